"""The recipe of pretraining; values and their meaning stand in configs/pretrain/default.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from carina.imaging.views import ViewSettings
from carina.pretrain.pretexts.anatpaste import AnatPasteSettings
from carina.pretrain.pretexts.moco import MoCoSettings
from carina.recipes import Section
from carina.training.engine import TrainingSettings


class PretextSettings(Section):
    moco: MoCoSettings
    anatpaste: AnatPasteSettings

    def weights(self) -> dict[str, float]:
        """The pretexts in use and their weights."""
        weights = {name: getattr(self, name).weight for name in type(self).model_fields}
        return {name: weight for name, weight in weights.items() if weight > 0}


class PretrainRecipe(TrainingSettings):
    store: str | list[str] | None
    rows: str
    where: str | None
    scales: Annotated[list[int], Field(min_length=1)]
    size: Annotated[int, Field(ge=16)] | None
    architecture: str
    init: str
    pretexts: PretextSettings
    views: ViewSettings
    out: str | None
