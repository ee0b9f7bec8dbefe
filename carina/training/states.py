"""Checkpoints: the state after a step as one atomic folder of safetensors and JSON, whole whatever the sharding.

Under FSDP every rank holds a part of each tensor. `whole` gathers it on all ranks, so that a checkpoint is the same file
on any number of ranks and a run may go on with another number.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from carina.errors import CarinaError
from carina.files import atomic_folder, read_json, write_json
from carina.models.checkpoints import load_tensors, save_tensors
from carina.runs import Run

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # a torch without distributed has nothing sharded
    DTensor = None


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of all ranks; every rank must ask for it."""
    return tensor.full_tensor() if DTensor is not None and isinstance(tensor, DTensor) else tensor


def _as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` on the device of `like`, and sharded as it is."""
    if DTensor is not None and isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)


def task_tensors(task: nn.Module) -> dict[str, torch.Tensor]:
    return {key: whole(value) for key, value in task.state_dict().items()}


@torch.no_grad()
def load_task_tensors(task: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    own = task.state_dict()
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())[0]
        raise CarinaError(
            f"the checkpoint is of another network (tensor {odd}); resume with the recipe it was made with"
        )
    for key, value in own.items():
        value.copy_(_as(tensors[key], value))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as named tensors; parameters are numbered in the order of the groups."""
    tensors = {}
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for name, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"{number}.{name}"] = whole(torch.as_tensor(value))
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        # Adam counts its steps in a tensor that stays on the CPU
        if name == "step":
            optimizer.state[parameter][name] = value.clone()
        else:
            optimizer.state[parameter][name] = _as(value.to(memory_format=_format(value)), parameter).clone()


def _format(value: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if value.ndim == 4 else torch.contiguous_format


def checkpoints(run: Run) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted((run.folder / "checkpoints").glob("step-*"))


def save_checkpoint(
    run: Run,
    step: int,
    task: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor],
    facts: dict[str, Any],
    *,
    keep: int,
    keep_every: int | None,
) -> None:
    """Write checkpoints/step-XXXXXXXX (the state after `step` steps); of the older ones stay the newest `keep` and those
    whose step is a multiple of `keep_every`."""
    with atomic_folder(run.folder / "checkpoints" / f"step-{step:08d}") as folder:
        save_tensors(folder / "task.safetensors", task)
        save_tensors(folder / "optimizer.safetensors", optimizer)
        write_json(folder / "state.json", {"step": step, **facts})
    passing = [p for p in checkpoints(run) if not keep_every or int(p.name.removeprefix("step-")) % keep_every]
    for old in passing[:-keep]:
        shutil.rmtree(old)


def newest_checkpoint(
    run: Run,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]] | None:
    """(task, optimizer, facts) of the newest checkpoint that is whole; None where there is none yet.

    A damaged one (a disk that lost data) is named in the log and the one before it taken.
    """
    found = checkpoints(run)
    for folder in reversed(found):
        try:
            task, optimizer = (load_tensors(folder / f"{name}.safetensors") for name in ("task", "optimizer"))
            return task, optimizer, read_json(folder / "state.json")
        except CarinaError as error:
            run.log(f"{folder.name} is damaged and passed over: {error}")
    if found:
        raise CarinaError(f"every checkpoint of {run.folder} is damaged; start anew with another out=")
    return None
