"""The private record of what a backbone or predictor has seen; kept in the run, never published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from carina.data.descriptors import any_near, known
from carina.data.store import Selection
from carina.files import write_table

MANIFEST = "manifest.parquet"
UNKNOWN = "unknown"
DESCRIPTOR = "descriptor"
COLUMNS = ["patient_id", "image_id", "content_hash", "stage", "key"]


def seen_rows(selection: Selection, stage: str) -> pd.DataFrame:
    """Keyed hashes and small descriptors of the rows a stage trains on."""
    rows = selection.table[COLUMNS[:3]].assign(stage=stage, key=selection.key_check)
    rows[DESCRIPTOR] = _descriptors(selection.table)
    return rows


def _descriptors(table: pd.DataFrame) -> pd.Series:
    """Bytes, None where there is none (stores and manifests of earlier versions)."""
    if DESCRIPTOR not in table.columns:
        return pd.Series(None, index=table.index, dtype=object)
    values = table[DESCRIPTOR].astype(object)
    return values.where(known(values.tolist()), None)


def find_manifest(reference: str) -> pd.DataFrame | None:
    """The manifest of a run or of the backbone folder in it; None where there is none (weights from elsewhere)."""
    path = Path(reference)
    for folder in (path, path.parent):
        if (folder / MANIFEST).is_file():
            return pd.read_parquet(folder / MANIFEST)
    return None


def write_manifest(folder: Path, rows: pd.DataFrame, began_with: str, natural_images: bool = False) -> None:
    """What this run saw, and what the backbone it began with had seen before.

    began_with: the reference of that backbone. natural_images: it comes from elsewhere but saw no radiographs.
    """
    frames = [rows]
    if not began_with.startswith("random") and not natural_images:
        earlier = find_manifest(began_with)
        unknown = pd.DataFrame([{**dict.fromkeys(COLUMNS, ""), "stage": UNKNOWN}])
        frames.insert(0, unknown if earlier is None else earlier)
    table = pd.concat([frame.assign(**{DESCRIPTOR: _descriptors(frame)}) for frame in frames], ignore_index=True)
    # Rows that differ in the descriptor alone: an earlier version wrote the one without; keep the other.
    table = table.sort_values([*COLUMNS, DESCRIPTOR], na_position="last").drop_duplicates(COLUMNS)
    write_table(folder / MANIFEST, table[[*COLUMNS, DESCRIPTOR]])


def overlap(manifest: pd.DataFrame | None, test: Selection) -> dict[str, Any]:
    """How many test rows share a patient or pixels with what was seen, by stage.

    identical_images have the pixels of a seen image at the same largest scale; near_identical_images beside them look
    the same by their small descriptors: copies that were encoded again, or one picture in stores of other scales.

    ``known`` is False where there is no manifest; ``doubts`` says why a part of the past cannot be compared. Neither is
    taken for clean.
    """
    if manifest is None:
        return {"known": False, "doubts": ["what the backbone was trained on is unknown"], "stages": {}}
    seen, doubts = manifest[manifest["stage"] != UNKNOWN], []
    if len(seen) < len(manifest):
        doubts.append("a part of the backbone's past is unknown")
    if (seen["key"] != test.key_check).any():
        doubts.append("some of it was prepared under another key, so its patients cannot be matched")
    nameless = int(test.table["patient_id"].str.startswith("file-").sum())
    if nameless or seen["patient_id"].str.startswith("file-").any():
        doubts.append("the patients of some images are unknown")
    own, others = _descriptors(test.table), _descriptors(seen)
    if own.isna().any() or others.isna().any():
        doubts.append(
            "some images have no descriptor (an earlier version prepared them), so their near copies are unknown"
        )
    stages = {}
    for stage, rows in seen.groupby("stage"):
        patients = test.table["patient_id"].isin(set(rows["patient_id"]))
        same = test.table["content_hash"].isin(set(rows["content_hash"])).to_numpy()
        near = np.zeros(len(test), dtype=bool)
        near[~same] = any_near(own[~same].tolist(), others[rows.index].tolist())
        stages[str(stage)] = {
            "patients": int(test.table.loc[patients, "patient_id"].nunique()),
            "images_of_those": int(patients.sum()),
            "identical_images": int(same.sum()),
            "near_identical_images": int(near.sum()),
        }
    return {
        "known": True,
        "doubts": doubts,
        "images": len(test),
        "patients": int(test.table["patient_id"].nunique()),
        "stages": stages,
    }
