"""Contrast of patches at the same place of two views."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from carina.recipes import Section


class PatchContrastSettings(Section):
    weight: float
    temperature: Annotated[float, Field(gt=0)]
    dimension: Annotated[int, Field(ge=2)]
    positions: Annotated[int, Field(ge=1)]
