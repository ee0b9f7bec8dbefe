"""The recipe of the verb prepare."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from carina.recipes import Section


class PrepareRecipe(Section):
    """Values and their meaning stand in configs/prepare/default.yaml."""

    out: str | None
    scales: Annotated[list[Annotated[int, Field(ge=16, le=4096)]], Field(min_length=1)]
    fit: Literal["pad", "stretch", "crop"]
    window: Literal["auto", "header", "percentile", "full"]
    for_processing: Literal["reject", "log"]
    frames: Literal["reject", "first"]
    source: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    synthetic: bool
    patient: str | None
    patient_regex: str | None
    study: str | None
    view: str | None
    sex: str | None
    age: str | None
    split: str | None
    labels: list[str] | dict[str, str]
    mask: str | None
    lesions: dict[str, str]
    lungs: bool
    key: str | None
    workers: Annotated[int, Field(ge=1)] | None
