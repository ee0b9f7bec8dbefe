"""Two arms at their own thresholds: which is right where the other is wrong (McNemar's test)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from carina.draws import permutation
from carina.files import read_json
from carina.metrics.agreement import mcnemar_test
from carina.metrics.intervals import ALPHA, holm
from carina.metrics.resampling import patient_codes


def thresholds_of(folder: str | Path) -> dict[str, float]:
    """By label, from the metrics.json of an evaluation; empty where it has none."""
    path = Path(folder) / "metrics.json"
    table = read_json(path).get("table", []) if path.is_file() else []
    return {row["label"]: row["threshold"] for row in table if row.get("threshold") is not None}


def one_each(patients: np.ndarray, seed: int) -> np.ndarray:
    """Rows (k,), one drawn for every patient: the test takes images for independent, and those of a patient are not."""
    order = permutation(len(patients), "mcnemar", seed)
    return np.sort(order[np.unique(patient_codes(patients)[order], return_index=True)[1]])


def decision_tests(
    labels: Sequence[str],
    target: np.ndarray,
    scores: Sequence[np.ndarray],
    thresholds: Sequence[Mapping[str, float]],
    patients: np.ndarray,
    names: tuple[str, str],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row a label that both arms have thresholds for. target: (n, L) of 0, 1 or NaN; scores: of each arm (n, L).

    One image of every patient with a known target is tested; p-values are corrected over the labels (Holm). Being right
    counts alike with and without the finding, so for a rare one the test is mostly about false alarms.
    """
    rows = []
    for column, label in enumerate(labels):
        if not all(label in found for found in thresholds):
            continue
        known = np.flatnonzero(~np.isnan(target[:, column]))
        if not len(known):
            continue
        chosen = known[one_each(patients[known], seed)]
        called = [one[chosen, column] >= found[label] for one, found in zip(scores, thresholds)]
        tested = mcnemar_test(target[chosen, column].astype(int), *(calls.astype(int) for calls in called))
        limits = {f"threshold_{arm}": found[label] for arm, found in zip("ab", thresholds)}
        rows.append({"label": label, **limits, "images": len(chosen), "left_out": len(known) - len(chosen), **tested})
    for row, corrected in zip(rows, holm(np.array([row["p_value"] for row in rows]))):
        row["p_corrected"] = float(corrected)
        row["sentence"] = _sentence(row, names)
    return rows


def _sentence(row: dict[str, Any], names: tuple[str, str]) -> str:
    drawn = ", one drawn of each patient" if row["left_out"] else ""
    start = (
        f"{row['label']} at the thresholds: on {row['images']} images{drawn}, {names[0]} alone is right "
        f"{row['only_a_right']} times and {names[1]} alone {row['only_b_right']} times (McNemar p = {row['p_value']:.4f}, "
        f"corrected {row['p_corrected']:.4f}). "
    )
    if row["p_corrected"] >= ALPHA:
        return start + "This test cannot tell their decisions apart."
    better = names[0] if row["only_a_right"] > row["only_b_right"] else names[1]
    return start + f"{better[0].upper() + better[1:]} decides rightly more often; chance is an unlikely explanation."
