"""Which files of a folder may be pictures."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from carina.errors import CarinaError

_NOT_IMAGES = re.compile(
    r"\.(csv|tsv|jsonl?|ndjson|txt|xml|md|rst|html?|css|pdf|docx?|xlsx?|log|ini|cfg|toml|ya?ml|py|ipynb|sh|"
    r"zip|gz|bz2|xz|zst|tar|7z|rar|parquet|arrow|feather|db|sqlite|sql|pkl|npz|h5|hdf5|pth?|safetensors|"
    r"md5|sha256|tmp|part)",
    re.IGNORECASE,
)
_NOT_IMAGE_NAMES = {"DICOMDIR", "THUMBS.DB", "DESKTOP.INI", "LICENSE", "LICENCE", "README", "CHANGELOG", "MAKEFILE"}


def list_files(source: str | Path) -> list[Path]:
    """The candidate files of a folder (recursive), a glob, or one file, sorted by path.

    Hidden files and folders, DICOMDIR and what is plainly no picture by its suffix (.csv, .json, .zip ...) are left
    out; whether the rest can be read shows when it is. Links are followed; a file that can be reached by several ways
    is listed once, by the shortest. Raises CarinaError when there is nothing.
    """
    path = Path(source)
    if path.is_dir():
        found = [file for file in _walk(path) if _candidate(file.name)]
    elif path.is_file():
        return [path]
    elif glob.has_magic(str(source)):
        found = [Path(name) for name in glob.glob(str(source), recursive=True)]
        found = [file for file in found if _candidate(file.name) and file.is_file()]
    else:
        raise CarinaError(f"{source} is not there; give a folder, a file, or a glob in quotes")
    if not found:
        raise CarinaError(f"{source} holds no file that could be a picture; check the path")
    once: dict[str, Path] = {}
    for file in sorted(found, key=lambda file: (len(file.parts), file.as_posix())):
        once.setdefault(os.path.realpath(file), file)
    return sorted(once.values(), key=lambda file: file.as_posix())


def _candidate(name: str) -> bool:
    suffix = os.path.splitext(name)[1]
    return not (name.startswith(".") or name.upper() in _NOT_IMAGE_NAMES or _NOT_IMAGES.fullmatch(suffix))


def _walk(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if "store.json" in names or "plan.json" in names:  # a store that lies in its source is no part of it
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent) / name for name in names if (Path(parent) / name).is_file())
