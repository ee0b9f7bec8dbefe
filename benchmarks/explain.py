"""Explanations: do heat maps find lesions, and do they depend on what was learned?

    python benchmarks/explain.py [findings=[Opacity,Effusion]] [primary=Opacity] [patients=2400] [phantoms=12] [size=64]
                                 [steps=1000] [parts=[maps,fields]] [out=FILE.json]

On synthetic radiographs, half of the patients with one finding whose place is known. For each finding a network is trained
on the images alone, places unseen, and judged on other patients by the pointing game
(carina.metrics.localization): how often the highest value of an image's heat map lies in the lesion's box. `chance` is what
a map that says nothing gets, the box's share of the picture. The sanity check randomizes the trained network from the output
to the input: with the last part of it gone, maps must no longer resemble the trained network's (Spearman) and must point no
better than chance; `edges`, the picture's own gradient, shows what a map gets that looks at the picture alone. The finding
named `primary` and Grad-CAM decide, both fixed beforehand. With `out` pictures of a few test images are drawn beside it.

The receptive fields are those of k stacked 3x3 convolutions, whose width must be 2 k + 1, and of networks of timm.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from common import console, script
from lesions import Drawn, boxes_of, scored, trained
from matplotlib.figure import Figure
from pydantic import Field
from rich.table import Table
from scipy.ndimage import gaussian_gradient_magnitude
from torch import nn

from carina.draws import permutation
from carina.evaluate.explain import heat_maps, sanity
from carina.evaluate.receptive import receptive_fields, theoretical_field
from carina.files import atomic_path, write_json
from carina.imaging.phantom import phantom
from carina.metrics.localization import box_masks, pointing_game
from carina.metrics.ranking import auroc
from carina.models.backbones import random_backbone
from carina.progress import Progress
from carina.recipes import Section

BAR = 0.7  # of the pointing game, by Grad-CAM for the primary finding
TRAINED = 0.8  # share of the patients
LOOKED = 32  # images that the sanity check sees
METHODS = ("gradcam", "integrated_gradients")
STACKED = (1, 2, 5, 9, 16)
FIELDS = ("resnet18", "resnet50", "densenet121", "efficientnet_lite0", "convnext_atto")
Finding = Literal["Opacity", "Nodule", "Effusion", "Cardiomegaly", "Pneumothorax"]


class Arguments(Section):
    findings: Annotated[list[Finding], Field(min_length=1)]
    primary: Finding
    patients: Annotated[int, Field(ge=40)]
    phantoms: int
    size: Annotated[int, Field(ge=32)]
    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=2)]
    lr: Annotated[float, Field(gt=0)]
    seed: int
    draws: Annotated[int, Field(ge=1)]
    parts: Annotated[list[Literal["maps", "fields"]], Field(min_length=1)]
    out: str | None


DEFAULTS = {
    "findings": ["Opacity", "Effusion"],
    "primary": "Opacity",
    "patients": 2400,
    "phantoms": 12,  # their seed: all settings were settled on the patients of seed 11
    "size": 64,
    "steps": 1000,
    "batch_size": 32,
    "lr": 4e-3,
    "seed": 0,
    "draws": 3,
    "parts": ["maps", "fields"],
    "out": None,
}


def drawn(finding: str, patients: int, size: int, seed: int) -> tuple[Drawn, np.ndarray]:
    """Every patient once, half with the finding, and the lesions (N, size, size) bool."""
    images, lungs, masks = [], [], []
    with Progress(finding, patients, unit="phantoms") as progress:
        for patient in range(patients):
            shown = phantom(seed, patient, size=size, view="PA", marker=False,
                            findings=(finding,) if patient % 2 else ())  # fmt: skip
            images.append(np.round(shown.image * 255).astype(np.uint8))
            lungs.append(shown.lungs)
            masks.append(shown.lesions.get(finding, np.zeros((size, size), dtype=bool)))
            progress.advance()
    boxes = [boxes_of(mask) for mask in masks]
    return Drawn(np.stack(images), np.stack(lungs), np.array([bool(own) for own in boxes]), boxes, finding), np.stack(
        masks
    )


def pointed(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """The pointing game's mean with its 95 % interval over patients (one image each). maps: of the images of `masks`, once
    or several times over."""
    times = len(maps) // len(masks)
    hits = pointing_game(maps, np.tile(masks, (times, 1, 1))).reshape(times, -1).mean(axis=0)
    draws = np.random.default_rng(0).integers(0, len(hits), (2000, len(hits)))
    low, high = np.quantile(hits[draws].mean(axis=1), (0.025, 0.975))
    return {"value": float(hits.mean()), "low": float(low), "high": float(high)}


def judged(given: Arguments, finding: str, panels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    every, lesions = drawn(finding, given.patients, given.size, given.phantoms)
    order = permutation(given.patients, "explain", finding)
    cut = round(TRAINED * given.patients)
    train, test = every.part(order[:cut]), every.part(order[cut:])
    sick = np.flatnonzero(test.target[:, 0] == 1)
    images, boxes = test.tensor[sick], box_masks([test.boxes[row] for row in sick], given.size)
    exact = lesions[order[cut:]][sick]
    edges = np.stack([gaussian_gradient_magnitude(image[0].numpy(), 1.0) for image in images])
    rows, chance = [], float(boxes.mean())
    member = trained(train, given.seed, given.steps, given.batch_size, given.lr)
    area = auroc(test.target[:, 0], scored(member, test.tensor))
    for method in METHODS:
        maps = np.concatenate([heat_maps(member, part, 0, method=method) for part in images.split(64)])
        draws = [sanity(member, images[:LOOKED], 0, method=method, seed=seed) for seed in range(given.draws)]
        randomized = []
        for steps in zip(*draws):
            some = np.concatenate([step["maps"] for step in steps])
            randomized.append(
                {
                    "part": steps[0]["randomized"],
                    "similarity": float(np.mean([step["similarity"] for step in steps])),
                    "empty": float((some.max(axis=(1, 2)) == 0).mean()),
                    "pointing": pointed(some, boxes[:LOOKED]),
                }
            )
        rows.append(
            {
                "finding": finding,
                "method": method,
                "auroc": area,
                "images": len(sick),
                "chance": chance,
                "pointing": pointed(maps, boxes),
                "pointing_exact": pointed(maps, exact),
                "edges": pointed(edges, boxes)["value"],
                "randomized": randomized[1:],
            }
        )
        panels.append({**rows[-1], "images": images[:4, 0].numpy(), "boxes": [test.boxes[row] for row in sick[:4]],
                       "maps": maps[:4], "random": draws[0][-1]["maps"][:4]})  # fmt: skip
    return rows


def verdict(rows: list[dict[str, Any]], primary: str) -> dict[str, Any]:
    """Of Grad-CAM on the convolutional network for the primary finding."""
    row = next(r for r in rows if (r["finding"], r["method"]) == (primary, "gradcam"))
    last = row["randomized"][-1]
    return {
        "finding": primary,
        "pointing": row["pointing"]["value"],
        "randomized_pointing": last["pointing"]["value"],
        "randomized_similarity": last["similarity"],
        "found": row["pointing"]["value"] >= BAR,
        "sanity_lost": abs(last["similarity"]) < 0.3 and last["pointing"]["high"] < row["pointing"]["low"] / 2,
    }


def fields(given: Arguments) -> dict[str, Any]:
    stacked = []
    for count in STACKED:
        layers = [nn.Conv2d(1 if number == 0 else 4, 4, 3, padding=1) for number in range(count)]
        width = theoretical_field(nn.Sequential(*layers), 1)[0]
        stacked.append({"layers": count, "width": width, "expected": 2 * count + 1})
    networks = []
    with Progress("fields", len(FIELDS), unit="networks") as progress:
        for name in FIELDS:
            found = receptive_fields(random_backbone(name, 128, given.seed), [128])
            networks.append({"network": name, "fields": [f.theoretical for f in found]})
            progress.advance(note=name)
    return {"stacked": stacked, "networks": networks, "met": all(r["width"] == r["expected"] for r in stacked)}


def pictured(panels: list[dict[str, Any]], path: Path) -> None:
    """A row an arm: images with boxes, the map of the trained network, and of the randomized one."""
    figure = Figure(figsize=(12, 1.25 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 12, squeeze=False)
    for line, panel in zip(grid, panels):
        for number in range(4):
            image, box = panel["images"][number], panel["boxes"][number][0]
            for place, heat in ((0, None), (4, panel["maps"][number]), (8, panel["random"][number])):
                axes = line[place + number]
                axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
                if heat is not None:
                    axes.imshow(heat, cmap="inferno", alpha=0.6, vmin=0, vmax=1, interpolation="bicubic")
                side = len(image)
                x0, y0, x1, y1 = (edge * side - 0.5 for edge in box)
                axes.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color="#35d8f0", linewidth=1)
                axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(f"{panel['finding']}\n{panel['method']}".replace("_gr", "\ngr"), fontsize=6.5)
    for place, word in ((0, "synthetic, with the lesion's box"), (4, "trained"), (8, "all weights random")):
        grid[0, place].set_title(word, fontsize=9, loc="left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(
        title="synthetic radiographs: the highest value of the heat map lies in the lesion's box",
        caption="[95 % interval over patients]; similarity: Spearman against the trained network's maps",
    )
    names = ("finding", "AUROC", "method", "pointing", "in the lesion itself", "chance", "edges")
    for name in (*names, "similarity after the head / half / all", "pointing, all randomized"):
        result.add_column(name)
    for row in rows:
        steps = row["randomized"]
        similar = " / ".join(f"{steps[at]['similarity']:.2f}" for at in (0, len(steps) // 2, -1))
        result.add_row(
            row["finding"],
            f"{row['auroc']:.3f}",
            row["method"],
            shown(row["pointing"]),
            shown(row["pointing_exact"]),
            f"{row['chance']:.2f}",
            f"{row['edges']:.2f}",
            similar,
            f"{shown(steps[-1]['pointing'])}, {100 * steps[-1]['empty']:.0f} % empty",
        )
    return result


def shown(value: dict[str, float]) -> str:
    return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def work(given: Arguments) -> None:
    out = console(190)
    result: dict[str, Any] = {"benchmark": "explain", "synthetic": True, "arguments": given.model_dump(exclude={"out"})}
    if "maps" in given.parts:
        panels: list[dict[str, Any]] = []
        result["maps"] = [row for finding in given.findings for row in judged(given, finding, panels)]
        out.print(table(result["maps"]))
        if given.primary in given.findings:
            found = result["verdict"] = verdict(result["maps"], given.primary)
            out.print(
                f"{given.primary}, Grad-CAM, named beforehand: pointing {found['pointing']:.2f} (bar {BAR}); all weights "
                f"random {found['randomized_pointing']:.2f}, similarity {found['randomized_similarity']:.2f}"
            )
        if given.out:
            pictured(panels, Path(given.out).with_suffix(".png"))
    if "fields" in given.parts:
        found = result["fields"] = fields(given)
        out.print("k stacked 3x3: " + ", ".join(f"{r['layers']}: {r['width']}" for r in found["stacked"]))
        for row in found["networks"]:
            out.print(f"{row['network']}: " + ", ".join("all" if f is None else f"{f} px" for f in row["fields"]))
    if given.out:
        write_json(given.out, result)


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "explain", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
