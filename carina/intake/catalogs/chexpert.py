"""CheXpert (Irvin et al., AAAI 2019): 224,316 pictures of 65,240 patients; labels by study, -1 where uncertain.

train.csv and valid.csv (and test.csv of CheXlocalize) name every picture by its path. The labeler leaves blank what a
report does not mention; where it says No Finding it has looked at all, so there a blank is a 0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from carina.data.labels import NO_FINDING, SUPPORT_DEVICES, harmonize
from carina.errors import CarinaError
from carina.intake.catalogs.base import Catalog, Records, Terms
from carina.intake.catalogs.places import by_path
from carina.intake.catalogs.tables import (
    ages,
    find_table,
    need_table,
    original_text,
    read_csv,
    sexes,
    with_abnormal,
)
from carina.intake.items import Labels

HOME = "https://stanfordmlgroup.github.io/competitions/chexpert/"
FINDINGS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other"),
    *("Fracture", "Support Devices"),
)
NUMBERS = {name: np.float32 for name in FINDINGS}
FILES = {"train": ("train.csv",), "val": ("valid.csv",), "test": ("test.csv", "test_labels.csv")}


def mined_labels(table: pd.DataFrame) -> Labels:
    """The 14 labels of the CheXpert labeler, the zeros that No Finding implies, and `abnormal`."""
    names = [harmonize(name) for name in FINDINGS]
    values = table[list(FINDINGS)].to_numpy(np.float32)
    nothing = values[:, names.index(NO_FINDING)] == 1
    for i, name in enumerate(names):
        if name not in (NO_FINDING, SUPPORT_DEVICES):  # a device is compatible with No Finding
            values[nothing & np.isnan(values[:, i]), i] = 0
    return with_abnormal(names, values, FINDINGS)


def read(folder: Path) -> Records:
    need_table(folder, "chexpert", HOME, *FILES["train"], *FILES["val"], *FILES["test"])
    parts = []
    for split, files in FILES.items():
        path = find_table(folder, *files)
        if path is not None:
            part = read_csv(
                path, ("Path", *FINDINGS), dtype={"Path": str, "Age": str, "Sex": str, **NUMBERS}, na_values=[""]
            )
            parts.append(part.assign(split=split))
    table = pd.concat(parts, ignore_index=True)
    # CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg: the first folder depends on the download.
    place = table["Path"].str.extract(r"((?:train|valid|test)/(patient\d+)/(study\d+)/[^/]+)$")
    if place[0].isna().any():
        wrong = table["Path"][place[0].isna()].iloc[0]
        raise CarinaError(f"{folder}: '{wrong}' in column Path is not like train/patient00001/study1/view1_frontal.jpg")
    side, frontal = _text(table, "AP/PA").str.strip(), _text(table, "Frontal/Lateral")
    lateral, told = frontal == "Lateral", frontal != ""
    rows = pd.DataFrame(
        {
            "relative": place[0],
            "patient": place[1],
            "study": place[2],
            # A few frontal rows say LL or RL: neither is to be trusted there.
            "view": side.where(side.isin(("AP", "PA")), "FRONTAL").where(~lateral, "LATERAL").where(told, side),
            "sex": sexes(_text(table, "Sex").replace("Unknown", "")),
            "age": ages(_text(table, "Age")).replace(0, np.nan),  # all are adults
            "split": table["split"],
            "original": original_text(table[list(FINDINGS)]),
        }
    )
    return Records(rows, mined_labels(table), "its tables")


def _text(table: pd.DataFrame, name: str) -> pd.Series:
    if name not in table:
        return pd.Series("", index=table.index, dtype=object)
    return table[name].astype(object).where(table[name].notna(), "").astype(str)


CATALOG = Catalog(
    name="chexpert",
    title="CheXpert",
    homepage=HOME,
    terms=Terms(
        license="Stanford University Dataset Research Use Agreement",
        url=HOME,
        redistribution="no",
        derived_weights="ask",
        credentialed=False,
        clause="Non-commercial research only, after registration; the pictures may not be passed on.",
        citation="Irvin J. et al., CheXpert: a large chest radiograph dataset with uncertainty labels, AAAI 2019",
    ),
    layout="train.csv and valid.csv beside train/ and valid/ (CheXpert-v1.0 or CheXpert-v1.0-small)",
    read=read,
    locate=by_path("", "CheXpert-v1.0*"),
    split="train.csv, valid.csv (val) and, where present, test.csv",
)
