"""The recipe of pretraining; values and their meaning stand in configs/pretrain/default.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from carina.imaging.views import ViewSettings
from carina.pretrain.pretexts.anatpaste import AnatPasteSettings
from carina.pretrain.pretexts.barlow import BarlowTwinsSettings
from carina.pretrain.pretexts.byol import BYOLSettings
from carina.pretrain.pretexts.cutpaste import CutPasteSettings
from carina.pretrain.pretexts.dino import DINOSettings
from carina.pretrain.pretexts.dinov2 import DINOv2Settings
from carina.pretrain.pretexts.mae import MAESettings
from carina.pretrain.pretexts.moco import MoCoSettings
from carina.pretrain.pretexts.mocov3 import MoCoV3Settings
from carina.pretrain.pretexts.nsa import NSASettings
from carina.pretrain.pretexts.patches import PatchContrastSettings
from carina.pretrain.pretexts.simclr import SimCLRSettings
from carina.pretrain.pretexts.simmim import SimMIMSettings
from carina.pretrain.pretexts.swav import SwAVSettings
from carina.pretrain.pretexts.vicreg import VICRegSettings
from carina.pretrain.watch import WatchSettings
from carina.recipes import Section
from carina.training.engine import TrainingSettings


class PretextSettings(Section):
    simclr: SimCLRSettings
    moco: MoCoSettings
    mae: MAESettings
    dino: DINOSettings
    swav: SwAVSettings
    byol: BYOLSettings
    barlow: BarlowTwinsSettings
    vicreg: VICRegSettings
    mocov3: MoCoV3Settings
    simmim: SimMIMSettings
    dinov2: DINOv2Settings
    anatpaste: AnatPasteSettings
    cutpaste: CutPasteSettings
    nsa: NSASettings
    patches: PatchContrastSettings

    def weights(self) -> dict[str, float]:
        """The pretexts in use and their weights."""
        weights = {name: getattr(self, name).weight for name in type(self).model_fields}
        return {name: weight for name, weight in weights.items() if weight > 0}


class PretrainRecipe(TrainingSettings):
    store: str | list[str] | None
    rows: str
    where: str | None
    scales: Annotated[list[int], Field(min_length=1)]
    scale_plan: Literal["mixed", "growing"]
    norms: Literal["shared", "per_size"]
    positives: Literal["image", "study", "patient"]
    size: Annotated[int, Field(ge=16)] | None
    architecture: str
    init: str
    pretexts: PretextSettings
    views: ViewSettings
    ema: Annotated[float, Field(gt=0, lt=1)] | None
    export: Literal["last", "ema", "teacher"]
    out: str | None
    watch: WatchSettings
