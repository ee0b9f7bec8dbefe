"""SIIM-ACR Pneumothorax Segmentation Challenge 2019: DICOM pictures of NIH patients with masks of pneumothorax.

train-rle.csv (stage 1) or stage_2_train.csv: ImageId and EncodedPixels, a row a mask or -1. Run lengths are relative:
each gap counts from the end of the run before it, down the columns of the 1024 x 1024 picture. That there is no
pneumothorax does not make a picture normal, so `abnormal` is unknown there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from carina.data.labels import ABNORMAL
from carina.intake.catalogs.base import Catalog, Records, Terms
from carina.intake.catalogs.places import by_name
from carina.intake.catalogs.tables import need_table, read_csv
from carina.intake.items import Labels
from carina.intake.masks import run_lengths

HOME = "https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation"
SIDE = 1024
LABEL = "Pneumothorax"


def read(folder: Path) -> Records:
    names = ("stage_2_train.csv", "train-rle.csv")
    path = need_table(folder, "siim", HOME, *names)
    table = read_csv(path, ("ImageId", "EncodedPixels"))  # the published header has a blank before EncodedPixels
    runs = table["EncodedPixels"].str.strip()
    drawn = table[~runs.isin(("-1", ""))]
    images = pd.Index(table["ImageId"].unique())
    row_of = {name: row for row, name in enumerate(images)}
    lesions = {
        row_of[image]: {LABEL: run_lengths(SIDE, SIDE, group.tolist())}
        for image, group in drawn.groupby("ImageId")["EncodedPixels"]
    }
    found = np.zeros(len(images), dtype=np.float32)
    found[list(lesions)] = 1
    labels = Labels((LABEL, ABNORMAL), np.stack([found, np.where(found == 1, 1, np.nan)], axis=1))
    rows = pd.DataFrame({"relative": images + ".dcm", "original": np.where(found == 1, LABEL, "")})
    return Records(rows, labels, path.name, lesions=lesions)


CATALOG = Catalog(
    name="siim",
    title="SIIM-ACR Pneumothorax Segmentation",
    homepage=HOME,
    terms=Terms(
        license="competition rules; pictures from NIH without restriction",
        url=HOME + "/rules",
        redistribution="ask",
        derived_weights="ask",
        credentialed=False,
        clause="The pictures are NIH's; the masks stand under the rules of the competition.",
        citation="Society for Imaging Informatics in Medicine, American College of Radiology, SIIM-ACR Pneumothorax "
        "Segmentation Challenge, 2019",
    ),
    layout="stage_2_train.csv (or train-rle.csv) and the DICOM pictures anywhere below",
    read=read,
    locate=by_name(".dcm", ".png", ".jpg"),
    lineage=("nih14",),
    patients="header",
)
