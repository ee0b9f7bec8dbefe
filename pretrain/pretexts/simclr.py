"""SimCLR (Chen et al., arXiv 2002.05709)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from carina.recipes import Section


class SimCLRSettings(Section):
    weight: float
    temperature: Annotated[float, Field(gt=0)]
    dimension: Annotated[int, Field(ge=2)]
    exclude: Literal["image", "study", "patient"]
