"""Cut&Remain: does a classifier look at the lesion because of it, and does the blank itself give the label away?

    python benchmarks/cut_remain.py [patients=1200] [phantoms=12] [finding=Opacity] [marker=false] [size=64] [steps=600]
                                    [share=0.5] [seeds=[0,1]] [out=FILE.json]

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
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from common import console, script
from lesions import Drawn, boxes_of, scored, trained
from pydantic import Field
from rich.table import Table

from carina.draws import Draws, hash64, permutation, sample_codes
from carina.evaluate.explain import heat_maps
from carina.files import write_json
from carina.finetune.mixing import CutRemain, remain
from carina.finetune.recipe import MixingSettings
from carina.imaging.phantom import phantom
from carina.metrics.intervals import interval
from carina.metrics.ranking import auroc
from carina.metrics.resampling import replicate
from carina.models.predictor import Member
from carina.progress import Progress
from carina.recipes import Section

BAR = 0.10
TRAINED = 0.7  # share of the patients


class Arguments(Section):
    patients: Annotated[int, Field(ge=40)]
    phantoms: int
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
    "patients": 1200,
    "phantoms": 12,  # their seed
    "marker": False,
    "finding": "Opacity",
    "size": 64,
    "steps": 600,
    "batch_size": 32,
    "lr": 4e-3,
    "share": 0.5,
    "seeds": [0, 1],
    "resamples": 2000,
    "out": None,
}


def plate(side: int, patient: int) -> tuple[slice, slice]:
    """Rows and columns of a rectangle of 8 x 12 % of the side near the upper left corner, its place drawn by patient."""
    rng = np.random.default_rng(hash64("plate", patient))
    top, left = (round(side * rng.uniform(0.02, 0.08)) for _ in range(2))
    return slice(top, top + round(0.08 * side)), slice(left, left + round(0.12 * side))


def drawn(given: Arguments, train: np.ndarray, progress: Progress) -> tuple[Drawn, np.ndarray]:
    """Every patient once, half with the finding, and the same images without it (N, S, S) uint8. train: (N,) bool."""
    images, lungs, clean, boxes = [], [], [], []
    for patient in range(given.patients):
        how = {"size": given.size, "view": "PA", "marker": False}
        normal = phantom(given.phantoms, patient, findings=(), **how)
        shown = phantom(given.phantoms, patient, findings=(given.finding,), **how) if patient % 2 else normal
        own = boxes_of(shown.lesions[given.finding]) if given.finding in shown.lesions else []
        if given.marker and (own or not train[patient]):
            shown.image[plate(given.size, patient)] = normal.image[plate(given.size, patient)] = 1.0
        images.append(shown.image if own else normal.image)
        lungs.append(normal.lungs)
        clean.append(normal.image)
        boxes.append(own)
        progress.advance()
    pixels, without = (np.round(np.stack(part) * 255).astype(np.uint8) for part in (images, clean))
    target = np.array([bool(own) for own in boxes])
    return Drawn(pixels, np.stack(lungs), target, boxes, given.finding), without


def inside(member: Member, rows: Drawn) -> np.ndarray:
    """Share of positive attribution in the box, of every image with the finding (M,); 0 where nothing speaks for it."""
    chosen = np.flatnonzero(rows.target[:, 0] == 1)
    maps = np.concatenate([heat_maps(member, part, 0) for part in rows.tensor[chosen].split(128)])
    frame = torch.ones(len(chosen), 1, *maps.shape[1:])
    boxes = remain(frame, [np.array(rows.boxes[row]) for row in chosen])[:, 0].numpy()
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
    found = Drawn(images[:, 0].numpy(), rows.lungs, rows.target[:, 0], [[] for _ in rows.boxes], given.finding)
    found.table = rows.table
    return found


def run(given: Arguments) -> dict[str, Any]:
    order = permutation(given.patients, "cut remain")
    cut = round(TRAINED * given.patients)
    with Progress("phantoms", given.patients, unit="images") as progress:
        every, clean = drawn(given, np.isin(np.arange(given.patients), order[:cut]), progress)
    train, test = (every.part(rows) for rows in (order[:cut], order[cut:]))
    target, patients = test.target, test.table["patient_id"].to_numpy()
    positive = np.flatnonzero(target[:, 0] == 1)
    corners = np.array([test.boxes[row][0] for row in positive])
    area = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
    arms, shares = {}, {}
    how = (given.steps, given.batch_size, given.lr)
    blanks = [blanked(rows, clean[own], given, 0) for rows, own in ((train, order[:cut]), (test, order[cut:]))]
    with Progress("cut_remain", 3 * len(given.seeds), unit="trainings") as progress:
        for mixing in ("none", "cut_remain"):
            members = []
            for seed in given.seeds:
                members.append(trained(train, seed, *how, mixing={"name": mixing, "share": given.share}))
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
            member = trained(blanks[0], seed, *how)
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
