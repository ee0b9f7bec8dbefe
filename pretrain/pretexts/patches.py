"""Patch contrast: a place of one view must find itself in the other view, among other places and other patients.

Related: DenseCL (Wang et al., arXiv 2011.09157), VADeR (Pinheiro et al., arXiv 2011.05499), PixPro (Xie et al., arXiv
2011.10043). Ours: places are points drawn where the views overlap, read from both maps by interpolation, so that which
two belong together is known exactly from the views' geometry. Negatives are places of other patients, and places of the
same image so far away that the map tells them apart. Both views are of one image, whatever `positives` says: two
images have no places in common.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from carina.data.batches import Batch
from carina.imaging.views import affine_matrices, make_view
from carina.models.backbones import Backbone, seeded
from carina.pretrain.pretexts import Corpus, Pretext, spread
from carina.pretrain.pretexts.masking import places, stride_of
from carina.recipes import Section
from carina.training.ranks import gather, own_rows

CANDIDATES = 8  # points drawn for each that is wanted: views that keep half the area overlap by a third and more
VIEWS = ("patches first", "patches second")


class PatchContrastSettings(Section):
    weight: float
    temperature: Annotated[float, Field(gt=0)]
    dimension: Annotated[int, Field(ge=2)]
    positions: Annotated[int, Field(ge=1)]
    away: Annotated[float, Field(ge=0)]
    exclude: Literal["image", "study", "patient"]


def shared_points(
    thetas: tuple[torch.Tensor, torch.Tensor], candidates: torch.Tensor, count: int
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The first `count` of the candidate points that both views show.

    thetas: (B, 2, 3) each, from coordinates of a view to those of the image, all in [-1, 1]. candidates: (B, M, 2), x
    and y in the first view. Returns the points in the image (B, N, 2), in both views (B, N, 2) each, and whether each
    is shown (B, N) bool: an image whose views hardly overlap has fewer.
    """
    (first, first_shift), (second, second_shift) = ((theta[:, :, :2], theta[:, None, :, 2]) for theta in thetas)
    image = candidates @ first.mT + first_shift
    other = (image - second_shift) @ torch.linalg.inv(second).mT
    shown = (image.abs().amax(dim=2) <= 1) & (other.abs().amax(dim=2) <= 1)
    best = (~shown).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    pick = best[:, :, None].expand(-1, -1, 2)
    in_views = [candidates.gather(1, pick), other.gather(1, pick)]
    return image.gather(1, pick), in_views, shown.gather(1, best)


def place_contrast(
    queries: torch.Tensor,
    keys: torch.Tensor,
    points: torch.Tensor,
    shown: torch.Tensor,
    owners: torch.Tensor,
    away: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE of unit vectors (B, N, d), place by place: the loss (mean over images of the mean over their places) and
    the share of places found.

    points: (B, N, 2) in the image, which is 2 wide. shown: (B, N) bool. owners: (B,) int64; images of one owner are no
    negatives of each other. away: places of the same image nearer than this share of the side are none either. Keys of
    every rank serve as negatives.
    """
    batch, count, _ = queries.shape
    rows, own = own_rows(batch, queries.device), torch.arange(batch, device=queries.device)
    all_keys, all_owners, all_shown = gather(keys), gather(owners), gather(shown)
    logits = torch.einsum("bnd,cmd->bncm", queries, all_keys) / temperature
    allowed = (owners[:, None] != all_owners)[:, None, :, None] & all_shown
    allowed = allowed.expand(batch, count, -1, -1).clone()
    allowed[own, :, rows] = (torch.cdist(points, points) / 2 > away) & shown[:, None, :]
    itself = torch.zeros_like(allowed)
    itself[own, :, rows] = torch.eye(count, dtype=torch.bool, device=queries.device)
    logits = logits.masked_fill(~(allowed | itself), float("-inf")).flatten(2)
    target = itself.flatten(2).to(torch.uint8).argmax(dim=2)
    each = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    weight = shown / shown.sum(dim=1, keepdim=True).clamp(min=1)
    found = (logits.detach().argmax(dim=2) == target).float()
    return (each * weight).sum() / batch, (found * weight).sum() / batch


class PatchContrast(Pretext):
    healthy = (
        "the loss falls from log(1 + negatives) for the whole run while accuracy climbs; the spread stays above 0.5"
    )
    remedy = "lower optim.lr, raise pretexts.patches.temperature, or lower pretexts.patches.positions"

    def __init__(self, backbone: Backbone, settings: PatchContrastSettings, corpus: Corpus):
        super().__init__(backbone, settings, corpus)
        stride_of(backbone, corpus, "patches")
        width = backbone.dimension
        with seeded(corpus.seed, "patches head"):
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, settings.dimension))

    def views(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        settings, size = self.corpus.views, self.corpus.size_of(batch.scale)
        return tuple(make_view(batch.images, batch.draws.part(name), settings, size) for name in VIEWS)

    def loss(self, backbone: Backbone, views: tuple[torch.Tensor, ...], batch: Batch) -> dict[str, torch.Tensor]:
        """Both ways: the first view's places among the second's, and the reverse."""
        maps = places(backbone, torch.cat(views)).chunk(2)
        with torch.autocast(views[0].device.type, enabled=False):
            thetas = tuple(affine_matrices(batch.draws.part(name), self.corpus.views, views[0]) for name in VIEWS)
            count = self.settings.positions
            candidates = batch.draws.part("patches").uniform("places", -1, 1, shape=(CANDIDATES * count, 2))
            candidates = torch.from_numpy(candidates).to(views[0].device)
            points, in_views, shown = shared_points(thetas, candidates, count)
        read = [
            F.grid_sample(m.float(), where[:, None], padding_mode="border", align_corners=False)[:, :, 0].mT
            for m, where in zip(maps, in_views)
        ]
        first, second = F.normalize(self.head(torch.stack(read)).float(), dim=3)
        away = max(self.settings.away, 2**0.5 / maps[0].shape[-1])  # two points of one cell of the map look alike
        with torch.autocast(first.device.type, enabled=False):
            rest = (points, shown, batch.groups[self.settings.exclude], away, self.settings.temperature)
            there, back = place_contrast(first, second, *rest), place_contrast(second, first, *rest)
        return {
            "loss": (there[0] + back[0]) / 2,
            "accuracy": ((there[1] + back[1]) / 2).detach(),
            "spread": spread(first.flatten(0, 1)),
        }
