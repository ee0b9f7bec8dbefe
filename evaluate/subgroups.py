"""Figures within a view, a sex, an age band, a manufacturer, a source; whether such a group explains the overall figure; and
which group is served worst. Of groups with few patients nothing is told that says what one of them has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from carina.evaluate.numbers import MACRO, Scored, figure, told
from carina.evaluate.studies import AGES, age_bands
from carina.metrics.intervals import ALPHA, MIN_POSITIVES, Difference, Interval, holm, interval
from carina.metrics.resampling import Replicates, patient_codes
from carina.metrics.strata import alike, by_group, gap, of_group, pairs_by_group, within_groups
from carina.models.hub.few import FEW, FEWER

VARIABLES = ("view", "sex", "age", "manufacturer", "source")
UNKNOWN, OTHER = "unknown", "other"
MOST_GROUPS = 10  # of a variable; the smaller ones are one group
TOO_FEW = f"{FEWER} patients: not shown"
UNCOUNTED = "counts are not shown, so that a smaller group cannot be computed from them"
WORDS = {"age": "age band"}


@dataclass(frozen=True)
class Grouped:
    """One variable: names of its groups, codes (N,), AUROC, average precision and pairs of each group, and why the figures
    or the counts of a group and label are not told: (groups, L) of text, empty where they are."""

    variable: str
    names: list[str]
    codes: np.ndarray
    auroc: list[Replicates]
    ap: list[Replicates]
    pairs: list[Replicates]
    hidden: np.ndarray

    @property
    def word(self) -> str:
        return WORDS.get(self.variable, self.variable)

    def figure(self, measured: Sequence[Replicates], number: int, column: int) -> dict[str, Any] | None:
        """Of one group and label, as far as it may be told."""
        why = self.hidden[number, column]
        if why == TOO_FEW:
            return None
        found = figure(measured[number], column)
        return _uncounted(found) if why else found


def _uncounted(found: dict[str, Any]) -> dict[str, Any]:
    return {key: None if key.startswith("num_") else value for key, value in found.items()}


def groups_of(facts: pd.DataFrame, variable: str) -> np.ndarray:
    """(N,) the group of every row in words; what is not recorded is `unknown`."""
    if variable == "age":
        return np.array([*AGES, UNKNOWN], dtype=object)[age_bands(facts["age"].to_numpy(np.float64))]
    values = facts[variable].fillna("").astype(str).str.strip().replace("", UNKNOWN)
    counts = values.value_counts()
    if len(counts) > MOST_GROUPS:
        values = values.where(values.isin(counts.index[: MOST_GROUPS - 1]), OTHER)
    return values.to_numpy(dtype=object)


def hidden_groups(targets: np.ndarray, patients: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    """(groups, L) of text: why the figures of a group are not told, empty where they are.

    Of a group with fewer than 20 patients of known target nothing is told, and then the next smallest ones lose their counts
    until at least 20 patients are uncounted together: else the whole less what is counted would give back what was not.
    """
    people, hidden = patient_codes(patients), np.full((count, targets.shape[1]), "", dtype=object)
    for column, known in enumerate((~np.isnan(targets)).T):
        found = [np.unique(people[known & (codes == number)]) for number in range(count)]
        sizes = np.array([len(one) for one in found])
        hidden[sizes < FEW, column] = TOO_FEW
        together = np.unique(np.concatenate([one for one in found if len(one) < FEW] or [people[:0]]))
        for number in np.argsort(sizes, kind="stable"):
            if not 0 < len(together) < FEW:
                break
            if sizes[number] >= FEW:
                hidden[number, column] = UNCOUNTED
                together = np.union1d(together, found[number])
    return hidden


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
        drawn = scored.resamples, scored.seed
        auroc, ap = (
            by_group(scored.targets, scored.scores, codes, scored.patients, metric, *drawn)
            for metric in ("auroc", "average_precision")
        )
        pairs = pairs_by_group(scored.targets, codes, scored.patients, *drawn)
        hidden = hidden_groups(scored.targets, scored.patients, codes, len(names))
        found.append(Grouped(variable, names, codes, auroc, ap, pairs, hidden))
    return found, missing


def subgroups(scored: Scored, variables: Sequence[Grouped]) -> list[dict[str, Any]]:
    """A row a variable, group and label. Patients are resampled from all, so a group's size varies as it would.

    Rows of few patients are withheld: they keep their names and lose every figure and count. Those from which they could be
    computed keep AUROC and average precision, which do not add up to those of the whole.
    """
    rows = []
    for one in variables:
        for number, name in enumerate(one.names):
            decided = scored.decided(of_group(scored.targets, one.codes, number))
            for column, label in enumerate(scored.labels):
                why = one.hidden[number, column]
                auroc, counts = one.figure(one.auroc, number, column), one.auroc[number].counts[column]
                rows.append(
                    {
                        "variable": one.variable,
                        "group": name,
                        "label": label,
                        "withheld": bool(why),
                        "n": None if why else int(counts[0] + counts[1]),
                        "patients": None if why else int(counts[5]),
                        "positives": None if why else int(counts[0]),
                        "auroc": auroc,
                        "ap": one.figure(one.ap, number, column),
                        "sensitivity": None if why else figure(decided.get("sensitivity"), column),
                        "specificity": None if why else figure(decided.get("specificity"), column),
                        "note": why or ("" if auroc["estimable"] else auroc["reason"]),
                    }
                )
    return rows


# -- does a group explain the overall figure? ---------------------------------------------------------------------------


def confounders(scored: Scored, variables: Sequence[Grouped]) -> list[dict[str, Any]]:
    """AUROC over all images beside that over pairs of one group, by variable and label; of several labels the mean first.

    Where the first is higher, pairs across groups are ranked better: because the score knows the group, or because the
    finding is more frequent where it shows more plainly. `among_negatives` tells these apart: the AUROC of being of a group
    in which the label is more frequent than overall, by the scores of negatives alone, for which nothing can show. The mean
    is over the labels with at least 20 patients of each class in pairs that count. p-values of the paired differences are
    corrected over all entries (Holm). `separated`: no group has both classes, so that nothing is left within.
    """
    entries, tests = [], []
    for one in variables:
        within = within_groups(one.auroc, one.pairs, scored.auroc)
        shares = _shares(scored, one)
        negatives = scored.measured("auroc", _of_richer_groups(scored, one, shares))
        enough = np.flatnonzero((within.counts[:, 3:5] >= MIN_POSITIVES).all(axis=1))
        columns = [np.array([column]) for column in range(len(scored.labels)) if len(shares[column]) > 1]
        for chosen in [*([enough] if len(enough) > 1 else []), *columns]:
            overall, inside = alike(scored.auroc.select(chosen), within.select(chosen))
            label = None if len(chosen) > 1 else 0
            found = _reliable(gap(overall, inside, label), one.word)
            separated = label == 0 and np.isnan(found.value)
            if separated and (one.hidden[:, chosen[0]].any() or np.isnan(scored.auroc.point[0, chosen[0]])):
                continue
            few, uncounted = ((one.hidden[:, chosen] == why).any(axis=1) for why in (TOO_FEW, UNCOUNTED))
            shown = {name for name, lost in zip(one.names, few | uncounted) if not lost}
            share = {} if label is None else shares[chosen[0]]
            parts = [None if lost else figure(part.select(chosen), label) for part, lost in zip(one.auroc, few)]
            entry = {
                "variable": one.variable,
                "label": MACRO if label is None else scored.labels[chosen[0]],
                "prevalence": {name: value if name in shown else None for name, value in share.items()},
                "overall": figure(scored.auroc.select(chosen) if separated else overall, label),
                "within": _reliable(interval(inside, label), one.word).to_dict(),
                "groups": {
                    name: _uncounted(part) if part and lost else part
                    for name, part, lost in zip(one.names, parts, uncounted)
                },
                "difference": found.to_dict(),
                "among_negatives": figure(negatives.select(chosen), label),
                "separated": bool(separated),
            }
            entries.append(entry)
            tests.append((found, one.word, len(chosen)))
    corrections = _corrected([found for found, *_ in tests])
    for entry, (_, word, count), corrected in zip(entries, tests, corrections):
        entry["p_corrected"] = corrected
        entry["sentence"] = _confounder_sentence(entry, word, count, scored.unit)
    return entries


def _reliable(found: Interval, word: str) -> Any:
    """The figure with a reason of its own where pairs within groups are too few: those of the whole may be many."""
    if found.estimable:
        return found
    if np.isnan(found.value):
        return replace(found, reason=f"no {word} has both classes")
    few = f"pairs of one {word} rest on fewer than {MIN_POSITIVES} patients of a class"
    return replace(found, reason=few) if f"fewer than {MIN_POSITIVES}" in found.reason else found


def _shares(scored: Scored, one: Grouped) -> list[dict[str, float]]:
    """By label the share of positives in every group with known targets."""
    result = []
    for target in scored.targets.T:
        own = {name: target[(one.codes == number) & ~np.isnan(target)] for number, name in enumerate(one.names)}
        result.append({name: float(values.mean()) for name, values in own.items() if len(values)})
    return result


def _of_richer_groups(scored: Scored, one: Grouped, shares: Sequence[dict[str, float]]) -> np.ndarray:
    """(N, L): among negatives 1 in groups with a share of positives above that of all, 0 in those below; else NaN, and in
    groups of few patients."""
    result = np.full(scored.targets.shape, np.nan)
    for column, (target, share) in enumerate(zip(scored.targets.T, shares)):
        well = target == 0
        if well.any():
            hidden = one.hidden[:, column] == TOO_FEW
            by_code = np.where(hidden, np.nan, [share.get(name, np.nan) for name in one.names])
            beyond = by_code[one.codes[well]] - np.nanmean(target)
            result[well, column] = np.where((beyond == 0) | np.isnan(beyond), np.nan, beyond > 0)
    return result


def _corrected(tests: Sequence[Difference], times: Sequence[int] | None = None) -> list[float | None]:
    """Holm's correction of those that can be relied on; times: how many candidates each was chosen from."""
    times = times or [1] * len(tests)
    p_values = np.array([min(1.0, found.p_value * count) if found.estimable else np.nan
                         for found, count in zip(tests, times)])  # fmt: skip
    return [None if np.isnan(p) else float(p) for p in holm(p_values)]


def _confounder_sentence(entry: dict[str, Any], word: str, labels: int, unit: str) -> str:
    """labels: how many a mean is over. unit: images, studies or patients."""
    what = f"Mean over the {labels} labels with enough patients" if labels > 1 else entry["label"]
    shares = {name: share for name, share in entry["prevalence"].items() if share is not None}
    frequent = ""
    if len(shares) > 1:
        high, low = max(shares, key=shares.get), min(shares, key=shares.get)
        frequent = f"It is present in {shares[high]:.0%} of {high} and {shares[low]:.0%} of {low} {unit}. "
    if entry["separated"]:
        return (
            f"{what}: no {word} has {unit} both with and without it, so the {word} alone tells this label and its AUROC, "
            f"{told(entry['overall'])}, may be that of the {word}. {frequent}".strip()
        )
    start = (
        f"{what}: AUROC {told(entry['overall'])} over all {unit}, {told(entry['within'])} over pairs of one {word}; "
        f"difference {told(entry['difference'], signed=True)}. {frequent}"
    )
    found, negatives = entry["difference"], entry["among_negatives"]
    if not found["estimable"]:
        return start + f"Too little to rely on: {found['reason']}."
    if found["low"] <= 0 <= found["high"]:
        return start + f"This test does not show that the {word} adds to the overall figure."
    if entry["p_corrected"] >= ALPHA:
        return start + "The interval excludes 0, but among this many comparisons such a row can be chance."
    if found["value"] < 0:
        return start + (
            f"Pairs of different groups are ranked worse than those of one: scores may mean another thing by {word}."
        )
    if negatives["estimable"] and negatives["low"] > 0.5:
        return start + (
            f"{unit.capitalize()} without the finding score higher too where it is more frequent (AUROC of the {word} among "
            f"them {told(negatives)}), so a part of the overall figure is knowledge of the {word}; read the one within."
        )
    return start + (
        "The overall figure counts pairs across groups, which differ in how often or how plainly the finding shows; "
        f"this can be knowledge of the {word}, but scores without the finding do not show it. Read the one within."
    )


# -- who is served worst ------------------------------------------------------------------------------------------------


def worst(scored: Scored, variables: Sequence[Grouped]) -> list[dict[str, Any]]:
    """By variable and label the group with the lowest AUROC among those that can be estimated, and its gap: the AUROC
    of the other groups, over pairs of one of them, minus its own, on the same resamples.

    Pairs across groups are in neither figure, so that groups which differ in prevalence alone have no gap. The group is
    chosen by looking, so p is multiplied by the number of groups it was chosen from (two groups are one test), then
    corrected over all entries (Holm). Groups of few patients are in neither figure.
    """
    entries, gaps = [], []
    for one in variables:
        for column, label in enumerate(scored.labels):
            shown = np.flatnonzero(one.hidden[:, column] != TOO_FEW)
            parts, pairs = ({n: found[n].select([column]) for n in shown} for found in (one.auroc, one.pairs))
            figures = {number: figure(part, 0) for number, part in parts.items()}
            usable = [number for number in shown if figures[number]["estimable"]]
            if len(usable) < 2:
                continue
            lowest = min(usable, key=lambda number, figures=figures: figures[number]["value"])
            others = [number for number in shown if number != lowest]
            rest = within_groups([parts[n] for n in others], [pairs[n] for n in others], scored.auroc.select([column]))
            found = gap(rest, parts[lowest], 0)
            entries.append(
                {
                    "variable": one.variable,
                    "label": label,
                    "group": one.names[lowest],
                    "auroc": one.figure(one.auroc, lowest, column),
                    "gap": found.to_dict(),
                    "chosen_from": len(usable),
                }
            )
            gaps.append(found)
    for entry, corrected in zip(entries, _corrected(gaps, [_times(entry) for entry in entries])):
        entry["p_corrected"] = corrected
        entry["sentence"] = _worst_sentence(entry, WORDS.get(entry["variable"], entry["variable"]))
    return entries


def _times(entry: dict[str, Any]) -> int:
    """How many tests an entry stands for: of two groups, which is the lower is one two-sided question."""
    return entry["chosen_from"] if entry.get("chosen_from", 1) > 2 else 1


def _worst_sentence(entry: dict[str, Any], word: str) -> str:
    start = (
        f"{entry['label']} is ranked worst in {word} {entry['group']}, AUROC {told(entry['auroc'])}; over pairs of one "
        f"other {word} it is higher by {told(entry['gap'], signed=True)}. "
    )
    if not entry["gap"]["estimable"]:
        return start + f"Too little to rely on: {entry['gap']['reason']}."
    if entry["p_corrected"] < ALPHA and entry["gap"]["value"] > 0:
        return start + "Chance is an unlikely explanation."
    return start + "Some group is always last; this gap can be chance."


def telling(entries: Sequence[dict[str, Any]], key: str) -> list[str]:
    """The sentences of entries whose figure under `key` is unlikely to be chance, or that have none within any group."""
    return [
        entry["sentence"]
        for entry in entries
        if entry.get("separated")
        or (entry["p_corrected"] is not None and entry["p_corrected"] < ALPHA and entry[key]["value"])
    ]


def too_coarse(entries: Sequence[dict[str, Any]], resamples: int) -> list[str]:
    """Said where so many comparisons are made that even a gap which no resample closes would not survive correction."""
    tests = sum(_times(entry) for entry in entries if entry["p_corrected"] is not None)
    if tests / (resamples + 1) < ALPHA:
        return []
    return [
        f"{resamples:,} resamples cannot tell gaps from chance among {tests} comparisons of groups; give resamples="
        f"{10_000 if tests / 10_001 < ALPHA else 100_000}."
    ]
