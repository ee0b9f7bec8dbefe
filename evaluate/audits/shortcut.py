"""Shortcuts: what remains of a label without the lungs, without pixels, and what the features tell of the acquisition.

Three kinds of evidence, because each alone misleads. *predictor*: this predictor on pictures of which a part is black; it
never saw such, so a loss may be strangeness. *learned*: a linear model on the same backbone's features of those pictures,
fitted across patients: what can be read there by whoever looks. *control*: the same on features that know nothing of
disease (DeGrave et al., Nature Machine Intelligence 2021, use masked pictures and saliency likewise).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from carina.data.batches import control_chunks
from carina.evaluate.audits.common import NEAR, Audited, Change, entry, listed, told, unchanged, usable
from carina.metrics.intervals import MIN_POSITIVES, interval
from carina.models.controls import control_scale, controls, describe, nothing_to_see
from carina.models.features import Region, only

RING = 0.1  # of the side
CONTROLS = (
    "raw pixels",
    "HOG",
    "HOG, lungs only",
    "HOG, background only",
    "HOG, mask silhouette",
    "HOG, outer ring",
    "pixels, outer ring",
    "nine intensity statistics",
    "file size",
)
METADATA = ("view", "sex", "age", "manufacturer", "source")
ACQUISITION = ("view", "manufacturer", "source")
FREE = 1.0  # strength of logistic regression (C) on a few columns of metadata


def _region(region: Region) -> Change:
    return lambda images, lungs, rows: (only(images, lungs, region), lungs)


def _ring(images: torch.Tensor, lungs: torch.Tensor | None, rows: slice) -> tuple:
    kept, width = images.clone(), max(1, round(RING * images.shape[-1]))
    kept[..., width:-width, width:-width] = 0
    return kept, lungs


def parts_of_pictures(has_lungs: bool) -> dict[str, Change]:
    regions = {"lungs only": _region("lungs"), "background only": _region("background")} if has_lungs else {}
    return {"whole": unchanged, **regions, "outer ring only": _ring}


def regions(audited: Audited) -> dict[str, Any]:
    """AUROC of parts of the pictures, of control features and of metadata, each against the whole picture."""
    changes = parts_of_pictures(audited.has_lungs)
    scores = audited.scores(changes, lungs=audited.has_lungs)
    features = audited.features(changes, lungs=audited.has_lungs)
    rows = _rows(audited, "predictor", scores)
    rows += _rows(audited, "learned", {name: audited.learned(part) for name, part in features.items()})
    rows += _rows(audited, "control", _control_scores(audited), against="HOG")
    rows += _rows(audited, "metadata", _metadata_scores(audited))
    if audited.has_lungs:
        rows += _contrast(audited, features)
    return entry("shortcut", _sentence(rows, audited.has_lungs, audited.labels), rows)


def _rows(
    audited: Audited, kind: str, scores: dict[str, np.ndarray | str], against: str = "whole"
) -> list[dict[str, Any]]:
    """Rows of every input: scores (N, L), or why there are none. Differences are from the input `against`."""
    measured = {name: audited.measured(found) for name, found in scores.items() if not isinstance(found, str)}
    rows = []
    for name, found in scores.items():
        facts = {"kind": kind, "input": name}
        if isinstance(found, str):
            rows.append({**facts, "label": audited.labels[0], "auroc": None, "drop": None, "missing": found})
            continue
        whole = measured.get(against) if name != against else None
        rows += [{**facts, **figure, "missing": ""} for figure in audited.figures(measured[name], whole)]
    return rows


def _contrast(audited: Audited, features: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """How much better the label is read from the lungs than from the background: what a claim of lesions needs."""
    lungs, background = (
        audited.measured(audited.learned(features[f"{name} only"])) for name in ("lungs", "background")
    )
    return [
        {**row, "kind": "learned", "input": "lungs only minus background only", "auroc": None, "missing": ""}
        for row in audited.figures(background, lungs)
    ]


def _control_scores(audited: Audited) -> dict[str, np.ndarray | str]:
    scale = control_scale(set.intersection(*(set(store.scales) for store in audited.selection.stores)))
    wanted = controls(scale, audited.settings.seed, CONTROLS)
    features = describe(control_chunks(audited.selection, scale, audited.quiet), wanted)
    return {
        control.name: nothing_to_see(control, features.get(control.name)) or audited.learned(features[control.name])
        for control in wanted
    }


def metadata_columns(table: pd.DataFrame, name: str) -> np.ndarray:
    """(N, D) of one column: age with its square and whether it is known, else one column a value."""
    if name != "age":
        return pd.get_dummies(table[name].fillna("")).to_numpy(np.float64)
    age = table["age"].to_numpy(np.float64)
    known = ~np.isnan(age)
    centered = np.where(known, age - np.nanmean(age), 0.0) if known.any() else np.zeros(len(age))
    return np.stack([centered, centered**2, known], axis=1)


def _metadata_scores(audited: Audited) -> dict[str, np.ndarray | str]:
    columns = {name: metadata_columns(audited.selection.table, name) for name in METADATA}
    varied = {name: column for name, column in columns.items() if np.ptp(column, axis=0).any()}
    scores: dict[str, np.ndarray | str] = {
        name: audited.learned(varied[name], strength=FREE) if name in varied else "the same for every image"
        for name in METADATA
    }
    if len(varied) > 1:
        scores["all of these"] = audited.learned(np.concatenate(list(varied.values()), axis=1), strength=FREE)
    return scores


def _sentence(rows: list[dict[str, Any]], has_lungs: bool, labels: list[str]) -> str:
    first = {(row["kind"], row["input"]): row for row in reversed(rows)}  # the mean over labels stands first

    def figure(kind: str, name: str, what: str = "auroc") -> Any:
        found = first.get((kind, name))
        return found[what] if found and usable(found[what]) else None

    whole = figure("learned", "whole")
    where = "background only" if has_lungs else "outer ring only"
    part, drop = figure("learned", where), figure("learned", where, "drop")
    if whole is None or part is None or drop is None:
        why = first["learned", "whole"]["auroc"]["reason"] or first["learned", where]["auroc"]["reason"]
        said = f"What can be read without the lungs cannot be said: {why}"
    else:
        what = f"{len(labels)} labels (their mean)" if len(labels) > 1 else "label"
        without = "without the lungs" if has_lungs else "from the outer ring (there are no lung masks)"
        against = f"{where} {told(part)} against {told(whole)} of the whole picture"
        if drop["high"] <= NEAR:
            said = f"The {what} can be read nearly as well {without}: {against}"
        elif part["low"] > 0.5:
            said = f"A part of the {what} can be read {without}: {against}"
        else:
            said = f"The {what} cannot be shown to be readable {without}: {against}"
        said += ", by a linear model that may learn from each"
    own, own_whole = figure("predictor", where), figure("predictor", "whole")
    if own and own_whole:
        said += f"; this predictor, unchanged, keeps {told(own)} of {told(own_whole)} there"
    contrast = figure("learned", "lungs only minus background only", "drop")
    if contrast:
        beats = "beats" if contrast["low"] > 0 else "does not beat"
        said += f"; lungs only {beats} background only ({told(contrast, signed=True)})"
    free = [(name, figure("metadata", name)) for name in METADATA]
    free.append(("file size", figure("control", "file size")))
    known = [(name, found) for name, found in free if found and found["low"] > 0.5]
    if known:
        name, found = max(known, key=lambda pair: pair[1]["value"])
        said += f"; without looking at any pixel, {name} alone gives {told(found)}"
    return said + "."


def acquisition(audited: Audited) -> dict[str, Any]:
    """How well view, manufacturer and source can be told from the features: AUROC of every value against the others."""
    table, rows = audited.selection.table, []
    features: np.ndarray | None = None
    for name in ACQUISITION:
        values = table[name].fillna("")
        people = table.groupby(values)["patient_id"].nunique()
        enough = [value for value, count in people.items() if value and count >= MIN_POSITIVES]
        if len(enough) < 2:
            why = "fewer than two values are recorded of 20 patients or more"
            rows.append({"column": name, "value": None, "images": 0, "auroc": None, "missing": why})
            continue
        if features is None:
            features = audited.features({"whole": unchanged})["whole"]
        inside = values.isin(enough).to_numpy()
        for value in enough[:1] if len(enough) == 2 else enough:
            target = np.where(inside, values == value, np.nan).astype(np.float64)[:, None]
            found = interval(audited.measured(audited.learned(features, target), target), 0).to_dict()
            facts = {"column": name, "value": str(value), "images": int((target == 1).sum())}
            rows.append({**facts, "auroc": found, "missing": "" if found["value"] is not None else found["reason"]})
    return entry("acquisition", _acquisition_sentence(rows), rows)


def _acquisition_sentence(rows: list[dict[str, Any]]) -> str:
    read = [row for row in rows if usable(row["auroc"])]
    if not read:
        return "The rows are of one view, manufacturer and source, or these are not recorded, so nothing can be told apart."
    clear = [row for row in read if row["auroc"]["low"] > 0.5]
    if not clear:
        return "The features do not show the view, the manufacturer or the source of a picture."
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(clear, key=lambda one: one["auroc"]["value"]):
        best[row["column"]] = row
    said = listed([f"the {name} ({row['value']}: AUROC {told(row['auroc'])})" for name, row in best.items()])
    return f"The features show {said}; a label that goes with it can be learned from it, so judge within each."
