"""Archives without a table, whose folders say split and class: SPLIT/CLASS/picture, or SPLIT/CLASS/img/picture."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from carina.data.labels import ABNORMAL, NO_FINDING
from carina.errors import CarinaError
from carina.intake.catalogs.base import Records
from carina.intake.items import Labels

SPLITS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
_PICTURE = re.compile(r".+\.(?:png|jpe?g|dcm)", re.IGNORECASE)


def by_folder(
    split: str, normal: str, abnormal: str, homepage: str
) -> tuple[Callable[[Path], Records], Callable[[Path, list[str]], list[str]]]:
    """`read` and `locate` of a catalog. split: a pattern of folder names whose first group is train, val, valid or test.
    normal, abnormal: patterns of the folders of each class. Case does not count."""
    folders = re.compile(rf"(?:.*/)?{split}/(?:({normal})|({abnormal}))/(?:img/)?([^/]+)", re.IGNORECASE)

    def found(folder: Path) -> dict[str, tuple[str, str, bool]]:
        """By name in the archive, whatever stands before its splits: place below the folder, split, abnormal."""
        result = {}
        for path in sorted(folder.rglob("*")):
            below = path.relative_to(folder).as_posix()
            match = (
                folders.fullmatch(below) if _PICTURE.fullmatch(path.name) and not path.name.startswith(".") else None
            )
            if match:
                to, sick = SPLITS[match[1].lower()], match[3] is not None
                result[f"{to}/{'abnormal' if sick else 'normal'}/{match[4]}"] = (below, to, sick)
        return result

    def read(folder: Path) -> Records:
        pictures = found(folder)
        if not pictures:
            raise CarinaError(
                f"{folder} holds no pictures in folders of the form {_shown(split)}/{_shown(normal)} and "
                f"{_shown(split)}/{_shown(abnormal)}; give the folder in which the archive was unpacked ({homepage})"
            )
        sick = np.array([entry[2] for entry in pictures.values()])
        table = pd.DataFrame(
            {
                "relative": list(pictures),
                "split": [entry[1] for entry in pictures.values()],
                "original": np.where(sick, "abnormal", "normal"),
            }
        )
        labels = Labels((NO_FINDING, ABNORMAL), np.stack([~sick, sick], axis=1).astype(np.float32))
        return Records(table, labels, "its folder")

    def locate(folder: Path, names: list[str]) -> list[str]:
        places = {name: entry[0] for name, entry in found(folder).items()}
        return [places[name] for name in names]

    return read, locate


def _shown(pattern: str) -> str:
    """A pattern as a user would write one of its folders."""
    return re.sub(r"\(\?:[^()]*\)\?|[()?]", "", pattern).split("|")[0]
