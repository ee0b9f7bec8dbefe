"""What part of a radiograph one place of a feature map sees: the theoretical receptive field, exact, and the effective one.

A lesion wider than the effective field is never seen whole by that layer at that scale, which is one reason why the best
scale depends on the finding.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm.layers
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from pydantic import Field as Limit
from torch import nn

from carina.data.batches import unit_tensor
from carina.data.store import Selection, select
from carina.draws import hash64, permutation
from carina.errors import CarinaError
from carina.files import write_bytes
from carina.models.backbones import Backbone, load_backbone
from carina.models.features import stages
from carina.models.fetch import fetched
from carina.recipes import Section, parse_overrides, validate
from carina.training.engine import pick_device

SHARE = 0.95  # of the energy that the square holds
IMAGES = 32  # over which the effective field is averaged
LOW, WIDEST = (
    32,
    4096,
)  # height and greatest width in pixels of the strip on which a network's theoretical field is measured
Maps = Callable[[nn.Module, torch.Tensor], torch.Tensor]  # network, images (B, C, H, W) -> maps (B, D, h, w)


@dataclass(frozen=True)
class Field:
    """layer: of the network, the first is 1. size: side of the image in pixels. stride: pixels from place to place.
    theoretical: width of the theoretical field in pixels, which may be more than the image's; None where it is the whole
    image, however wide, and for transformers.
    effective: side in pixels of the square around its middle that holds 95 % of the energy. energy: (size, size), sums to 1.
    """

    layer: int
    size: int
    stride: float
    theoretical: int | None
    effective: int
    energy: np.ndarray


def theoretical_field(
    network: nn.Module, channels: int, maps: Maps | None = None, *, height: int = 64, start: int = 64
) -> tuple[int, float, float] | None:
    """Of a unit of a map, in pixels: the width of what it depends on, the stride from unit to unit, and the middle of what
    the first unit would depend on without an edge; None where a unit sees the whole image, or more than 4,096 pixels of it.

    The gradient of a unit in the middle is taken on an image of ones, in a copy of the network where nothing can cancel or
    vanish: weights positive and of sum 1, norms and activations passing all, maxima replaced by means. What has a gradient
    then is what the unit is connected to; k stacked 3x3 convolutions give 2 k + 1. Norms that take statistics over places
    (group norm) and weight standardization are passed over. maps: what reads the network (default: calling it). height:
    of the image in pixels, which need not hold the field, only be one that the network takes. start: the width tried first.
    """
    positive = _positive(network)
    maps = maps or (lambda network, images: network(images))
    width = start
    while width <= WIDEST:
        images = torch.ones(1, channels, height, width, dtype=torch.float64, requires_grad=True)
        found = maps(positive, images)[0].sum(dim=0)
        row, column = (side // 2 for side in found.shape)
        edges = []
        for unit in (column, column - 1):
            (gradient,) = torch.autograd.grad(found[row, unit], images, retain_graph=True)
            seen = torch.nonzero(gradient[0].sum(dim=(0, 1)))[:, 0]
            edges.append((int(seen[0]), int(seen[-1])) if len(seen) else (0, 0))
        (first, last), before = edges
        if column and first > 0 and before[0] > 0 and last < width - 1:
            stride = float(first - before[0])
            return last - first + 1, stride, (first + last) / 2 - column * stride
        width *= 2
    return None


@torch.no_grad()
def _positive(network: nn.Module) -> nn.Module:
    """A copy of the network, (B, C, H, W) of ones to positive maps, every gradient positive where there is a connection."""
    found = copy.deepcopy(network).double().cpu().eval()
    for name, value in found.named_parameters():
        last = name.rpartition(".")[2]
        if value.ndim >= 2 and last == "weight":
            value.fill_(1 / value[0].numel())
        else:
            value.fill_(0 if last == "bias" or value.ndim > 1 else 1)
    for module in [part for part in found.modules() if list(part.children())]:
        for name, child in module.named_children():
            if (other := _passing(child)) is not None:
                setattr(module, name, other)
    return found


def _passing(module: nn.Module) -> nn.Module | None:
    """What takes the place of a module that could hide a connection; None leaves it."""
    if isinstance(module, nn.MaxPool2d):
        kind = timm.layers.AvgPool2dSame if "Same" in type(module).__name__ else nn.AvgPool2d
        return kind(module.kernel_size, module.stride, module.padding, module.ceil_mode)
    activations = (torch.nn.modules.activation.__name__, "timm.layers.activations")
    hides = type(module).__module__.startswith(activations) or "norm" in type(module).__name__.lower()
    weighs = any(isinstance(part, nn.Conv2d | nn.Linear | nn.MultiheadAttention) for part in module.modules())
    return nn.Identity() if hides and not weighs else None


def energy_of(maps: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, seed: int = 0) -> np.ndarray:
    """(H, W), sums to 1: squared gradients of the middle unit of a map, summed over its channels, mean over images (B, C, H,
    W); after Luo et al., NeurIPS 2016.

    maps: images -> (B, D, h, w). The sum over channels is estimated without bias by one backward pass with random signs an
    image: the square of a sum with such signs is, on average, the sum of squares.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        found = maps(images)
        unit = found[:, :, found.shape[-2] // 2, found.shape[-1] // 2]
        signs = np.random.default_rng(hash64("receptive", seed)).choice([-1.0, 1.0], tuple(unit.shape))
        (unit * torch.from_numpy(signs).to(unit)).sum().backward()
    energy = images.grad.double().square().sum(dim=1).mean(dim=0).cpu().numpy()
    if not energy.sum() > 0:
        raise CarinaError("the middle of this layer's maps depends on no pixel; its weights may be zero")
    return energy / energy.sum()


def side_holding(energy: np.ndarray, middle: tuple[float, float], share: float = SHARE) -> int:
    """Side in pixels of the smallest square around `middle` (row, column) that holds `share` of the energy (H, W)."""
    rows, columns = np.indices(energy.shape)
    away = np.maximum(abs(rows - middle[0]), abs(columns - middle[1])).ravel()
    order = np.argsort(away, kind="stable")
    reached = np.searchsorted(np.cumsum(energy.ravel()[order]), share * energy.sum() - 1e-12)
    return round(2 * away[order[min(reached, len(order) - 1)]] + 1)


def receptive_fields(
    backbone: Backbone, sizes: Sequence[int], images: Mapping[int, torch.Tensor] | None = None, seed: int = 0
) -> list[Field]:
    """The fields of every layer for images of every size in pixels.

    images: by size (B, 1, size, size) in [0, 1], radiographs that the effective field is averaged over (default: 32 of
    uniform noise).
    """
    backbone = backbone.eval()
    device, layers = backbone.mean.device, len(getattr(backbone.network, "feature_info", None) or [])
    if not layers:
        raise CarinaError(f"timm does not say where the stages of {backbone.spec.name} are; choose another backbone")
    backbone.check_sizes(sizes)
    theory = _theory(backbone, layers, min(sizes))
    result = []
    for size in sizes:
        if images is None:
            noise = np.random.default_rng(hash64("receptive", seed, size)).random((IMAGES, 1, size, size), np.float32)
        pictures = (torch.from_numpy(noise) if images is None else images[size]).to(device)
        for layer in range(1, layers + 1):

            def maps(images: torch.Tensor, layer: int = layer) -> torch.Tensor:
                return stages(backbone, images, [layer])[0]

            with torch.no_grad():
                height, width = maps(pictures[:1]).shape[-2:]
            even = size / width  # a place of a transformer is its patch
            bound, stride, first = theory[layer - 1] or (None, even, (even - 1) / 2)
            energy = energy_of(maps, pictures, seed)
            middle = (height // 2 * stride + first, width // 2 * stride + first)
            result.append(Field(layer, size, stride, bound, side_holding(energy, middle), energy))
    return result


def _theory(backbone: Backbone, layers: int, size: int) -> list[tuple[int, float, float] | None]:
    """The theoretical field of every layer. size: that the network is known to take."""
    if backbone.family != "cnn":
        return [None] * layers
    try:
        backbone.check_sizes([LOW])
        height = LOW
    except CarinaError:
        height = size
    found: list[tuple[int, float, float] | None] = []
    for layer in range(layers):

        def maps(network: nn.Module, images: torch.Tensor, layer: int = layer) -> torch.Tensor:
            how = {"indices": [layer], "intermediates_only": True, "output_fmt": "NCHW"}
            return network.forward_intermediates(images, **how)[0]

        before = found[-1][0] if found and found[-1] else height
        start = height * 2 ** max(0, math.ceil(math.log2(before / height)))
        sees_all = bool(found) and found[-1] is None  # then so do the layers behind
        found.append(
            None
            if sees_all
            else theoretical_field(backbone.network, backbone.spec.channels, maps, height=height, start=start)
        )
    return found


def thorax_width(selection: Selection, scale: int) -> float | None:
    """Median width of the lungs as a fraction of the image's side, over images with a lung mask; None without any."""
    masks = selection.masks(range(len(selection)), scale).any(axis=1)
    spans = [np.flatnonzero(columns) for columns in masks if columns.any()]
    return float(np.median([span[-1] - span[0] + 1 for span in spans])) / scale if spans else None


class FieldSettings(Section):
    field: str
    store: str | Sequence[str] | None = None
    scales: list[Annotated[int, Limit(ge=16)]] | None = None
    seed: int = 0


def look(run: str, overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The receptive fields of a run's backbone, layer by layer and scale by scale, drawn into the PNG `field`.

    With a store the images are 32 of its training images, the scales (default) those of the store, and lengths are told in
    widths of the thorax too; without one the images are noise and the scale is the backbone's own.
    """
    given = dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)
    settings = validate(FieldSettings, given, "inspect")
    selection, device, run = None, pick_device(), fetched(run)
    if settings.store is not None:
        selection = select(settings.store, rows="train")
        selection = selection.where(np.sort(permutation(len(selection), "receptive", settings.seed)[:IMAGES]))
        scales = settings.scales or sorted(set.intersection(*(set(store.scales) for store in selection.stores)))
        for store in selection.stores:
            for scale in scales:
                store.check_scale(scale)
    else:
        scales = settings.scales or [load_backbone(run).spec.size]
    backbone = load_backbone(run, largest=max(scales)).to(device)
    images = width = None
    if selection is not None:
        every = range(len(selection))
        images = {scale: unit_tensor(torch.from_numpy(selection.images(every, scale))) for scale in scales}
        width = thorax_width(selection, max(scales))
    fields, rows = receptive_fields(backbone, scales, images, settings.seed), []
    for found in fields:
        row = {"scale": found.size, "layer": found.layer, "stride": round(found.stride, 3)}
        row |= {"theoretical": found.theoretical, "effective": found.effective}
        row["of_side"] = round(found.effective / found.size, 4)
        rows.append(row | ({"of_thorax": round(found.effective / found.size / width, 4)} if width else {}))
    write_bytes(Path(settings.field), chart(fields, width))
    return {
        "what": "receptive fields",
        "images": "noise" if selection is None else f"{len(selection)} of the store's training images",
        "thorax_of_side": width and round(width, 4),
        "fields": rows,
        "out": settings.field,
    }


def chart(fields: Sequence[Field], thorax: float | None = None) -> bytes:
    """PNG: side of the effective field by layer, a line a scale, theoretical ones dashed; in widths of the thorax
    (`thorax`: its fraction of the side), else of the image's side."""
    from carina.evaluate.report.figures import INK, QUIET, RULE

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    unit = thorax or 1.0
    sizes = sorted({found.size for found in fields})
    for number, size in enumerate(sizes):
        own = [found for found in fields if found.size == size]
        layers, color = [found.layer for found in own], f"C{number}"
        axes.plot(layers, [f.effective / size / unit for f in own], color=color, marker="o", ms=4, label=f"{size} px")
        theory = [np.nan if f.theoretical is None else f.theoretical / size / unit for f in own]
        axes.plot(layers, theory, color=color, linewidth=1, linestyle=(0, (3, 3)))
    axes.axhline(1 / unit, color=RULE, linewidth=1)
    axes.text(
        0.01, 1 / unit, "the whole image", fontsize=7.5, color=QUIET, va="bottom", transform=axes.get_yaxis_transform()
    )
    axes.set(
        yscale="log", xlabel="layer", ylabel="side / width of the thorax" if thorax else "side / side of the image"
    )
    axes.set_xticks(sorted({found.layer for found in fields}))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Receptive field: 95 % of the energy (dashed: theoretical)", fontsize=9.5, color=INK, loc="left")
    axes.legend(frameon=False, fontsize=8, title="scale", title_fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
