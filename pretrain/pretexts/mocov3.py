"""MoCo v3 (Chen et al., arXiv 2104.02057)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from carina.recipes import Section


class MoCoV3Settings(Section):
    weight: float
    temperature: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, le=1)]
    dimension: Annotated[int, Field(ge=2)]
    hidden: Annotated[int, Field(ge=1)]
    exclude: Literal["image", "study", "patient"]
    freeze_patches: bool
