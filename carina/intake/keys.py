"""The key that hashes identifiers, and what lies beside it: the table from image_id to path."""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from carina.errors import CarinaError
from carina.files import atomic_path, disk_errors


def settings_folder() -> Path:
    """The user's configuration folder of carina (XDG_CONFIG_HOME or ~/.config)."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "carina"


@dataclass(frozen=True)
class Key:
    """A secret that stays with the owner. `folder` holds the private tables made under it."""

    secret: bytes
    folder: Path

    def hash(self, kind: str, *parts: str, size: int = 12) -> str:
        """Keyed BLAKE2b of an identifier, hexadecimal; `kind` keeps patients, studies and images apart."""
        digest = hashlib.blake2b(key=hashlib.sha256(self.secret).digest(), digest_size=size)
        digest.update("\x1f".join((kind, *parts)).encode())
        return digest.hexdigest()

    @property
    def check(self) -> str:
        """Tells whether two stores were made under one key, and nothing else."""
        return self.hash("carina key check", size=6)


def load_key(path: str | None) -> tuple[Key, str | None]:
    """The key from the file `path`, from CARINA_KEY, or from the configuration folder, where it is made once.

    Returns the key and, when one was made, a note for the user.
    """
    if path:
        file = Path(path)
        if not file.is_file():
            raise CarinaError(f"there is no key file at {path}; write one secret line into it, or leave key= out")
        secret = file.read_bytes().strip()
        if len(secret) < 16:
            raise CarinaError(f"the key in {path} is shorter than 16 characters; use a longer secret")
        return Key(secret, file.resolve().parent), None
    secret_text = os.environ.get("CARINA_KEY")
    if secret_text is not None:
        if len(secret_text) < 16:
            raise CarinaError("CARINA_KEY is shorter than 16 characters; use a longer secret")
        return Key(secret_text.encode(), settings_folder()), None
    file = settings_folder() / "key"
    if file.is_file():
        return Key(file.read_bytes().strip(), file.parent), None
    secret = secrets.token_hex(32).encode()
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(secret + b"\n")
    note = (
        f"A key that hashes patient identifiers was made at {file}. Back it up: without it, later stores cannot be "
        "joined with this one, and image_ids cannot be traced to files."
    )
    return Key(secret, file.parent), note
