"""The predictor: members (backbone, scale, head or scorer) -> scores, thresholds, and what it wants to be fed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from carina.errors import CarinaError
from carina.files import atomic_folder, read_json, write_json
from carina.models.backbones import Backbone, load_backbone
from carina.models.checkpoints import load_tensors, save_tensors, write_backbone
from carina.models.features import Region, only
from carina.models.scorers import SCORERS, Scorer, ScorerSettings

FILE = "predictor.json"
DARK, BRIGHT = 0.95, 0.999  # shares of the pixels of normal images' maps between which their values are drawn


class Member(nn.Module):
    """One backbone at one scale with a head (logits, one a label) or a scorer (distance), seeing one region."""

    def __init__(
        self,
        backbone: Backbone,
        scale: int,
        head: nn.Linear | None,
        scorer: Scorer | None,
        region: Region = "whole",
    ):
        super().__init__()
        self.backbone, self.scale, self.head, self.scorer, self.region = backbone, scale, head, scorer, region

    def scores(self, images: torch.Tensor, lungs: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, 1, S, S) in [0, 1] -> probabilities (B, L), or distances (B, 1).

        lungs: (B, 1, S, S) bool, needed where `region` is not the whole image.
        """
        images = only(images, lungs, self.region)
        if self.scorer is not None:
            return self.distances(images)[:, None]
        return self.from_features(self.backbone.features(images))

    def from_features(self, features: torch.Tensor) -> torch.Tensor:
        """Pooled features (B, D) -> probabilities (B, L)."""
        return torch.sigmoid(self.head(features))

    def distances(self, images: torch.Tensor) -> torch.Tensor:
        """(B,) of images that show the region alone."""
        return self.scorer(self.scorer.read(self.backbone, images, self.scorer.settings))

    def maps(self, images: torch.Tensor, lungs: torch.Tensor | None = None) -> torch.Tensor | None:
        """Anomaly maps (B, S, S) at the size of the images, higher is worse; None where the scorer knows no positions."""
        if self.scorer is None or not self.scorer.positions:
            return None
        return self.region_maps(only(images, lungs, self.region))

    def region_maps(self, images: torch.Tensor) -> torch.Tensor:
        """(B, S, S) of images that show the region alone, by a scorer that knows positions."""
        found = self.scorer.maps(self.scorer.read(self.backbone, images, self.scorer.settings))
        return F.interpolate(found[:, None], images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


@dataclass
class Predictor:
    """info: predictor.json. members: loaded networks in evaluation mode."""

    info: dict[str, Any]
    members: list[Member]

    @property
    def labels(self) -> list[str]:
        return self.info["labels"]

    @property
    def scales(self) -> list[int]:
        return [member.scale for member in self.members]

    @torch.no_grad()
    def scores(self, images: dict[int, torch.Tensor], lungs: dict[int, torch.Tensor] | None = None) -> np.ndarray:
        """(B, L) float64 from images (and lungs, where a member needs them) by scale, members weighted as the stack says."""
        weights = self.info["stack"]
        total = 0.0
        for number, member in enumerate(self.members):
            values = member.scores(images[member.scale], (lungs or {}).get(member.scale)).double().cpu().numpy()
            total = total + values * np.array([weights[label][number] for label in self.labels])
        return np.asarray(total)

    def check_prepared(self, photometry: dict[str, Any], geometry: dict[str, Any], where: str) -> None:
        """Refuse images that were prepared otherwise than those the predictor was trained on."""
        for name, theirs in (("photometry", photometry), ("geometry", geometry)):
            if theirs != self.info[name]:
                raise CarinaError(
                    f"{where} was prepared with {name} {theirs}, the predictor was trained on {self.info[name]}; prepare "
                    "the store with the same settings"
                )


def map_span(maps: np.ndarray) -> tuple[float, float]:
    """Between which values anomaly maps are drawn, black to full, from those of normal images (N, H, W).

    Black is what 95 of 100 pixels of normal images stay below. Full lies twice as far above it as what only one in 1,000
    exceeds, so that normal images stay dark and a map is bright only where it goes beyond what normal ones show.
    """
    dark, bright = (float(value) for value in np.quantile(maps, (DARK, BRIGHT)))
    return dark, dark + max(2 * (bright - dark), 1e-6 * max(abs(dark), 1.0))


def save_predictor(folder: Path, predictor: Predictor, card: str) -> None:
    """predictor.json, member-N.safetensors (head or scorer) and member-N/ (backbone), as one atomic folder."""
    with atomic_folder(folder) as temporary:
        entries = []
        for number, member in enumerate(predictor.members):
            if member.head is not None:
                part, entry = member.head, {"head": {"name": "linear"}}
            else:
                part, entry = member.scorer, {"scorer": member.scorer.facts(), "region": member.region}
            save_tensors(temporary / f"member-{number}.safetensors", part.state_dict())
            saw = predictor.info["pretext_saw"]
            saw += f", then {predictor.info['finetune_saw']}" if predictor.info["mode"] == "full" else ""
            record = {"kind": "member", "pretext_saw": saw, "transductive": predictor.info["transductive"]}
            write_backbone(temporary / f"member-{number}", member.backbone, record, card)
            entries.append({"backbone": member.backbone.spec.to_dict(), "scale": member.scale, **entry})
        write_json(temporary / FILE, {**predictor.info, "members": entries})


def load_predictor(folder: str | Path, device: torch.device | None = None) -> Predictor:
    """From a run or a predictor folder."""
    path = Path(folder)
    path = path / "predictor" if (path / "predictor" / FILE).is_file() else path
    if not (path / FILE).is_file():
        raise CarinaError(f"{folder} holds no predictor ({FILE}); give a run of carina finetune")
    info = read_json(path / FILE)
    members = []
    for number, entry in enumerate(info["members"]):
        backbone = load_backbone(str(path / f"member-{number}"), size=entry["backbone"]["size"])
        tensors = load_tensors(path / f"member-{number}.safetensors")
        head = scorer = None
        if "head" in entry:
            head = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0])
            head.load_state_dict(tensors)
        else:
            scorer = _scorer(entry["scorer"], tensors)
        member = Member(backbone, entry["scale"], head, scorer, entry.get("region", "whole"))
        members.append(member.eval().to(device or "cpu"))
    return Predictor(info, members)


def _scorer(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Scorer:
    if facts["name"] not in SCORERS:
        raise CarinaError(f"this carina knows no scorer '{facts['name']}'; a newer one may")
    fields = ScorerSettings.model_fields
    if missing := sorted(set(fields) - set(facts)):
        raise CarinaError(f"this predictor was made by an older carina (its scorer lacks {missing[0]}); fit it again")
    settings = ScorerSettings.model_validate({name: facts[name] for name in fields})
    return SCORERS[facts["name"]].from_tensors(settings, tensors, facts)
