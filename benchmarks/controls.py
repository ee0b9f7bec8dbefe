"""Control rows: how far a label can be read off radiographs by methods that know nothing of lungs or lesions.

    python benchmarks/controls.py store=STORE task=classify|anomaly [label=abnormal] [split=test|val+test | folds=5]
                                  [where="view == 'PA'"] [scale=128] [patients=64 draws=5] [out=FILE.json]

A method earns its name where it beats these rows on the same images. Classification is the probe of carina.finetune,
its strength chosen inside the training patients from the grid of the shipped recipe; anomaly detection is a scorer of
carina.models.scorers fitted on the normal images of the training rows. Intervals are BCa intervals of the patient
bootstrap.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from common import console, script
from pydantic import Field
from rich.table import Table

from carina.data.batches import control_chunks
from carina.data.labels import ABNORMAL, to_targets
from carina.data.splits import patient_folds, patient_subset
from carina.data.store import Selection, select
from carina.errors import CarinaError
from carina.files import write_json
from carina.finetune.probe import probe
from carina.finetune.recipe import FinetuneRecipe
from carina.metrics.intervals import difference, interval
from carina.metrics.ranking import auroc
from carina.metrics.resampling import Replicates, replicate
from carina.models.controls import (
    BACKGROUND_ONLY,
    LUNGS_ONLY,
    Method,
    controls,
    describe,
    nothing_to_see,
)
from carina.progress import Progress
from carina.recipes import Section, build


class Arguments(Section):
    store: Annotated[str | list[str], Field(min_length=1)]
    task: Literal["classify", "anomaly"]
    label: str
    split: str | None
    folds: Annotated[int, Field(ge=2)] | None
    where: str | None
    scale: Annotated[int, Field(ge=16)]
    patients: Annotated[int, Field(ge=1)] | None
    draws: Annotated[int, Field(ge=1)]
    resamples: Annotated[int, Field(ge=100)]
    seed: int
    out: str | None


DEFAULTS = {
    "label": ABNORMAL,
    "split": None,  # the rows that are scored: test, or val+test where every setting was fixed beforehand
    "folds": None,  # instead of splits: patient folds over all rows, their scores pooled
    "where": None,
    "scale": 128,
    "patients": None,  # classify: labelled patients (null: all); subsets are those of carina finetune
    "draws": 1,  # of `patients`, averaged
    "resamples": 2000,
    "seed": 0,
    "out": None,
}


def fits(arguments: Arguments, table: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, scored rows), each (N,) bool: one pair for splits, one a fold for folds."""
    patients = table["patient_id"].tolist()
    if arguments.folds is not None:
        if arguments.split is not None:
            raise CarinaError("folds= scores every row and split= only some; give one of them")
        folds = patient_folds(patients, arguments.folds)
        return [(folds != fold, folds == fold) for fold in range(arguments.folds)]
    names = (arguments.split or "test").split("+")
    if "train" in names:
        raise CarinaError(f"split={arguments.split} would score the rows that are trained on; give test or val+test")
    have = sorted(set(table["split"]))
    for name in ("train", *names):
        if name not in have:
            raise CarinaError(
                f"no row has split={name} (the store has {', '.join(have)}); give split= to match, or folds=5"
            )
    train, scored = (table["split"].isin(some).to_numpy() for some in (["train"], names))
    return [(train, scored)]


class Bench:
    """The rows of one selection, scored: `scores` gives (k, N), one line a draw, NaN where a row is not scored."""

    def __init__(self, arguments: Arguments, selection: Selection):
        self.arguments = arguments
        every_target = to_targets(selection.targets([arguments.label]))[:, 0]
        every_fit = fits(arguments, selection.table)  # before unknown labels leave, as in carina finetune
        known = ~np.isnan(every_target)
        self.selection, self.target = selection.where(known), every_target[known]
        self.fits = [(train[known], scored[known]) for train, scored in every_fit]
        self.patients = self.selection.table["patient_id"].to_numpy()
        self.scored = np.logical_or.reduce([scored for _, scored in self.fits])
        if not self.scored.any():
            raise CarinaError(
                f"no row that would be scored has a known label '{arguments.label}'; check split= and where="
            )
        self.recipe = build("finetune", FinetuneRecipe, arguments.task, {"labels": [arguments.label]})

    def _labelled(self, train: np.ndarray, draw: int) -> np.ndarray:
        """The training rows whose labels may be used, as positions."""
        rows = np.flatnonzero(train)
        if self.arguments.patients is None:
            return rows
        return rows[patient_subset(self.patients[rows].tolist(), self.arguments.patients, draw)]

    def _classify(self, features: np.ndarray, train: np.ndarray, scored: np.ndarray) -> np.ndarray:
        weight, bias, _, _ = probe(
            features[train],
            self.target[train, None],
            self.patients[train].tolist(),
            [self.arguments.label],
            self.recipe.probe,
            self.arguments.seed,
        )
        return features[scored].astype(np.float64) @ weight[0] + bias[0]

    def scores(self, features: np.ndarray, method: Method | None) -> np.ndarray:
        """Of features (N, D) by a method of anomaly detection, or by the probe (None)."""
        result = np.full((self.arguments.draws, len(features)), np.nan)
        for draw in range(self.arguments.draws):
            for train, scored in self.fits:
                rows, test = self._labelled(train, draw), np.flatnonzero(scored)
                if method is None:
                    result[draw, test] = self._classify(features, rows, test)
                else:
                    result[draw, test] = method.distances(features[rows[self.target[rows] == 0]], features[test])
        return result

    def replicates(self, scores: np.ndarray, metric: str) -> Replicates:
        use = self.scored
        target = self.target[use].astype(np.float64)[:, None]
        return replicate(
            target, scores[:, use, None], self.patients[use], metric, self.arguments.resamples, self.arguments.seed
        )

    def within_folds(self, scores: np.ndarray) -> float | None:
        """Mean over draws and folds of the AUROC inside a fold, where scores of different fits do not meet."""
        values = [auroc(self.target[scored], line[scored]) for line in scores for _, scored in self.fits]
        values = [value for value in values if not np.isnan(value)]
        return float(np.mean(values)) if len(self.fits) > 1 and values else None


def run(arguments: Arguments) -> dict[str, Any]:
    """Every control row of one store: counts, figures and the contrast of lungs with background, as JSON values."""
    if arguments.task == "anomaly" and arguments.label != ABNORMAL:
        raise CarinaError(f"anomaly detection scores '{ABNORMAL}', not '{arguments.label}'; leave label= out")
    if arguments.task == "anomaly" and arguments.patients is not None:
        raise CarinaError("patients= counts labelled patients of classify; anomaly uses every normal of the train rows")
    if arguments.patients is None and arguments.draws > 1:
        raise CarinaError("draws= repeats patients=, and without it all draws are the same; give patients= as well")
    bench = Bench(arguments, select(arguments.store, where=arguments.where, scales=[arguments.scale]))
    rows = controls(arguments.scale, arguments.seed)
    features = describe(control_chunks(bench.selection, arguments.scale, quiet=False), rows)
    kept: dict[str, Replicates] = {}
    table = []
    work = [(c, m) for c in rows for m in (c.methods if arguments.task == "anomaly" else (None,))]
    with Progress(arguments.task, len(work), unit="rows") as progress:
        for control, method in work:
            values = features.get(control.name)
            dimension = 0 if values is None else values.shape[1]
            entry = {"control": control.name, "method": str(method or "probe"), "dimension": dimension}
            missing = nothing_to_see(control, values)
            if not missing:
                scores = bench.scores(values, method)
                kept[control.name] = bench.replicates(scores, "auroc")
                entry["auroc"] = interval(kept[control.name], 0).to_dict()
                entry["average_precision"] = interval(bench.replicates(scores, "average_precision"), 0).to_dict()
                entry["auroc_within_folds"] = bench.within_folds(scores)
            table.append({**entry, "missing": missing})
            progress.advance(note=control.name)
    lungs, background = kept.get(LUNGS_ONLY), kept.get(BACKGROUND_ONLY)
    return {
        "benchmark": "controls",
        "arguments": _shareable(arguments),
        "data": _facts(bench),
        "rows": table,
        "lungs_minus_background": difference(lungs, background, 0).to_dict() if lungs and background else None,
    }


def _shareable(arguments: Arguments) -> dict[str, Any]:
    """The arguments without the folders of this machine: a store is told by its name here and by its hash below."""
    stores = [arguments.store] if isinstance(arguments.store, str) else arguments.store
    return {**arguments.model_dump(exclude={"out"}), "store": [Path(store).name for store in stores]}


def _facts(bench: Bench) -> dict[str, Any]:
    table, scored = bench.selection.table, bench.scored
    trained = np.logical_or.reduce([train for train, _ in bench.fits])
    if bench.arguments.task == "anomaly":
        trained &= bench.target == 0

    def counts(rows: np.ndarray) -> dict[str, Any]:
        positives = int((bench.target[rows] == 1).sum())
        patients = int(table["patient_id"][rows].nunique())
        return {"images": int(rows.sum()), "patients": patients, "positives": positives}

    return {
        "store_hashes": bench.selection.hashes,
        "synthetic": bench.selection.synthetic,
        "trained": counts(trained),
        "scored": counts(scored),
        "lungs_source": {str(k): int(v) for k, v in table["lungs_source"].value_counts().items()},
        "lungs_implausible": int((~table["lungs_plausible"] & (table["lungs_source"] != "none")).sum()),
    }


def _figure(value: dict[str, Any]) -> str:
    if value["value"] is None:
        return value["reason"]
    text = f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return text if value["estimable"] else f"{text}, not estimable"


def shown(result: dict[str, Any]) -> Table:
    """The result as a table for the terminal."""
    given, scored, trained = result["arguments"], result["data"]["scored"], result["data"]["trained"]
    which = f"{given['folds']} patient folds, pooled" if given["folds"] else f"split {given['split'] or 'test'}"
    title = f"{given['task']} {given['label']}, {'+'.join(given['store'])}, {which}"
    title += f", where {given['where']}" if given["where"] else ""
    title += f", {given['patients']} labelled patients x {given['draws']}" if given["patients"] else ""
    table = Table(
        title=("synthetic: " if result["data"]["synthetic"] else "") + title,
        caption=f"trained on {trained['images']} images of {trained['patients']} patients; scored {scored['images']} "
        f"images of {scored['patients']} patients, {scored['positives']} positive (chance: AUROC 0.5, AP "
        f"{scored['positives'] / scored['images']:.3f}); BCa 95 % intervals, patients drawn",
        caption_justify="left",
        title_justify="left",
    )
    heads = ["control", "method", "features", "AUROC", "average precision"] + ["within folds"] * bool(given["folds"])
    for head in heads:
        table.add_column(head)
    for row in result["rows"]:
        cells = [row["control"], row["method"], str(row["dimension"])]
        if row["missing"]:
            cells += [row["missing"]]
        else:
            cells += [_figure(row["auroc"]), _figure(row["average_precision"])]
            within = row["auroc_within_folds"]
            cells += ["" if within is None else f"{within:.3f}"] * bool(given["folds"])
        table.add_row(*cells)
    return table


def remarks(result: dict[str, Any]) -> list[str]:
    """What the figures say in words: whether lungs beat background, and what below chance means."""
    lines = []
    contrast = result["lungs_minus_background"]
    if contrast and contrast["value"] is not None:
        claim = "beats" if contrast["low"] > 0 else "does not beat"
        lines.append(f"HOG on lungs only {claim} HOG on background only: AUROC difference {_figure(contrast)}.")
    below = [row["control"] for row in result["rows"] if not row["missing"] and (row["auroc"]["high"] or 1) < 0.5]
    if below and result["arguments"]["task"] == "anomaly":
        lines.append(
            f"Below chance ({', '.join(below)}): abnormal images lie nearer to the training normals than other normals "
            "do, so distance from normal measures something else than disease; turning the sign would use the labels."
        )
    return lines


def work(given: Arguments) -> None:
    result = run(given)
    if given.out:
        write_json(given.out, result)
    out = console()
    out.print(shown(result))
    for line in remarks(result):
        out.print(line)


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "controls", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
