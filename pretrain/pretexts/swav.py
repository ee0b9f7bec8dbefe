"""SwAV (Caron et al., arXiv 2006.09882)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from carina.imaging.views import CropSettings
from carina.recipes import Section


class SwAVSettings(Section):
    weight: float
    prototypes: Annotated[int, Field(ge=2)]
    dimension: Annotated[int, Field(ge=2)]
    temperature: Annotated[float, Field(gt=0)]
    epsilon: Annotated[float, Field(gt=0)]
    iterations: Annotated[int, Field(ge=1)]
    queue: Annotated[int, Field(ge=0)]
    freeze: Annotated[float, Field(ge=0, le=1)]
    supervised: Annotated[float, Field(ge=0)]
    labels: list[str]
    crops: CropSettings
