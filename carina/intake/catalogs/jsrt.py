"""JSRT (Shiraishi et al., AJR 2000): 247 PA films of 2048 x 2048, 154 with a lung nodule; masks of SCR (van Ginneken
et al., Medical Image Analysis 2006).

CLNDAT_EN.txt (nodules) and CNNDAT_EN.txt (none) are tables separated by tabs, without a header: file, subtlety, size in
millimeters, age, sex, x, y, malignant or benign, place, diagnosis; and file, age, sex, "non-nodule". A nodule's box is
the square of its size (0.175 mm a pixel) around x, y. Pictures are JPCLN001.IMG, which `carina.imaging.pictures` knows;
copies as PNG, TIFF or DICOM are read as they are. SCR: masks/left lung/JPCLN001.gif and masks/right lung/ below fold1
and fold2.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from carina.data.labels import ABNORMAL
from carina.intake.catalogs.base import Catalog, Records, Terms
from carina.intake.catalogs.places import by_name
from carina.intake.catalogs.tables import ages, find_table, need_table, read_csv, sexes, to_numbers
from carina.intake.items import Labels

HOME = "http://db.jsrt.or.jp/eng.php"
SIDE, SPACING = 2048, 0.175
NODULES = ("file", "subtlety", "size", "age", "sex", "x", "y", "malignant", "place", "diagnosis")
OTHERS = ("file", "age", "sex", "class")
NAMES = ("Nodule", "Malignant_Nodule", ABNORMAL)


def read(folder: Path) -> Records:
    places = [folder, folder / "Clinical_Information", folder / "ClinicalInformation"]
    options = {"sep": "\t", "header": None, "index_col": False}
    tables = []
    for file, columns in (("CLNDAT_EN.txt", NODULES), ("CNNDAT_EN.txt", OTHERS)):
        names = (file, file[:-4] + ".TXT")
        path = next(filter(None, (find_table(place, *names) for place in places)), None)
        path = path or need_table(folder, "jsrt", HOME, *names)
        tables.append(read_csv(path, names=list(columns), **options).apply(lambda column: column.str.strip()))
    table = pd.concat(tables, ignore_index=True).fillna("")
    stems = table["file"].str.rsplit(".", n=1).str[0]
    sick = np.arange(len(table)) < len(tables[0])
    malignant = table["malignant"].str.lower().str.startswith("malignant").to_numpy()
    rows = pd.DataFrame(
        {
            "relative": stems + ".IMG",
            "patient": stems,
            "view": "PA",
            "sex": sexes(table["sex"]),
            "age": ages(table["age"]),
            "original": (table["malignant"] + " " + table["diagnosis"]).where(sick, "non-nodule").str.strip(),
        }
    )
    # "Non-nodule" was not called normal.
    values = np.stack([sick, sick & malignant, np.where(sick, 1.0, np.nan)], axis=1).astype(np.float32)
    records = Records(rows, Labels(NAMES, values), "CLNDAT_EN.txt", box_frame=(SIDE, SIDE))
    x, y, size = (to_numbers(table[name]) for name in ("x", "y", "size"))
    half = size / SPACING / 2
    for row, *box in zip(table.index, x - half, y - half, x + half, y + half):
        if sick[row] and not np.isnan(box).any():
            records.boxes[row] = [("Nodule", *map(float, box), "size")]
    sides = [{path.stem: path for path in folder.rglob(f"{side} lung/*.gif")} for side in ("left", "right")]
    for row, stem in enumerate(stems):
        if all(stem in side for side in sides):
            records.masks[row] = [str(side[stem]) for side in sides]
    return records


CATALOG = Catalog(
    name="jsrt",
    title="JSRT digital image database, with the masks of SCR",
    homepage=HOME,
    terms=Terms(
        license="terms of JSRT; SCR masks on their own terms",
        url=HOME,
        redistribution="ask",
        derived_weights="ask",
        credentialed=False,
        clause="Free for research after registration, with the paper cited.",
        citation="Shiraishi J. et al., Development of a digital image database for chest radiographs with and without "
        "a lung nodule, American Journal of Roentgenology 174, 2000",
    ),
    layout="CLNDAT_EN.txt, CNNDAT_EN.txt and JPCLN*.IMG, JPCNN*.IMG (or copies); SCR's fold1/ and fold2/ for masks",
    read=read,
    locate=by_name(".IMG", ".png", ".tif", ".tiff", ".dcm", ".jpg", skip=("left lung", "right lung", "heart")),
)
