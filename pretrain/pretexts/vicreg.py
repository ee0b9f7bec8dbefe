"""VICReg (Bardes et al., arXiv 2105.04906)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from carina.recipes import Section


class VICRegSettings(Section):
    weight: float
    dimension: Annotated[int, Field(ge=2)]
    invariance: Annotated[float, Field(ge=0)]
    variance: Annotated[float, Field(ge=0)]
    covariance: Annotated[float, Field(ge=0)]
