"""One step of every pretext on this rank's part of a fixed batch; torchrun starts it, test_ranks.py reads what it wrote.

Batch norm is in eval mode: its statistics are a rank's own by design, everything else must not know the ranks apart.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from carina.data.batches import Batch
from carina.draws import Draws
from carina.models.backbones import random_backbone
from carina.pretrain.pretexts import METHODS, Corpus, method
from carina.pretrain.recipe import PretrainRecipe
from carina.pretrain.run import Pretraining
from carina.recipes import build

COUNT, STEPS = 16, 2
EXTRA = {"swav": {"queue": 32, "supervised": 0.5, "labels": ["a", "b"]}}
SMALL = {
    "prototypes": 24,
    "hidden": 32,
    "bottleneck": 16,
    "dimension": 16,
    "width": 32,
    "depth": 1,
    "heads": 4,
    "queue": 32,
}


def joined(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    masks = torch.zeros(COUNT, 1, 64, 64, dtype=torch.bool)
    masks[..., 16:48, 12:52] = True
    targets = torch.randint(0, 2, (COUNT, 2), generator=generator).float()
    targets[::5] = float("nan")
    return {
        "images": torch.rand(COUNT, 1, 64, 64, generator=generator),
        "masks": masks,
        "targets": targets,
        "codes": torch.arange(COUNT) + 100 * step,
        # two images of one patient on either rank, and two on one
        "patients": torch.tensor([0, 1, 2, 3, 3, 4, 5, 6, 0, 7, 8, 9, 10, 11, 12, 13]),
    }


def batch(step: int, rank: int, world: int) -> Batch:
    rows = slice(rank * COUNT // world, (rank + 1) * COUNT // world)
    part = {name: value[rows] for name, value in joined(step).items()}
    groups = {"image": part["codes"], "study": part["codes"], "patient": part["patients"]}
    draws = Draws(0, 0, part["codes"].numpy().astype(np.uint64))
    return Batch(part["images"], part["masks"], groups, part["targets"], draws, 64, (0, step, rank))


def run(name: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Losses of two steps (the second sees what the first left behind), gradients of the second, and the state."""
    recipe = build("pretrain", PretrainRecipe, "default", {"pretexts": {name: EXTRA.get(name, {})}})
    settings = getattr(recipe.pretexts, name)
    fields = {k: v for k, v in SMALL.items() if k in type(settings).model_fields and k not in EXTRA.get(name, {})}
    settings = settings.model_copy(update=fields)
    backbone = random_backbone("test_vit", 64, 0)
    corpus = Corpus(
        count=256, batch_size=COUNT, micro_batch=COUNT // world, scales=(64,), size=None, views=recipe.views, seed=0,
        steps=10,
    )  # fmt: skip
    task = Pretraining(backbone, {name: 1.0}, {name: method(name)(backbone, settings, corpus)})
    task.train()
    for part in task.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.eval()
    model = task
    if world > 1:
        model = DistributedDataParallel(task, broadcast_buffers=False, find_unused_parameters=True)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.05)
    out = {}
    for step in range(STEPS):
        losses = model(batch(step, rank, world))
        optimizer.zero_grad()
        losses["loss"].backward()
        out |= {f"gradient.{step}.{key}": p.grad.clone() for key, p in task.named_parameters() if p.grad is not None}
        optimizer.step()
        task.after_step(step)
        value = losses["loss"].detach().clone()
        if world > 1:
            dist.all_reduce(value)
        out[f"loss.{step}"] = value / world
    out |= {f"state.{key}": value.clone().contiguous() for key, value in task.pretexts.state_dict().items()}
    return {key: value.contiguous().clone() for key, value in out.items()}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for name in METHODS:
        save_file(run(name, rank, world), Path(folder) / f"{name}-{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
