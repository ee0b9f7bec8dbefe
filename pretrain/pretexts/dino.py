"""DINO (Caron et al., arXiv 2104.14294)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from carina.imaging.views import CropSettings
from carina.recipes import Section


class DINOSettings(Section):
    weight: float
    prototypes: Annotated[int, Field(ge=2)]
    hidden: Annotated[int, Field(ge=1)]
    bottleneck: Annotated[int, Field(ge=1)]
    student_temperature: Annotated[float, Field(gt=0)]
    teacher_temperature: Annotated[float, Field(gt=0)]
    warmup_temperature: Annotated[float, Field(gt=0)]
    warmup: Annotated[float, Field(ge=0, le=1)]
    momentum: Annotated[float, Field(ge=0, le=1)]
    center_momentum: Annotated[float, Field(ge=0, le=1)]
    crops: CropSettings
