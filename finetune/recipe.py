"""The recipe of fine-tuning; values and their meaning stand in configs/finetune/default.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from carina.data.labels import Uncertain
from carina.imaging.views import ViewSettings
from carina.models.features import Region
from carina.models.heads import HeadSettings
from carina.models.pasting import PastingSettings
from carina.models.scorers import ScorerSettings
from carina.recipes import Section
from carina.training.engine import TrainingSettings

Mode = Literal["frozen", "partial", "full", "lora"]
# youden, f1, or the operating point that keeps a sensitivity or a specificity, as sensitivity:0.9
ThresholdRule = Annotated[str, Field(pattern=r"^(youden|f1|(sensitivity|specificity):0?\.\d+)$")]


class ProbeSettings(Section):
    strengths: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    folds: Annotated[int, Field(ge=2)]


class LoraSettings(Section):
    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)]


class LossSettings(Section):
    name: Literal["bce", "weighted_bce", "focal", "asymmetric", "ldam_drw"]
    gamma: Annotated[float, Field(ge=0)]
    alpha: Annotated[float, Field(ge=0, le=1)] | None
    gamma_positive: Annotated[float, Field(ge=0)]
    gamma_negative: Annotated[float, Field(ge=0)]
    clip: Annotated[float, Field(ge=0, lt=1)]
    margin: Annotated[float, Field(gt=0)]
    sharpness: Annotated[float, Field(gt=0)]
    reweight_from: Annotated[float, Field(ge=0, le=1)]
    beta: Annotated[float, Field(ge=0, lt=1)]


class MixingSettings(Section):
    name: Literal["none", "mixup", "cutmix", "cut_remain"]
    alpha: Annotated[float, Field(gt=0)]
    share: Annotated[float, Field(ge=0, le=1)]
    blank_negatives: bool


class ConsistencySettings(Section):
    weight: Annotated[float, Field(ge=0)]
    flip: bool


class FinetuneRecipe(TrainingSettings):
    task: Literal["classify", "anomaly"]
    store: str | list[str] | None
    where: str | None
    rows: str
    threshold_rows: str | None
    folds: Annotated[int, Field(ge=2)] | None
    fold: Annotated[int, Field(ge=0)]
    patients: Annotated[int, Field(ge=1)] | None
    draw: Annotated[int, Field(ge=0)]
    labels: list[str]
    uncertain: Uncertain
    permute_labels: bool
    backbone: str
    architecture: str
    scale: int | None
    scales: Annotated[list[int], Field(min_length=2)] | None
    shared: bool
    size: Annotated[int, Field(ge=16)] | None
    mode: Mode
    blocks: Annotated[int, Field(ge=1)]
    lora: LoraSettings
    head: HeadSettings
    probe: ProbeSettings
    loss: LossSettings
    mixing: MixingSettings
    consistency: ConsistencySettings
    threshold_rule: ThresholdRule
    temperature: bool
    cache: str | None
    region: Region
    scorer: ScorerSettings
    false_positive_rate: Annotated[float, Field(gt=0, lt=1)]
    cross_folds: Annotated[int, Field(ge=2)]
    fixed_norms: bool | None
    contamination: Annotated[float, Field(ge=0, lt=0.5)]
    select: Literal["last", "aucp", "validation"]
    pool_rows: str | None
    pool_prevalence: Annotated[float, Field(gt=0, lt=1)] | None
    views: ViewSettings
    pasting: PastingSettings
    out: str | None


def few(recipe: FinetuneRecipe, count: int) -> FinetuneRecipe:
    """The recipe for `count` rows: where they do not fill a batch, the largest even one that they fill."""
    return recipe.model_copy(update={"batch_size": max(2, count // 2 * 2)}) if recipe.batch_size > count else recipe
