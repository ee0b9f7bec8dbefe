"""The head that pasting trained, as a scorer: how much of an image does it take for pasted?"""

from __future__ import annotations

import copy
from typing import Any

import torch

from carina.models.backbones import Backbone, resize_images
from carina.models.pasting import DenseHead, PastingHead
from carina.models.scorers.base import Scorer, ScorerSettings, parted, with_places

TOP = 0.005  # share of a map's places whose mean logit is the image's score


class Head(Scorer):
    """A head of classes gives the log odds of "pasted" against "original", logsumexp(logits[1:]) - logits[0]. A dense head
    draws its probabilities as the anomaly map, and the score is the mean of the highest 0.5 % of its logits, about what a
    disk of 8 % of the side covers.

    It reads what it was trained on, the backbone's features at its own size, so `layers`, `sizes` and `normalize` do not
    concern it, and has no `fit`: `Head.of` takes the trained head. State: the head's tensors.
    """

    def __init__(self, settings: ScorerSettings, head: PastingHead | DenseHead):
        super().__init__(settings)
        self.head = head
        self.positions = isinstance(head, DenseHead)
        self.eval()

    @classmethod
    def of(cls, head: PastingHead | DenseHead, settings: ScorerSettings) -> Head:
        """A copy of the head as it is now."""
        return cls(settings.model_copy(update={"layers": None, "sizes": None}), copy.deepcopy(head))

    @classmethod
    def from_tensors(cls, settings: ScorerSettings, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> Head:
        """The scorer whose state_dict these tensors are and whose `facts` these."""
        kind = DenseHead if facts["head"]["target"] == "map" else PastingHead
        named = {name.removeprefix("head."): tensor for name, tensor in tensors.items()}
        return cls(settings, kind.from_tensors(named, facts["head"]))

    def read(
        self, backbone: Backbone, images: torch.Tensor, settings: ScorerSettings, lungs: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """[(B, D)] or, for a dense head, the maps of its stages, of images (B, 1, S, S) in [0, 1], and the places in the
        lungs (B, 1, S, S) bool where `places` asks for them."""
        images = resize_images(images, backbone.spec.size)
        if self.positions:
            return with_places(self.head.read(backbone, images), lungs, settings, self.head.enlarge)
        return [backbone(images).float()]

    def forward(self, read: list[torch.Tensor]) -> torch.Tensor:
        if self.positions:
            read, places = parted(read, self.settings)
            logits = self.head(read).flatten(1)
            count = max(1, round(TOP * logits.shape[1]))
            if places is None:
                return logits.topk(count, dim=1).values.mean(dim=1)
            values = logits.masked_fill(~places.flatten(1), -torch.inf).topk(count, dim=1).values
            there = values > -torch.inf  # small lungs hold fewer places
            return values.where(there, 0).sum(dim=1) / there.sum(dim=1)
        logits = self.head(*read)
        return torch.logsumexp(logits[:, 1:], dim=1) - logits[:, 0]

    def maps(self, read: list[torch.Tensor]) -> torch.Tensor:
        return torch.sigmoid(self.head(parted(read, self.settings)[0])[:, 0]) if self.positions else super().maps(read)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "head": self.head.facts()}
