"""Shenzhen Hospital (Jaeger et al. 2014): 662 PA pictures, 336 with tuberculosis, 566 with lung masks.

The masks are of Stirenko et al. (2018).

CXR_png/CHNCXR_0001_0.png (the last digit is 1 for tuberculosis), ClinicalReadings/CHNCXR_0001_0.txt, and masks, which
were published apart, as CHNCXR_0001_0_mask.png in a folder mask/ or masks/.
"""

from __future__ import annotations

from pathlib import Path

from carina.intake.catalogs.base import Catalog, Records
from carina.intake.catalogs.montgomery import HOME, TERMS
from carina.intake.catalogs.places import by_name
from carina.intake.catalogs.readings import read_set


def read(folder: Path) -> Records:
    records = read_set(folder, "CHNCXR", "the Shenzhen set", HOME)
    masks = {path.stem.removesuffix("_mask"): path for path in folder.rglob("CHNCXR_*_mask.png")}
    for row, name in enumerate(records.table["relative"]):
        stem = name.rsplit(".", 1)[0]
        if stem in masks:
            records.masks[row] = str(masks[stem])
    return records


CATALOG = Catalog(
    name="shenzhen",
    title="Shenzhen Hospital chest X-ray set",
    homepage=HOME,
    terms=TERMS,
    layout="CXR_png/ and ClinicalReadings/ (ChinaSet_AllFiles), masks as *_mask.png anywhere below",
    read=read,
    locate=by_name(".png", ".jpg", skip=("mask", "masks")),
)
