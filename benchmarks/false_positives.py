"""Do thresholds keep what they promise? False positives of every anomaly scorer on normal images that nothing has seen.

    python benchmarks/false_positives.py store=STORE [backbones=[random,imagenet-lite0,RUN]] [scorers=[gaussian,knn]]
                                         [folds=[5,10,20]] [scale=128] [repeats=20] [places=[all,lungs]]
                                         [runs=[RUN,...]] [out=FILE.json]

A scorer is fitted on the normal training images. Its threshold lets 5 % of reference scores pass: those of the
training normals themselves, each scored without its patient's fold, or those of held-out normals (validation normals
for the test normals and the other way round). Shown are the share of new normals (validation and test patients) above
the threshold, and the AUROC of new against reference normals, 0.5 where both are scored alike. Bars: 3 to 8 %, and
0.5 +- 0.05. Scorers of maps are shown by every choice of `places`.

`runs` are finished anomaly predictors of this store's training normals, a head that pasting trained among them, which
nothing here fits anew: their rows rest on held-out normals alone, and on validation normals, from which such a run takes
its threshold itself and which leaves the test normals as new.

One store has one split, and its chance is in the figures. `repeats` deals the patients of all normals anew, as many
into training and as many out of it, and gives the mean over the draws: what is left is the bias of the number of folds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from common import console, script
from pydantic import Field
from rich.table import Table
from scipy.stats import binomtest

from carina.data.batches import intensity
from carina.data.labels import ABNORMAL
from carina.data.splits import linked_patients
from carina.data.store import Selection, select
from carina.draws import permutation
from carina.errors import CarinaError, nearest
from carina.files import write_json
from carina.finetune.anomaly import (
    collect,
    cross_fitted_distances,
    distances,
    fit_scorer,
    member_distances,
    rows_of,
)
from carina.metrics.intervals import patient_bootstrap
from carina.metrics.ranking import auroc
from carina.metrics.resampling import patient_codes, patient_resamples
from carina.models.backbones import load_backbone
from carina.models.features import Region
from carina.models.predictor import load_predictor
from carina.models.scorers import SCORERS, Read, ScorerSettings
from carina.progress import Progress
from carina.recipes import Section, merge, read_recipe, validate
from carina.training.engine import pick_device

BAR, AUROC_BAR = (0.03, 0.08), (0.45, 0.55)
LEAST = 250  # new normals that the bars ask for
FITTED, HELD_OUT, OWN = "the fitted images", "held-out normals", "validation normals"  # beside cross-fitted ones
Places = Literal["all", "lungs"]


class Arguments(Section):
    store: Annotated[str | list[str], Field(min_length=1)]
    backbones: Annotated[list[str], Field(min_length=1)]
    architecture: str
    scorers: list[str] | None
    places: Annotated[list[Places], Field(min_length=1)]
    runs: list[str]
    layers: list[int] | None
    region: Region
    folds: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)]
    where: str | None
    scale: Annotated[int, Field(ge=16)]
    rate: Annotated[float, Field(gt=0, lt=1)]
    repeats: Annotated[int, Field(ge=0)]
    resamples: Annotated[int, Field(ge=100)]
    seed: int
    threads: Annotated[int, Field(ge=1)]
    out: str | None


DEFAULTS = {
    "backbones": ["random", "imagenet-lite0"],
    "architecture": "resnet18",  # of random
    "scorers": None,  # null: all that can be fitted on features
    "places": ["all", "lungs"],
    "runs": [],
    "layers": None,
    "region": "whole",
    "folds": [5, 10, 20],
    "where": None,
    "scale": 128,  # and the size that enters the network
    "rate": 0.05,
    "repeats": 0,
    "resamples": 2000,
    "seed": 0,
    "threads": 1,
    "out": None,
}


def fitted_scorers() -> list[str]:
    """Those that learn from features; the pretext's own head learns with the backbone."""
    return [name for name in SCORERS if name != "head"]


class Normals:
    """Normal images of one store: train (N,) bool, the rest is new; patients (N,), those with copies of one picture as
    one."""

    def __init__(self, given: Arguments):
        everything = select(given.store, where=given.where, scales=[given.scale])
        self.selection: Selection = everything.where(everything.targets([ABNORMAL])[:, 0] == 0)
        split = self.selection.table["split"].to_numpy()
        self.train, self.val, self.test = (split == name for name in ("train", "val", "test"))
        for name, rows in (("train", self.train), ("val", self.val), ("test", self.test)):
            if not rows.any():
                raise CarinaError(
                    f"no normal image (abnormal = 0) has split={name}; give a store with all three splits"
                )
        self.patients = linked_patients(self.selection.table)

    def dealt(self, draw: int) -> np.ndarray:
        """Another choice of training rows (N,) bool: as many patients as the store's own, drawn among all."""
        names = np.unique(self.patients.astype(str))
        count = len(np.unique(self.patients[self.train].astype(str)))
        return np.isin(self.patients.astype(str), names[permutation(len(names), "false positives", draw)[:count]])


def references(
    read: Read, normals: Normals, settings: ScorerSettings, given: Arguments
) -> dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]]:
    """By name: pieces of (reference scores, their patients, new scores, their patients), a threshold each."""
    fit, own = rows_of(read, normals.train), normals.patients[normals.train]
    scorer = fit_scorer(fit, settings)
    new, others = distances(scorer, rows_of(read, ~normals.train)), normals.patients[~normals.train]
    found = {FITTED: [(distances(scorer, fit), own, new, others)]}
    for folds in given.folds:
        crossed = cross_fitted_distances(fit, own.tolist(), settings, given.seed, folds)
        found[f"{folds} folds"] = [(crossed, own, new, others)]
    first = normals.val[~normals.train]
    one, two = (new[first], others[first]), (new[~first], others[~first])
    return {**found, HELD_OUT: [(*one, *two), (*two, *one)]}


def above(pieces: list[tuple[np.ndarray, ...]], rate: float, weights: list[list[np.ndarray]] | None = None) -> float:
    """Share of new images above the threshold of their piece. weights: of reference and new images of each piece."""
    alarms = images = 0.0
    for number, (reference, _, new, _) in enumerate(pieces):
        mine, theirs = weights[number] if weights else (np.ones(len(reference), int), np.ones(len(new), int))
        if not mine.any():
            continue
        threshold = np.quantile(np.repeat(reference, mine), 1 - rate)
        alarms, images = alarms + theirs[new > threshold].sum(), images + theirs.sum()
    return alarms / images if images else np.nan


def rate_interval(pieces: list[tuple[np.ndarray, ...]], given: Arguments) -> tuple[float, float]:
    """Percentile interval of `above`; reference patients are drawn too, so that the threshold's own chance counts."""
    everyone = np.concatenate([patients for piece in pieces for patients in (piece[1], piece[3])])
    codes = patient_codes(everyone)
    ends = np.cumsum([len(patients) for piece in pieces for patients in (piece[1], piece[3])])[:-1]
    values = []
    for draws in patient_resamples(codes, given.resamples, given.seed):
        for draw in draws.T.astype(int):
            parts = np.split(draw[codes], ends)
            values.append(above(pieces, given.rate, [parts[i : i + 2] for i in range(0, len(parts), 2)]))
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def figures(pieces: list[tuple[np.ndarray, ...]], given: Arguments) -> dict[str, Any]:
    share, images = above(pieces, given.rate), sum(len(piece[2]) for piece in pieces)
    low, high = rate_interval(pieces, given)
    exact = binomtest(round(share * images), images).proportion_ci(0.95, "exact")
    entry: dict[str, Any] = {
        "false_positives": {
            "value": share, "low": low, "high": high, "images": images, "binomial": [exact.low, exact.high],
        },
        "within_bar": bool(BAR[0] <= share <= BAR[1]),
    }  # fmt: skip
    if len(pieces) == 1:  # the two directions of held-out normals would cancel
        reference, own, new, others = pieces[0]
        target = np.concatenate([np.zeros(len(reference)), np.ones(len(new))])
        scores, patients = np.concatenate([reference, new]), np.concatenate([own, others])
        found = patient_bootstrap(target, scores, patients, resamples=given.resamples, seed=given.seed)
        entry["auroc"] = found.to_dict()
        entry["auroc_within_bar"] = bool(AUROC_BAR[0] <= found.value <= AUROC_BAR[1])
    return entry


def redealt(read: Read, normals: Normals, settings: ScorerSettings, given: Arguments) -> dict[str, Any]:
    """Means over `repeats` splits of the patients, with the standard error, by number of folds."""
    found: dict[str, list[tuple[float, float]]] = {f"{folds} folds": [] for folds in given.folds}
    for draw in range(given.repeats):
        train = normals.dealt(draw)
        fit, own = rows_of(read, train), normals.patients[train].tolist()
        new = distances(fit_scorer(fit, settings), rows_of(read, ~train))
        for folds in given.folds:
            crossed = cross_fitted_distances(fit, own, settings, draw, folds)
            target = np.concatenate([np.zeros(len(crossed)), np.ones(len(new))])
            share = float((new > np.quantile(crossed, 1 - given.rate)).mean())
            found[f"{folds} folds"].append((share, auroc(target, np.concatenate([crossed, new]))))
    result = {}
    for name, values in found.items():
        mean, error = np.mean(values, axis=0), np.std(values, axis=0, ddof=1) / np.sqrt(len(values))
        result[name] = {
            "false_positives": {"value": mean[0], "standard_error": error[0]},
            "auroc": {"value": mean[1], "standard_error": error[1]},
        }
    return result


def finished(run: str, normals: Normals, given: Arguments, device: torch.device) -> dict[str, Any]:
    """The row of a predictor as it is: held-out normals are its reference."""
    predictor = load_predictor(run, device)
    info, member = predictor.info, predictor.members[0]
    if info["kind"] != "anomaly":
        raise CarinaError(f"{run} holds no anomaly predictor; give runs of carina finetune anomaly")
    if info["store_hashes"] != normals.selection.hashes or info["rows"] != "train" or info["folds"] is not None:
        raise CarinaError(
            f"{run} was not trained on the training rows of this store; give the store that it was trained on"
        )
    if not info["thresholds_from"].startswith(OWN):
        raise CarinaError(f"the threshold of {run} is not from validation normals; train it with threshold_rows=val")
    pieces = []
    for rows in (normals.val, normals.test):
        pieces.append((member_distances(member, normals.selection.where(rows), device), normals.patients[rows]))
    one, two = pieces
    found = {HELD_OUT: [(*one, *two), (*two, *one)], OWN: [(*one, *two)]}
    known = member.scorer.settings
    entry = {"backbone": Path(run).name, "scorer": known.name, "places": known.places, "shape": None}
    return {**entry, "references": {key: figures(value, given) for key, value in found.items()}, "redealt": None}


def run(given: Arguments) -> dict[str, Any]:
    """Every row of the table, as JSON values."""
    torch.set_num_threads(given.threads)
    names = given.scorers or fitted_scorers()
    for name in names:
        if name not in fitted_scorers():
            raise CarinaError(
                f"'{name}' is no scorer that is fitted on features{nearest(name, fitted_scorers())}; it is one of "
                f"{', '.join(fitted_scorers())}"
            )
    if given.repeats == 1:
        raise CarinaError("repeats=1 has no standard error; give 2 or more, or 0")
    normals, device = Normals(given), pick_device()
    mean, std = intensity(normals.selection.where(normals.train), given.scale)
    rows = []
    kinds = [(name, places) for name in names for places in (given.places if SCORERS[name].positions else ["all"])]
    with Progress("false positives", len(kinds) * len(given.backbones) + len(given.runs), unit="rows") as progress:
        for reference in given.backbones:
            named = f"random:{given.architecture}" if reference == "random" else reference
            backbone = load_backbone(
                named, size=given.scale, architecture=given.architecture, seed=given.seed, mean=mean, std=std
            )
            kept: dict[tuple[bool, Places], Read] = {}  # pooled features and maps serve several scorers
            for name, places in kinds:
                own = {"name": name, "layers": given.layers, "sizes": None, "places": places}
                settings = validate(ScorerSettings, merge(read_recipe("finetune", "anomaly")["scorer"], own), "scorer")
                reading, began = (SCORERS[name].positions, places), time.perf_counter()
                if reading not in kept:
                    kept[reading] = collect(backbone, normals.selection, given.scale, settings, given.region, device)
                read = kept[reading]
                entry = {"backbone": Path(reference).name, "scorer": name, "places": places}
                entry["shape"] = list(read[0].shape[1:])
                found = references(read, normals, settings, given)
                entry["references"] = {key: figures(pieces, given) for key, pieces in found.items()}
                entry["redealt"] = redealt(read, normals, settings, given) if given.repeats else None
                rows.append(entry)
                progress.advance(note=f"{name} {time.perf_counter() - began:.0f} s")
        for run in given.runs:
            rows.append(finished(run, normals, given, device))
            progress.advance(note=Path(run).name)
    new = ~normals.train
    return {
        "benchmark": "false_positives",
        "arguments": {**given.model_dump(exclude={"out", "store", "backbones", "runs"}), "scorers": names},
        "stores": [Path(store).name for store in ([given.store] if isinstance(given.store, str) else given.store)],
        "store_hashes": normals.selection.hashes,
        "synthetic": normals.selection.synthetic,
        "fitted": {"images": int(normals.train.sum()), "patients": len(set(normals.patients[normals.train]))},
        "new": {"images": int(new.sum()), "patients": len(set(normals.patients[new]))},
        "rows": rows,
        "bar": list(BAR),
        "auroc_bar": list(AUROC_BAR),
    }


def shown(result: dict[str, Any]) -> list[Table]:
    """The figures as tables for the terminal: the store's own split, and patients dealt anew."""
    given, fitted, new = result["arguments"], result["fitted"], result["new"]
    title = f"Nominal {given['rate']:.0%} false positives, {'+'.join(result['stores'])} at {given['scale']} px"
    table = Table(
        title=("synthetic: " if result["synthetic"] else "") + title,
        caption=f"fitted on {fitted['images']} normals of {fitted['patients']} patients; new: {new['images']} normals "
        f"of {new['patients']} patients; 95 % intervals, patients drawn (those of the reference too); bars {BAR[0]:.0%} "
        f"to {BAR[1]:.0%}, AUROC {AUROC_BAR[0]} to {AUROC_BAR[1]}, on at least {LEAST} new normals",
        title_justify="left",
        caption_justify="left",
    )
    for head in (
        "backbone",
        "scorer",
        "threshold from",
        "above it",
        "binomial",
        "AUROC new : reference",
        "within bars",
    ):
        table.add_column(head)
    for row in result["rows"]:
        for number, (name, figure) in enumerate(row["references"].items()):
            share, area = figure["false_positives"], figure.get("auroc")
            within = "yes" if figure["within_bar"] and figure.get("auroc_within_bar", True) else "no"
            within += f", of {share['images']} only" if share["images"] < LEAST else ""
            table.add_row(
                "" if number else row["backbone"],
                "" if number else row["scorer"] + (", lungs" if row["places"] == "lungs" else ""),
                name,
                f"{share['value']:.1%} [{share['low']:.1%}, {share['high']:.1%}]",
                "[{:.1%}, {:.1%}]".format(*share["binomial"]),
                f"{area['value']:.3f} [{area['low']:.3f}, {area['high']:.3f}]" if area else "",
                within,
            )
    tables = [table]
    if given["repeats"]:
        dealt = Table(title=f"Patients dealt anew {given['repeats']} times: mean, standard error", title_justify="left")
        for head in ("backbone", "scorer", "threshold from", "above it", "AUROC new : reference"):
            dealt.add_column(head)
        for row in result["rows"]:
            for number, (name, figure) in enumerate((row["redealt"] or {}).items()):
                share, area = figure["false_positives"], figure["auroc"]
                dealt.add_row(
                    "" if number else row["backbone"],
                    "" if number else row["scorer"] + (", lungs" if row["places"] == "lungs" else ""),
                    name,
                    f"{share['value']:.2%} +- {share['standard_error']:.2%}",
                    f"{area['value']:.4f} +- {area['standard_error']:.4f}",
                )
        tables.append(dealt)
    return tables


def work(given: Arguments) -> None:
    result = run(given)
    if given.out:
        write_json(given.out, result)
    out = console()
    for table in shown(result):
        out.print(table)


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "false_positives", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
