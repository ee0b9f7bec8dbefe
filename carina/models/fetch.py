"""What is named by its place on the hub, as a local folder. Nothing is fetched unless a reference says `hub:`."""

from __future__ import annotations

import functools
from pathlib import Path

from carina.errors import CarinaError

HUB = "hub:"
WANTED = ("*.json", "*.safetensors", "*.md", "*.yaml", "SHA256SUMS")  # nothing pickled, no graphs, no pictures


def is_carina(folder: Path) -> bool:
    """Whether a folder holds a backbone or predictor that carina can read without anything pickled."""
    return (folder / "predictor.json").is_file() or all(
        (folder / name).is_file() for name in ("config.json", "model.safetensors")
    )


@functools.lru_cache(maxsize=64)
def fetched(reference: str) -> str:
    """The folder of ``hub:ORG/NAME`` or ``hub:ORG/NAME@REVISION``, downloaded into huggingface_hub's cache unless it is
    there; every other reference as it is. A folder that carina published is checked against its checksums."""
    if not reference.startswith(HUB):
        return reference
    name, _, revision = reference.removeprefix(HUB).partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise CarinaError(f"{reference} is not of the form hub:ORG/NAME, or hub:ORG/NAME@REVISION")
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(WANTED))
    except Exception as error:  # the hub client and its transport raise many kinds; none is carina's
        raise CarinaError(
            f"{reference} could not be fetched ({type(error).__name__}); check the name, your access and the network, or "
            "give a file or folder"
        ) from None
    if (Path(folder) / "SHA256SUMS").is_file():
        from carina.models.hub.folder import verify

        verify(Path(folder), whole=False)
    return str(folder)
