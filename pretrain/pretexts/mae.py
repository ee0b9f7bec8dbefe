"""MAE (He et al., arXiv 2111.06377)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from carina.recipes import Section


class MAESettings(Section):
    weight: float
    masked: Annotated[float, Field(gt=0, lt=1)]
    width: Annotated[int, Field(ge=16)]
    depth: Annotated[int, Field(ge=1)]
    heads: Annotated[int, Field(ge=1)]
    normalize: bool
