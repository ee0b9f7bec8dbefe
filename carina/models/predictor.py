"""The predictor: members (backbone, scale, head or scorer) -> scores, thresholds, and what it wants to be fed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from carina.errors import CarinaError
from carina.files import atomic_folder, read_json, write_json
from carina.models.backbones import Backbone, load_backbone
from carina.models.checkpoints import load_tensors, save_tensors, write_backbone
from carina.models.scorers import SCORERS

FILE = "predictor.json"


class Member(nn.Module):
    """One backbone at one scale with a head (logits, one a label) or a scorer (distance)."""

    def __init__(self, backbone: Backbone, scale: int, head: nn.Linear | None, scorer: nn.Module | None):
        super().__init__()
        self.backbone, self.scale, self.head, self.scorer = backbone, scale, head, scorer

    def scores(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 1, S, S) in [0, 1] -> probabilities (B, L), or distances (B, 1)."""
        return self.from_features(self.backbone.features(images))

    def from_features(self, features: torch.Tensor) -> torch.Tensor:
        if self.head is not None:
            return torch.sigmoid(self.head(features))
        return self.scorer(features)[:, None]

    def raw(self, images: torch.Tensor) -> torch.Tensor:
        """What a heat map explains: logits, or the distance; `images` already at the backbone's size."""
        features = self.backbone(images)
        return self.head(features) if self.head is not None else self.scorer(features)[:, None]


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
    def scores(self, images: dict[int, torch.Tensor]) -> np.ndarray:
        """(B, L) float64 from images by scale, members weighted as the stack says."""
        weights = self.info["stack"]
        total = 0.0
        for number, member in enumerate(self.members):
            values = member.scores(images[member.scale]).double().cpu().numpy()
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


def save_predictor(folder: Path, predictor: Predictor, card: str) -> None:
    """predictor.json, member-N.safetensors (head or scorer) and member-N/ (backbone), as one atomic folder."""
    with atomic_folder(folder) as temporary:
        entries = []
        for number, member in enumerate(predictor.members):
            if member.head is not None:
                part, entry = member.head, {"head": {"name": "linear"}}
            else:
                part, entry = member.scorer, {"scorer": {**predictor.info["scorer"], "memory": member.scorer.memory}}
            save_tensors(temporary / f"member-{number}.safetensors", part.state_dict())
            record = {"kind": "member", **{key: predictor.info[key] for key in ("pretext_saw", "transductive")}}
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
            scorer = _empty_scorer(entry["scorer"], tensors)
            scorer.load_state_dict(tensors)
        members.append(Member(backbone, entry["scale"], head, scorer).eval().to(device or "cpu"))
    return Predictor(info, members)


def _empty_scorer(entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module:
    if entry["name"] not in SCORERS:
        raise CarinaError(f"this carina knows no scorer '{entry['name']}'; a newer one may")
    settings = {k: v for k, v in entry.items() if k not in ("name", "memory")}
    if "memory_bank" in tensors:
        count, dimension = tensors["memory_bank"].shape
        return SCORERS[entry["name"]](count=count, dimension=dimension, **settings)
    dimension, components = tensors["whitening"].shape
    return SCORERS[entry["name"]](dimension=dimension, **{**settings, "components": components})
