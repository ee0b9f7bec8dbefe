"""What a loss needs of the other ranks: their tensors in the order of the joined batch, with the right gradients.

On one process every function returns its argument. The gradients are those of the mean of the ranks' losses, which is
what DDP and FSDP make by averaging: a loss that every rank computes on the gathered batch, and a loss of each rank's own
rows against the gathered batch, both give the gradient of one process with the joined batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(world())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """(B, ...) of every rank, all of one shape -> (world * B, ...) in the order of the joined batch; gradients flow back."""
    return tensor if world() == 1 else _Gather.apply(tensor.contiguous())


def own_rows(count: int, device: torch.device) -> torch.Tensor:
    """(count,) int64: where this rank's `count` rows stand in a gathered batch."""
    return torch.arange(count, device=device) + rank() * count


@torch.no_grad()
def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, without gradient."""
    if world() == 1:
        return tensor
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over ranks, without gradient."""
    return total(tensor) / world()
