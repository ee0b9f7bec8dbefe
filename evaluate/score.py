"""The verb evaluate: predictor + store -> predictions.parquet, metrics.json, report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from carina.data.batches import in_order, unit_tensor
from carina.data.labels import to_targets
from carina.data.manifest import find_manifest, overlap
from carina.data.splits import linked_patients, stable_folds
from carina.data.store import Selection, select
from carina.errors import CarinaError
from carina.evaluate.explain import heat_maps
from carina.evaluate.report import build_report
from carina.files import read_json, write_json, write_table
from carina.metrics.intervals import interval
from carina.metrics.resampling import replicate
from carina.models.predictor import Predictor, load_predictor
from carina.progress import Progress
from carina.recipes import Section, build
from carina.runs import Run, environment
from carina.training.engine import pick_device

FACTS = ["image_id", "patient_id", "study_id", "split", "view", "sex", "age", "manufacturer"]
COLUMNS = [
    "image_id", "patient_id", "study_id", "split", "fold", "seed", "view", "sex", "age", "manufacturer", "label",
    "target", "score",
]  # fmt: skip
MIN_ROWS = 2


class EvaluateRecipe(Section):
    """Values and their meaning stand in configs/evaluate/default.yaml."""

    store: str | list[str] | None
    split: str
    where: str | None
    out: str | None
    resamples: Annotated[int, Field(ge=100)]
    examples: Annotated[int, Field(ge=0, le=200)]
    seed: int


def score_selection(predictor: Predictor, selection: Selection, quiet: bool = True) -> np.ndarray:
    """(N, L) float64 scores of all rows, every member at its own scale."""
    device = pick_device()
    for scale in predictor.scales:
        for store in selection.stores:
            store.check_scale(scale)
    result = np.zeros((len(selection), len(predictor.labels)))
    total = len(selection) * len(predictor.members)
    with Progress("score", total, unit="images", quiet=quiet) as progress, torch.no_grad():
        for number, member in enumerate(predictor.members):
            member.to(device)
            weights = np.array([predictor.info["stack"][label][number] for label in predictor.labels])
            for rows, images in in_order(selection, member.scale, device):
                result[rows] += member.scores(images).double().cpu().numpy() * weights
                progress.advance(len(images))
    return result


def evaluation_rows(predictor: Predictor, recipe: EvaluateRecipe) -> Selection:
    """The rows that are scored; with split=fold those of the fold that this run never saw."""
    selection = select(recipe.store, where=recipe.where)
    if recipe.split == "fold":
        folds, fold = predictor.info["folds"], predictor.info["fold"]
        if folds is None:
            raise CarinaError("split=fold needs a run that was trained with folds=; give split=test")
        whole = select(recipe.store, where=predictor.info["where"])
        if whole.hashes != predictor.info["store_hashes"]:
            raise CarinaError(
                "the folds of this run were dealt over another store, so this one would mix trained and held-out patients; "
                "give the store that the run was trained on"
            )
        number = stable_folds(linked_patients(whole.table).tolist(), folds, predictor.info["draw"])
        mine = set(whole.table["patient_id"].to_numpy()[number == fold])
        return selection.where(selection.table["patient_id"].isin(mine).to_numpy())
    if predictor.info["folds"] is not None and recipe.split != "all":
        raise CarinaError(
            "this run was trained on patient folds, so a split holds patients it has seen; give split=fold"
        )
    return selection if recipe.split == "all" else selection.split(*recipe.split.split("+"))


def _score_run(folder: str, recipe: EvaluateRecipe, quiet: bool) -> tuple[Predictor, Selection, np.ndarray, dict]:
    predictor = load_predictor(folder)
    selection = evaluation_rows(predictor, recipe)
    if not len(selection):
        raise CarinaError(f"no row has split={recipe.split}; carina inspect STORE shows the splits there are")
    predictor.check_prepared(selection.photometry, selection.geometry, "the store")
    scores = score_selection(predictor, selection, quiet)
    return predictor, selection, scores, overlap(find_manifest(folder), selection)


def predictions_frame(predictor: Predictor, selection: Selection, scores: np.ndarray) -> pd.DataFrame:
    """The long table: one row per image and label; targets NaN where unknown or uncertain."""
    targets = to_targets(selection.targets(predictor.labels))
    frames = []
    for column, label in enumerate(predictor.labels):
        frame = selection.table[FACTS].copy()
        frame["fold"] = -1 if predictor.info["fold"] is None else predictor.info["fold"]
        frame["seed"] = predictor.info["seed"]
        frame["label"] = label
        frame["target"], frame["score"] = targets[:, column], scores[:, column]
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)[COLUMNS]


def _wide(frame: pd.DataFrame, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first = frame[frame["label"] == labels[0]]
    targets = np.stack([frame.loc[frame["label"] == label, "target"].to_numpy() for label in labels], axis=1)
    scores = np.stack([frame.loc[frame["label"] == label, "score"].to_numpy() for label in labels], axis=1)
    return targets, scores, first["patient_id"].to_numpy()


def metric_table(frame: pd.DataFrame, labels: Sequence[str], thresholds: dict[str, float] | None, recipe) -> list[dict]:
    """A row a label, and the macro mean first when there are several: AUROC and average precision with intervals."""
    targets, scores, patients = _wide(frame, labels)
    found = {
        name: replicate(targets, scores[None], patients, name, recipe.resamples, recipe.seed)
        for name in ("auroc", "average_precision")
    }

    def row(label: str, column: int | None) -> dict[str, Any]:
        auroc, ap = (interval(found[name], column).to_dict() for name in ("auroc", "average_precision"))
        part = targets if column is None else targets[:, [column]]
        entry = {
            "label": label,
            "n": int((~np.isnan(part)).any(axis=1).sum()),
            "positives": int((part == 1).sum()),
            "unknown": int(np.isnan(part).sum()),
            "auroc": auroc,
            "ap": ap,
            "note": "" if auroc["estimable"] else auroc["reason"],
        }
        if column is not None and thresholds:
            known = ~np.isnan(part[:, 0])
            above, sick = scores[known, column] >= thresholds[label], part[known, 0] == 1
            entry["threshold"] = thresholds[label]
            entry["sensitivity"] = float(above[sick].mean()) if sick.any() else None
            entry["specificity"] = float((~above[~sick]).mean()) if (~sick).any() else None
        return entry

    rows = [row(label, column) for column, label in enumerate(labels)]
    return ([row("macro", None)] if len(labels) > 1 else []) + rows


def overlap_sentence(found: dict[str, Any]) -> str:
    """What of the test patients was seen before, in words; unknown is not taken for clean."""
    if not found["known"]:
        return "What the backbone was trained on is unknown, so it may have seen these patients."
    counts = ("patients", "identical_images", "near_identical_images")
    clean = [stage for stage, seen in found["stages"].items() if not any(seen[name] for name in counts)]
    parts = [f"none of the {found['patients']} test patients was seen in {' or '.join(clean)}"] if clean else []
    parts += [
        f"{seen['patients']} of {found['patients']} test patients were seen in {stage} ({seen['images_of_those']} of their "
        f"images are scored here), {seen['identical_images']} images are identical to one that was seen and "
        f"{seen['near_identical_images']} nearly so"
        for stage, seen in found["stages"].items()
        if stage not in clean
    ]
    text = "; ".join(parts) + "."
    text = text[0].upper() + text[1:]
    return text + "".join(f" But {doubt}." for doubt in found["doubts"])


def pooled_overlap(folds: list[dict[str, Any]]) -> dict[str, Any]:
    """The overlaps of several folds as one: counts add up, because no test row is in two folds."""
    known = [fold for fold in folds if fold["known"]]
    if len(known) < len(folds):
        return overlap(None, None)
    stages: dict[str, dict[str, int]] = {}
    for fold in folds:
        for stage, seen in fold["stages"].items():
            total = stages.setdefault(stage, dict.fromkeys(seen, 0))
            for name, number in seen.items():
                total[name] += number
    return {
        "known": True,
        "doubts": sorted({doubt for fold in folds for doubt in fold["doubts"]}),
        "images": sum(fold["images"] for fold in folds),
        "patients": sum(fold["patients"] for fold in folds),
        "stages": stages,
    }


def evaluate(runs: str, overrides: Any = (), *, quiet: bool = False) -> dict[str, Any]:
    """Score a run, or several folds of one (``A,B,C`` with split=fold, pooled); returns what metrics.json says."""
    recipe = build("evaluate", EvaluateRecipe, "default", overrides)
    if not recipe.store:
        raise CarinaError("evaluate needs a store; give store=FOLDER")
    folders = runs.split(",")
    if len(folders) > 1 and recipe.split != "fold":
        raise CarinaError("several runs are pooled only as folds of one; give split=fold, or evaluate them one by one")
    if len(folders) > 1 and not recipe.out:
        raise CarinaError("several folds need a place for the pooled result; give out=DIR")
    out = Path(recipe.out) if recipe.out else Path(folders[0]) / "evaluations" / recipe.split.replace("+", "-")
    _check_free(out, recipe)
    done = [_score_run(folder, recipe, quiet) for folder in folders]
    predictor, selection = done[0][0], done[0][1]
    labels = predictor.labels
    _same_protocol([entry[0] for entry in done])
    frame = pd.concat([predictions_frame(p, s, scores) for p, s, scores, _ in done], ignore_index=True)
    if frame.duplicated(["image_id", "label"]).any():
        raise CarinaError("two of these runs scored the same images; give each fold once")
    if frame["image_id"].nunique() < MIN_ROWS:
        raise CarinaError(f"{frame['image_id'].nunique()} image is too few to evaluate; widen split= or where=")
    thresholds = predictor.info["thresholds"] if len(done) == 1 else None
    table = metric_table(frame, labels, thresholds, recipe)
    seen = done[0][3] if len(done) == 1 else pooled_overlap([entry[3] for entry in done])
    sentence = overlap_sentence(seen)
    if predictor.info["transductive"]:
        sentence += " Transductive: pretraining read rows outside the training split."
    synthetic = any(s.synthetic for _, s, _, _ in done) or predictor.info["synthetic"]
    result = {
        "kind": predictor.info["kind"],
        "mode": predictor.info["mode"],
        "backbone": predictor.members[0].backbone.spec.origin,
        "split": recipe.split,
        "where": recipe.where,
        "images": int(frame["image_id"].nunique()),
        "patients": int(frame["patient_id"].nunique()),
        "labels": labels,
        "score": predictor.info["score"],
        "synthetic": bool(synthetic),
        "labels_used": predictor.info["labels_used"],
        "pretext_saw": predictor.info["pretext_saw"],
        "transductive": predictor.info["transductive"],
        "finetune_saw": predictor.info["finetune_saw"],
        "thresholds_from": predictor.info["thresholds_from"],
        "overlap": seen,
        "overlap_sentence": sentence,
        "store_hashes": selection.hashes,
        "labels_hashes": selection.labels_hashes,
        "resamples": recipe.resamples,
        "table": table,
    }
    write_table(out / "predictions.parquet", frame.assign(age=frame["age"].astype(np.float32)))
    write_json(out / "metrics.json", result)
    build_report(out, _report_content(result, frame, done, folders, recipe))
    return {**result, "out": str(out), "report": str(out / "report.html")}


def _check_free(out: Path, recipe: EvaluateRecipe) -> None:
    """An evaluation may be made again, but never replaced by one of other rows."""
    if (out / "metrics.json").is_file():
        old = read_json(out / "metrics.json")
        now = {"split": recipe.split, "where": recipe.where, "store_hashes": select(recipe.store).hashes}
        other = [key for key, value in now.items() if old.get(key) != value]
        if other:
            raise CarinaError(
                f"{out} holds an evaluation of other rows ({', '.join(other)} differ); choose another out="
            )


def _same_protocol(predictors: list[Predictor]) -> None:
    first = predictors[0].info
    for other in predictors[1:]:
        changed = [
            k for k in ("kind", "mode", "labels", "folds", "draw", "where", "score") if other.info[k] != first[k]
        ]
        if changed:
            raise CarinaError(f"these runs are not folds of one: {', '.join(changed)} differ")


def _report_content(result, frame, done, folders, recipe) -> dict[str, Any]:
    predictor, selection, scores, _ = done[0]
    run = Run(folders[0])
    has_run = (run.folder / "recipe.yaml").is_file()
    unknown = int(frame["target"].isna().sum())
    word = "synthetic " if result["synthetic"] else ""
    best = result["table"][0]
    what = "the mean over labels" if best["label"] == "macro" else best["label"]
    headline = (
        "Nothing can be estimated: " + best["note"]
        if best["auroc"]["value"] is None
        else (
            f"AUROC {best['auroc']['value']:.3f} ({best['auroc']['low']:.3f} to {best['auroc']['high']:.3f}) for "
            f"{what} on {result['images']} {word}images of {result['patients']} patients."
        )
    )
    warnings = []
    if result["synthetic"]:
        warnings.append("These radiographs are synthetic: the figures say that the software runs, nothing of patients.")
    if any(stage["patients"] for stage in result["overlap"]["stages"].values()) or result["overlap"]["doubts"]:
        warnings.append(result["overlap_sentence"])
    flow = [
        {"what": "scored", "images": result["images"], "patients": result["patients"], "note": f"split {recipe.split}"}
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
        f"{predictor.members[0].backbone.spec.name}, split {recipe.split}",
        "kind": result["kind"],
        "score": result["score"],
        "synthetic": result["synthetic"],
        "summary": [headline, f"Backbone: {result['backbone']}.", result["overlap_sentence"]],
        "warnings": warnings,
        "metrics": result["table"],
        "predictions": frame,
        "examples": _examples(predictor, selection, scores, recipe.examples),
        "data_flow": flow,
        "labels_used": f"Pretext saw: {result['pretext_saw']}. Labels used: {result['labels_used']}. {unknown} unknown or "
        f"uncertain values left out. Thresholds from {result['thresholds_from']}.",
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
    member = predictor.members[0]
    rows = []
    for row, column, kind in chosen[:count]:
        image = selection.images([row], member.scale)
        pixels = unit_tensor(torch.from_numpy(image))
        member.cpu()
        heat = heat_maps(member, pixels, column)[0]
        lungs = selection.masks([row], member.scale)[0]
        rows.append(
            {
                "image": pixels[0, 0].numpy(),
                "heat": heat,
                "lungs": lungs if lungs.any() else None,
                "caption": f"{predictor.labels[column]}: {kind}, score {scores[row, column]:.2f}",
            }
        )
    return rows


def terminal_table(result: dict[str, Any]) -> Any:
    """The metric table for a terminal."""
    from rich.table import Table

    title = f"{result['kind']} {result['mode']}, split {result['split']}, {result['patients']} patients"
    table = Table(title=title + (" (synthetic)" if result["synthetic"] else ""), caption=result["overlap_sentence"])
    for name in ("label", "AUROC", "95 % interval", "average precision", "positives", "note"):
        table.add_column(name)
    for row in result["table"]:
        auroc, ap = row["auroc"], row["ap"]
        none = auroc["value"] is None
        span = "-" if none or auroc["low"] is None else f"{auroc['low']:.3f} to {auroc['high']:.3f}"
        table.add_row(
            row["label"],
            "-" if none else f"{auroc['value']:.3f}",
            span,
            "-" if ap["value"] is None else f"{ap['value']:.3f}",
            f"{row['positives']} of {row['n']}",
            row["note"],
        )
    return table
