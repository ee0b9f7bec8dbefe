"""BYOL (Grill et al., arXiv 2006.07733)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from carina.recipes import Section


class BYOLSettings(Section):
    weight: float
    dimension: Annotated[int, Field(ge=2)]
    hidden: Annotated[int, Field(ge=1)]
    momentum: Annotated[float, Field(ge=0, le=1)]
    predictor: bool
