"""Cut&Remain: does a classifier look at the lesion because of it, and does the blank itself give the label away?

    python benchmarks/cut_remain.py [patients=800] [finding=Effusion] [marker=false] [size=64] [steps=300] [share=0.5]
                                    [seeds=[0,1]] [out=FILE.json]

On synthetic radiographs, half of the patients with one finding whose box is known. The same network is trained with and
without Cut&Remain (carina.finetune.mixing), on the same images in the same order, and judged on other patients, whose
images are whole. `inside` is the share of Grad-CAM's positive attribution (carina.evaluate.explain) that lies in the box,
mean over images with the finding; `area` is what attribution at random would reach. With marker=true a plate goes with
the finding in training, a bright rectangle in a corner, and all images of the other patients bear one.

The control asks whether the blank is a shortcut: the patients with the finding are drawn again without it, everything
else the same, and blanked by its box; the normal ones are blanked by boxes of others, as in training. A classifier is
trained to tell the two apart; on other patients it must not. Intervals: patients and seeds are drawn together.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import timm
import torch
from common import console, script
from pydantic import Field
from rich.table import Table

from carina.data.store import Selection
from carina.draws import Draws, hash64, permutation, sample_codes
from carina.evaluate.explain import heat_maps
from carina.files import write_json
from carina.finetune.classify import Classification
from carina.finetune.mixing import CutRemain, remain
from carina.finetune.recipe import FinetuneRecipe, MixingSettings
from carina.imaging.phantom import phantom
from carina.metrics.intervals import interval
from carina.metrics.ranking import auroc
from carina.metrics.resampling import replicate
from carina.models.backbones import Backbone, Spec, seeded
from carina.models.predictor import Member
from carina.progress import Progress
from carina.recipes import Section, build
from carina.runs import Run
from carina.training.engine import Engine

BAR = 0.10
TRAINED = 0.7  # share of the patients
NETWORK = "test_resnet"  # small, with the last map at an eighth of the side


class Arguments(Section):
    patients: Annotated[int, Field(ge=40)]
    marker: bool
    finding: Literal["Opacity", "Nodule", "Effusion", "Cardiomegaly", "Pneumothorax"]
    size: Annotated[int, Field(ge=32)]
    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=2)]
    lr: Annotated[float, Field(gt=0)]
    share: Annotated[float, Field(gt=0, le=1)]
    seeds: Annotated[list[int], Field(min_length=1)]
    resamples: Annotated[int, Field(ge=100)]
    out: str | None


DEFAULTS = {
    "patients": 800,
    "marker": False,
    "finding": "Effusion",
    "size": 64,
    "steps": 300,
    "batch_size": 32,
    "lr": 2e-3,
    "share": 0.5,
    "seeds": [0, 1],
    "resamples": 2000,
    "out": None,
}


class Drawn(Selection):
    """Synthetic radiographs in memory: images (N, S, S) uint8, lungs alike, bool, targets (N, 1), boxes of the finding, a
    patient each."""

    def __init__(
        self, images: np.ndarray, lungs: np.ndarray, target: np.ndarray, boxes: list[np.ndarray | None], label: str
    ):
        names = [f"{hash64('drawn', number):016x}" * 2 for number in range(len(images))]
        told = [
            None if own is None else [dict(zip(("x0", "y0", "x1", "y1"), own[0].tolist()), label=label)]
            for own in boxes
        ]
        table = pd.DataFrame({"image_id": names, "study_id": names, "patient_id": names, "boxes": told})
        super().__init__([SimpleNamespace(scales=[images.shape[1]])], table.assign(lungs_source="mask"))
        self.pixels, self.lungs, self.target, self.boxes = images, lungs, target.astype(np.float32)[:, None], boxes

    def images(self, rows: Sequence[int], scale: int) -> np.ndarray:
        return self.pixels[np.asarray(rows)]

    def masks(self, rows: Sequence[int], scale: int, name: str = "lungs") -> np.ndarray:
        return self.lungs[np.asarray(rows)]

    def part(self, rows: np.ndarray, label: str) -> Drawn:
        boxes = [self.boxes[row] for row in rows]
        found = Drawn(self.pixels[rows], self.lungs[rows], self.target[rows, 0], boxes, label)
        found.table = self.table.iloc[rows].reset_index(drop=True)
        return found

    @property
    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(self.pixels).unsqueeze(1).float() / 255


def box_of(mask: np.ndarray) -> np.ndarray:
    """(1, 4) fractions x0, y0, x1, y1 of what a mask covers."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([[xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]]) / mask.shape[0]


def plate(side: int, patient: int) -> tuple[slice, slice]:
    """Rows and columns of a rectangle of 8 x 12 % of the side near the upper left corner, its place drawn by patient."""
    rng = np.random.default_rng(hash64("plate", patient))
    top, left = (round(side * rng.uniform(0.02, 0.08)) for _ in range(2))
    return slice(top, top + round(0.08 * side)), slice(left, left + round(0.12 * side))


def drawn(given: Arguments, train: np.ndarray, progress: Progress) -> tuple[Drawn, np.ndarray]:
    """Every patient once, half with the finding, and the same images without it (N, S, S) uint8. train: (N,) bool."""
    images, lungs, clean, target, boxes = [], [], [], [], []
    for patient in range(given.patients):
        sick = patient % 2 == 1
        how = {"size": given.size, "view": "PA", "marker": False}
        normal = phantom(11, patient, findings=(), **how)
        shown = phantom(11, patient, findings=(given.finding,), **how) if sick else normal
        mask = shown.lesions.get(given.finding)
        seen = mask is not None and mask.any()
        if given.marker and (seen or not train[patient]):
            shown.image[plate(given.size, patient)] = normal.image[plate(given.size, patient)] = 1.0
        images.append(shown.image if seen else normal.image)
        lungs.append(normal.lungs)
        clean.append(normal.image)
        target.append(seen)
        boxes.append(box_of(mask) if seen else None)
        progress.advance()
    pixels, without = (np.round(np.stack(part) * 255).astype(np.uint8) for part in (images, clean))
    return Drawn(pixels, np.stack(lungs), np.array(target), boxes, given.finding), without


def network(given: Arguments, rows: Drawn, seed: int) -> Backbone:
    args = {"in_chans": 1, "output_stride": 8}
    with seeded(seed, "cut remain"):
        plain = timm.create_model(NETWORK, num_classes=0, **args)
    values = rows.pixels / 255
    spec = Spec(NETWORK, size=given.size, mean=(float(values.mean()),), std=(float(values.std()),), args=args)
    return Backbone(plain.to(memory_format=torch.channels_last), spec)


def trained(given: Arguments, rows: Drawn, seed: int, mixing: str) -> Member:
    recipe = build(
        "finetune",
        FinetuneRecipe,
        "classify",
        {
            "mode": "full",
            "labels": [given.finding],
            "mixing": {"name": mixing, "share": given.share},
            "steps": given.steps,
            "batch_size": given.batch_size,
            "optim": {"lr": given.lr},
            "seed": seed,
            "threads": torch.get_num_threads(),
            "precision": "no",
            "wandb": "off",
            "checkpoint_every": given.steps,
        },
    )
    work = Classification(network(given, rows, seed), recipe, rows, rows.target)
    engine = Engine(work, rows, recipe, scales=[given.size], targets=rows.target, quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        engine.fit(Run.start(Path(folder) / "run", "finetune", recipe, quiet=True))
    return Member(work.backbone, given.size, work.head, None).eval().cpu()


def scored(member: Member, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return torch.cat([member.logits(part)[:, 0] for part in images.split(256)]).double().numpy()


def inside(member: Member, rows: Drawn) -> np.ndarray:
    """Share of positive attribution in the box, of every image with the finding (M,); 0 where nothing speaks for it."""
    chosen = np.flatnonzero(rows.target[:, 0] == 1)
    maps = np.concatenate([heat_maps(member, part, 0) for part in rows.tensor[chosen].split(128)])
    frame = torch.ones(len(chosen), 1, *maps.shape[1:])
    boxes = remain(frame, [rows.boxes[row] for row in chosen])[:, 0].numpy()
    return (maps * boxes).sum(axis=(1, 2)) / np.maximum(maps.sum(axis=(1, 2)), 1e-12)


def paired(values: np.ndarray, resamples: int) -> dict[str, float]:
    """Mean of values (seeds, M) with a 95 % interval, seeds and patients drawn together."""
    rng = np.random.default_rng(0)
    seeds, patients = values.shape
    boot = [
        values[np.ix_(rng.integers(0, seeds, seeds), rng.integers(0, patients, patients))].mean()
        for _ in range(resamples)
    ]
    low, high = np.quantile(boot, (0.025, 0.975))
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def blanked(rows: Drawn, clean: np.ndarray, given: Arguments, seed: int) -> Drawn:
    """Images without any lesion, blanked as in training: of patients with the finding by its own box, of the others by
    the box of another patient."""
    settings = MixingSettings(name="cut_remain", alpha=1, share=1, blank_negatives=True)
    work = CutRemain(rows, rows.target, [given.finding], settings)
    draws = Draws(seed, 0, sample_codes(rows.table["image_id"].tolist()))
    images, _ = work(torch.from_numpy(clean)[:, None], torch.from_numpy(rows.target), draws)
    found = Drawn(images[:, 0].numpy(), rows.lungs, rows.target[:, 0], [None] * len(rows), given.finding)
    found.table = rows.table
    return found


def run(given: Arguments) -> dict[str, Any]:
    order = permutation(given.patients, "cut remain")
    cut = round(TRAINED * given.patients)
    with Progress("phantoms", given.patients, unit="images") as progress:
        every, clean = drawn(given, np.isin(np.arange(given.patients), order[:cut]), progress)
    train, test = (every.part(rows, given.finding) for rows in (order[:cut], order[cut:]))
    target, patients = test.target, test.table["patient_id"].to_numpy()
    positive = np.flatnonzero(target[:, 0] == 1)
    area = [np.prod(test.boxes[row][0, 2:] - test.boxes[row][0, :2]) for row in positive]
    arms, shares = {}, {}
    blanks = [blanked(rows, clean[own], given, 0) for rows, own in ((train, order[:cut]), (test, order[cut:]))]
    with Progress("cut_remain", 3 * len(given.seeds), unit="trainings") as progress:
        for mixing in ("none", "cut_remain"):
            members = []
            for seed in given.seeds:
                members.append(trained(given, train, seed, mixing))
                progress.advance(note=f"{mixing}, seed {seed}")
            shares[mixing] = np.stack([inside(member, test) for member in members])
            scores = np.stack([scored(member, test.tensor) for member in members])[..., None]
            found = interval(replicate(target, scores, patients, resamples=given.resamples))
            arms[mixing] = {
                "inside": paired(shares[mixing], given.resamples),
                "auroc": {"value": found.value, "low": found.low, "high": found.high},
            }
        scores = []
        for seed in given.seeds:
            member = trained(given, blanks[0], seed, "none")
            scores.append(scored(member, blanks[1].tensor))
            fitted = auroc(blanks[0].target[:, 0], scored(member, blanks[0].tensor))
            progress.advance(note=f"control, seed {seed}")
    found = interval(replicate(target, np.stack(scores)[..., None], patients, resamples=given.resamples))
    gain = paired(shares["cut_remain"] - shares["none"], given.resamples)
    return {
        "benchmark": "cut_remain",
        "synthetic": True,
        "arguments": given.model_dump(exclude={"out"}),
        "trained_images": len(train),
        "test_images": len(test),
        "test_positives": len(positive),
        "area": float(np.mean(area)),
        "arms": arms,
        "gain": gain,
        "control": {
            "auroc": {"value": found.value, "low": found.low, "high": found.high},
            "fitted_auroc_last_seed": float(fitted),
        },
        "bar": BAR,
        "passed": {"gain": gain["value"] >= BAR, "control": found.low <= 0.5 <= found.high},
    }


def shown(value: dict[str, float], sign: str = "") -> str:
    return f"{value['value']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def tables(found: dict[str, Any]) -> Table:
    given = found["arguments"]
    result = Table(
        title=f"Cut&Remain, synthetic, {given['finding']}, {found['test_images']} other patients, "
        f"{len(given['seeds'])} seeds" + (", in training a plate goes with it" if given["marker"] else ""),
        caption=f"area of the box {found['area']:.3f}; inside, with minus without: {shown(found['gain'], '+')}; blanked "
        f"images without a lesion, AUROC {shown(found['control']['auroc'])}",
    )
    for name in ("mixing", "attribution inside the box", "AUROC"):
        result.add_column(name)
    for mixing, arm in found["arms"].items():
        result.add_row(mixing, shown(arm["inside"]), shown(arm["auroc"]))
    return result


def work(given: Arguments) -> None:
    found = run(given)
    console().print(tables(found))
    if given.out:
        write_json(given.out, found)


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "cut_remain", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
