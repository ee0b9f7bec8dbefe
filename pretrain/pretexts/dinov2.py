"""DINO with masked patches and spread features, as in DINOv2 (Oquab et al., arXiv 2304.07193).

To DINO's loss on whole images come iBOT's (Zhou et al., arXiv 2111.07832: the student, given a global view with some
patches replaced by a mask token, predicts how the teacher assigns those patches) and KoLeo's (Sablayrolles et al., arXiv
1806.03198: images keep away from their nearest neighbor). Teacher, heads and centers stand in distillation.py.
Differences from the paper: one global view of every image is masked, drawn for each image, so that half of the views are
masked in every batch; blocks are ellipses; teachers are centered, not balanced by Sinkhorn; KoLeo's neighbors come from
all ranks and never from the same patient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from carina.data.batches import Batch
from carina.draws import Draws
from carina.errors import CarinaError
from carina.imaging.views import Shares
from carina.models.backbones import Backbone, seeded
from carina.pretrain.pretexts import Corpus, information, spread
from carina.pretrain.pretexts.distillation import DistillationSettings, SelfDistillation, pair_entropy
from carina.training import ranks

BLOCKS = 4  # of a masked view


class DINOv2Settings(DistillationSettings):
    ibot: Annotated[float, Field(ge=0)]
    koleo: Annotated[float, Field(ge=0)]
    masked: Shares


def block_masks(draws: Draws, side: int, share: tuple[float, float]) -> np.ndarray:
    """(B, side * side) bool, row by row: `share` of each grid is masked, drawn for each sample, in up to BLOCKS ellipses
    of drawn places, sizes and shapes."""
    count = np.clip(np.rint(draws.uniform("share", *share) * side**2), 1, side**2)
    center = draws.uniform("center", 0, side, shape=(BLOCKS, 2))[..., None]
    size = draws.uniform("size", 0.5, 1, shape=(BLOCKS,))[..., None]
    shape = np.exp(draws.uniform("shape", -np.log(2), np.log(2), shape=(BLOCKS,)))[..., None]
    y, x = np.divmod(np.arange(side**2), side)
    offset_y, offset_x = y + 0.5 - center[:, :, 0], x + 0.5 - center[:, :, 1]
    distance = ((offset_y**2 * shape + offset_x**2 / shape) / size**2).min(axis=1)
    return distance.argsort(axis=1, kind="stable").argsort(axis=1) < count[:, None]


def view_masks(draws: Draws, side: int, share: tuple[float, float]) -> np.ndarray:
    """(2, B, side * side) bool: of every image one of the two global views is masked."""
    masks, first = block_masks(draws, side, share), draws.coin("first")[:, None]
    return np.stack([masks & first, masks & ~first])


@contextlib.contextmanager
def masked_patches(backbone: Backbone, token: torch.Tensor, masks: torch.Tensor) -> Iterator[None]:
    """Within, the patch embeddings of a ViT are `token` (D,) where `masks` (B, patches) are true; positions still come
    on top."""

    def replace(module: nn.Module, inputs: tuple, embedded: torch.Tensor) -> torch.Tensor:
        where = masks.view(*embedded.shape[:-1], 1)  # (B, patches, D), or (B, h, w, D) at dynamic sizes
        return torch.where(where, token.to(embedded.dtype), embedded)

    handle = backbone.network.patch_embed.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def embed(backbone: Backbone, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 1, H, W) -> pooled features (B, D), as the backbone gives them, and patch tokens (B, patches, D)."""
    tokens = backbone.network.forward_features(backbone.normalize(images))
    return backbone.network.forward_head(tokens), tokens[:, backbone.network.num_prefix_tokens :]


def koleo(features: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """-mean log of the distance of unit vectors (B, D) to their nearest neighbor of another owner (B,), over all ranks."""
    with torch.autocast(features.device.type, enabled=False):
        points = F.normalize(features.float(), dim=1)
        everyone, everyones = ranks.gather(points), ranks.gather(owners)
        cosines = points.detach() @ everyone.detach().T
        cosines = cosines.masked_fill(owners[:, None] == everyones[None, :], float("-inf"))
        closest, neighbor = cosines.max(dim=1)
        distance = (points - everyone[neighbor]).norm(dim=1)
        return -torch.where(closest.isfinite(), (distance + 1e-8).log(), 0.0).mean()


class DINOv2(SelfDistillation):
    mixes_batch = True  # by KoLeo
    healthy = (
        "dino starts near log(prototypes) and falls slowly while information stays well above 0, ibot falls first and "
        "faster, koleo falls to a plateau"
    )
    remedy = (
        "lower optim.lr, take fewer prototypes and a momentum of 0.99 to 0.994, keep teacher_temperature at 0.07 or less "
        "and center_momentum near 0.9, or lower pretexts.dinov2.ibot"
    )

    def __init__(self, backbone: Backbone, settings: DINOv2Settings, corpus: Corpus):
        if backbone.family != "vit":
            raise CarinaError(
                f"dinov2 masks the patches of a plain vision transformer, which {backbone.spec.name} is not; take an "
                "architecture such as vit_small_patch16_224, or the pretext dino"
            )
        super().__init__("dinov2", backbone, settings, corpus)
        if settings.ibot:
            width = backbone.network.embed_dim
            self.add_head("patch", width)
            with seeded(corpus.seed, "dinov2 mask token"):
                self.mask_token = nn.Parameter(torch.randn(width) * 0.02)

    def loss(self, backbone: Backbone, views: list[torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        """dino + `ibot` * ibot + `koleo` * koleo. koleo sums over the two global views, as the paper's weight expects.

        information: of the teacher's assignments of whole images; spread: of the student's pooled features.
        """
        s, whole = self.settings, torch.cat(views[:2])
        with torch.no_grad():
            teacher_pooled, teacher_patches = embed(self.teacher_backbone, whole)
            cosines = self.teacher_heads["image"](teacher_pooled)
        self.collect("image", batch.scale, cosines.mean(dim=0))
        targets = self.targets(cosines, "image", batch.scale)
        side = views[0].shape[-1] // backbone.patch
        masks = view_masks(batch.draws.part("dinov2 masks"), side, s.masked).reshape(len(whole), -1)
        with contextlib.ExitStack() as stack:
            if s.ibot:
                stack.enter_context(masked_patches(backbone, self.mask_token, torch.from_numpy(masks).to(whole.device)))
            pooled, patches = embed(backbone, whole)
        features = [pooled, backbone(torch.cat(views[2:]))] if views[2:] else [pooled]
        logs = self.predictions(torch.cat(features), "image")
        dino = pair_entropy(targets.unflatten(0, (2, -1)), logs.unflatten(0, (len(views), -1)))
        parts, total = {"dino": dino}, dino
        if s.ibot:
            parts["ibot"] = self.ibot(patches, teacher_patches, masks, batch.scale)
            total = total + s.ibot * parts["ibot"]
        if s.koleo:
            parts["koleo"] = sum(koleo(view, batch.groups["patient"]) for view in pooled.chunk(2))
            total = total + s.koleo * parts["koleo"]
        parts = {name: value.detach() for name, value in parts.items()}
        return {"loss": total, **parts, "information": information(targets), "spread": spread(pooled)}

    def ibot(self, patches: torch.Tensor, teacher_patches: torch.Tensor, masks: np.ndarray, scale: int) -> torch.Tensor:
        """Cross entropy of the teacher's and the student's assignments of the masked patches: the mean over the patches
        of a view, then over the masked views. patches: (V, patches, D); masks: (V, patches) bool."""
        view, _ = np.nonzero(masks)
        weight = 1 / masks.sum(axis=1)[view] / masks.any(axis=1).sum()
        index = torch.from_numpy(np.flatnonzero(masks)).to(patches.device)
        weight = torch.from_numpy(weight.astype(np.float32)).to(patches.device)
        with torch.no_grad():
            cosines = self.teacher_heads["patch"](teacher_patches.flatten(0, 1)[index])
        self.collect("patch", scale, (weight[:, None] * cosines).sum(dim=0))
        targets = self.targets(cosines, "patch", scale)
        logs = self.predictions(patches.flatten(0, 1)[index], "patch")
        return -(weight * (targets * logs).sum(dim=1)).sum()
