"""SimMIM (Xie et al., arXiv 2111.09886)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from carina.recipes import Section


class SimMIMSettings(Section):
    weight: float
    masked: Annotated[float, Field(gt=0, lt=1)]
    patch: Annotated[int, Field(ge=4)]
