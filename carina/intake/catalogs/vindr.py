"""VinDr-CXR (Nguyen et al., Scientific Data 2022): DICOM, 15,000 pictures read by three radiologists each, 3,000 by
five together.

Two forms are published. PhysioNet: annotations/image_labels_{train,test}.csv (28 labels, in train a row a reader) and
annotations_{train,test}.csv (boxes). Kaggle: one train.csv (a row a box or "No finding", by reader), no labels for its
test pictures. Of three readers, two or three make a label 1, none makes it 0, one alone makes it -1: uncertain, so the
policy "ones" asks for any reader and "zeros" for the majority. Boxes are pixels of the DICOM picture; their origin is
the reader's number (R1 ... R17), or "consensus" in the test set. Resized copies on Kaggle come with train_meta.csv: rows
(dim0) and columns (dim1) of every DICOM picture. Without it, boxes of PNG and JPEG copies cannot be placed and are left
out.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd

from carina.data.labels import ABNORMAL, NO_FINDING, harmonize
from carina.errors import CarinaError
from carina.intake.catalogs.base import Catalog, Records, Terms
from carina.intake.catalogs.places import by_name
from carina.intake.catalogs.tables import add_label, deal_val, find_table, need_table, read_csv, to_numbers
from carina.intake.items import Box, Labels

HOME = "https://physionet.org/content/vindr-cxr/"
CORNERS = ("x_min", "y_min", "x_max", "y_max")
CONSENSUS = "consensus"


def read(folder: Path) -> Records:
    for place in (folder, folder / "annotations"):
        if find_table(place, "image_labels_train.csv", "image_labels_test.csv"):
            return _with_sizes(_physionet(place), folder)
    path = need_table(folder, "vindr", HOME, "train.csv", "annotations/image_labels_train.csv")
    table = read_csv(path, ("image_id", "class_name", "rad_id", *CORNERS))
    votes = pd.crosstab([table["image_id"], table["rad_id"]], table["class_name"]).clip(upper=1)
    readers = votes.groupby(level="image_id")
    values = _agreed(readers.sum(), readers.size())
    rows = pd.DataFrame({"relative": values.index + ".dicom"})
    return _with_sizes(_records(rows, values, [table], path.name), folder)


def _with_sizes(records: Records, folder: Path) -> Records:
    """The records with the size of the DICOM picture by row, where the folder says it."""
    path = find_table(folder, "train_meta.csv")
    table = None if path is None else read_csv(path)
    if table is not None and {"image_id", "dim0", "dim1"} <= set(table.columns):
        sizes = zip(to_numbers(table["dim1"]), to_numbers(table["dim0"]))
        size_of = {image + ".dicom": size for image, size in zip(table["image_id"], sizes)}
        for row in records.boxes:
            wide, high = size_of.get(records.table["relative"].iat[row], (0, 0))
            if wide > 0 and high > 0:
                records.copy_frames[row] = (int(wide), int(high))
    return records


def _physionet(folder: Path) -> Records:
    parts, boxes = [], []
    for split in ("train", "test"):
        path = find_table(folder, f"image_labels_{split}.csv")
        if path is None:
            continue
        table = read_csv(path, ("image_id",))
        named = table.drop(columns=[name for name in table.columns if name in ("image_id", "rad_id", "rad_ID")])
        votes = named.apply(to_numbers).fillna(0).groupby(table["image_id"])
        parts.append(_agreed(votes.sum(), votes.size()).assign(split=split))
        drawn = find_table(folder, f"annotations_{split}.csv")
        if drawn is not None:
            boxes.append(read_csv(drawn, ("image_id", "class_name", *CORNERS)))
    values = pd.concat(parts)
    rows = pd.DataFrame({"relative": values.index + ".dicom", "split": values.pop("split").to_numpy()})
    if (rows["split"] == "test").any():
        rows = deal_val(rows)
    else:
        rows = rows.drop(columns="split")
    return _records(rows, values, boxes, "image_labels_train.csv")


def _agreed(votes: pd.DataFrame, readers: pd.Series) -> pd.DataFrame:
    """Votes for each label and the number of readers, by picture -> 1, 0, -1."""
    share = votes.div(readers, axis=0)
    return pd.DataFrame(
        np.select([share == 0, share >= 0.5], [0.0, 1.0], -1.0), index=votes.index, columns=votes.columns
    )


def _records(rows: pd.DataFrame, values: pd.DataFrame, tables: list[pd.DataFrame], found_by: str) -> Records:
    names = [harmonize(name) for name in values.columns]
    original = pd.Series("", index=values.index, dtype=object)
    for column in values.columns:
        stated = values[column] != 0
        original[stated] += column + values[column][stated].map({1.0: "=1;", -1.0: "=-1;"})
    rows["original"] = original.str.rstrip(";").to_numpy()
    labels = Labels(names, values.to_numpy(np.float32), list(values.columns))
    if NO_FINDING not in labels.names:
        raise CarinaError(f"{found_by} of vindr has no picture with 'No finding'; is it the table that was published?")
    # Readers who say "No finding" or not have judged: where they disagree, `abnormal` is uncertain too.
    nothing = labels.column(NO_FINDING)
    labels = add_label(labels, ABNORMAL, np.where(nothing == -1, -1, 1 - nothing))
    return Records(rows, labels, found_by, boxes=_boxes(tables, values.index), originals=(".dicom", ".dcm"))


def _boxes(tables: list[pd.DataFrame], images: pd.Index) -> dict[int, list[Box]]:
    row_of = {name: row for row, name in enumerate(images)}
    boxes = defaultdict(list)
    for table in tables:
        corners = [to_numbers(table[name]) for name in CORNERS]
        origin = table["rad_id"] if "rad_id" in table else pd.Series(CONSENSUS, index=table.index)
        drawn = pd.concat(corners, axis=1).notna().all(axis=1)
        columns = (table["image_id"], table["class_name"], *corners, origin)
        for image, name, x0, y0, x1, y1, reader in zip(*(column[drawn] for column in columns)):
            if image in row_of:
                boxes[row_of[image]].append((harmonize(name), float(x0), float(y0), float(x1), float(y1), reader))
    return dict(boxes)


CATALOG = Catalog(
    name="vindr",
    title="VinDr-CXR",
    homepage=HOME,
    terms=Terms(
        license="PhysioNet Credentialed Health Data License 1.5.0",
        url="https://physionet.org/content/vindr-cxr/view-license/1.0.0/",
        redistribution="no",
        derived_weights="ask",
        credentialed=True,
        clause="Credentialed users after training and a signed agreement; the data may not be shared. The Kaggle copy "
        "has rules of its own: research and teaching, not commercial.",
        citation="Nguyen H.Q. et al., VinDr-CXR: an open dataset of chest X-rays with radiologist's annotations, "
        "Scientific Data 9, 2022",
    ),
    layout="annotations/image_labels_train.csv (PhysioNet) or train.csv (Kaggle) beside train/ and test/",
    read=read,
    locate=by_name(".dicom", ".dcm", ".png", ".jpg"),
    split="PhysioNet: train and test, a tenth of train is val; Kaggle: none (its test pictures have no labels)",
    patients="picture",
)
