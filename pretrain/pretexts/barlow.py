"""Barlow Twins (Zbontar et al., arXiv 2103.03230)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from carina.recipes import Section


class BarlowTwinsSettings(Section):
    weight: float
    dimension: Annotated[int, Field(ge=2)]
    redundancy: Annotated[float, Field(ge=0)]
