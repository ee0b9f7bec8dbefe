"""Size-specific batch norm: all weights are shared, every input size has batch norms of its own.

Maps of a small image and of a large one have other means and variances after the same kernel, so one set of running
statistics serves none of them. With a set for each size the network stays one, and each size normalizes by itself
(switchable batch norm of Yu et al., arXiv 1812.08928, with the input size as the switch).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from carina.errors import CarinaError
from carina.files import read_json

if TYPE_CHECKING:
    from carina.models.backbones import Backbone

FILE = "scales.safetensors"  # beside model.safetensors: `<size>/<key>` of every size but the default one
Norms = dict[int, dict[str, torch.Tensor]]  # size -> plain timm key -> tensor


def nearest_size(sizes: Iterable[int], side: int) -> int:
    """The size with the smallest ratio to `side`; the first one of equals."""
    return min(sizes, key=lambda size: max(size / side, side / size))


class SizeChoice:
    """Which size's norms are in use: one object, shared by all norms of a network and set before each forward pass."""

    def __init__(self, sizes: tuple[int, ...]):
        self.sizes, self.size = sizes, sizes[0]

    def set(self, side: int) -> None:
        self.size = nearest_size(self.sizes, side)


class SizeNorm(nn.Module):
    """A batch norm of each size; `choice` says which one normalizes."""

    def __init__(self, norms: dict[int, nn.Module], choice: SizeChoice):
        super().__init__()
        self.norms = nn.ModuleDict({str(size): norm for size, norm in norms.items()})
        self.choice = choice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norms[str(self.choice.size)](x)


def _places(network: nn.Module) -> dict[str, SizeNorm]:
    return {name: module for name, module in network.named_modules() if isinstance(module, SizeNorm)}


def norm_sizes(network: nn.Module) -> tuple[int, ...]:
    """The sizes with norms of their own; none where the norms are shared or there are none."""
    choice = getattr(network, "size_choice", None)
    return choice.sizes if choice is not None else ()


def add_size_norms(backbone: Backbone, sizes: Iterable[int]) -> None:
    """Give each of `sizes` (sides in pixels, the first is the default) a copy of every batch norm, in place.

    Copies start equal, so nothing changes until they are trained. Other sides (local crops) use the nearest size's.
    Where the network has norms of sizes already, each of the new sizes starts from the nearest of those.
    A network without batch norm stays as it is. Call it before the optimizer, copies of the backbone and DDP are made.
    """
    sizes = tuple(dict.fromkeys(sizes))
    choice = SizeChoice(sizes)
    found = False
    inside = {id(part) for place in _places(backbone.network).values() for part in place.modules()}
    for parent in [module for module in backbone.network.modules() if id(module) not in inside]:
        for name, child in list(parent.named_children()):
            if isinstance(child, SizeNorm):
                held = {int(size): norm for size, norm in child.norms.items()}
            elif isinstance(child, _BatchNorm):
                held = {sizes[0]: child}
            else:
                continue
            norms = {size: copy.deepcopy(held[nearest_size(held, size)]) for size in sizes}
            setattr(parent, name, SizeNorm(norms, choice))
            found = True
    if found:
        backbone.network.size_choice = choice


def split_norms(network: nn.Module) -> tuple[dict[str, torch.Tensor], Norms]:
    """The tensors that all sizes share, and each size's norms, under the keys of the plain timm network."""
    places = _places(network)
    inside = tuple(f"{name}.norms." for name in places)
    shared = {key: value for key, value in network.state_dict().items() if not key.startswith(inside)}
    norms: Norms = {size: {} for size in norm_sizes(network)}
    for size, tensors in norms.items():
        for name, module in places.items():
            state = module.norms[str(size)].state_dict()
            tensors.update({f"{name}.{key}": value for key, value in state.items()})
    return shared, norms


def put_norms(network: nn.Module, norms: Norms, size: int) -> None:
    """Load stored norms: into a plain network those nearest to `size`, into size-specific norms each size's nearest."""
    places = _places(network)
    if not places:
        _load(network, norms[nearest_size(norms, size)])
    for own in norm_sizes(network):
        state = norms[nearest_size(norms, own)]
        for name, module in places.items():
            start = f"{name}."
            own_state = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            _load(module.norms[str(own)], own_state)


def _load(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    try:
        unexpected = module.load_state_dict(tensors, strict=False).unexpected_keys
    except RuntimeError as error:
        raise CarinaError(f"{FILE} does not fit its network ({str(error).splitlines()[-1].strip()})") from None
    if unexpected:
        raise CarinaError(f"{FILE} does not fit its network: it holds {unexpected[0]}; write the backbone again")


def stored_norms(folder: Path) -> Norms:
    """All norms that a backbone folder holds, by size, the default one's first; empty where sizes share them."""
    if not (folder / FILE).is_file():
        return {}
    try:
        others, plain = load_file(folder / FILE), load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise CarinaError(f"{folder / FILE} is not whole ({error}); write or download the backbone again") from None
    norms: Norms = {}
    for name, tensor in others.items():
        size, _, key = name.partition("/")
        norms.setdefault(int(size), {})[key] = tensor
    keys = next(iter(norms.values()))
    default = read_json(folder / "carina.json")["norm_sizes"][0]
    return {default: {key: plain[key] for key in keys}, **norms}


def rest_statistics(network: nn.Module, rest: bool) -> None:
    """With `rest`, batch norms in training go on normalizing by the batch but leave their running statistics alone."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            if rest and not hasattr(module, "own_momentum"):
                module.own_momentum, module.momentum = module.momentum, 0.0
            elif not rest and hasattr(module, "own_momentum"):
                module.momentum = module.own_momentum
                del module.own_momentum
