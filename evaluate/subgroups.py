"""Figures within a view, a sex, an age band, a manufacturer, a source; whether such a group explains the overall figure; and
which group is served worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from carina.evaluate.numbers import MACRO, Scored, figure, told
from carina.metrics.intervals import MIN_POSITIVES, Difference, difference, holm
from carina.metrics.resampling import Replicates, replicate
from carina.metrics.strata import by_group, gap, within_groups

VARIABLES = ("view", "sex", "age", "manufacturer", "source")
AGES = {"0-17": 18, "18-39": 40, "40-59": 60, "60-79": 80, "80+": np.inf}  # bands and the first age beyond each
UNKNOWN, OTHER = "unknown", "other"
MOST_GROUPS = 10  # of a variable; the smaller ones are one group
ALPHA = 0.05
WORDS = {"age": "age band"}


@dataclass(frozen=True)
class Grouped:
    """One variable: names of its groups, codes (N,), AUROC and average precision of each group."""

    variable: str
    names: list[str]
    codes: np.ndarray
    auroc: list[Replicates]
    ap: list[Replicates]

    @property
    def word(self) -> str:
        return WORDS.get(self.variable, self.variable)


def groups_of(facts: pd.DataFrame, variable: str) -> np.ndarray:
    """(N,) the group of every row in words; what is not recorded is `unknown`."""
    if variable == "age":
        ages = facts["age"].to_numpy(np.float64)
        names = np.array([*AGES, UNKNOWN], dtype=object)
        place = np.searchsorted(list(AGES.values()), ages, side="right")
        return names[np.where(np.isnan(ages), len(AGES), place)]
    values = facts[variable].fillna("").astype(str).str.strip().replace("", UNKNOWN)
    counts = values.value_counts()
    if len(counts) > MOST_GROUPS:
        values = values.where(values.isin(counts.index[: MOST_GROUPS - 1]), OTHER)
    return values.to_numpy(dtype=object)


def grouped(scored: Scored) -> tuple[list[Grouped], list[str]]:
    """The variables that part these rows, and the names of those that are recorded for none."""
    found, missing = [], []
    for variable in VARIABLES:
        values = groups_of(scored.facts, variable)
        names = sorted(set(values), key=lambda name: (name in (OTHER, UNKNOWN), name))
        if names == [UNKNOWN]:
            missing.append(variable)
        if len(names) < 2:
            continue
        codes = pd.Categorical(values, categories=names).codes.astype(int)
        given = (scored.targets, scored.scores, codes, scored.patients)
        parts = (by_group(*given, metric, scored.resamples, scored.seed) for metric in ("auroc", "average_precision"))
        found.append(Grouped(variable, names, codes, *parts))
    return found, missing


def _of_group(scored: Scored, one: Grouped, number: int) -> np.ndarray:
    """(N, L) targets, unknown outside the group."""
    return np.where((one.codes == number)[:, None], scored.targets, np.nan)


def subgroups(scored: Scored, variables: Sequence[Grouped]) -> list[dict[str, Any]]:
    """A row a variable, group and label. Patients are resampled from all, so a group's size varies as it would."""
    rows = []
    for one in variables:
        for number, name in enumerate(one.names):
            decided = scored.decided(_of_group(scored, one, number))
            for column, label in enumerate(scored.labels):
                auroc, counts = figure(one.auroc[number], column), one.auroc[number].counts[column]
                rows.append(
                    {
                        "variable": one.variable,
                        "group": name,
                        "label": label,
                        "n": int(counts[0] + counts[1]),
                        "patients": int(counts[5]),
                        "positives": int(counts[0]),
                        "auroc": auroc,
                        "ap": figure(one.ap[number], column),
                        "sensitivity": figure(decided.get("sensitivity"), column),
                        "specificity": figure(decided.get("specificity"), column),
                        "note": "" if auroc["estimable"] else auroc["reason"],
                    }
                )
    return rows


# -- does a group explain the overall figure? ---------------------------------------------------------------------------


def confounders(scored: Scored, variables: Sequence[Grouped]) -> list[dict[str, Any]]:
    """AUROC over all images beside that over pairs of one group, by variable and label; of several labels the mean first.

    Where the first is higher, a part of it is knowledge of the group. The mean is over the labels with at least 20 patients
    in each class. p-values of the paired differences are corrected over all entries (Holm).
    """
    entries, tests = [], []
    enough = np.flatnonzero((scored.auroc.counts[:, 3:5] >= MIN_POSITIVES).all(axis=1))
    for one in variables:
        within = within_groups(scored.targets, one.auroc, scored.auroc, one.codes, scored.patients)
        shares = _shares(scored, one)
        columns = [np.array([column]) for column in range(len(scored.labels)) if len(shares[column]) > 1]
        for chosen in [*([enough] if len(enough) > 1 else []), *columns]:
            overall, inside = scored.auroc.select(chosen), within.select(chosen)
            label = None if len(chosen) > 1 else 0
            found = difference(overall, inside, label)
            if np.isnan(found.value):
                continue
            groups = {name: figure(part.select(chosen), label) for name, part in zip(one.names, one.auroc)}
            entry = {
                "variable": one.variable,
                "label": MACRO if label is None else scored.labels[chosen[0]],
                "prevalence": {} if label is None else shares[chosen[0]],
                "overall": figure(overall, label),
                "within": figure(inside, label),
                "groups": groups,
                "difference": found.to_dict(),
            }
            large = {name for name, part in zip(one.names, one.auroc) if part.counts[chosen[0], 5] >= MIN_POSITIVES}
            entries.append(entry)
            tests.append((found, one.word, large, len(chosen)))
    corrections = _corrected([found for found, *_ in tests])
    for entry, (_, word, large, count), corrected in zip(entries, tests, corrections):
        entry["p_corrected"] = corrected
        entry["sentence"] = _confounder_sentence(entry, word, large, count)
    return entries


def _shares(scored: Scored, one: Grouped) -> list[dict[str, float]]:
    """By label the share of positives in every group with known targets."""
    result = []
    for target in scored.targets.T:
        own = {name: target[(one.codes == number) & ~np.isnan(target)] for number, name in enumerate(one.names)}
        result.append({name: float(values.mean()) for name, values in own.items() if len(values)})
    return result


def _corrected(tests: Sequence[Difference], times: Sequence[int] | None = None) -> list[float | None]:
    """Holm's correction of those that can be relied on; times: how many candidates each was chosen from."""
    times = times or [1] * len(tests)
    p_values = np.array([min(1.0, found.p_value * count) if found.estimable else np.nan
                         for found, count in zip(tests, times)])  # fmt: skip
    return [None if np.isnan(p) else float(p) for p in holm(p_values)]


def _confounder_sentence(entry: dict[str, Any], word: str, large: set[str], labels: int) -> str:
    """large: groups with enough patients for their share of positives to be told; labels: how many a mean is over."""
    what = f"Mean over the {labels} labels with enough patients" if labels > 1 else entry["label"]
    start = (
        f"{what}: AUROC {told(entry['overall'])} over all images, {told(entry['within'])} over pairs of one {word}; "
        f"difference {told(entry['difference'], signed=True)}. "
    )
    shares = {name: share for name, share in entry["prevalence"].items() if name in large}
    if len(shares) > 1:
        high, low = max(shares, key=shares.get), min(shares, key=shares.get)
        start += f"It is present in {shares[high]:.0%} of {high} and {shares[low]:.0%} of {low} images. "
    found = entry["difference"]
    if not found["estimable"]:
        return start + f"Too little to rely on: {found['reason']}."
    if found["low"] <= 0 <= found["high"]:
        return start + f"This test does not show that the {word} adds to the overall figure."
    if entry["p_corrected"] >= ALPHA:
        return start + "The interval excludes 0, but among this many comparisons such a row can be chance."
    if found["value"] > 0:
        return (
            start + f"A part of the overall figure is knowledge of the {word}, not of the finding; read the one within."
        )
    return (
        start
        + f"Pairs of different groups are ranked worse than those of one: the {word} hides a part of what is seen."
    )


# -- who is served worst ------------------------------------------------------------------------------------------------


def worst(scored: Scored, variables: Sequence[Grouped]) -> list[dict[str, Any]]:
    """By variable and label the group with the lowest AUROC among those that can be estimated, and its gap: the AUROC
    of all other images minus its own, on the same resamples.

    The group is chosen by looking, so p is multiplied by the number of groups it was chosen from (two groups are one test),
    then corrected over all entries (Holm).
    """
    entries, gaps, times = [], [], []
    for one in variables:
        figures = [[figure(part, column) for part in one.auroc] for column in range(len(scored.labels))]
        usable = [[number for number, found in enumerate(row) if found["estimable"]] for row in figures]
        columns = [column for column, numbers in enumerate(usable) if len(numbers) > 1]
        if not columns:
            continue
        lowest = {c: min(usable[c], key=lambda number, c=c: figures[c][number]["value"]) for c in columns}
        outside = np.stack([one.codes != lowest[c] for c in columns], axis=1)
        targets = np.where(outside, scored.targets[:, columns], np.nan)
        rest = replicate(
            targets, scored.scores[None][..., columns], scored.patients, "auroc", scored.resamples, scored.seed
        )
        for place, column in enumerate(columns):
            found = gap(rest.select([place]), one.auroc[lowest[column]].select([column]), 0)
            entries.append(
                {
                    "variable": one.variable,
                    "label": scored.labels[column],
                    "group": one.names[lowest[column]],
                    "auroc": figures[column][lowest[column]],
                    "gap": found.to_dict(),
                }
            )
            gaps.append(found)
            times.append(len(usable[column]) if len(usable[column]) > 2 else 1)
    for entry, corrected in zip(entries, _corrected(gaps, times)):
        entry["p_corrected"] = corrected
        entry["sentence"] = _worst_sentence(entry, WORDS.get(entry["variable"], entry["variable"]))
    return entries


def _worst_sentence(entry: dict[str, Any], word: str) -> str:
    start = (
        f"{entry['label']} is ranked worst in {word} {entry['group']}, AUROC {told(entry['auroc'])}; all other images have "
        f"{told(entry['gap'], signed=True)} more. "
    )
    if not entry["gap"]["estimable"]:
        return start + f"Too little to rely on: {entry['gap']['reason']}."
    if entry["p_corrected"] < ALPHA and entry["gap"]["value"] > 0:
        return start + "Chance is an unlikely explanation."
    return start + "Some group is always last; this gap can be chance."


def telling(entries: Sequence[dict[str, Any]], key: str) -> list[str]:
    """The sentences of entries whose figure under `key` is unlikely to be chance."""
    return [
        entry["sentence"]
        for entry in entries
        if entry["p_corrected"] is not None and entry["p_corrected"] < ALPHA and entry[key]["value"]
    ]


def too_coarse(entries: Sequence[dict[str, Any]], resamples: int) -> list[str]:
    """Said where so many comparisons are made that even a gap which no resample closes would not survive correction."""
    tests = sum(entry["p_corrected"] is not None for entry in entries)
    if tests / (resamples + 1) < ALPHA:
        return []
    return [
        f"{resamples:,} resamples cannot tell gaps from chance among {tests} comparisons of groups; give resamples="
        f"{10_000 if tests / 10_001 < ALPHA else 100_000}."
    ]
