"""The predictor: members (backbone, scale, head or scorer) -> scores, thresholds, and what it wants to be fed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, logit
from torch import nn

from carina.errors import CarinaError
from carina.files import atomic_folder, read_json, write_json
from carina.models.backbones import Backbone, load_backbone, resize_images
from carina.models.checkpoints import load_tensors, save_tensors, write_backbone
from carina.models.features import Region, only
from carina.models.fetch import fetched
from carina.models.heads import Head, head_from_facts
from carina.models.scales import FILE as SCALES
from carina.models.scorers import SCORERS, Scorer, ScorerSettings

FILE = "predictor.json"
EDGE = 1e-15  # how near a probability may come to 0 and 1 before its logit is taken
DARK, BRIGHT = 0.95, 0.999  # shares of the pixels of normal images' maps between which their values are drawn
SPAN_IMAGES = 64  # normal images that tell those values, at most


class Member(nn.Module):
    """One backbone at one scale with a head (logits, one a label) or a scorer (distance), seeing one region.

    scale: what is read from the store, in pixels; `backbone.spec.size` is what enters the network. Members of several
    scales may share a network and a head: then their backbones differ in the spec alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        scale: int,
        head: Head | None,
        scorer: Scorer | None,
        region: Region = "whole",
    ):
        super().__init__()
        self.backbone, self.scale, self.head, self.scorer, self.region = backbone, scale, head, scorer, region

    def scores(self, images: torch.Tensor, lungs: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, 1, S, S) in [0, 1] -> probabilities (B, L), or distances (B, 1).

        lungs: (B, 1, S, S) bool, where `needs_lungs`.
        """
        images = only(images, lungs, self.region)
        if self.scorer is not None:
            return self.distances(images, lungs)[:, None]
        return torch.sigmoid(self.logits(images).double())  # in float32 what is sure would tie at 1

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """(B, L) of images that show the region alone, by the head."""
        return self.head(self.head.read(self.backbone, resize_images(images, self.backbone.spec.size)))

    @property
    def needs_lungs(self) -> bool:
        """Whether it sees less than the whole image, or judges places in the lungs alone."""
        return self.region != "whole" or (self.scorer is not None and self.scorer.settings.places == "lungs")

    def distances(self, images: torch.Tensor, lungs: torch.Tensor | None = None) -> torch.Tensor:
        """(B,) of images that show the region alone."""
        return self.scorer(self.scorer.read(self.backbone, images, self.scorer.settings, lungs))

    def maps(self, images: torch.Tensor, lungs: torch.Tensor | None = None) -> torch.Tensor | None:
        """Anomaly maps (B, S, S) at the size of the images, higher is worse; None where the scorer knows no positions."""
        if self.scorer is None or not self.scorer.positions:
            return None
        return self.region_maps(only(images, lungs, self.region), lungs)

    def region_maps(self, images: torch.Tensor, lungs: torch.Tensor | None = None) -> torch.Tensor:
        """(B, S, S) of images that show the region alone, by a scorer that knows positions."""
        found = self.scorer.maps(self.scorer.read(self.backbone, images, self.scorer.settings, lungs))
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
        """(B, L) float64 from images (and lungs, where a member needs them) by scale."""
        return self.combine(
            [
                member.scores(images[member.scale], (lungs or {}).get(member.scale)).double().cpu().numpy()
                for member in self.members
            ]
        )

    def combine(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """(B, L) float64 from the scores (B, L) of each member: their mean, weighted by finding as the stack says, and
        for probabilities the temperature of each finding on the logit of that mean."""
        weights = np.array([self.info["stack"][label] for label in self.labels])
        return calibrated(stacked(parts, weights), self.temperatures) if self.calibrates else stacked(parts, weights)

    def leading(self, column: int) -> Member:
        """The member with the greatest weight for a finding, the first among equals: whose maps show it."""
        return self.members[int(np.argmax(self.info["stack"][self.labels[column]]))]

    @property
    def calibrates(self) -> bool:
        return any(value != 1 for value in self.info.get("temperature", {}).values())

    @property
    def temperatures(self) -> np.ndarray:
        return np.array([self.info["temperature"][label] for label in self.labels])

    def check_prepared(self, photometry: dict[str, Any], geometry: dict[str, Any], where: str) -> None:
        """Refuse images that were prepared otherwise than those the predictor was trained on."""
        for name, theirs in (("photometry", photometry), ("geometry", geometry)):
            if theirs != self.info[name]:
                raise CarinaError(
                    f"{where} was prepared with {name} {theirs}, the predictor was trained on {self.info[name]}; prepare "
                    "the store with the same settings"
                )


def stacked(parts: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Scores (B, L) of M members -> their mean (B, L) float64, weighted by label. weights: (L, M), rows summing to 1."""
    return sum(np.asarray(part, dtype=np.float64) * weights[:, number] for number, part in enumerate(parts))


def logits_of(probabilities: np.ndarray) -> np.ndarray:
    """Logits, finite where a probability has been rounded to 0 or 1."""
    return logit(np.clip(probabilities, EDGE, 1 - EDGE))


def calibrated(probabilities: np.ndarray, temperatures: np.ndarray | float) -> np.ndarray:
    """Probabilities (B, L) -> sigmoid(logit(p) / T) by label, T > 0 (Guo et al., ICML 2017)."""
    return expit(logits_of(probabilities) / temperatures)


def map_span(maps: np.ndarray) -> tuple[float, float]:
    """Between which values anomaly maps are drawn, black to full, from those of normal images (N, H, W).

    Black is what 95 of 100 pixels of normal images stay below. Full lies twice as far above it as what only one in 1,000
    exceeds, so that normal images stay dark and a map is bright only where it goes beyond what normal ones show.
    """
    dark, bright = (float(value) for value in np.quantile(maps, (DARK, BRIGHT)))
    return dark, dark + max(2 * (bright - dark), 1e-6 * max(abs(dark), 1.0))


def save_predictor(folder: Path, predictor: Predictor, card: str) -> None:
    """predictor.json, member-N.safetensors (head or scorer) and member-N/ (backbone), as one atomic folder.

    What members share is written once: `weights` and `tensors` of an entry number the member that it lies with.
    """
    with atomic_folder(folder) as temporary:
        entries: list[dict[str, Any]] = []
        networks, parts = {}, {}
        for number, member in enumerate(predictor.members):
            part = member.scorer if member.head is None else member.head
            if member.head is not None:
                entry = {"head": member.head.facts()}
            else:
                entry = {"scorer": member.scorer.facts(), "region": member.region}
            if id(part) not in parts:
                save_tensors(temporary / f"member-{number}.safetensors", part.state_dict())
            if id(member.backbone.network) not in networks:
                saw = predictor.info["pretext_saw"]
                saw += f", then {predictor.info['finetune_saw']}" if predictor.info["mode"] != "frozen" else ""
                record = {"kind": "member", "pretext_saw": saw, "transductive": predictor.info["transductive"]}
                write_backbone(temporary / f"member-{number}", member.backbone, record, card)
            entry |= {
                "weights": networks.setdefault(id(member.backbone.network), number),
                "tensors": parts.setdefault(id(part), number),
            }
            entries.append({"backbone": member.backbone.spec.to_dict(), "scale": member.scale, **entry})
        write_json(temporary / FILE, {**predictor.info, "members": entries})


def load_predictor(folder: str | Path, device: torch.device | None = None) -> Predictor:
    """From a run, a predictor folder or ``hub:ORG/NAME``."""
    path = Path(fetched(str(folder)))
    path = path / "predictor" if (path / "predictor" / FILE).is_file() else path
    if not (path / FILE).is_file():
        raise CarinaError(f"{folder} holds no predictor ({FILE}); give a run of carina finetune")
    info = read_json(path / FILE)
    members, backbones, heads = [], {}, {}
    for number, entry in enumerate(info["members"]):
        weights, tensors = entry.get("weights", number), entry.get("tensors", number)
        backbone = _backbone(path / f"member-{weights}", entry["backbone"]["size"], backbones.get(weights))
        backbones.setdefault(weights, backbone)
        saved = load_tensors(path / f"member-{tensors}.safetensors")
        head = scorer = None
        if "head" in entry:
            head = heads.setdefault(tensors, head_from_facts(entry["head"], saved))
        else:
            scorer = _scorer(entry["scorer"], saved)
        member = Member(backbone, entry["scale"], head, scorer, entry.get("region", "whole"))
        members.append(member.eval().to(device or "cpu"))
    return Predictor(info, members)


def _backbone(folder: Path, size: int, shared: Backbone | None) -> Backbone:
    """The network of a folder for one size: the one that is there already, unless sizes have batch norms of their own."""
    if shared is None or (folder / SCALES).is_file():
        return load_backbone(str(folder), size=size)
    return Backbone(shared.network, replace(shared.spec, size=size))


def _scorer(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Scorer:
    if facts["name"] not in SCORERS:
        raise CarinaError(f"this carina knows no scorer '{facts['name']}'; a newer one may")
    fields = ScorerSettings.model_fields
    if missing := sorted(name for name in set(fields) - set(facts) if fields[name].is_required()):
        raise CarinaError(f"this predictor was made by an older carina (its scorer lacks {missing[0]}); fit it again")
    settings = ScorerSettings.model_validate({name: facts[name] for name in fields if name in facts})
    return SCORERS[facts["name"]].from_tensors(settings, tensors, facts)
