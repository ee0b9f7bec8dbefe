"""NIH ChestX-ray14 (Wang et al., CVPR 2017): 112,120 frontal PNGs of 1024 x 1024, labels mined from reports.

Data_Entry_2017.csv (or _v2020) names every picture; train_val_list.txt and test_list.txt split them by patient;
BBox_List_2017.csv holds 984 boxes, x, y, width and height in pixels of the 1024 x 1024 picture.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pandas as pd

from carina.data.labels import harmonize
from carina.intake.catalogs.base import Catalog, Records, Terms
from carina.intake.catalogs.places import by_name
from carina.intake.catalogs.tables import (
    ages,
    deal_val,
    find_table,
    need_table,
    one_hot,
    read_csv,
    sexes,
    to_numbers,
    with_abnormal,
)
from carina.intake.items import Box

HOME = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
SIDE = 1024
FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia"),
    *("Infiltration", "Mass", "No Finding", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax"),
)


def read(folder: Path) -> Records:
    path = need_table(folder, "nih14", HOME, "Data_Entry_2017*.csv")
    columns = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "View Position")
    table = read_csv(path, columns)
    sex = "Patient Gender" if "Patient Gender" in table else "Patient Sex"
    names = table["Image Index"]
    rows = pd.DataFrame(
        {
            "relative": names,
            # The number in the name has leading zeros, the column has none.
            "patient": table["Patient ID"].str.strip().str.lstrip("0"),
            "view": table["View Position"].str.strip(),
            "sex": sexes(table[sex]) if sex in table else "",
            "age": ages(table["Patient Age"]),
            "original": table["Finding Labels"],
        }
    )
    split = _split(folder, names)
    if split is not None:
        rows = deal_val(rows.assign(split=split))
    codes, texts = pd.factorize(table["Finding Labels"])
    values = one_hot((text.split("|") for text in texts), FINDINGS)
    labels = with_abnormal([harmonize(name) for name in FINDINGS], values, FINDINGS).take(codes)
    return Records(rows, labels, path.name, boxes=_boxes(folder, names), box_frame=(SIDE, SIDE))


def _split(folder: Path, names: pd.Series) -> pd.Series | None:
    lists = {
        split: find_table(folder, f"{name}.txt") for split, name in (("train", "train_val_list"), ("test", "test_list"))
    }
    if None in lists.values():
        return None
    split = pd.Series("", index=names.index, dtype=object)
    for value, path in lists.items():
        split[names.isin(path.read_text(encoding="utf-8").split())] = value
    return split


def _boxes(folder: Path, names: pd.Series) -> dict[int, list[Box]]:
    path = find_table(folder, "BBox_List_2017.csv")
    if path is None:
        return {}
    table = read_csv(path, ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]"))
    row_of = {name: row for row, name in enumerate(names)}
    x, y, w, h = (to_numbers(table[name]) for name in ("Bbox [x", "y", "w", "h]"))
    boxes = defaultdict(list)
    for name, finding, *box in zip(table["Image Index"], table["Finding Label"], x, y, x + w, y + h):
        if name in row_of:
            boxes[row_of[name]].append((harmonize(finding), *map(float, box), "radiologist"))
    return dict(boxes)


CATALOG = Catalog(
    name="nih14",
    title="NIH ChestX-ray14",
    homepage=HOME,
    terms=Terms(
        license="no restriction on use",
        url=HOME,
        redistribution="yes",
        derived_weights="yes",
        credentialed=False,
        clause="Use is unrestricted; link to the download site, acknowledge the NIH Clinical Center, cite the paper.",
        citation="Wang X. et al., ChestX-ray8: hospital-scale chest X-ray database and benchmarks, CVPR 2017",
    ),
    layout="Data_Entry_2017.csv (or _v2020) and the pictures in images/, images_001/images/ ... or anywhere below",
    read=read,
    locate=by_name(".png", ".jpg", ".jpeg", ".dcm"),
    split="train_val_list.txt and test_list.txt; a tenth of the patients of the first are val",
)
