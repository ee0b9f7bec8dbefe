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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from carina.data.labels import ABNORMAL, to_targets
from carina.data.splits import patient_folds, patient_subset
from carina.data.store import Selection, select, unit
from carina.errors import CarinaError
from carina.files import write_json
from carina.finetune.anomaly import distances, fit_scorer
from carina.finetune.classify import probe
from carina.finetune.recipe import FinetuneRecipe
from carina.metrics.intervals import difference, interval
from carina.metrics.ranking import auroc
from carina.metrics.resampling import Replicates, replicate
from carina.models.backbones import Backbone, random_backbone
from carina.progress import Progress
from carina.recipes import Section, build, merge, parse_overrides, validate

CHUNK = 256

HOG_SIDE, HOG_CELL, HOG_BLOCK, HOG_BINS = 128, 16, 2, 9
HOG_CLIP, HOG_EPSILON = 0.2, 1e-5
PIXEL_SIDE = 32
RING_SIDE, RING_WIDTH = 40, 4  # the outermost 10 % of the side
PERCENTILES = (5, 25, 50, 75, 95)


class Arguments(Section):
    store: Annotated[str | list[str], Field(min_length=1)]
    task: Literal["classify", "anomaly"]
    label: str
    split: str | None
    folds: Annotated[int, Field(ge=2)] | None
    where: str | None
    scale: Annotated[int, Field(ge=HOG_SIDE)]
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


@dataclass(frozen=True)
class Rows:
    """A chunk of a store. images: (B, S, S) uint8 or uint16. lungs: (B, S, S) bool. sizes: (B, 2) height and width of
    the files."""

    images: np.ndarray
    lungs: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class Scorer:
    """A scorer and what is done to features before it: standard (mean 0, deviation 1 among the normals that are fitted)
    where their units differ, unit (length 1, the recipe's default) for networks."""

    name: Literal["gaussian", "knn"]
    before: Literal["nothing", "standard", "unit"] = "nothing"

    def __str__(self) -> str:
        return self.name + {"nothing": "", "standard": ", standardized", "unit": ", unit length"}[self.before]


@dataclass(frozen=True)
class Control:
    """Features that know nothing of disease. `describe` makes them, (B, D), of a chunk; `scorers` are those of anomaly
    detection, one row of the table each; `lungs`: lung masks are needed."""

    name: str
    describe: Callable[[Rows], np.ndarray]
    scorers: tuple[Scorer, ...] = (Scorer("gaussian"),)
    lungs: bool = False


def resized(images: np.ndarray, side: int) -> np.ndarray:
    """(B, S, S) uint8, uint16 or bool -> (B, side, side) float32 in [0, 1], area filter."""
    scale = np.float32(1 if images.dtype == bool else np.iinfo(images.dtype).max)
    shrunk = [cv2.resize(image.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA) for image in images]
    return np.stack(shrunk) / scale


def hog(images: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients (Dalal and Triggs, CVPR 2005) of images (B, 128, 128): (B, 7 * 7 * 36).

    Central differences, 0 at the border; 9 unsigned orientations, a gradient shared linearly between the two nearest;
    cells of 16 pixels without overlap or smoothing; blocks of 2 x 2 cells at every cell, L2-Hys with clip 0.2.
    """
    images = images.astype(np.float32)
    rows, columns = np.zeros_like(images), np.zeros_like(images)
    rows[:, 1:-1] = images[:, 2:] - images[:, :-2]
    columns[:, :, 1:-1] = images[:, :, 2:] - images[:, :, :-2]
    strength = np.hypot(rows, columns)
    place = np.mod(np.arctan2(rows, columns) / np.pi, 1.0) * HOG_BINS
    count, cells = len(images), HOG_SIDE // HOG_CELL
    histogram = np.empty((count, cells, cells, HOG_BINS), dtype=np.float32)
    for orientation in range(HOG_BINS):
        away = np.abs(place - (orientation + 0.5))
        share = np.maximum(1 - np.minimum(away, HOG_BINS - away), 0) * strength
        histogram[..., orientation] = share.reshape(count, cells, HOG_CELL, cells, HOG_CELL).sum(axis=(2, 4))
    blocks = np.lib.stride_tricks.sliding_window_view(histogram, (HOG_BLOCK, HOG_BLOCK), axis=(1, 2))
    blocks = blocks.reshape(count, *blocks.shape[1:3], -1)
    blocks = np.minimum(_unit(blocks), HOG_CLIP)
    return _unit(blocks).reshape(count, -1)


def _unit(blocks: np.ndarray) -> np.ndarray:
    return blocks / np.sqrt((blocks**2).sum(axis=-1, keepdims=True) + HOG_EPSILON**2)


def _hog_images(rows: Rows) -> np.ndarray:
    return resized(rows.images, HOG_SIDE)


def _hog_lungs(rows: Rows) -> np.ndarray:
    return (resized(rows.lungs, HOG_SIDE) >= 0.5).astype(np.float32)


def _border(side: int, width: int) -> np.ndarray:
    inner = np.ones((side, side), dtype=bool)
    inner[width:-width, width:-width] = False
    return inner


def statistics(rows: Rows) -> np.ndarray:
    """(B, 9): mean, standard deviation, least, greatest, and five percentiles of an image's pixels in [0, 1]."""
    pixels = unit(rows.images.reshape(len(rows.images), -1))
    moments = (pixels.mean(axis=1), pixels.std(axis=1), pixels.min(axis=1), pixels.max(axis=1))
    return np.stack([*moments, *np.percentile(pixels, PERCENTILES, axis=1)], axis=1)


def file_size(rows: Rows) -> np.ndarray:
    """(B, 3): width, height, and width / height of the original files, in pixels."""
    height, width = rows.sizes.astype(np.float64).T
    return np.stack([width, height, width / height], axis=1)


def pooled_features(backbone: Backbone) -> Callable[[Rows], np.ndarray]:
    @torch.no_grad()
    def describe(rows: Rows) -> np.ndarray:
        images = torch.from_numpy(rows.images).unsqueeze(1).float().div_(255)
        return torch.cat([backbone.features(part) for part in images.split(64)]).numpy()

    return describe


def blocks_opened(backbone: Backbone) -> Backbone:
    """The same random network with its residual blocks at work.

    timm starts the last batch norm of every residual block at scale 0, which is good for training but leaves little
    more than the stem of an untrained network; scale 1 makes the stronger control.
    """
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and not module.weight.any():
            torch.nn.init.ones_(module.weight)
    return backbone


def controls(scale: int, seed: int) -> list[Control]:
    """The rows in the order of the table. HOG of masked images sees the mask's outline beside what is left."""
    border = _border(HOG_SIDE, round(0.1 * HOG_SIDE))
    ring = _border(RING_SIDE, RING_WIDTH)
    mixed_units = (Scorer("gaussian", "standard"),)
    network = (Scorer("gaussian", "unit"), Scorer("knn", "unit"), Scorer("knn"))
    random = random_backbone("resnet18", scale, seed).eval()
    opened = blocks_opened(random_backbone("resnet18", scale, seed)).eval()
    return [
        Control("raw pixels", lambda r: resized(r.images, PIXEL_SIDE).reshape(len(r.images), -1)),
        Control("HOG", lambda r: hog(_hog_images(r))),
        Control("HOG, lungs only", lambda r: hog(_hog_images(r) * _hog_lungs(r)), lungs=True),
        Control("HOG, background only", lambda r: hog(_hog_images(r) * (1 - _hog_lungs(r))), lungs=True),
        Control("HOG, mask silhouette", lambda r: hog(_hog_lungs(r)), lungs=True),
        Control("HOG, outer ring", lambda r: hog(_hog_images(r) * border)),
        Control("pixels, outer ring", lambda r: resized(r.images, RING_SIDE)[:, ring]),
        Control("nine intensity statistics", statistics, mixed_units),
        Control("file size", file_size, mixed_units),
        Control("random ResNet-18", pooled_features(random), network),
        Control("random ResNet-18, blocks opened", pooled_features(opened), network),
    ]


def describe(selection: Selection, scale: int, rows: Sequence[Control]) -> dict[str, np.ndarray]:
    """Features (N, D) of every control, in one pass over the store."""
    parts: dict[str, list[np.ndarray]] = {control.name: [] for control in rows}
    sizes = selection.table[["height", "width"]].to_numpy()
    with Progress("features", len(selection), unit="images") as progress:
        for start in range(0, len(selection), CHUNK):
            where = range(start, min(start + CHUNK, len(selection)))
            chunk = Rows(selection.images(where, scale), selection.masks(where, scale), sizes[where.start : where.stop])
            for control in rows:
                parts[control.name].append(control.describe(chunk))
            progress.advance(len(where))
    return {name: np.concatenate(values) for name, values in parts.items()}


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
        head, _, _ = probe(
            features[train],
            self.target[train, None],
            self.patients[train].tolist(),
            [self.arguments.label],
            self.recipe.probe,
            self.arguments.seed,
        )
        with torch.no_grad():
            return head(torch.from_numpy(features[scored].astype(np.float32)))[:, 0].double().numpy()

    def _anomaly(self, scorer: Scorer, features: np.ndarray, train: np.ndarray, scored: np.ndarray) -> np.ndarray:
        how = {"name": scorer.name, "normalize": scorer.before == "unit"}
        settings = self.recipe.scorer.model_copy(update=how)
        normal = features[train[self.target[train] == 0]].astype(np.float64)
        rest = features[scored].astype(np.float64)
        if scorer.before == "standard":
            spread = normal.std(axis=0)
            center, spread = normal.mean(axis=0), np.where(spread > 0, spread, 1.0)
            normal, rest = (normal - center) / spread, (rest - center) / spread
        return distances(fit_scorer(normal, settings), rest)

    def scores(self, features: np.ndarray, scorer: Scorer | None) -> np.ndarray:
        """Of features (N, D) by an anomaly scorer, or by the probe (None)."""
        result = np.full((self.arguments.draws, len(features)), np.nan)
        for draw in range(self.arguments.draws):
            for train, scored in self.fits:
                rows, test = self._labelled(train, draw), np.flatnonzero(scored)
                if scorer is None:
                    result[draw, test] = self._classify(features, rows, test)
                else:
                    result[draw, test] = self._anomaly(scorer, features, rows, test)
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

    def nothing_to_see(self, control: Control, features: np.ndarray) -> str:
        """Why a control has no row; empty where it has."""
        if control.lungs and not (self.selection.table["lungs_source"] != "none").any():
            return "the store holds no lung masks"
        if (features == features[0]).all():
            return "the same for every image"
        return ""


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
    features = describe(bench.selection, arguments.scale, rows)
    kept: dict[str, Replicates] = {}
    table = []
    work = [(c, s) for c in rows for s in (c.scorers if arguments.task == "anomaly" else (None,))]
    with Progress(arguments.task, len(work), unit="rows") as progress:
        for control, scorer in work:
            values = features[control.name]
            entry = {"control": control.name, "method": str(scorer or "probe"), "dimension": values.shape[1]}
            missing = bench.nothing_to_see(control, values)
            if not missing:
                scores = bench.scores(values, scorer)
                kept[control.name] = bench.replicates(scores, "auroc")
                entry["auroc"] = interval(kept[control.name], 0).to_dict()
                entry["average_precision"] = interval(bench.replicates(scores, "average_precision"), 0).to_dict()
                entry["auroc_within_folds"] = bench.within_folds(scores)
            table.append({**entry, "missing": missing})
            progress.advance(note=control.name)
    lungs, background = kept.get("HOG, lungs only"), kept.get("HOG, background only")
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


def main(words: Sequence[str] | None = None) -> int:
    """Run the script and return its exit code: 0, or 2 for a mistake in what was asked."""
    words = sys.argv[1:] if words is None else words
    try:
        if not words or words[0] in ("-h", "--help"):
            print(__doc__)
            return 0
        arguments = validate(Arguments, merge(DEFAULTS, parse_overrides(words)), "controls")
        result = run(arguments)
        if arguments.out:
            write_json(arguments.out, result)
    except CarinaError as error:
        print(f"controls: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(shown(result))
    for line in remarks(result):
        console.print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
