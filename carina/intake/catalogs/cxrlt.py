"""CXR-LT (Holste et al. 2022-2025): long-tailed labels for the pictures of MIMIC-CXR-JPG, 0 and 1, no uncertain ones.

The newest form that is found is read: cxr-lt-2024 (train_labeled.csv, development_labeled_task1.csv,
test_labeled_task1.csv: 40 labels), cxr-lt-2023 (train.csv, development.csv, test.csv: 26) or the lists of the MICCAI
2023 paper (miccai2023_mimic-cxr-lt_labels_{train,val,test}.csv). Pictures, patients and image_ids are those of the
catalog mimic.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from carina.data.labels import harmonize
from carina.errors import CarinaError
from carina.intake.catalogs.base import Catalog, Records
from carina.intake.catalogs.mimic import TERMS
from carina.intake.catalogs.places import by_path
from carina.intake.catalogs.tables import find_table, positive_words, read_csv, to_numbers, with_abnormal
from carina.intake.items import Labels

HOME = "https://physionet.org/content/cxr-lt-iccv-workshop-cvamd/"
FORMS = (
    ("train_labeled.csv", "development_labeled_task1.csv", "test_labeled_task1.csv"),
    ("train.csv", "development.csv", "test.csv"),
    tuple(f"miccai2023_mimic-cxr-lt_labels_{split}.csv" for split in ("train", "val", "test")),
)
FOLDERS = ("cxr-lt-2024", "cxr-lt-2023", "miccai-2023_mimic-cxr-lt", ".", "*/cxr-lt-2024", "*/cxr-lt-2023")
_OTHER = {
    "dicom_id",
    "subject_id",
    "study_id",
    "viewposition",
    "viewcodesequence_codemeaning",
    "path",
    "fpath",
    "split",
}


def read(folder: Path) -> Records:
    parts = []
    for split, path in zip(("train", "val", "test"), _tables(folder)):
        if path is not None:
            parts.append(read_csv(path).assign(split=split))
    table = pd.concat(parts, ignore_index=True)
    paths = table["fpath"] if "fpath" in table else table.get("path")
    place = None if paths is None else paths.str.extract(r"((p\d\d/p(\d+)/s(\d+))/[^/]+)$")
    if place is None or place[0].isna().any():
        raise CarinaError(f"{folder}: the tables of CXR-LT need fpath or path, as files/p10/p10000032/s5041/x.jpg")
    rows = pd.DataFrame({"relative": place[0], "patient": place[2], "study": place[3], "split": table["split"]})
    if "ViewPosition" in table:
        rows["view"] = table["ViewPosition"].fillna("").str.strip()
    names = [name for name in table.columns if name.lower() not in _OTHER and not name.startswith("Unnamed")]
    values = np.stack([to_numbers(table[name].fillna("")).to_numpy(np.float32) for name in names], axis=1)
    rows["original"] = positive_words(names, values)
    labels: Labels = with_abnormal([harmonize(name) for name in names], values, names)
    return Records(rows, labels, "its tables")


def _tables(folder: Path) -> list[Path | None]:
    for form in FORMS:
        for pattern in FOLDERS:
            for place in sorted(folder.glob(pattern)) if pattern != "." else [folder]:
                found = [find_table(place, name) for name in form]
                if found[0] is not None:
                    return found
    raise CarinaError(
        f"{folder} has none of {', '.join(form[0] for form in FORMS)}, the tables of cxrlt; put the folder cxr-lt-2024 "
        f"beside files/ of MIMIC-CXR-JPG ({HOME})"
    )


CATALOG = Catalog(
    name="cxrlt",
    title="CXR-LT, long-tailed labels for MIMIC-CXR-JPG",
    homepage=HOME,
    terms=TERMS,
    layout="cxr-lt-2024/ (or cxr-lt-2023/) beside files/p10 ... p19 of MIMIC-CXR-JPG",
    read=read,
    locate=by_path("files", "", "*/files", endings=("", ".dcm", ".png")),
    lineage=("mimic",),
    pictures_of="mimic",
    split="train, development (val) and test tables",
)
