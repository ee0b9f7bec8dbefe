"""CutPaste (Li et al., arXiv 2104.04015)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from carina.recipes import Section


class CutPasteSettings(Section):
    weight: float
    kind: Literal["normal", "scar", "union", "3way"]
    hidden: Annotated[int, Field(ge=1)]
