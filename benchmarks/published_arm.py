"""The arm "AnatPaste as published" of the Kermany tables: the pasting of the paper's description, with its own lung masks,
in carina's loop, beside the same backbone, schedule and head as our arm.

    python benchmarks/published_arm.py store=STORE out=RUNS [set=kermany_224] [seeds=[0,1,2]] [arm=imagenet_anatpaste]
                                       [protocol=kermany_patients]

A run a seed, which then are given to the protocol, here at their last epoch:
carina finetune protocol kermany_patients backbones.anatpaste_published=RUNS/{seed}/predictor-last
                                          arms.imagenet_anatpaste_published.seeds=[0,1,2] ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import script
from published_anatpaste import SIDE, published, published_mask

from carina.data.batches import Batch
from carina.finetune import anomaly
from carina.finetune.protocol import read_protocol
from carina.finetune.run import finetune
from carina.models.backbones import resize_images
from carina.recipes import Section, merge

DEFAULTS = {"set": "kermany_224", "seeds": [0, 1, 2], "arm": "imagenet_anatpaste", "protocol": "kermany_patients"}


class Arguments(Section):
    store: str
    out: str
    set: str
    seeds: list[int]
    arm: str
    protocol: str


class PublishedPasting(anomaly.Pasting):
    """The task of carina finetune with the views of the published algorithm; masks are found once an image."""

    def __init__(self, *args):
        super().__init__(*args)
        self.masks: dict[int, np.ndarray] = {}

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        wholes, pasted = [], []
        seeds = batch.draws.part("published").integers("seed", 0, 2**31)
        for code, seed, image in zip(batch.draws.codes, seeds, resize_images(batch.images, SIDE)[:, 0].cpu().numpy()):
            if int(code) not in self.masks:
                self.masks[int(code)] = published_mask(image)
            # one seed for both, so that a pair shares its jitter
            for mask, views in ((np.zeros_like(image, dtype=bool), wholes), (self.masks[int(code)], pasted)):
                views.append(published(image, np.random.default_rng(int(seed)), mask)[0])
        size = self.backbone.spec.size
        parts = (torch.from_numpy(np.stack(part))[:, None].to(batch.images.device) for part in (wholes, pasted))
        views = [resize_images(part, size) for part in parts]
        return self.task.loss(self.backbone, {"views": views, "maps": []})


def work(arguments: Arguments) -> None:
    protocol = read_protocol(arguments.protocol)
    given = merge(protocol.recipe, protocol.arms[arguments.arm].recipe or {})
    rows = protocol.sets[arguments.set]
    given |= {"backbone": protocol.arms[arguments.arm].backbone, "mode": "full", "threshold_rows": None}
    # the same fifth kept from training as in our arm
    given |= {"pool_rows": rows.pool, "pool_prevalence": rows.prevalence, "store": arguments.store}
    anomaly.Pasting = PublishedPasting
    for seed in arguments.seeds:
        finetune("anomaly", given | {"out": str(Path(arguments.out) / str(seed)), "seed": seed}, quiet=True)


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "published_arm", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
