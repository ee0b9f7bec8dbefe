"""MedIAnomaly's chest radiographs (Cai et al., Medical Image Analysis 2025), with the splits of DDAD: RSNA and VinDr-CXR.

data.json names the pictures: {"train": {"0": [...], "unlabeled": {"0": [...], "1": [...]}}, "test": {"0": [...], "1":
[...]}}, 0 normal and 1 abnormal (in RSNA an opacity). The unlabeled mixture, which some copies leave out, becomes val: a
pool apart from test. Pictures were dealt, not patients.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from carina.data.labels import ABNORMAL, NO_FINDING
from carina.errors import CarinaError
from carina.files import read_json
from carina.intake.catalogs import rsna, vindr
from carina.intake.catalogs.base import Catalog, Records
from carina.intake.catalogs.places import by_name
from carina.intake.items import Labels

HOME = "https://github.com/caiyu6666/MedIAnomaly"
LIST = "data.json"
CLASSES = {"0": 0.0, "1": 1.0}


def reader(catalog: str) -> Callable[[Path], Records]:
    def read(folder: Path) -> Records:
        path = folder / LIST
        if not path.is_file():
            raise CarinaError(f"{folder} has no {LIST}, the list of {catalog}; put it there (it comes with {HOME})")
        told = read_json(path)
        try:
            parts = {"train": told["train"], "val": told["train"].get("unlabeled", {}), "test": told["test"]}
            rows = [
                (str(name), split, CLASSES[kind])
                for split, lists in parts.items()
                for kind in lists.keys() & CLASSES.keys()
                for name in lists[kind]
            ]
        except (AttributeError, KeyError, TypeError):
            raise CarinaError(
                f"{path} is not a list of train and test by class; download it again from {HOME}"
            ) from None
        table = pd.DataFrame(sorted(rows), columns=["relative", "split", "abnormal"])
        sick = table.pop("abnormal").to_numpy(np.float32)
        table["original"] = np.where(sick == 1, "abnormal", "normal")
        return Records(table, Labels((NO_FINDING, ABNORMAL), np.stack([1 - sick, sick], axis=1)), LIST)

    return read


def _catalog(name: str, title: str, parent: Catalog) -> Catalog:
    return Catalog(
        name=name,
        title=title,
        homepage=HOME,
        terms=parent.terms,
        layout="data.json beside images/",
        read=reader(name),
        locate=by_name(".png", ".jpg", ".dcm", ".dicom"),
        lineage=(parent.name, *parent.lineage),
        split="train and test of data.json; its unlabeled mixture is val",
        patients="picture",
    )


RSNA = _catalog("medianomaly_rsna", "MedIAnomaly, chest X-rays of RSNA", rsna.CATALOG)
VINDR = _catalog("medianomaly_vindr", "MedIAnomaly, VinDr-CXR", vindr.CATALOG)
