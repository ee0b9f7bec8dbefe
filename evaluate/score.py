"""The verb evaluate: predictor + store -> predictions.parquet, metrics.json, report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from carina.data.batches import with_lungs
from carina.data.labels import to_targets
from carina.data.manifest import find_manifest, overlap
from carina.data.splits import LEFT_OUT, linked_patients, stable_folds
from carina.data.store import Selection, select
from carina.errors import CarinaError
from carina.evaluate import anomaly, audits
from carina.evaluate.audits.common import AuditSettings
from carina.evaluate.external import external, prevalence_shift, shift_sentences
from carina.evaluate.numbers import (
    Scored,
    averages,
    calibration_bins,
    decision_curves,
    listed,
    metric_table,
    sentence_of_fits,
    sentences_of_table,
)
from carina.evaluate.report import build_report
from carina.evaluate.report.content import report_content
from carina.evaluate.report.figures import stack_chart
from carina.evaluate.scales import scale_table
from carina.evaluate.studies import UNITS, Level, Pool, Pooling
from carina.evaluate.subgroups import confounders, grouped, subgroups, telling, too_coarse, worst
from carina.files import atomic_path, read_json, write_json, write_table
from carina.metrics.ranking import BELOW_CHANCE
from carina.models.predictor import Predictor, load_predictor
from carina.progress import Progress
from carina.recipes import Section, build
from carina.training.engine import pick_device

FACTS = ["image_id", "patient_id", "study_id", "split", "view", "sex", "age", "manufacturer", "source"]
COLUMNS = [
    "image_id", "patient_id", "study_id", "split", "fold", "seed", "view", "sex", "age", "manufacturer", "label",
    "target", "score",
]  # fmt: skip
MIN_ROWS = 2
Share = Annotated[float, Field(gt=0, lt=1)]


class ConvergenceSettings(Section):
    pretrained: list[str]
    scratch: list[str]
    target: Share | None


class EvaluateRecipe(Section):
    """Values and their meaning stand in configs/evaluate/default.yaml."""

    store: str | list[str] | None
    split: str
    where: str | None
    level: Level
    pool: Pool
    out: str | None
    resamples: Annotated[int, Field(ge=100)]
    prevalence: Share | dict[str, Share] | None
    examples: Annotated[int, Field(ge=0, le=200)]
    pixels: bool
    controls: bool
    audits: list[str]
    convergence: ConvergenceSettings
    seed: int


def member_scores(predictor: Predictor, selection: Selection, quiet: bool = True) -> list[np.ndarray]:
    """Scores (N, L) float64 of all rows by each member, at its own scale."""
    device = pick_device()
    for scale in predictor.scales:
        for store in selection.stores:
            store.check_scale(scale)
    result = [np.empty((len(selection), len(predictor.labels))) for _ in predictor.members]
    total = len(selection) * len(predictor.members)
    with Progress("score", total, unit="images", quiet=quiet) as progress, torch.no_grad():
        for member, found in zip(predictor.members, result):
            member.to(device)
            for rows, images, lungs in with_lungs(selection, member.scale, device, member.needs_lungs):
                found[rows] = member.scores(images, lungs).double().cpu().numpy()
                progress.advance(len(images))
    return result


def score_selection(predictor: Predictor, selection: Selection, quiet: bool = True) -> np.ndarray:
    """(N, L) float64 scores of all rows by the predictor."""
    return predictor.combine(member_scores(predictor, selection, quiet))


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


def _score_run(
    folder: str, recipe: EvaluateRecipe, quiet: bool
) -> tuple[tuple[Predictor, Selection, np.ndarray, dict], list[np.ndarray]]:
    """(predictor, rows, scores, overlap), and the scores of each member."""
    predictor = load_predictor(folder)
    selection = evaluation_rows(predictor, recipe)
    if not len(selection):
        raise CarinaError(f"no row has split={recipe.split}; carina inspect STORE shows the splits there are")
    predictor.check_prepared(selection.photometry, selection.geometry, "the store")
    parts = member_scores(predictor, selection, quiet)
    return (predictor, selection, predictor.combine(parts), overlap(find_manifest(folder), selection)), parts


def predictions_frame(
    predictor: Predictor, selection: Selection, scores: np.ndarray, level: Level = "image", pool: Pool = "max"
) -> pd.DataFrame:
    """The long table: one row per image (or study, or patient) and label; targets NaN where unknown or uncertain.

    Columns are those of predictions.parquet, and the source.
    """
    pooling = Pooling(selection.table, level, pool)
    targets, scores = pooling.targets(to_targets(selection.targets(predictor.labels))), pooling.scores(scores)
    facts = pooling.table(selection.table, FACTS)
    facts["fold"] = -1 if predictor.info["fold"] is None else predictor.info["fold"]
    facts["seed"] = predictor.info["seed"]
    frames = [
        facts.assign(label=label, target=targets[:, column], score=scores[:, column])
        for column, label in enumerate(predictor.labels)
    ]
    return pd.concat(frames, ignore_index=True)[[*COLUMNS, "source"]]


def scored_units(frames: Sequence[pd.DataFrame], done: Sequence[tuple], recipe: EvaluateRecipe) -> Scored:
    """The arrays behind the figures. frames: `predictions_frame` of every fit; done: (predictor, rows, scores, overlap)."""
    predictors = [entry[0] for entry in done]
    labels, info = predictors[0].labels, predictors[0].info

    def wide(column: str) -> np.ndarray:
        parts = [[frame.loc[frame["label"] == label, column].to_numpy(float) for label in labels] for frame in frames]
        return np.concatenate([np.stack(part, axis=1) for part in parts])

    facts = pd.concat([frame[frame["label"] == labels[0]] for frame in frames], ignore_index=True)
    fits = np.repeat(np.arange(len(frames)), [len(frame) // len(labels) for frame in frames])
    scores, thresholds = wide("score"), [one.info.get("thresholds") for one in predictors]
    called = None
    # thresholds were set on images; the greatest of several scores exceeds them more often
    if recipe.level == "image" and all(thresholds):
        called = scores >= np.array([[found[label] for label in labels] for found in thresholds])[fits]
    known = info.get("data", {}).get("labels")
    return Scored(
        labels=labels,
        targets=wide("target"),
        scores=scores,
        called=called,
        thresholds=thresholds[0] if called is not None and len(frames) == 1 else None,
        patients=facts["patient_id"].to_numpy(),
        facts=facts,
        fits=fits,
        probabilities=info["score"] == "probability",
        train_counts=known,
        resamples=recipe.resamples,
        seed=recipe.seed,
        unit=UNITS[recipe.level],
    )


def data_flow(
    scored: Scored, targets: np.ndarray, done: Sequence[tuple], recipe: EvaluateRecipe
) -> list[dict[str, Any]]:
    """How the scored rows were chosen, step by step: images and patients left after each. targets: of the images."""
    stores = done[0][1].stores
    tables = pd.concat([store.table[["image_id", "patient_id", "split"]] for store in stores])
    copies = int((tables["split"] == LEFT_OUT).sum())
    steps = [("rows of the store", tables, f"{copies} of them left out as copies" if copies else "")]
    if recipe.where:
        steps.append((f"where {recipe.where}", select(recipe.store, where=recipe.where).table, ""))
    rows = pd.concat([selection.table for _, selection, _, _ in done])
    steps.append((f"split {recipe.split}", rows, f"{len(done)} fits" if len(done) > 1 else ""))
    units = {"image": "", "study": "studies", "patient": "patients, each one unit"}[recipe.level]
    flow = [
        {"step": step, "images": len(table), "patients": int(table["patient_id"].nunique()), "note": note}
        for step, table, note in steps
    ]
    people = rows["patient_id"].to_numpy()
    for label, target, counts in zip(scored.labels, targets.T, scored.auroc.counts):
        known = ~np.isnan(target)
        note = f"{counts[0]} positive" + (f" of {counts[0] + counts[1]} {units}" if units else "")
        flow.append({"step": f"known {label}", "images": int(known.sum()), "patients": len(set(people[known])),
                     "note": note})  # fmt: skip
    scored_note = f"{len(scored.targets)} {units}" if units else ""
    flow.append({"step": "scored", "images": len(rows), "patients": flow[-1 - len(scored.labels)]["patients"],
                 "note": scored_note})  # fmt: skip
    return flow


def figures(scored: Scored, done: Sequence[tuple], seen: dict[str, Any], recipe: EvaluateRecipe) -> dict[str, Any]:
    """The part of metrics.json that says how good the scores are, for whom, and what a reader must know."""
    predictor, selection = done[0][0], done[0][1]
    table = metric_table(scored, recipe.prevalence)
    variables, missing = grouped(scored)
    mixed, served = confounders(scored, variables), worst(scored, variables)
    poolings = [Pooling(rows.table, recipe.level, recipe.pool) for _, rows, _, _ in done]
    people = [linked_patients(rows.table)[pooling.first] for pooling, (_, rows, _, _) in zip(poolings, done)]
    targets = np.concatenate([to_targets(rows.targets(scored.labels)) for _, rows, _, _ in done])
    owners = np.concatenate([rows.table["patient_id"].to_numpy() for _, rows, _, _ in done])
    shift = prevalence_shift(scored.labels, targets, owners, scored.train_counts)
    beyond = external(scored, selection, shift, np.concatenate(people), predictor.info, seen)
    words = sentences_of_table(table, scored.probabilities, scored.unit)
    if scored.probabilities and recipe.level != "image":
        words.append(
            f"Calibration is told of the {recipe.pool} of the images' probabilities of each of the {scored.unit}; training "
            "calibrated those of single images, so the pooled ones need not mean what they say."
        )
    if recipe.prevalence is not None and scored.called is None:
        words.append("No predictive values at the stated prevalence: this predictor came without thresholds.")
    if len(done) > 1:
        words.append(sentence_of_fits(scored))
    words += telling(mixed, "difference") + telling(served, "gap")
    words += [text for family in (mixed, served) for text in too_coarse(family, recipe.resamples)]
    words += shift_sentences(beyond["shift"])
    if missing:
        words.append(f"Not recorded for any of the {scored.unit}, so no subgroups by it: {listed(missing)}.")
    return {
        "table": table,
        "averages": averages(scored),
        "decision_curves": decision_curves(scored),
        "calibration_bins": calibration_bins(scored),
        "subgroups": subgroups(scored, variables),
        "confounders": mixed,
        "worst": served,
        "external": beyond,
        "flow": data_flow(scored, targets, done, recipe),
        "sentences": words,
    }


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
    if recipe.prevalence is not None and recipe.level != "image":
        raise CarinaError(
            f"prevalence= gives predictive values at thresholds, which are of images; leave it out with level={recipe.level}"
        )
    folders = runs.split(",")
    if len(folders) > 1 and recipe.split != "fold":
        raise CarinaError("several runs are pooled only as folds of one; give split=fold, or evaluate them one by one")
    if len(folders) > 1 and not recipe.out:
        raise CarinaError("several folds need a place for the pooled result; give out=DIR")
    name = recipe.split.replace("+", "-")
    name += "" if recipe.level == "image" else f"-{recipe.level}-{recipe.pool}"
    out = Path(recipe.out) if recipe.out else Path(folders[0]) / "evaluations" / name
    _check_free(out, recipe)
    done, parts = zip(*(_score_run(folder, recipe, quiet) for folder in folders))
    predictor, selection = done[0][0], done[0][1]
    labels = predictor.labels
    _same_protocol([entry[0] for entry in done])
    frames = [predictions_frame(p, s, scores, recipe.level, recipe.pool) for p, s, scores, _ in done]
    frame = pd.concat(frames, ignore_index=True)
    if frame.duplicated(["image_id", "label"]).any():
        raise CarinaError("two of these runs scored the same images; give each fold once")
    if frame["image_id"].nunique() < MIN_ROWS:
        raise CarinaError(f"{frame['image_id'].nunique()} image is too few to evaluate; widen split= or where=")
    seen = done[0][3] if len(done) == 1 else pooled_overlap([entry[3] for entry in done])
    found = figures(scored_units(frames, done, recipe), done, seen, recipe)
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
        "level": recipe.level,
        "pool": recipe.pool if recipe.level != "image" else None,
        "images": sum(len(rows) for _, rows, _, _ in done),
        "unit": UNITS[recipe.level],
        "units": int(frame["image_id"].nunique()),
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
        **found,
        "scales": scale_table(done, parts, recipe) if len(predictor.members) > 1 else None,
        "audits": _audited(predictor, selection, recipe, folders, quiet),
        **(_beyond(done, found["table"], recipe, quiet) if predictor.info["kind"] == "anomaly" else {}),
    }
    write_table(out / "predictions.parquet", frame[COLUMNS].assign(age=frame["age"].astype(np.float32)))
    write_json(out / "metrics.json", result)
    if result["scales"]:
        with atomic_path(out / "scales.png") as temporary:
            temporary.write_bytes(stack_chart(result["scales"], bool(synthetic), "png"))
    build_report(out, report_content(result, frame, done, folders[0], recipe.examples, recipe.pixels))
    return {**result, "out": str(out), "report": str(out / "report.html")}


def _beyond(done: list[tuple], table: list[dict], recipe: EvaluateRecipe, quiet: bool) -> dict[str, Any]:
    """What is told of an anomaly predictor only: its scorer and region, control rows, localization, and words."""
    predictor, selection = done[0][0], done[0][1]
    member = predictor.members[0]
    controls, words = [], []
    if recipe.level != "image":
        words.append(f"Control rows and maps are of images, so they are left out at the level of {recipe.level}.")
    elif recipe.controls:
        parts = [(p, s) for p, s, _, _ in done]
        controls, why = anomaly.measured_controls(parts, recipe.store, recipe.resamples, recipe.seed, quiet)
        words += [why] if why else []
    low = ["this predictor"] if anomaly.below_chance(table[0]["auroc"]) else []
    low += [row["control"] for row in controls if not row["missing"] and anomaly.below_chance(row["auroc"])]
    if low:
        words.append(f"Below chance ({', '.join(dict.fromkeys(low))}): {BELOW_CHANCE}.")
    found = None
    if len(done) == 1 and recipe.level == "image":  # maps of several fits have no common unit
        found = anomaly.measured_maps(predictor, selection, recipe.resamples, recipe.seed, quiet)
    return {
        "scorer": member.scorer.settings.name,
        "region": member.region,
        "controls": controls,
        "localization": found,
        "words": words,
    }


def _audited(
    predictor: Predictor, selection: Selection, recipe: EvaluateRecipe, folders: list[str], quiet: bool
) -> list[dict[str, Any]]:
    if recipe.audits and len(folders) > 1:
        raise CarinaError("audits are of one predictor; evaluate the folds one by one to audit them")
    runs = recipe.convergence.model_dump()
    settings = AuditSettings(resamples=recipe.resamples, seed=recipe.seed, run=folders[0], **runs)
    return audits.run(recipe.audits, predictor, selection, recipe.store, settings, quiet)


def _check_free(out: Path, recipe: EvaluateRecipe) -> None:
    """An evaluation may be made again, but never replaced by one of other rows."""
    if (out / "metrics.json").is_file():
        old = read_json(out / "metrics.json")
        pool = recipe.pool if recipe.level != "image" else None
        now = {"split": recipe.split, "where": recipe.where, "store_hashes": select(recipe.store).hashes}
        now |= {"level": recipe.level, "pool": pool}
        other = [key for key, value in now.items() if {"level": "image", **old}.get(key) != value]
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
