"""What an evaluation says in figures: the table, averages over labels, decision curves, calibration, and plain sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from carina.errors import CarinaError, nearest
from carina.metrics.decisions import net_benefit
from carina.metrics.intervals import ALPHA, MIN_POSITIVES, holm, interval, p_value_against
from carina.metrics.ranking import false_positive_rate
from carina.metrics.reliability import BINS, calibration_line, reliability, replicate_calibration
from carina.metrics.resampling import Replicates, replicate
from carina.metrics.strata import by_group, pairs_by_group, within_groups
from carina.metrics.thresholds import AT_PREVALENCE, NAMES, replicate_decisions

MACRO = "macro"
ESTIMABLE = "estimable"
# by positives in training (Holste et al., DALI 2022, cut NIH and MIMIC there)
HEAD, TAIL = 1000, 100
TREATED = np.arange(0.01, 1, 0.01)  # probabilities at which one would act, of decision curves
CALIBRATION = ("brier", "ece", "calibration_slope", "calibration_intercept")


@dataclass(frozen=True)
class Scored:
    """Scored units (images, studies or patients) of all fits: targets (N, L) of 0, 1 or NaN, scores (N, L), called (N, L)
    bool by each fit's own thresholds or None, facts (N rows: view, sex, age, manufacturer, source), fits (N,) numbers.

    thresholds: by label, where there is one fit. probabilities: whether scores are. train_counts: images in training by
    label (positive, negative), None where they are not known. unit: what is scored, in the plural.
    """

    labels: list[str]
    targets: np.ndarray
    scores: np.ndarray
    called: np.ndarray | None
    thresholds: dict[str, float] | None
    patients: np.ndarray
    facts: pd.DataFrame
    fits: np.ndarray
    probabilities: bool
    train_counts: dict[str, dict[str, int]] | None
    resamples: int
    seed: int
    unit: str = "images"

    def measured(self, metric: str, targets: np.ndarray | None = None) -> Replicates:
        targets = self.targets if targets is None else targets
        return replicate(targets, self.scores[None], self.patients, metric, self.resamples, self.seed)

    @cached_property
    def auroc(self) -> Replicates:
        return self.measured("auroc")

    @cached_property
    def ap(self) -> Replicates:
        return self.measured("average_precision")

    def decided(self, targets: np.ndarray | None = None, prevalence: np.ndarray | None = None) -> dict[str, Replicates]:
        """Sensitivity and the like; empty without thresholds."""
        if self.called is None:
            return {}
        targets = self.targets if targets is None else targets
        return replicate_decisions(targets, self.called, self.patients, prevalence, self.resamples, self.seed)


def figure(found: Replicates | None, column: int | None, method: str = "bca") -> dict[str, Any] | None:
    """A figure with its interval as JSON values; None where it was not measured."""
    return None if found is None else interval(found, column, method).to_dict()


def one_class(target: np.ndarray) -> bool:
    return not ((target == 1).any() and (target == 0).any())


def stated_prevalence(given: float | dict[str, float] | None, labels: Sequence[str]) -> np.ndarray | None:
    """(L,) prevalences that were stated, NaN where none was; None without any."""
    if given is None:
        return None
    if isinstance(given, dict):
        for name in given:
            if name not in labels:
                raise CarinaError(
                    f"prevalence= names {name}, which this predictor does not predict{nearest(name, labels)}; it predicts "
                    f"{', '.join(labels)}"
                )
        return np.array([given.get(label, np.nan) for label in labels])
    return np.full(len(labels), given)


def metric_table(scored: Scored, prevalence: float | dict[str, float] | None = None) -> list[dict[str, Any]]:
    """A row a label, and the macro mean first when there are several; figures with intervals over patients.

    Sensitivity to F1 are those of the thresholds that came with the predictor; calibration is of probabilities alone.
    """
    stated = stated_prevalence(prevalence, scored.labels)
    decided = scored.decided(prevalence=stated)
    calibrated = {}
    if scored.probabilities:
        calibrated = replicate_calibration(
            scored.targets, scored.scores, scored.patients, scored.resamples, scored.seed, BINS
        )
    rows = [_row(scored, column, decided, calibrated, stated) for column in range(len(scored.labels))]
    for row, p in zip(rows, _chance(scored, rows)):
        row["p_chance"] = None if np.isnan(p) else float(p)
    if len(rows) == 1:
        return rows
    empty = dict.fromkeys(
        (*CALIBRATION, *NAMES, "positives", "unknown", "threshold", "fpr95", "at_prevalence", "p_chance")
    )
    macro = {**_start(scored, None), **empty, "one_class": all(row["one_class"] for row in rows)}
    return [macro, *rows]


def _chance(scored: Scored, rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """(L,) p-values of ranking by chance, AUROC 0.5, corrected over the labels that can be estimated (Holm)."""
    sure = [row["auroc"]["estimable"] for row in rows]
    return holm(np.array([p_value_against(scored.auroc, 0.5, c) if ok else np.nan for c, ok in enumerate(sure)]))


def _start(scored: Scored, column: int | None) -> dict[str, Any]:
    part = scored.targets if column is None else scored.targets[:, [column]]
    auroc, ap = figure(scored.auroc, column), figure(scored.ap, column)
    return {
        "label": MACRO if column is None else scored.labels[column],
        "n": int((~np.isnan(part)).any(axis=1).sum()),
        "positives": int((part == 1).sum()),
        "unknown": int(np.isnan(part).sum()),
        "auroc": auroc,
        "ap": ap,
        "note": "" if auroc["estimable"] else auroc["reason"],
    }


def _row(
    scored: Scored,
    column: int,
    decided: dict[str, Replicates],
    calibrated: dict[str, Replicates],
    stated: np.ndarray | None,
) -> dict[str, Any]:
    target, score = scored.targets[:, column], scored.scores[:, column]
    slope = intercept = None
    if scored.probabilities:
        slope, intercept = (found.to_dict() for found in calibration_line(target, score, scored.patients))
    fpr = false_positive_rate(target, score)
    return {
        **_start(scored, column),
        "one_class": one_class(target),
        "brier": figure(calibrated.get("brier"), column),
        "ece": figure(calibrated.get("ece"), column, "centered"),
        "calibration_slope": slope,
        "calibration_intercept": intercept,
        "threshold": scored.thresholds[scored.labels[column]] if scored.thresholds else None,
        **{name: figure(decided.get(name), column) for name in NAMES},
        "at_prevalence": _at_prevalence(decided, column, stated),
        "fpr95": None if np.isnan(fpr) else fpr,
    }


def _at_prevalence(decided: dict[str, Replicates], column: int, stated: np.ndarray | None) -> dict[str, Any] | None:
    if not decided or stated is None or np.isnan(stated[column]):
        return None
    ppv, npv = (figure(decided[name], column) for name in AT_PREVALENCE)
    return {"prevalence": float(stated[column]), "ppv": ppv, "npv": npv}


# -- averages over labels -----------------------------------------------------------------------------------------------


def averages(scored: Scored) -> list[dict[str, Any]]:
    """Means over labels (all, and those that training showed often, less often, seldom) and all decisions pooled."""
    if len(scored.labels) < 2:
        return []
    usable = np.array([not one_class(target) for target in scored.targets.T])
    entries = [
        _average(scored, MACRO, np.ones(len(usable), bool), usable, "the mean over labels, each counting the same")
    ]
    enough = (scored.auroc.counts[:, 3:5] >= MIN_POSITIVES).all(axis=1)
    if enough.any() and not enough[usable].all():
        words = f"the mean over labels with at least {MIN_POSITIVES} patients of each class"
        entries.append(_average(scored, ESTIMABLE, enough, usable, words))
    flat, scores = scored.targets.reshape(-1, 1), scored.scores.reshape(1, -1, 1)
    people = np.repeat(scored.patients, len(scored.labels))
    pooled = [
        replicate(flat, scores, people, metric, scored.resamples, scored.seed)
        for metric in ("auroc", "average_precision")
    ]
    entries.append(
        {
            "name": "micro",
            "labels": scored.labels,
            "left_out": [],
            "words": f"every label of all {scored.unit} ranked together, so frequent labels count more and scores of "
            "different labels must mean the same",
            "auroc": figure(pooled[0], 0),
            "ap": figure(pooled[1], 0),
        }
    )
    return entries + _by_frequency(scored, usable)


def _average(scored: Scored, name: str, chosen: np.ndarray, usable: np.ndarray, words: str) -> dict[str, Any]:
    taken = chosen & usable
    labels = np.array(scored.labels)
    one = int(np.flatnonzero(taken)[0]) if taken.sum() == 1 else None
    return {
        "name": name,
        "labels": labels[taken].tolist(),
        "left_out": labels[chosen & ~usable].tolist(),
        "words": words,
        "auroc": figure(scored.auroc if one is not None else scored.auroc.select(taken), one) if taken.any() else None,
        "ap": figure(scored.ap if one is not None else scored.ap.select(taken), one) if taken.any() else None,
    }


def _by_frequency(scored: Scored, usable: np.ndarray) -> list[dict[str, Any]]:
    if scored.train_counts is not None:
        counts, where = [scored.train_counts[label]["positive"] for label in scored.labels], "images in training"
    else:
        counts, where = (
            (scored.targets == 1).sum(axis=0),
            f"{scored.unit} in this test (those in training are not known)",
        )
    counts = np.asarray(counts)
    bands = {
        "head": (counts > HEAD, f"more than {HEAD:,}"),
        "medium": ((counts >= TAIL) & (counts <= HEAD), f"{TAIL} to {HEAD:,}"),
        "tail": (counts < TAIL, f"fewer than {TAIL}"),
    }
    if sum(chosen.any() for chosen, _ in bands.values()) < 2:
        return []
    return [
        _average(scored, name, chosen, usable, f"the mean over labels with {bounds} positive {where}")
        for name, (chosen, bounds) in bands.items()
        if chosen.any()
    ]


# -- curves -------------------------------------------------------------------------------------------------------------


def decision_curves(scored: Scored) -> dict[str, Any] | None:
    """Net benefit of acting by the model and of acting on everybody, by label and threshold; probabilities only."""
    if not scored.probabilities:
        return None
    found = {}
    for label, target, score in zip(scored.labels, scored.targets.T, scored.scores.T):
        if not one_class(target):
            benefit = net_benefit(target, score, TREATED)
            found[label] = {"threshold": TREATED.round(2).tolist()}
            found[label] |= {name: benefit[name].tolist() for name in ("model", "all")}
    return found


def calibration_bins(scored: Scored) -> dict[str, Any] | None:
    """Predicted and observed shares in bins of equally many images, by label; probabilities only."""
    if not scored.probabilities:
        return None
    return {
        label: reliability(target, score, BINS)
        for label, target, score in zip(scored.labels, scored.targets.T, scored.scores.T)
        if not one_class(target)
    }


# -- in words -----------------------------------------------------------------------------------------------------------


def told(found: dict[str, Any], signed: bool = False) -> str:
    """A figure with its interval."""
    sign = "+" if signed else ""
    text = f"{found['value']:{sign}.2f}"
    return text if found["low"] is None else f"{text} ({found['low']:{sign}.2f} to {found['high']:{sign}.2f})"


def listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def sentences_of_table(table: Sequence[dict[str, Any]], probabilities: bool = True, unit: str = "images") -> list[str]:
    """Which labels have one class, too few patients, or (of probabilities) rank below chance, many labels allowed for."""
    rows = [row for row in table if row["label"] != MACRO]
    single = [row["label"] for row in rows if row["one_class"]]
    few = [row["label"] for row in rows if not row["one_class"] and not row["auroc"]["estimable"]]
    low = [row for row in rows if probabilities and row["auroc"]["estimable"] and row["auroc"]["high"] < 0.5]
    words = []
    if single:
        words.append(f"One class only, so nothing can be ranked: {listed(single)}.")
    if few:
        words.append(
            f"Not estimable, with fewer than {MIN_POSITIVES} patients in a class or no resample that differs: "
            f"{listed(few)}. Their figures are shown and should not be relied on."
        )
    words += [
        f"{row['label']} ranks below chance, AUROC {told(row['auroc'])}: {unit} with it get lower scores than others, so "
        "the model may read something that here goes with its absence."
        for row in low
        if row["p_chance"] < ALPHA
    ]
    return words


def sentence_of_fits(scored: Scored) -> str:
    """What pooling the scores of several fits means, and the AUROC over pairs of images of one fit."""
    parts = by_group(
        scored.targets, scored.scores, scored.fits, scored.patients, "auroc", scored.resamples, scored.seed
    )
    pairs = pairs_by_group(scored.targets, scored.fits, scored.patients, scored.resamples, scored.seed)
    within = within_groups(parts, pairs, scored.auroc)
    found = figure(within, 0 if len(scored.labels) == 1 else None)
    text = (
        f"Scores of {len(parts)} fits are pooled as they are: each is of the fit that never saw its patient, "
        f"and pairs of {scored.unit} of two fits count, so a difference of scale between fits costs AUROC."
    )
    return text + (f" Over pairs of one fit alone it is {told(found)}." if found["value"] is not None else "")
