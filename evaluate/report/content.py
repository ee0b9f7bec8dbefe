"""What the report of one evaluation says, from its figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from carina.data.batches import unit_tensor
from carina.data.labels import to_targets
from carina.data.store import Selection
from carina.evaluate import anomaly
from carina.evaluate.explain import heat_maps
from carina.models.predictor import Predictor
from carina.runs import Run, environment


def report_content(result: dict[str, Any], frame: pd.DataFrame, done: list[tuple], folder: str, examples: int) -> dict:
    """What `build_report` is given for an evaluation.

    done: (predictor, rows, scores, overlap) of every run. folder: of the first. examples: pictures to show.
    """
    predictor, selection, scores, _ = done[0]
    run = Run(folder)
    has_run = (run.folder / "recipe.yaml").is_file()
    unknown = int(frame["target"].isna().sum())
    word = "synthetic " if result["synthetic"] else ""
    best = result["table"][0]
    units = {"image": "images", "study": "studies", "patient": "patients"}[result["level"]]
    pooled = f", the {result['pool']} of their images' scores" if result["pool"] else ""
    what = "the mean over labels" if best["label"] == "macro" else best["label"]
    headline = (
        "Nothing can be estimated: " + best["note"]
        if best["auroc"]["value"] is None
        else (
            f"AUROC {best['auroc']['value']:.3f} ({best['auroc']['low']:.3f} to {best['auroc']['high']:.3f}) for "
            f"{what} on {result['units']} {word}{units} of {result['patients']} patients{pooled}."
        )
    )
    warnings = []
    if result["synthetic"]:
        warnings.append("These radiographs are synthetic: the figures say that the software runs, nothing of patients.")
    if any(stage["patients"] for stage in result["overlap"]["stages"].values()) or result["overlap"]["doubts"]:
        warnings.append(result["overlap_sentence"])
    warnings += result.get("words", [])
    flow = [
        {
            "what": "scored",
            "images": result["images"],
            "patients": result["patients"],
            "note": f"split {result['split']}",
        }
    ]
    flow += [
        {
            "what": f"known {label}",
            "images": int(frame.loc[frame["label"] == label, "target"].notna().sum()),
            "patients": int(frame[(frame["label"] == label) & frame["target"].notna()]["patient_id"].nunique()),
            "note": "",
        }
        for label in result["labels"]
    ]
    return {
        "title": f"{'Anomaly detection' if result['kind'] == 'anomaly' else 'Classification'}, {result['mode']}: "
        f"{predictor.members[0].backbone.spec.name}, split {result['split']}",
        "kind": result["kind"],
        "score": result["score"],
        "synthetic": result["synthetic"],
        "summary": [headline, f"Backbone: {result['backbone']}.", result["overlap_sentence"]],
        "warnings": warnings,
        "metrics": result["table"],
        "units": units,
        "scales": result["scales"],
        "controls": result.get("controls", []),
        "localization": anomaly.localization_rows(result["localization"]) if result.get("localization") else [],
        "localization_words": anomaly.localization_words(result["localization"]) if result.get("localization") else "",
        "predictions": frame,
        "examples": _examples(predictor, selection, scores, examples),
        "data_flow": flow,
        "labels_used": f"Pretext saw: {result['pretext_saw']}. Labels used: {result['labels_used']}. {unknown} unknown or "
        f"uncertain values left out. Thresholds from {result['thresholds_from']}.",
        "audits": [{"name": found["name"], "sentence": found["sentence"]} for found in result["audits"]],
        "overlap": {
            "sentence": result["overlap_sentence"],
            "counts": {stage: seen["patients"] for stage, seen in result["overlap"]["stages"].items()},
        }
        if result["overlap"]["known"]
        else None,
        "recipe": _without_places(run.recipe()) if has_run else {},
        "environment": run.environment() if has_run else environment(),
        "how_to_cite": "carina (CITATION.cff), and the sources of the data and of the backbone.",
    }


def _without_places(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in ("store", "out", "backbone")}


def _examples(predictor: Predictor, selection: Selection, scores: np.ndarray, count: int) -> list[dict[str, Any]]:
    """The most and least certain of right and wrong, dealt over the labels, with heat maps."""
    targets = to_targets(selection.targets(predictor.labels))
    chosen: list[tuple[int, int, str]] = []
    each = -(-count // (4 * len(predictor.labels)))
    for column, label in enumerate(predictor.labels):
        above = scores[:, column] >= predictor.info["thresholds"][label]
        order = np.argsort(-scores[:, column], kind="stable")
        kinds = (
            ("found", order, above & (targets[:, column] == 1)),
            ("missed", order[::-1], ~above & (targets[:, column] == 1)),
            ("false alarm", order, above & (targets[:, column] == 0)),
            ("rightly left", order[::-1], ~above & (targets[:, column] == 0)),
        )
        for kind, ranked, which in kinds:
            chosen += [(int(row), column, kind) for row in ranked if which[row]][:each]
    span = anomaly.display_span(predictor, selection) if chosen and count else None
    rows = []
    for row, column, kind in chosen[:count]:
        member = predictor.leading(column).cpu()
        pixels = unit_tensor(torch.from_numpy(selection.images([row], member.scale)))
        lungs = torch.from_numpy(selection.masks([row], member.scale))[:, None]
        rows.append(
            {
                "image": pixels[0, 0].numpy(),
                "heat": heat_maps(member, pixels, column, lungs, span)[0],
                "lungs": lungs[0, 0].numpy() if lungs.any() else None,
                "caption": f"{predictor.labels[column]}: {kind}, score {scores[row, column]:.2f}",
            }
        )
    return rows
