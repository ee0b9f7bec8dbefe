"""Heads: what a backbone gives -> logits, one a label. Each head says what it reads: pooled features, the last map, or the
maps of several stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from carina.errors import CarinaError
from carina.models.backbones import Backbone, seeded
from carina.models.features import stages
from carina.recipes import Section

NO_FINDINGS = ("No_Finding", "Support_Devices")  # labels that make no image abnormal
DERIVED = "abnormal"  # what noisy-or derives from the other labels
STAGES = (3, 4)  # how many the multi-scale head takes


class HeadSettings(Section):
    """Values and their meaning stand in configs/finetune/default.yaml."""

    name: Literal["linear", "mlp", "attentive", "lse", "multiscale"]
    hidden: Annotated[int, Field(ge=1)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    layers: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None
    sharpness: Annotated[float, Field(gt=0)]
    noisy_or: bool


def noisy_or(scores: torch.Tensor) -> torch.Tensor:
    """Logits (B, K) of findings -> logit (B,) of at least one of them, taken as independent: of 1 - prod(1 - p).

    With S = -log prod(1 - p) = sum softplus(s) it is log(exp(S) - 1); it is exact, gradients included, from logits that
    underflow as probabilities to those that round to 1.
    """
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    low = -33.0  # below it log softplus(s) is s to the last digit of float64
    logs = torch.where(scores < low, scores, torch.log(-F.logsigmoid(-scores.clamp(min=low))))
    log_total = torch.logsumexp(logs, dim=1)
    few = log_total < 0
    small = torch.where(few, log_total, torch.zeros_like(log_total)).exp().clamp(min=torch.finfo(scores.dtype).tiny)
    large = torch.where(few, torch.ones_like(log_total), (-F.logsigmoid(-scores)).sum(dim=1))
    return torch.where(few, log_total + torch.log(torch.expm1(small) / small), large + torch.log1p(-torch.exp(-large)))


class Head(nn.Module):
    """Logits (B, L) from what `read` gives of the images.

    channels: widths of what is read. outputs: L. column: the label that noisy-or derives from the others (Morano et al.,
    arXiv 2212.00565: a diagnosis from its lesions), which has no output of its own; None: every label has one.
    """

    name: ClassVar[str]
    standardizes: ClassVar[bool] = True

    def __init__(self, settings: HeadSettings, channels: Sequence[int], outputs: int, column: int | None):
        super().__init__()
        self.settings, self.channels, self.outputs, self.column = settings, list(channels), outputs, column
        self.own = outputs - (column is not None)
        if self.standardizes:
            for number, width in enumerate(self.channels):
                self.register_buffer(f"mean_{number}", torch.zeros(width))
                self.register_buffer(f"std_{number}", torch.ones(width))

    def read(self, backbone: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
        """Of images (B, 1, s, s) at the size that enters the network: features (B, C) or maps (B, C, h, w)."""
        raise NotImplementedError

    def scores(self, read: list[torch.Tensor]) -> torch.Tensor:
        """(B, K) logits of the labels with an output of their own."""
        raise NotImplementedError

    def attention(self, read: list[torch.Tensor]) -> torch.Tensor | None:
        """(B, K, h, w) of the labels with an output of their own, each summing to 1; None where none is weighed."""
        return None

    def forward(self, read: list[torch.Tensor]) -> torch.Tensor:
        scores = self.scores(read)
        return scores if self.column is None else self._with_derived(scores, noisy_or(scores)[:, None])

    def spread(self, read: list[torch.Tensor]) -> torch.Tensor | None:
        """Attention (B, L, h, w), each map summing to 1; None where the head weighs no positions.

        That of the derived label is the mean of the others', weighted by their probabilities, as its gradient is.
        """
        maps = self.attention(read)
        if maps is None or self.column is None:
            return maps
        weights = torch.softmax(F.logsigmoid(self.scores(read)), dim=1)
        return self._with_derived(maps, (maps * weights[:, :, None, None]).sum(dim=1, keepdim=True))

    def _with_derived(self, own: torch.Tensor, derived: torch.Tensor) -> torch.Tensor:
        return torch.cat([own[:, : self.column], derived.to(own.dtype), own[:, self.column :]], dim=1)

    @torch.no_grad()
    def standardize(self, read: Sequence[torch.Tensor]) -> None:
        """Take mean and deviation of every channel from what training images gave, (N, C) or (N, C, h, w); a linear head,
        which takes features as they are, stays as it is."""
        for number, part in enumerate(read if self.standardizes else ()):
            flat = part.transpose(0, 1).flatten(1).double()
            std = flat.std(dim=1, correction=0)
            getattr(self, f"mean_{number}").copy_(flat.mean(dim=1))
            getattr(self, f"std_{number}").copy_(torch.where(std > 1e-6 * std.max(), std, std.max().clamp(min=1e-6)))

    def standardized(self, read: list[torch.Tensor]) -> list[torch.Tensor]:
        result = []
        for number, part in enumerate(read):
            mean, std = getattr(self, f"mean_{number}"), getattr(self, f"std_{number}")
            shape = (1, -1, *[1] * (part.ndim - 2))
            result.append((part.to(mean.dtype) - mean.view(shape)) / std.view(shape))
        return result

    def facts(self) -> dict[str, Any]:
        """What `head_from_facts` needs beside the tensors."""
        own = {"channels": self.channels, "outputs": self.outputs, "column": self.column}
        return {**self.settings.model_dump(mode="json"), **own}


class LinearHead(Head):
    """weight (K, C) and bias (K,) on pooled features."""

    name, standardizes = "linear", False

    def __init__(self, settings: HeadSettings, channels: Sequence[int], outputs: int, column: int | None):
        super().__init__(settings, channels, outputs, column)
        self.weight = nn.Parameter(torch.empty(self.own, channels[0]))
        self.bias = nn.Parameter(torch.zeros(self.own))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as torch's own linear layer

    def read(self, backbone: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
        return [backbone(images)]

    def scores(self, read: list[torch.Tensor]) -> torch.Tensor:
        return F.linear(F.dropout(read[0], self.settings.dropout, self.training), self.weight, self.bias)


class MlpHead(Head):
    """One hidden layer on pooled features."""

    name = "mlp"

    def __init__(self, settings: HeadSettings, channels: Sequence[int], outputs: int, column: int | None):
        super().__init__(settings, channels, outputs, column)
        self.layers = nn.Sequential(
            nn.Linear(channels[0], settings.hidden),
            nn.GELU(),
            nn.Dropout(settings.dropout),
            nn.Linear(settings.hidden, self.own),
        )

    def read(self, backbone: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
        return [backbone(images)]

    def scores(self, read: list[torch.Tensor]) -> torch.Tensor:
        return self.layers(self.standardized(read)[0])


class LseHead(Head):
    """A linear score at every position, pooled by log-sum-exp: (1/r) log mean exp(r s), which lies between the mean and
    the maximum (Pinheiro and Collobert, CVPR 2015). Attention is what the pooled score's gradient gives the positions."""

    name = "lse"

    def __init__(self, settings: HeadSettings, channels: Sequence[int], outputs: int, column: int | None):
        super().__init__(settings, channels, outputs, column)
        self.classify = nn.Conv2d(channels[0], self.own, 1)
        self.dropout = nn.Dropout(settings.dropout)

    def read(self, backbone: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
        return [backbone.maps(images)]

    def _positions(self, read: list[torch.Tensor]) -> torch.Tensor:
        return self.classify(self.dropout(self.standardized(read)[0])).float() * self.settings.sharpness

    def scores(self, read: list[torch.Tensor]) -> torch.Tensor:
        sharp = self._positions(read).flatten(2)
        return (torch.logsumexp(sharp, dim=2) - math.log(sharp.shape[2])) / self.settings.sharpness

    def attention(self, read: list[torch.Tensor]) -> torch.Tensor:
        return _softmax(self._positions(read))


class AttentiveHead(Head):
    """Every label asks its own query of all positions and is scored on what it gathers (attention pooling as in Lee et
    al., arXiv 1810.00825, with one query a label)."""

    name = "attentive"

    def __init__(self, settings: HeadSettings, channels: Sequence[int], outputs: int, column: int | None):
        super().__init__(settings, channels, outputs, column)
        self.keys = nn.Conv2d(channels[0], settings.hidden, 1)
        self.values = nn.Conv2d(channels[0], settings.hidden, 1)
        self.queries = nn.Parameter(torch.randn(self.own, settings.hidden) * 0.02)  # the mean of positions, nearly
        self.dropout = nn.Dropout(settings.dropout)
        self.classify = _PerLabel(self.own, settings.hidden)

    def read(self, backbone: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
        return [backbone.maps(images)]

    def attention(self, read: list[torch.Tensor]) -> torch.Tensor:
        return self._attention(self.standardized(read)[0])

    def _attention(self, found: torch.Tensor) -> torch.Tensor:
        asked = torch.einsum("bchw,kc->bkhw", self.keys(found), self.queries)
        return _softmax(asked.float() / math.sqrt(self.settings.hidden))

    def scores(self, read: list[torch.Tensor]) -> torch.Tensor:
        found = self.standardized(read)[0]
        gathered = torch.einsum("bkhw,bchw->bkc", self._attention(found), self.values(found).float())
        return self.classify(self.dropout(gathered))


class MultiscaleHead(Head):
    """Attention over three or four stages, fused step by step from the deepest to the shallowest.

    Each stage is brought to `hidden` channels and has one map of where to look, in (0, 1); a stage looks only where the
    next deeper one, enlarged, lets it, and adds what the deeper ones have found. At the finest stage every label
    gathers by attention of its own under that map. Our design on the principle of MS-ANet (2021), whose inner detail is
    not public.
    """

    name = "multiscale"

    def __init__(self, settings: HeadSettings, channels: Sequence[int], outputs: int, column: int | None):
        super().__init__(settings, channels, outputs, column)
        width = settings.hidden
        self.project = nn.ModuleList(nn.Conv2d(channel, width, 1) for channel in channels)
        self.norm = nn.ModuleList(nn.GroupNorm(1, width) for _ in channels)
        self.look = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in channels)
        self.ask = nn.Conv2d(width, self.own, 1)
        self.dropout = nn.Dropout(settings.dropout)
        self.classify = _PerLabel(self.own, width)

    def read(self, backbone: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
        return stages(backbone, images, self.settings.layers)

    def _fused(self, read: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the finest stage holds in the end (B, hidden, h, w), and the labels' attention (B, K, h, w) on it."""
        found, gate = None, None
        parts = zip(self.standardized(read), self.project, self.norm, self.look)
        for part, project, norm, look in reversed(list(parts)):
            own = F.gelu(norm(project(part)).float())
            seen = F.logsigmoid(look(own).float())
            if found is not None:
                gate, found = _enlarged(gate, seen), _enlarged(found, own)
            gate = seen if gate is None else seen + gate
            found = own if found is None else own * gate.exp() + found
        return found, _softmax(self.ask(found).float() + gate)

    def attention(self, read: list[torch.Tensor]) -> torch.Tensor:
        return self._fused(read)[1]

    def scores(self, read: list[torch.Tensor]) -> torch.Tensor:
        found, attention = self._fused(read)
        return self.classify(self.dropout(torch.einsum("bkhw,bchw->bkc", attention, found)))


class _PerLabel(nn.Module):
    """(B, K, C) -> (B, K): a linear layer of its own for each label."""

    def __init__(self, labels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(labels, width).uniform_(-1, 1) / math.sqrt(width))
        self.bias = nn.Parameter(torch.zeros(labels))

    def forward(self, gathered: torch.Tensor) -> torch.Tensor:
        return (gathered * self.weight).sum(dim=2) + self.bias


def _softmax(maps: torch.Tensor) -> torch.Tensor:
    """(B, K, h, w) -> the same, every map summing to 1."""
    return torch.softmax(maps.flatten(2), dim=2).view_as(maps)


def _enlarged(maps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if maps.shape[-2:] == like.shape[-2:]:
        return maps
    return F.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=False)


HEADS: dict[str, type[Head]] = {
    kind.name: kind for kind in (LinearHead, MlpHead, AttentiveHead, LseHead, MultiscaleHead)
}


def make_head(settings: HeadSettings, backbone: Backbone, labels: Sequence[str], seed: int) -> Head:
    """A head for the labels on what the backbone gives, initialized from (seed, its name)."""
    column = None
    if settings.noisy_or:
        if DERIVED not in labels or len(labels) < 2:
            raise CarinaError(
                f"head.noisy_or=true derives {DERIVED} from the other findings; give labels= with {DERIVED} and at least "
                "one finding"
            )
        if others := [label for label in labels if label in NO_FINDINGS]:
            raise CarinaError(
                f"head.noisy_or=true derives {DERIVED} from findings, and {others[0]} is none; leave it out of labels="
            )
        column = list(labels).index(DERIVED)
    kind = HEADS[settings.name]
    if kind is MultiscaleHead:
        settings = settings.model_copy(update={"layers": _layers(settings, backbone)})
        info = backbone.network.feature_info
        channels = [_info(info, layer)["num_chs"] for layer in settings.layers]
    else:
        pooled = kind in (LinearHead, MlpHead)
        channels = [backbone.dimension if pooled else backbone.network.num_features]
    with seeded(seed, f"{settings.name} head"):
        return kind(settings, channels, len(labels), column)


def _info(info: Any, layer: int) -> dict[str, Any]:
    """timm keeps its stages as a list of dicts, or as an object that holds one."""
    return (info if isinstance(info, list) else info.info)[layer - 1]


def _layers(settings: HeadSettings, backbone: Backbone) -> list[int]:
    """The stages that the multi-scale head reads, shallow to deep."""
    there = len(getattr(backbone.network, "feature_info", None) or [])
    layers = sorted(set(settings.layers or range(max(there - 2, 1), there + 1)))
    if len(layers) not in range(STAGES[0], STAGES[1] + 1) or layers[-1] > there:
        raise CarinaError(
            f"head.name=multiscale takes three or four stages, {backbone.spec.name} has {there}, and head.layers={layers} "
            f"was asked for; give head.layers=[...] among 1 to {there}"
            if there >= STAGES[0]
            else f"head.name=multiscale needs three stages and {backbone.spec.name} has {there}; give head.name=attentive"
        )
    return layers


def head_from_arrays(weight: np.ndarray, bias: np.ndarray, column: int | None = None) -> LinearHead:
    """A linear head from a solver's coefficients: weight (L, D), bias (L,). column: the label that noisy-or derives
    instead, whose coefficients are left out."""
    outputs = len(weight)
    if column is not None:
        weight, bias = (np.delete(part, column, axis=0) for part in (weight, bias))
    settings = HeadSettings(name="linear", hidden=1, dropout=0, layers=None, sharpness=1, noisy_or=column is not None)
    head = LinearHead(settings, [weight.shape[1]], outputs, column)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight.astype(np.float32)))
        head.bias.copy_(torch.from_numpy(bias.astype(np.float32)))
    return head


def head_from_facts(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Head:
    """The head whose `facts()` and tensors were saved."""
    if facts.get("name") not in HEADS:
        raise CarinaError(f"this carina knows no head '{facts.get('name')}'; a newer one may")
    wanted = (*HeadSettings.model_fields, "channels", "outputs", "column")
    if missing := [name for name in wanted if name not in facts]:
        raise CarinaError(f"this predictor was made by an older carina (its head lacks {missing[0]}); fit it again")
    settings = HeadSettings.model_validate({name: facts[name] for name in HeadSettings.model_fields})
    head = HEADS[settings.name](settings, facts["channels"], facts["outputs"], facts["column"])
    head.load_state_dict(tensors)
    return head
