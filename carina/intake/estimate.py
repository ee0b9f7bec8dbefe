"""What a store will take, before the work starts: disk from its scales and encodings, time from a few files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from carina.errors import CarinaError
from carina.intake.images import Settings, prepare_isolated
from carina.intake.items import Item
from carina.intake.shards import mask_names
from carina.progress import clock

TRIED = 8  # files that are read to learn how long one takes
WORTH_IT = 400  # fewer files than this are done before a user has read the estimate
_ROW = 1024  # bytes of the tables that a row takes, at most


def estimate(items: Sequence[Item], settings: Settings, lesions: Sequence[str], workers: int) -> dict[str, Any]:
    """Bytes and seconds of the whole store, from up to eight files drawn evenly over it.

    Keys: files, tried, usable (of those tried), bytes, seconds (None when no file could be used), workers.
    """
    chosen = [items[i * len(items) // TRIED] for i in range(TRIED)] if len(items) > TRIED else list(items)
    results = prepare_isolated([chosen[0], *chosen], settings)
    next(results)  # starts the process and warms the caches; not timed
    began = time.perf_counter()
    used = [result for result in results if not result.reason]
    seconds = (time.perf_counter() - began) / len(chosen)
    names = mask_names(lesions)
    row = _ROW + sum(scale * scale * len(names) // 8 for scale in settings.encodings)
    for scale, encoding in settings.encodings.items():
        raw = scale * scale * encoding.bits // 8
        measured = encoding.format != "raw" and used
        row += sum(len(result.images[scale]) for result in used) // len(used) if measured else raw
    return {
        "files": len(items),
        "tried": len(chosen),
        "usable": len(used),
        "bytes": row * len(items),
        "seconds": seconds * len(items) / workers if used else None,
        "workers": workers,
    }


def sentence(estimated: dict[str, Any], free: int) -> str:
    """What a user wants to know before waiting."""
    took = "unknown time" if estimated["seconds"] is None else f"about {clock(estimated['seconds'])}"
    return (
        f"{estimated['files']} files: about {size(estimated['bytes'])} (free: {size(free)}) and {took} with "
        f"{estimated['workers']} worker(s), from {estimated['usable']} of {estimated['tried']} files tried."
    )


def size(count: float) -> str:
    """Bytes in words: 12 MB, 3.4 GB (powers of ten, as disks are sold)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def free_bytes(out: Path) -> int:
    """Free space of the disk on which `out` will lie."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_disk(out: Path, needed: int) -> int:
    """The free bytes; a CarinaError when the store would not fit."""
    free = free_bytes(out)
    if needed > free:
        raise CarinaError(
            f"the store would take about {size(needed)}, and the disk of {out} has {size(free)} left: free some space, "
            "choose another out=, fewer or smaller scales, or encoding=jpeg"
        )
    return free
