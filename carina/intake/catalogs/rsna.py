"""RSNA Pneumonia Detection Challenge 2018 (Shih et al., Radiology AI 2019): 26,684 labeled pictures of NIH patients.

stage_2_train_labels.csv holds a row a box (x, y, width, height in pixels of the 1024 x 1024 DICOM picture) or one row
without; stage_2_detailed_class_info.csv the three classes. "No Lung Opacity / Not Normal" is a class of its own
(Other_Abnormality): readers saw something, but no opacity that suggests pneumonia. It is `abnormal` because they called
it not normal; ``label_Other_Abnormality != 1`` leaves it out.

patientId numbers pictures, not patients. pneumonia-challenge-dataset-mappings_2018.json, beside the tables, says which
NIH picture each is; then patients are NIH's.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd

from carina.data.labels import ABNORMAL
from carina.errors import CarinaError
from carina.files import read_json
from carina.intake.catalogs.base import Catalog, Records, Terms
from carina.intake.catalogs.places import by_name
from carina.intake.catalogs.tables import find_table, need_table, read_csv, to_numbers
from carina.intake.items import Box, Labels

HOME = (
    "https://www.rsna.org/education/ai-resources-and-training/ai-image-challenge/"
    "rsna-pneumonia-detection-challenge-2018"
)
SIDE = 1024
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
OPACITY, OTHER, NORMAL = "Lung Opacity", "No Lung Opacity / Not Normal", "Normal"
NAMES = ("Lung_Opacity", "Other_Abnormality", "No_Finding", ABNORMAL)


def read(folder: Path) -> Records:
    names = ("stage_2_train_labels.csv", "stage_1_train_labels.csv")
    path = need_table(folder, "rsna", HOME, *names)
    table = read_csv(path, ("patientId", "x", "y", "width", "height", "Target"))
    target = to_numbers(table["Target"]).groupby(table["patientId"], sort=False).max()
    images = target.index
    classes = find_table(folder, "stage_2_detailed_class_info.csv", "stage_1_detailed_class_info.csv")
    if classes is None:
        named = pd.Series(np.where(target == 1, OPACITY, ""), index=images)
    else:
        info = read_csv(classes, ("patientId", "class")).drop_duplicates("patientId").set_index("patientId")["class"]
        named = info.reindex(images).fillna("")
    rows = pd.DataFrame({"relative": images + ".dcm", "original": named.to_numpy()})
    mapping = find_table(folder, MAPPING)
    if mapping is not None:
        rows["patient"] = _nih_patients(mapping, images)
    known = (named != "").to_numpy()
    values = np.full((len(images), len(NAMES)), np.nan, dtype=np.float32)
    values[:, 0] = target
    values[known, 1] = (named == OTHER).to_numpy()[known]
    values[known, 2] = (named == NORMAL).to_numpy()[known]
    values[known, 3] = (named != NORMAL).to_numpy()[known]
    labels = Labels(NAMES, values, (OPACITY, OTHER, NORMAL, ABNORMAL))
    owner = "nih14" if mapping is not None else ""
    boxes = _boxes(table, images)
    return Records(rows, labels, path.name, boxes=boxes, box_frame=(SIDE, SIDE), patients_of=owner)


def _boxes(table: pd.DataFrame, images: pd.Index) -> dict[int, list[Box]]:
    row_of = {name: row for row, name in enumerate(images)}
    x, y, w, h = (to_numbers(table[name]) for name in ("x", "y", "width", "height"))
    drawn = w.notna()
    boxes = defaultdict(list)
    for image, *box in zip(*(column[drawn] for column in (table["patientId"], x, y, x + w, y + h))):
        boxes[row_of[image]].append((NAMES[0], *map(float, box), "radiologist"))
    return dict(boxes)


def _nih_patients(path: Path, images: pd.Index) -> list[str]:
    """NIH Patient IDs, "" where the mapping does not know the picture."""
    try:
        patient_of = {entry["subset_img_id"]: entry["img_id"].split("_")[0].lstrip("0") for entry in read_json(path)}
    except (TypeError, KeyError, AttributeError):
        raise CarinaError(f"{path} is not the mapping that RSNA published; remove it or download it again") from None
    return [patient_of.get(image, "") for image in images]


CATALOG = Catalog(
    name="rsna",
    title="RSNA Pneumonia Detection Challenge 2018",
    homepage=HOME,
    terms=Terms(
        license="RSNA terms of use with attribution",
        url=HOME,
        redistribution="ask",
        derived_weights="yes",
        credentialed=False,
        clause="Academic, commercial and other use is allowed with the attribution that the page asks for (NIH, RSNA).",
        citation="Shih G. et al., Augmenting the NIH chest radiograph dataset with expert annotations of possible "
        "pneumonia, Radiology: Artificial Intelligence 1(1), 2019",
    ),
    layout="stage_2_train_labels.csv and stage_2_detailed_class_info.csv beside stage_2_train_images/",
    read=read,
    locate=by_name(".dcm", ".png", ".jpg"),
    lineage=("nih14",),
    patients="picture",
    patients_table=MAPPING,
)
