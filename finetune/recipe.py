"""The recipe of fine-tuning; values and their meaning stand in configs/finetune/default.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from carina.data.labels import Uncertain
from carina.imaging.views import ViewSettings
from carina.models.features import Region
from carina.models.pasting import PastingSettings
from carina.models.scorers import ScorerSettings
from carina.recipes import Section
from carina.training.engine import TrainingSettings


class ProbeSettings(Section):
    strengths: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    folds: Annotated[int, Field(ge=2)]


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
    backbone: str
    architecture: str
    scale: int | None
    size: Annotated[int, Field(ge=16)] | None
    mode: Literal["frozen", "full"]
    probe: ProbeSettings
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
