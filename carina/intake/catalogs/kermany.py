"""Kermany et al. (Cell 2018), pediatric chest X-rays: JPEG, AP, children of one to five years, NORMAL or PNEUMONIA.

There is no table: the folders say split and class, the names the patient and the kind of pneumonia
(person12_bacteria_46.jpeg, IM-0115-0001.jpeg, NORMAL2-IM-0383-0001.jpeg; in later versions BACTERIA-2001-0001.jpeg).
train and test number their patients separately, so person1 of one is not person1 of the other. IM-0383 and
NORMAL2-IM-0383 count as one patient: whether they are is not published, and one too few does not leak. The val folder
of some copies holds 16 pictures of train; they go back there, and a tenth of the training patients are val.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from carina.data.labels import ABNORMAL
from carina.errors import CarinaError
from carina.intake.catalogs.base import Catalog, Records, Terms
from carina.intake.catalogs.tables import deal_val
from carina.intake.items import Labels

HOME = "https://data.mendeley.com/datasets/rscbjbr9sj"
NAMES = ("Pneumonia", "Bacterial_Pneumonia", "Viral_Pneumonia", ABNORMAL)
_PLACE = re.compile(r"(?:^|/)(train|val|test)/(NORMAL|PNEUMONIA)/([^/]+\.(?:jpe?g|png))$", re.IGNORECASE)
_PATIENT = re.compile(r"(person\d+|IM-\d+|(?:NORMAL|BACTERIA|VIRUS)-\d+)[_-]", re.IGNORECASE)


def read(folder: Path) -> Records:
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(folder.rglob("*")):
        match = _PLACE.search(path.relative_to(folder).as_posix())
        if match and "__MACOSX" not in path.parts and not path.name.startswith("."):
            relative = f"{match[1].lower()}/{match[2].upper()}/{match[3]}"
            # Some copies hold the whole tree twice, one inside the other.
            found.setdefault(relative, (match[1].lower(), match[2].upper(), match[3]))
    if not found:
        raise CarinaError(
            f"{folder} holds no train/NORMAL, train/PNEUMONIA, test/NORMAL or test/PNEUMONIA with pictures; give the "
            f"folder in which the archive of Kermany was unpacked ({HOME})"
        )
    table = pd.DataFrame(found.values(), columns=["split", "class", "name"])
    table["split"] = table["split"].replace("val", "train")
    number = table["name"].str.extract(_PATIENT.pattern, flags=re.IGNORECASE)[0].fillna("").str.lower()
    kind = table["name"].str.lower().str.extract(r"(bacteria|virus)")[0].fillna("")
    rows = pd.DataFrame(
        {
            "relative": list(found),
            "patient": (table["split"] + "/" + number).where(number != "", ""),
            "view": "AP",
            "split": table["split"],
            "original": (table["class"] + " " + kind).str.strip(),
        }
    )
    sick = (table["class"] == "PNEUMONIA").to_numpy()
    known = (kind != "").to_numpy() | ~sick
    values = np.full((len(rows), len(NAMES)), np.nan, dtype=np.float32)
    values[:, 0] = values[:, 3] = sick
    values[known, 1] = (kind == "bacteria").to_numpy()[known]
    values[known, 2] = (kind == "virus").to_numpy()[known]
    labels = Labels(NAMES, values, ("PNEUMONIA", "bacteria", "virus", ABNORMAL))
    return Records(deal_val(rows), labels, "its folder")


def locate(folder: Path, names: list[str]) -> list[str]:
    places = {}
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder).as_posix()
        match = _PLACE.search(below)
        if match and "__MACOSX" not in path.parts:
            places.setdefault(f"{match[1].lower()}/{match[2].upper()}/{match[3]}", below)
    return [places[name] for name in names]


CATALOG = Catalog(
    name="kermany",
    title="Kermany pediatric chest X-rays",
    homepage=HOME,
    terms=Terms(
        license="CC BY 4.0",
        url="https://creativecommons.org/licenses/by/4.0/",
        redistribution="yes",
        derived_weights="yes",
        credentialed=False,
        clause="Free use with attribution and a note of changes.",
        citation="Kermany D., Zhang K., Goldbaum M., Labeled optical coherence tomography (OCT) and chest X-ray images "
        "for classification, Mendeley Data v2, 2018, doi 10.17632/rscbjbr9sj.2",
    ),
    layout="train/ and test/ (and perhaps val/) with NORMAL/ and PNEUMONIA/ in each",
    read=read,
    locate=locate,
    split="train and test folders; a tenth of the patients of train are val",
)
