"""What each scale of a stack is worth: AUROC of every member beside the stack, by finding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from carina.data.labels import to_targets
from carina.evaluate.studies import Pooling
from carina.metrics.intervals import difference, interval
from carina.metrics.resampling import replicate


def scale_table(done: Sequence[tuple], parts: Sequence[list[np.ndarray]], recipe) -> dict[str, Any]:
    """Rows by member and finding, and the best scale of each finding on these very images.

    done: (predictor, rows, scores, overlap) of every run; parts: the scores (N, L) of its members. A row holds the member's
    AUROC and `stack_minus`, the stack's minus it, paired; `weight` is the mean over runs. The best scale is chosen on the
    images it is measured on, so its AUROC flatters it and the stack is held against the hardest member; `chosen` is the
    one that scores out of training found best beforehand.
    """
    predictor = done[0][0]
    labels, members = predictor.labels, predictor.members
    poolings = [Pooling(rows.table, recipe.level, recipe.pool) for _, rows, _, _ in done]
    targets = np.concatenate(
        [pool.targets(to_targets(rows.targets(labels))) for pool, (_, rows, _, _) in zip(poolings, done)]
    )
    patients = np.concatenate(
        [rows.table["patient_id"].to_numpy()[pool.first] for pool, (_, rows, _, _) in zip(poolings, done)]
    )
    weights = np.mean([[p.info["stack"][label] for label in labels] for p, _, _, _ in done], axis=0)

    def measured(found: Sequence[np.ndarray]) -> Any:
        scores = np.concatenate([pool.scores(part) for pool, part in zip(poolings, found)])
        return replicate(targets, scores[None], patients, "auroc", recipe.resamples, recipe.seed)

    stack = measured([scores for _, _, scores, _ in done])
    columns: list[int | None] = [*([None] if len(labels) > 1 else []), *range(len(labels))]
    rows, best = [], {}
    for number, member in enumerate(members):
        found = measured([part[number] for part in parts])
        rows += [
            {
                "scale": member.scale,
                "label": "macro" if column is None else labels[column],
                "weight": float(weights[:, number].mean() if column is None else weights[column, number]),
                "auroc": interval(found, column).to_dict(),
                "stack_minus": difference(stack, found, column).to_dict(),
            }
            for column in columns
        ]
    for label in dict.fromkeys(row["label"] for row in rows):
        ranked = [row for row in rows if row["label"] == label and row["auroc"]["value"] is not None]
        if ranked:
            top = max(ranked, key=lambda row: row["auroc"]["value"])
            best[label] = {"scale": top["scale"], **_chosen(done, label)}
    return {
        "scales": [member.scale for member in members],
        "weights": {label: [float(w) for w in row] for label, row in zip(labels, weights)},
        "from": predictor.info["stack_from"],
        "rows": rows,
        "best": best,
    }


def _chosen(done: Sequence[tuple], label: str) -> dict[str, int]:
    """The scale with the greatest mean AUROC over the runs' scores out of training (macro: over the findings too)."""
    found = [p.info["stack_auroc"] for p, _, _, _ in done]
    rows = [one for run in found for name, one in run.items() if label in ("macro", name) and None not in one.values()]
    return {"chosen": int(max(rows[0], key=lambda scale: np.mean([row[scale] for row in rows])))} if rows else {}
