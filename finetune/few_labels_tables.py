"""The table of a protocol of few labels: AUROC of every arm, mode and count of labelled patients with intervals over test
patients and draws, and paired differences. Values that JSON can hold; few_labels_page shows and draws them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from carina.files import write_json, write_text
from carina.finetune.few_labels_page import draw_curves, figure, markdown
from carina.finetune.few_labels_plan import Cell, LabelRow, LabelsPlan
from carina.finetune.protocol_base import read_cell
from carina.metrics.intervals import difference, holm, interval
from carina.metrics.ranking import average_precision
from carina.metrics.resampling import Replicates, replicate

MACRO = "mean of labels"
OVERALL = "overall"
CORRECTED = 10_000  # resamples where p-values are corrected


@dataclass(frozen=True)
class Kind:
    """A row of the table: all draws of one arm, mode and count."""

    set: str
    arm: str
    mode: str
    patients: str


class Tables:
    """The tables of the cells that are in `out`."""

    def __init__(self, plan: LabelsPlan, out: Path):
        self.plan, self.recipe, self.out = plan, plan.recipe, out
        self.scores: dict[tuple[Kind, int], tuple[pd.DataFrame, list[dict[str, Any]]]] = {}
        self.measured: dict[tuple, Replicates] = {}

    def write(self) -> dict[str, Any]:
        """Measure what has come since, write table.json, table.md and figure.png, and return what the first says."""
        result = {
            "task": "classify",
            "title": self.recipe.title,
            "about": " ".join(self.recipe.about.split()),
            "synthetic": any(found["synthetic"] for found in self.plan.counts.values()),
            "left_out": self.plan.left_out,
            "remarks": self.plan.remarks,
            "resamples": self.recipe.resamples,
            "tables": [self._table(name) for name in self.plan.stores],
        }
        write_json(self.out / "table.json", result)
        write_text(self.out / "table.md", markdown(result))
        draw_curves(result, self.out / "figure.png")
        return result

    def _table(self, name: str) -> dict[str, Any]:
        asked, done = 0, {}
        for arm, entry in self.plan.arms.items():
            for mode in entry.modes:
                for cell in self.plan.cells(name, arm, mode):
                    asked += 1
                    if (self.out / cell.place).is_file():
                        done.setdefault(Kind(name, arm, mode, cell.patients), []).append(cell)
        kinds = {kind: draws for kind, cells in done.items() if (draws := self._draws(name, cells))}
        modes = list(dict.fromkeys(mode for entry in self.plan.arms.values() for mode in entry.modes))
        counts = [str(count) for count in self.recipe.sets[name].patients]
        order = sorted(kinds, key=lambda k: (modes.index(k.mode), counts.index(k.patients)))
        rows = [row for kind in order for row in self._rows(kind, kinds[kind])]
        primary, exploratory = self._contrasts(name, kinds)
        return {
            "set": name,
            "counts": self.plan.counts[name],
            "labels": self.plan.labels[name],
            "cells": {"asked": asked, "done": sum(map(len, done.values()))},
            "rows": rows,
            "primary": primary,
            "exploratory": exploratory,
            "permuted": [self._permuted(row) for row in rows if row["permuted"]],
        }

    def _draws(self, name: str, cells: list[Cell]) -> dict[int, list[Cell]]:
        """The draws of which all folds are there."""
        folds, found = self.recipe.sets[name].folds or 1, {}
        for cell in cells:
            found.setdefault(cell.draw, []).append(cell)
        return {draw: cells for draw, cells in found.items() if len(cells) == folds}

    # -- scores -----------------------------------------------------------------------------------------------------

    def _read(self, kind: Kind, draw: int, cells: list[Cell]) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
        """The scores of one draw, folds pooled by rank, and the facts of its cells. A fit's scores have a scale of their
        own, and where all are equal in one fold they say nothing there: ranks within a fold keep that."""
        if (kind, draw) not in self.scores:
            frames, facts = zip(*(read_cell(self.out / cell.place) for cell in cells))
            parts = []
            for frame in frames:
                if len(frames) > 1:
                    ranks = frame.groupby("label", sort=False)["score"].transform(
                        lambda s: (rankdata(s) - 0.5) / len(s)
                    )
                    frame = frame.assign(score=ranks)
                parts.append(frame)
            self.scores[kind, draw] = (
                pd.concat(parts).sort_values(["label", "image_id"], ignore_index=True),
                list(facts),
            )
        return self.scores[kind, draw]

    def _arrays(
        self, kind: Kind, draws: dict[int, list[Cell]], labels: list[str], where: tuple[str, Any] | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """targets (n, L), scores (k, n, L), patients (n,)."""
        targets, scores = [], []
        for draw in sorted(draws):
            frame, _ = self._read(kind, draw, draws[draw])
            if where:
                frame = frame[frame[where[0]] == where[1]]
            parts = [frame[frame["label"] == label] for label in labels]
            targets = np.stack([part["target"].to_numpy(float) for part in parts], axis=1)
            scores.append(np.stack([part["score"].to_numpy() for part in parts], axis=1))
        return targets, np.stack(scores), parts[0]["patient_id"].to_numpy()

    def _replicates(
        self, kind: Kind, draws: dict[int, list[Cell]], labels: list[str], where: tuple[str, Any] | None, resamples: int
    ) -> Replicates:
        key = (kind, tuple(sorted(draws)), tuple(labels), where, resamples)
        if key not in self.measured:
            targets, scores, patients = self._arrays(kind, draws, labels, where)
            self.measured[key] = replicate(targets, scores, patients, "auroc", resamples, self.recipe.seed)
        return self.measured[key]

    # -- rows -------------------------------------------------------------------------------------------------------

    def _groups(self, name: str) -> list[tuple[str, tuple[str, Any] | None]]:
        table = self.plan.tested(name).table
        inside = [
            (f"{column} {value}", (column, value))
            for column in self.recipe.sets[name].within
            for value in sorted(table[column].dropna().unique())
        ]
        return [(OVERALL, None), *inside]

    def _rows(self, kind: Kind, draws: dict[int, list[Cell]]) -> list[dict[str, Any]]:
        """A row for each label and group; the mean of labels beside them where there are several."""
        labels = self.plan.labels[kind.set]
        facts = [fact for draw in draws for fact in self._read(kind, draw, draws[draw])[1]]
        told = {name: facts[0][name] for name in ("labels_used", "pretext_saw", "transductive", "seen_patients")}
        patients = [fact["patients"] for fact in facts]
        told["labels_used"] = told["labels_used"].replace(f"{patients[0]} patients", _span(patients) + " patients", 1)
        named = {
            "arm": kind.arm,
            "mode": kind.mode,
            "patients": kind.patients,
            "permuted": self.plan.permuted(kind.arm),
        }
        named |= {"labelled_patients": int(np.median(patients)), "draws": len(draws)}
        rows = []
        for group, where in self._groups(kind.set):
            found = self._replicates(kind, draws, labels, where, self.recipe.resamples)
            targets, scores, _ = self._arrays(kind, draws, labels, where)
            for column, label in [*enumerate(labels), *([(None, MACRO)] if len(labels) > 1 else [])]:
                entry = {**named, "label": label, "group": group, "auroc": interval(found, column).to_dict(), **told}
                values = found.point[..., column] if column is not None else np.nanmean(found.point, axis=-1)
                entry["auroc_by_draw"] = [None if np.isnan(value) else float(value) for value in values]
                if column is not None and len(np.unique(targets[~np.isnan(targets[:, column]), column])) == 2:
                    each = [average_precision(targets[:, column], line[:, column]) for line in scores]
                    entry["average_precision"] = float(np.mean(each))
                missing = sum(label in fact["one_class"] for fact in facts)
                entry["one_class"] = f"{missing} of {len(facts)}" if missing else ""
                rows.append(entry)
        return rows

    def _permuted(self, row: dict[str, Any]) -> dict[str, Any]:
        found = row["auroc"]
        inside = found["value"] is not None and found["low"] <= 0.5 <= found["high"]
        names = ("arm", "mode", "patients", "label", "group", "draws")
        return {**{name: row[name] for name in names}, "auroc": found, "at_chance": inside}

    # -- contrasts --------------------------------------------------------------------------------------------------

    def _pair(self, ours: Kind, theirs: Kind, kinds: dict[Kind, dict[int, list[Cell]]], label: str) -> dict[str, Any]:
        """The paired difference of two rows over the draws that both have."""
        shared = set(kinds[ours]) & set(kinds[theirs])
        both = [
            self._replicates(kind, {draw: kinds[kind][draw] for draw in shared}, [label], None, CORRECTED)
            for kind in (ours, theirs)
        ]
        found = difference(*both, 0).to_dict()
        return {
            "label": label,
            "patients": ours.patients,
            "row": {"arm": ours.arm, "mode": ours.mode},
            "reference": {"arm": theirs.arm, "mode": theirs.mode},
            "draws": len(shared),
            "difference": found,
        }

    def _contrasts(
        self, name: str, kinds: dict[Kind, dict[int, list[Cell]]]
    ) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """The contrast that was named beforehand (None: not here, or not done), and all others of the first label against
        the references of their mode, corrected together (Holm)."""
        named, label, primary, others = self.recipe.primary, self.plan.labels[name][0], None, []

        def kind(row: LabelRow, patients: Any) -> Kind:
            return Kind(name, row.arm, row.mode, str(patients))

        if named and named.set == name:
            pair = kind(named, named.patients), kind(named.reference, named.patients)
            if all(one in kinds and kinds[one] for one in pair) and set(kinds[pair[0]]) & set(kinds[pair[1]]):
                primary = self._pair(*pair, kinds, named.label)
                primary["sentence"] = sentence(primary)
        for ours in kinds:
            if self.plan.permuted(ours.arm):
                continue
            references = self.recipe.references.get(ours.mode, [])
            # of two references the later one is compared with the earlier, once
            before = references[: references.index(ours.arm)] if ours.arm in references else references
            for theirs in (replace(ours, arm=arm) for arm in before):
                of_primary = primary and label == named.label and (ours, theirs) == pair
                if theirs in kinds and not of_primary and set(kinds[ours]) & set(kinds[theirs]):
                    others.append(self._pair(ours, theirs, kinds, label))
        values = [entry["difference"].get("p_value") for entry in others]
        for entry, value in zip(others, holm(np.array([np.nan if v is None else v for v in values], dtype=float))):
            entry["p_holm"] = None if np.isnan(value) else float(value)
        return primary, others


def sentence(entry: dict[str, Any]) -> str:
    found, ours, theirs = entry["difference"], entry["row"], entry["reference"]
    if found["value"] is None:
        verdict = found["reason"]
    elif not found["estimable"]:
        verdict = f"too little to rely on: {found['reason']}"
    else:
        apart = (
            "above it" if found["low"] > 0 else "below it" if found["high"] < 0 else "which does not tell them apart"
        )
        verdict = apart
    return (
        f"Primary: {ours['arm']} ({ours['mode']}) minus {theirs['arm']} ({theirs['mode']}) on {entry['label']} with "
        f"{entry['patients']} labelled patients is {figure(found, '+')} over {entry['draws']} draws, {verdict}."
    )


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
