"""MIMIC-CXR-JPG (Johnson et al. 2019): 377,110 pictures of 65,379 patients; labels by study, -1 where uncertain.

mimic-cxr-2.0.0-metadata.csv.gz names every picture, -split.csv.gz splits them by patient, -chexpert.csv.gz holds the
labels of the CheXpert labeler. Dates are shifted by patient into another century: no year is kept. With patients.csv.gz
of MIMIC-IV in the folder, sex and age at the study are known.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from carina.intake.catalogs.base import Catalog, Records, Terms
from carina.intake.catalogs.chexpert import FINDINGS, NUMBERS, mined_labels
from carina.intake.catalogs.places import by_path
from carina.intake.catalogs.tables import find_table, need_table, original_text, read_csv, sexes, to_numbers

HOME = "https://physionet.org/content/mimic-cxr-jpg/"
KEYS = ("subject_id", "study_id")
SPLITS = {"train": "train", "validate": "val", "test": "test"}

TERMS = Terms(
    license="PhysioNet Credentialed Health Data License 1.5.0",
    url="https://physionet.org/content/mimic-cxr-jpg/view-license/2.1.0/",
    redistribution="no",
    derived_weights="ask",
    credentialed=True,
    clause="Credentialed users after training and a signed agreement; the data may not be shared, and models that may "
    "disclose them only under the same conditions: ask before publishing weights.",
    citation="Johnson A. et al., MIMIC-CXR-JPG, a large publicly available database of labeled chest radiographs, 2019",
)


def place(table: pd.DataFrame) -> pd.Series:
    """p10/p10000032/s50414267/<dicom_id>.jpg of rows with subject_id, study_id, dicom_id."""
    subject = table["subject_id"]
    return "p" + subject.str[:2] + "/p" + subject + "/s" + table["study_id"] + "/" + table["dicom_id"] + ".jpg"


def read(folder: Path) -> Records:
    path = need_table(folder, "mimic", HOME, "mimic-cxr-2*-metadata.csv")
    table = read_csv(path, ("dicom_id", *KEYS, "ViewPosition"))
    rows = pd.DataFrame(
        {
            "relative": place(table),
            "patient": table["subject_id"],
            "study": table["study_id"],
            "view": table["ViewPosition"].str.strip(),
        }
    )
    splits = find_table(folder, "mimic-cxr-2*-split.csv")
    if splits is not None:
        official = read_csv(splits, ("dicom_id", "split")).set_index("dicom_id")["split"].map(SPLITS)
        rows["split"] = table["dicom_id"].map(official).fillna("")
    patients = find_table(folder, "patients.csv")
    if patients is not None:
        _add_patients(rows, table, read_csv(patients, ("subject_id", "gender", "anchor_age", "anchor_year")))
    found = need_table(folder, "mimic", HOME, "mimic-cxr-2*-chexpert.csv", "mimic-cxr-2*-negbio.csv")
    texts = dict.fromkeys(KEYS, str)
    mined = read_csv(found, (*KEYS, *FINDINGS), dtype={**texts, **NUMBERS}, na_values=[""])
    mined = mined.drop_duplicates(list(KEYS)).set_index(list(KEYS))
    mined["original"] = original_text(mined[list(FINDINGS)])
    joined = mined.reindex(pd.MultiIndex.from_frame(table[list(KEYS)])).reset_index(drop=True)
    rows["original"] = joined["original"].fillna("")
    return Records(rows, mined_labels(joined), path.name)


def _add_patients(rows: pd.DataFrame, table: pd.DataFrame, patients: pd.DataFrame) -> None:
    known = patients.drop_duplicates("subject_id").set_index("subject_id")
    rows["sex"] = sexes(table["subject_id"].map(known["gender"]).fillna(""))
    if "StudyDate" not in table:
        return
    # Both years are shifted by the same amount for a patient, so their difference is true.
    anchor = table["subject_id"].map(to_numbers(known["anchor_year"]))
    age = table["subject_id"].map(to_numbers(known["anchor_age"])) + to_numbers(table["StudyDate"].str[:4]) - anchor
    rows["age"] = age


CATALOG = Catalog(
    name="mimic",
    title="MIMIC-CXR-JPG",
    homepage=HOME,
    terms=TERMS,
    layout="mimic-cxr-2.0.0-metadata.csv.gz, -split.csv.gz and -chexpert.csv.gz beside files/p10 ... p19",
    read=read,
    locate=by_path("files", "", endings=("", ".dcm", ".png")),
    split="mimic-cxr-2.0.0-split.csv.gz (validate is val)",
)
