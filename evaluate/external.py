"""Whether a test is external, how the findings' frequencies moved, and what recalibration on the new patients gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from carina.data.splits import patient_folds
from carina.data.store import Selection
from carina.evaluate.numbers import Scored, figure, listed
from carina.metrics.intervals import MIN_POSITIVES
from carina.metrics.reliability import calibration_line, recalibrated, recalibration, replicate_calibration
from carina.models.hub.clauses import origins_of
from carina.models.hub.few import FEW

MOVED = 2.0  # ratio of prevalences above which a shift is said


def families(origins: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]]:
    """By source, lower case: every name that its pictures or patients go by, its catalogs' parents among them."""
    return {
        source: {name.lower() for name in (source, origin.get("name", ""), *origin.get("lineage", ())) if name}
        for source, origin in origins.items()
    }


def kind_of_test(selection: Selection, info: Mapping[str, Any], overlap: Mapping[str, Any]) -> tuple[str, str]:
    """internal, external or unknown, and why in a sentence.

    A test is internal where a store, a patient, a picture or a source (or its parent, or a sibling of one parent) was
    trained on; external where everything that was trained on is known and none of these were; else unknown.
    """
    trained = families(origins_of(info))
    sources = sorted(set(selection.table["source"]))
    tested = families({source: selection.origins.get(source, {}) for source in sources})
    shared = sorted(source for source in tested if any(tested[source] & names for names in trained.values()))
    seen = sum(stage["patients"] + stage["identical_images"] for stage in overlap["stages"].values())
    if set(selection.hashes) & _trained_stores(info):
        return "internal", "Internal test: its store is one that the model was trained on."
    if shared:
        related = [_relation(source, tested[source], trained) for source in shared]
        return "internal", f"Internal test: {listed(related)}."
    if seen:
        return "internal", "Internal test: patients or pictures of it were trained on."
    doubts = list(overlap["doubts"])
    if alike := sum(stage.get("near_identical_images", 0) for stage in overlap["stages"].values()):
        doubts.append(f"{alike} images look the same as ones that were trained on")
    if doubts or not trained:
        return "unknown", (
            f"Whether this test is external is unknown: {listed(doubts or ['no source of training images was recorded'])}."
        )
    return "external", (
        f"External test: {listed(sources)} shares no source, patient or picture with what was trained on "
        f"({listed(sorted(trained))}), as far as sources are named."
    )


def _trained_stores(info: Mapping[str, Any]) -> set[str]:
    return {*info["store_hashes"], *((info.get("pretraining") or {}).get("store_hashes") or ())}


def _relation(source: str, names: set[str], trained: Mapping[str, set[str]]) -> str:
    for other, theirs in trained.items():
        if source.lower() == other.lower():
            return f"{source} was trained on"
        if names & theirs:
            common = listed(sorted(names & theirs))
            return f"{source} shares pictures or patients of {common} with {other}, which was trained on"
    return source


def external(
    scored: Scored, selection: Selection, shift: list[dict[str, Any]], people: np.ndarray, info: Mapping[str, Any],
    overlap: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """kind and sentence, the shift of every label's prevalence, and recalibration where the test is not internal.

    shift: of `prevalence_shift`. people: (N,) whom scored units are kept together by, linked patients.
    """
    kind, sentence = kind_of_test(selection, info, overlap)
    mended = recalibrations(scored, people) if kind != "internal" and scored.probabilities else []
    return {"kind": kind, "sentence": sentence, "shift": shift, "recalibration": mended}


def prevalence_shift(
    labels: Sequence[str],
    targets: np.ndarray,
    patients: np.ndarray,
    train_counts: Mapping[str, Mapping[str, int]] | None,
) -> list[dict[str, Any]]:
    """Share of positives among the known images in training and here, by label.

    targets: (images, L) of 0, 1 or NaN, of images even where studies or patients are scored: a patient of many images is
    positive more often than one image of his. patients: (images,). None where nothing is known, with fewer than 20 patients
    here, and with fewer than 20 images in training.
    """
    rows = []
    for label, target in zip(labels, targets.T):
        counts = (train_counts or {}).get(label)
        trained = counts["positive"] + counts["negative"] if counts else 0
        known = ~np.isnan(target)
        enough, before = len(set(patients[known])) >= FEW, trained >= FEW
        rows.append(
            {
                "label": label,
                "train_prevalence": counts["positive"] / trained if before else None,
                "test_prevalence": float((target[known] == 1).mean()) if enough else None,
                "train_n": trained if before else None,
                "test_n": int(known.sum()) if enough else None,
            }
        )
    return rows


def recalibrations(scored: Scored, people: np.ndarray) -> list[dict[str, Any]]:
    """Temperature and intercept by label, fitted on one half of the patients and measured on the other, both ways round.

    temperature and intercept are means of the two fits. Labels with fewer than 20 patients of a class in a half are left
    out: nothing can be fitted to them.
    """
    half = patient_folds(list(people), 2, scored.seed)
    result = []
    for column, label in enumerate(scored.labels):
        target, score = scored.targets[:, column], scored.scores[:, column]
        counts = [len(set(people[(half == side) & (target == value)])) for side in (0, 1) for value in (0, 1)]
        if min(counts) < MIN_POSITIVES:
            continue
        fits = [recalibration(target[half == side], score[half == side]) for side in (0, 1)]
        mended = np.empty(len(score))
        for side, fit in enumerate(fits):
            mended[half != side] = recalibrated(score[half != side], *fit)
        known = ~np.isnan(target)
        temperature, intercept = np.mean(fits, axis=0)
        result.append(
            {
                "label": label,
                "patients_fitted": min(len(set(people[known & (half == side)])) for side in (0, 1)),
                "patients_left": len(set(people[known])),
                "temperature": float(temperature),
                "intercept": float(intercept),
                "before": _calibration(scored, target, score),
                "after": _calibration(scored, target, mended),
            }
        )
    return result


def _calibration(scored: Scored, target: np.ndarray, score: np.ndarray) -> dict[str, Any]:
    found = replicate_calibration(target[:, None], score[:, None], scored.patients, scored.resamples, scored.seed)
    slope, intercept = calibration_line(target, score, scored.patients)
    return {
        "brier": figure(found["brier"], 0),
        "ece": figure(found["ece"], 0, "centered"),
        "slope": slope.to_dict(),
        "intercept": intercept.to_dict(),
    }


def shift_sentences(shift: list[dict[str, Any]]) -> list[str]:
    """Labels whose share of positives here is less than half or more than twice that in training, rare ones left out."""
    moved = [
        f"{row['label']} {row['train_prevalence']:.1%} to {row['test_prevalence']:.1%}"
        for row in shift
        if row["train_prevalence"] and row["test_prevalence"]
        and max(row["train_prevalence"], row["test_prevalence"]) * row["test_n"] >= MIN_POSITIVES
        and not 1 / MOVED <= row["test_prevalence"] / row["train_prevalence"] <= MOVED
    ]  # fmt: skip
    if not moved:
        return []
    return [
        f"Findings are much rarer or more frequent here than in training ({listed(moved)}), so probabilities and predictive "
        "values do not carry over; AUROC does not depend on that share."
    ]
