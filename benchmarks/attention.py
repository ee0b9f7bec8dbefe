"""Attention consistency: does attention move with the image, and what does that cost?

    python benchmarks/attention.py store=STORE [backbone=RUN] [labels=[abnormal]] [weights=[0,0.05]] [seeds=[0,1,2]]
                                   [steps=300] [scale=64] [rows=train] [held_out=val+test] [where=...] [out=FILE.json]

The same network with the multi-scale attention head is trained with every weight of the consistency loss and nothing
else changed, and judged on held-out patients. `disagreement` is the share of attention that lies elsewhere after the
image was turned, shifted or mirrored (carina.finetune.attention): 0 to 1. It could also fall because attention stops
looking: so beside it stand `places`, the share of the places that attention is spread over (the exponential of its
entropy), and `between images`, the share that lies elsewhere in another image, which is 0 for attention that no longer
depends on what is seen. AUROC differences are paired: patients and seeds are drawn together.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from common import console, script
from pydantic import Field
from rich.table import Table

from carina.data.batches import in_order, intensity
from carina.data.labels import to_targets
from carina.data.store import Selection, select
from carina.draws import Draws, permutation, sample_codes
from carina.errors import CarinaError
from carina.files import write_json
from carina.finetune.attention import disagreement, moved
from carina.finetune.classify import Classification, check
from carina.finetune.recipe import FinetuneRecipe
from carina.metrics.intervals import difference, interval
from carina.metrics.resampling import replicate
from carina.models.backbones import load_backbone, resize_images
from carina.progress import Progress
from carina.recipes import Section, build
from carina.runs import Run
from carina.training.engine import Engine, pick_device

BAR = 0.3  # by how much disagreement must fall
LOOKS = 2  # how often every held-out image is moved


class Arguments(Section):
    store: Annotated[str | list[str], Field(min_length=1)]
    backbone: str
    architecture: str
    labels: Annotated[list[str], Field(min_length=1)]
    weights: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2)]
    seeds: Annotated[list[int], Field(min_length=1)]
    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=2)]
    lr: Annotated[float, Field(gt=0)]
    scale: int
    rows: str
    held_out: str
    where: str | None
    resamples: Annotated[int, Field(ge=100)]
    out: str | None


DEFAULTS = {
    "backbone": "random",
    "architecture": "resnet18",
    "labels": ["abnormal"],
    "weights": [0.0, 0.05],
    "seeds": [0, 1, 2],
    "steps": 300,
    "batch_size": 32,
    "lr": 5e-4,
    "scale": 64,
    "rows": "train",
    "held_out": "val+test",
    "where": None,
    "resamples": 2000,
    "out": None,
}


def recipe(given: Arguments, weight: float, seed: int) -> FinetuneRecipe:
    found = build(
        "finetune",
        FinetuneRecipe,
        "classify",
        {
            "mode": "full",
            "labels": given.labels,
            "head": {"name": "multiscale", "hidden": 128},
            "consistency": {"weight": weight},
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
    check(found)
    return found


def trained(given: Arguments, weight: float, seed: int, rows: Selection, progress: Progress) -> Classification:
    own = recipe(given, weight, seed)
    mean, std = intensity(rows, given.scale)
    reference = f"random:{given.architecture}" if given.backbone == "random" else given.backbone
    backbone = load_backbone(reference, size=given.scale, seed=seed, mean=mean, std=std)
    targets = to_targets(rows.targets(given.labels))
    work = Classification(backbone, own, rows, targets)
    engine = Engine(work, rows, own, scales=[given.scale], targets=targets, quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        engine.fit(Run.start(Path(folder) / "run", "finetune", own, quiet=True))
    progress.advance(note=f"weight {weight:g}, seed {seed}")
    return work.eval()


@torch.no_grad()
def looked(work: Classification, rows: Selection, scale: int) -> tuple[np.ndarray, dict[str, float]]:
    """Logits (N, L) of all rows, and means over them of what their attention does."""
    device = pick_device()
    codes = sample_codes(rows.table["image_id"].tolist())
    size, labels = work.backbone.spec.size, work.recipe.labels
    logits, spreads, apart = [], [], []
    for part, stored in in_order(rows, scale, device):
        images = resize_images(stored, size)
        read = work.head.read(work.backbone, images)
        before = work.head.spread(read)
        logits.append(work.head(read).double().cpu())
        spreads.append(before.cpu())
        for look in range(LOOKS):
            other, theta, flipped = moved(images, Draws(7, look, codes[part]), work.recipe.consistency)
            after = work.head.spread(work.head.read(work.backbone, other))
            apart.append(disagreement(before, after, theta, flipped, labels).cpu())
    flat = torch.cat(spreads).flatten(2)
    centered = flat - flat.mean(dim=2, keepdim=True)
    unit = centered / centered.norm(dim=2, keepdim=True).clamp(min=1e-10)
    another = (unit * unit[permutation(len(flat), "another image")]).sum(dim=2)
    entropy = -(flat * flat.clamp(min=1e-12).log()).sum(dim=2)
    measures = {
        "disagreement": float(torch.cat(apart).mean()),
        "between": float(1 - another.mean()),
        "places": float(entropy.exp().mean() / flat.shape[2]),
    }
    return torch.cat(logits).numpy(), measures


def run(given: Arguments) -> dict[str, Any]:
    everything = select(given.store, where=given.where, scales=[given.scale])
    train, held = (everything.split(*names.split("+")) for names in (given.rows, given.held_out))
    if not len(train) or not len(held):
        raise CarinaError(f"the store has no rows of split={given.rows} or of {given.held_out}; give rows=, held_out=")
    train = train.where(~np.isnan(to_targets(train.targets(given.labels))).all(axis=1))
    target, patients = to_targets(held.targets(given.labels)), held.table["patient_id"].to_numpy()
    arms: dict[float, dict[str, Any]] = {}
    replicates = {}
    with Progress("attention", len(given.weights) * len(given.seeds), unit="trainings") as progress:
        for weight in given.weights:
            found = [looked(trained(given, weight, seed, train, progress), held, given.scale) for seed in given.seeds]
            replicates[weight] = replicate(target, np.stack([logits for logits, _ in found]), patients,
                                           resamples=given.resamples)  # fmt: skip
            auroc = interval(replicates[weight])
            arms[weight] = {
                "weight": weight,
                **{name: float(np.mean([measures[name] for _, measures in found])) for name in found[0][1]},
                "disagreement_by_seed": [measures["disagreement"] for _, measures in found],
                "auroc": {"value": auroc.value, "low": auroc.low, "high": auroc.high},
            }
    base = given.weights[0]
    for weight in given.weights[1:]:
        cost = difference(replicates[weight], replicates[base])
        arms[weight] |= {
            "fall": 1 - arms[weight]["disagreement"] / arms[base]["disagreement"],
            "auroc_difference": {"value": cost.value, "low": cost.low, "high": cost.high},
        }
    return {
        "benchmark": "attention",
        "arguments": given.model_dump(exclude={"store", "out", "backbone"}),
        "synthetic": everything.synthetic,
        "trained_images": len(train),
        "held_out_images": len(held),
        "held_out_patients": int(held.table["patient_id"].nunique()),
        "arms": list(arms.values()),
        "bar": BAR,
        "passed": all(arm["fall"] >= BAR for arm in list(arms.values())[1:]),
    }


def table(found: dict[str, Any]) -> Table:
    word = "synthetic, " if found["synthetic"] else ""
    result = Table(
        title=f"attention consistency, {word}{len(found['arguments']['seeds'])} seeds, {found['held_out_images']} held-out "
        f"images of {found['held_out_patients']} patients",
        caption="[95 % interval, patients and seeds drawn]; differences are to the first row, paired",
    )
    for name in ("weight", "disagreement", "fall", "between images", "places", "AUROC", "AUROC difference"):
        result.add_column(name)
    for arm in found["arms"]:
        auroc, cost = arm["auroc"], arm.get("auroc_difference")
        result.add_row(
            f"{arm['weight']:g}",
            f"{arm['disagreement']:.3f}",
            f"{arm['fall']:.0%}" if "fall" in arm else "",
            f"{arm['between']:.3f}",
            f"{arm['places']:.2f}",
            f"{auroc['value']:.3f} [{auroc['low']:.3f}, {auroc['high']:.3f}]",
            f"{cost['value']:+.3f} [{cost['low']:+.3f}, {cost['high']:+.3f}]" if cost else "",
        )
    return result


def work(given: Arguments) -> None:
    found = run(given)
    console().print(table(found))
    if given.out:
        write_json(given.out, found)


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "attention", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
