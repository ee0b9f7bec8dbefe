"""Synthetic radiographs in memory whose lesions are known, and a small network that learns to find them; what the benchmarks
of explanations and of Cut&Remain share.

The network's last map is a quarter of the side: a place of it is less than half as wide as most lesions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import timm
import torch

from carina.data.store import Selection
from carina.draws import hash64
from carina.finetune.classify import Classification
from carina.finetune.recipe import FinetuneRecipe
from carina.models.backbones import Backbone, Spec, seeded
from carina.models.predictor import Member
from carina.recipes import build
from carina.runs import Run
from carina.training.engine import Engine

NETWORK = ("densenet121", {"in_chans": 1, "block_config": (6,), "growth_rate": 16})
Corners = list[float]  # x0, y0, x1, y1 in fractions of the frame


class Drawn(Selection):
    """Images (N, S, S) uint8, lungs alike, bool; target (N,) of the one finding `label`; the boxes of each image, a patient
    each."""

    def __init__(
        self, images: np.ndarray, lungs: np.ndarray, target: np.ndarray, boxes: Sequence[list[Corners]], label: str
    ):
        names = [f"{hash64('drawn', number):016x}" * 2 for number in range(len(images))]
        told = [[dict(zip(("x0", "y0", "x1", "y1"), box), label=label) for box in own] for own in boxes]
        table = pd.DataFrame({"image_id": names, "study_id": names, "patient_id": names, "boxes": told})
        super().__init__([SimpleNamespace(scales=[images.shape[1]])], table.assign(lungs_source="mask"))
        self.pixels, self.lungs, self.label, self.boxes = images, lungs, label, list(boxes)
        self.target = np.asarray(target, dtype=np.float32)[:, None]

    def images(self, rows: Sequence[int], scale: int) -> np.ndarray:
        return self.pixels[np.asarray(rows)]

    def masks(self, rows: Sequence[int], scale: int, name: str = "lungs") -> np.ndarray:
        return self.lungs[np.asarray(rows)]

    def part(self, rows: np.ndarray) -> Drawn:
        found = Drawn(
            self.pixels[rows], self.lungs[rows], self.target[rows, 0], [self.boxes[row] for row in rows], self.label
        )
        found.table = self.table.iloc[rows].reset_index(drop=True)
        return found

    @property
    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(self.pixels).unsqueeze(1).float() / 255


def boxes_of(mask: np.ndarray) -> list[Corners]:
    """The box around what a mask (S, S) covers; none where it covers nothing."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [(np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]) / len(mask)).tolist()] if len(xs) else []


def trained(rows: Drawn, seed: int, steps: int, batch_size: int, lr: float, **recipe) -> Member:
    """The network with the head `lse`, trained on whether the finding is there; never told where, unless by `mixing`."""
    name, args = NETWORK
    size = rows.pixels.shape[1]
    with seeded(seed, "lesions"):
        plain = timm.create_model(name, num_classes=0, **args)
    values = rows.pixels / 255
    spec = Spec(name, size=size, mean=(float(values.mean()),), std=(float(values.std()),), args=args)
    given = {
        "mode": "full",
        "labels": [rows.label],
        "head": {"name": "lse"},
        "steps": steps,
        "batch_size": batch_size,
        "optim": {"lr": lr},
        "seed": seed,
        "threads": torch.get_num_threads(),
        "precision": "no",
        "wandb": "off",
        "checkpoint_every": steps,
    }
    settings = build("finetune", FinetuneRecipe, "classify", {**given, **recipe})
    work = Classification(Backbone(plain, spec), settings, rows, rows.target)
    engine = Engine(work, rows, settings, scales=[size], targets=rows.target, quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        engine.fit(Run.start(Path(folder) / "run", "finetune", settings, quiet=True))
    return Member(work.backbone, size, work.head, None).eval().cpu()


def scored(member: Member, images: torch.Tensor) -> np.ndarray:
    """(N,) float64 logits of images (N, 1, S, S)."""
    with torch.no_grad():
        return torch.cat([member.logits(part)[:, 0] for part in images.split(256)]).double().numpy()
