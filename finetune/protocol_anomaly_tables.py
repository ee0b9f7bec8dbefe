"""The tables of a protocol: what is done of it, with intervals over patients and seeds, the control rows, what may be
claimed, and published figures apart from ours. Values that JSON can hold; protocol_anomaly_page shows them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from carina.files import write_json, write_text
from carina.finetune.protocol_anomaly_page import below, markdown, words
from carina.finetune.protocol_anomaly_plan import Cell, Plan, Row
from carina.finetune.protocol_base import read_cell
from carina.finetune.protocol_page import figure
from carina.metrics.intervals import difference, interval
from carina.metrics.ranking import auroc, average_precision, false_positive_rate
from carina.metrics.resampling import Replicates, replicate
from carina.models.controls import BACKGROUND_ONLY, LUNGS_ONLY, Control


@dataclass(frozen=True)
class Measured:
    """Rows of one kind over seeds: entry (JSON values) and the replicates of their AUROC, None where nothing is ranked."""

    entry: dict[str, Any]
    replicates: Replicates | None


class Tables:
    """The tables of the cells that are in `out`. controls: the control rows of every set."""

    def __init__(self, plan: Plan, out: Path, controls: dict[str, list[Control]]):
        self.plan, self.recipe, self.out, self.controls = plan, plan.recipe, out, controls
        self.measured: dict[tuple[Path, ...], Measured] = {}

    def write(self) -> dict[str, Any]:
        """Measure every cell that has come since, write table.json and table.md, and return what the first says."""
        result = {
            "title": self.recipe.title,
            "about": " ".join(self.recipe.about.split()),
            "synthetic": any(found["synthetic"] for found in self.plan.counts.values()),
            "left_out": self.plan.left_out,
            "remarks": self.plan.remarks,
            "tables": [self._table(name) for name in self.plan.stores],
            "published": [row.model_dump() for row in self.plan.published],
            "resamples": self.recipe.resamples,
        }
        write_json(self.out / "table.json", result)
        write_text(self.out / "table.md", markdown(result))
        return result

    def _table(self, name: str) -> dict[str, Any]:
        asked = [cell for unit in self.plan.units if unit.set == name for cell in unit.cells]
        done: dict[Cell, list[Cell]] = {}  # the cells of all seeds under the first of them
        for cell in asked:
            if (self.out / cell.place).is_file():
                done.setdefault(replace(cell, seed=self.recipe.seeds[0]), []).append(cell)
        order, regions = list(self.plan.arms), self.recipe.regions
        kinds = sorted(done, key=lambda c: (order.index(c.arm), c.checkpoint != "last", regions.index(c.region)))
        rows = {kind: self._measure(done[kind]) for kind in kinds}
        clean = {kind: row for kind, row in rows.items() if not kind.share}
        primary = self._primary(name, clean)
        entries = [row.entry | {"primary": bool(primary) and kind == primary["kind"]} for kind, row in clean.items()]
        return {
            "set": name,
            "counts": self.plan.counts[name],
            "cells": {"asked": len(asked), "done": sum(map(len, done.values()))},
            "rows": entries,
            "primary": {key: value for key, value in primary.items() if key != "kind"} if primary else None,
            "controls": [row.entry for row in self._control_rows(name)],
            "lungs_minus_background": self._regions(name, clean),
            "contamination": [self._contaminated(kind, done) for kind in kinds if kind.share],
            "below_chance": [words(entry) for entry in entries if below(entry["auroc"])],
        }

    def _measure(self, cells: list[Cell]) -> Measured:
        first = cells[0]
        named = {key: getattr(first, key) for key in ("arm", "checkpoint", "scorer", "region", "share")}
        return self._over_seeds(named, tuple(self.out / cell.place for cell in cells))

    def _over_seeds(self, named: dict[str, Any], paths: tuple[Path, ...]) -> Measured:
        if paths not in self.measured:
            cells = [read_cell(path) for path in paths]
            facts = [fact for _, fact in cells]
            entry = {**named, "seeds": len(cells)}
            if facts[0].get("missing"):
                self.measured[paths] = Measured(entry | {"missing": facts[0]["missing"]}, None)
            else:
                figures, found = measure([frame for frame, _ in cells], self.recipe.resamples, self.recipe.seed)
                self.measured[paths] = Measured(entry | figures | told(facts), found)
        return self.measured[paths]

    def _primary(self, name: str, rows: dict[Cell, Measured]) -> dict[str, Any] | None:
        """The row named beforehand against the row that it must beat, at the last epoch."""
        named = self.recipe.primary

        def kind(row: Row) -> Cell:
            checkpoint = "frozen" if self.recipe.arms[row.arm].mode == "frozen" else "last"
            return Cell(name, row.arm, self.recipe.seeds[0], 0.0, checkpoint, row.region, row.scorer)

        if named is None or kind(named) not in rows or kind(named.reference) not in rows:
            return None
        ours, theirs = rows[kind(named)], rows[kind(named.reference)]
        found = difference(ours.replicates, theirs.replicates, 0)
        role = "Primary" if name == named.set else "The primary contrast on other rows"
        verdict = "above it" if found.low > 0 else "below it" if found.high < 0 else "which does not tell them apart"
        verdict = verdict if found.estimable else f"too little to rely on: {found.reason}"
        pair = f"{words(ours.entry)} minus {words(theirs.entry)}"
        return {
            "kind": kind(named),
            "row": words(ours.entry),
            "reference": words(theirs.entry),
            "difference": found.to_dict(),
            "sentence": f"{role}: {pair} is {figure(found.to_dict(), '+')}, {verdict}.",
        }

    def _control_rows(self, name: str) -> list[Measured]:
        pairs = [(control.name, str(method)) for control in self.controls[name] for method in control.methods]
        return [
            self._over_seeds({"control": control, "method": method}, (self.out / control_name(name, control, method),))
            for control, method in pairs
        ]

    def _regions(self, name: str, rows: dict[Cell, Measured]) -> list[dict[str, Any]]:
        """Lungs minus background of every arm and scorer, and of HOG: what must exceed 0 before lesions are claimed."""
        pairs = [
            (
                f"{kind.arm} ({kind.checkpoint}, {kind.scorer})",
                kind.scorer,
                row,
                rows[replace(kind, region="background")],
            )
            for kind, row in rows.items()
            if kind.region == "lungs" and replace(kind, region="background") in rows
        ]
        hog = {row.entry["control"]: row for row in self._control_rows(name)}
        if hog[LUNGS_ONLY].replicates and hog[BACKGROUND_ONLY].replicates:
            pairs.append(("control: HOG", "", hog[LUNGS_ONLY], hog[BACKGROUND_ONLY]))
        result = []
        for what, scorer, lungs, background in pairs:
            found = difference(lungs.replicates, background.replicates, 0)
            # lungs that say nothing do not see lesions, however misleading the background is
            claims = found.estimable and found.low > 0 and lungs.entry["auroc"]["low"] > 0.5
            entry = {"row": what, "lungs": lungs.entry["auroc"], "background": background.entry["auroc"]}
            entry |= {"difference": found.to_dict(), "claims_lesions": bool(claims), "sentence": ""}
            if claims and scorer and (not self.recipe.primary or scorer == self.recipe.primary.scorer):
                entry["sentence"] = f"{what} claims lesions: lungs beat background by {figure(found.to_dict(), '+')}."
            result.append(entry)
        return result

    def _contaminated(self, kind: Cell, done: dict[Cell, list[Cell]]) -> dict[str, Any]:
        """A row with abnormal images among the training normals beside the same seeds without them."""
        cells = done[kind]
        seeds = {cell.seed for cell in cells}
        clean = [cell for cell in done.get(replace(kind, share=0.0), []) if cell.seed in seeds]
        row, beside = self._measure(cells), self._measure(clean) if clean else None
        return {
            **{key: row.entry[key] for key in ("arm", "checkpoint", "scorer", "share", "seeds", "auroc")},
            "clean": beside.entry["auroc"] if beside else None,
            "difference": difference(row.replicates, beside.replicates, 0).to_dict() if beside else None,
        }


def control_name(set_name: str, control: str, method: str) -> str:
    """The file of a control row below the protocol's folder."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in f"{control}--{method}".lower())
    return f"cells/{set_name}/controls/{plain}.parquet"


def measure(frames: list[pd.DataFrame], resamples: int, seed: int) -> tuple[dict[str, Any], Replicates]:
    """Figures of the cells of one row, one a seed: the mean over them, the AUROC with its interval."""
    tests = [frame[frame["role"] == "test"].sort_values("image_id") for frame in frames]
    target, patients = tests[0]["target"].to_numpy(float), tests[0]["patient_id"].to_numpy()
    scores = np.stack([test["score"].to_numpy() for test in tests])
    found = replicate(target[:, None], scores[:, :, None], patients, "auroc", resamples, seed)
    entry = {
        "auroc": interval(found, 0).to_dict(),
        "auroc_by_seed": found.point[:, 0].tolist(),
        "average_precision": float(np.mean([average_precision(target, line) for line in scores])),
        "fpr_at_95_tpr": float(np.mean([false_positive_rate(target, line) for line in scores])),
    }
    if tests[0]["fold"].nunique() > 1:
        inside = float(np.mean([within_folds(test) for test in tests]))
        entry["auroc_within_folds"] = None if np.isnan(inside) else inside
    for what, role in (("", "reference"), ("_held_out", "held out")):
        pairs = [against(frame, role) for frame in frames]
        if None not in pairs:
            entry["fpr_nominal" + what], entry["shift" + what] = np.mean(pairs, axis=0).tolist()
    return entry, found


def told(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the cells of one row say of their backbones."""
    names = ("mode", "pretext_saw", "finetune_saw", "labels_used", "transductive")
    entry = {name: facts[0][name] for name in names if name in facts[0]}
    if "step" in facts[0]:
        entry["steps"] = [fact["step"] for fact in facts]
        entry["informative"] = all(fact.get("informative", True) for fact in facts)
    return entry


# -- figures of one frame -----------------------------------------------------------------------------------------------


def within_folds(test: pd.DataFrame) -> float:
    """Mean AUROC inside a fold, where scores of different fits do not meet; NaN where no fold has both classes."""
    values = [auroc(part["target"].to_numpy(float), part["score"].to_numpy()) for _, part in test.groupby("fold")]
    values = [value for value in values if not np.isnan(value)]
    return float(np.mean(values)) if values else float("nan")


def against(frame: pd.DataFrame, role: str, rate: float = 0.05) -> tuple[float, float] | None:
    """New normals against normals in `role`, fold by fold: the share above the nominal 5 % threshold, and the AUROC of
    the one against the other (0.5 where nothing has shifted). None where there are none in that role."""
    alarms, shifts, weights = [], [], []
    for _, part in frame.groupby("fold"):
        old = part.loc[part["role"] == role, "score"].to_numpy()
        new = part.loc[(part["role"] == "test") & (part["target"] == 0), "score"].to_numpy()
        if not len(old) or not len(new):
            continue
        alarms.append((new > np.quantile(old, 1 - rate)).mean())
        shifts.append(auroc(np.repeat([0.0, 1.0], [len(old), len(new)]), np.concatenate([old, new])))
        weights.append(len(new))
    return (float(np.average(alarms, weights=weights)), float(np.average(shifts, weights=weights))) if weights else None
