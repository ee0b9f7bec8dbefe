"""The private record of what a backbone or predictor has seen; kept in the run, never published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from carina.data.store import Selection
from carina.files import write_table

MANIFEST = "manifest.parquet"
UNKNOWN = "unknown"
COLUMNS = ["patient_id", "image_id", "content_hash", "stage", "key"]


def seen_rows(selection: Selection, stage: str) -> pd.DataFrame:
    """Keyed hashes of the rows a stage trains on."""
    return selection.table[COLUMNS[:3]].assign(stage=stage, key=selection.key_check)


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
    write_table(folder / MANIFEST, pd.concat(frames, ignore_index=True).drop_duplicates().sort_values(COLUMNS))


def overlap(manifest: pd.DataFrame | None, test: Selection) -> dict[str, Any]:
    """How many test rows share a patient or pixels with what was seen, by stage.

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
    stages = {}
    for stage, rows in seen.groupby("stage"):
        patients = test.table["patient_id"].isin(set(rows["patient_id"]))
        same = test.table["content_hash"].isin(set(rows["content_hash"]))
        stages[str(stage)] = {
            "patients": int(test.table.loc[patients, "patient_id"].nunique()),
            "images_of_those": int(patients.sum()),
            "identical_images": int(same.sum()),
        }
    return {
        "known": True,
        "doubts": doubts,
        "images": len(test),
        "patients": int(test.table["patient_id"].nunique()),
        "stages": stages,
    }
