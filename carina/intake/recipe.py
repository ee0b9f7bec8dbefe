"""The recipes of the verb prepare: files to a store, and new labels for a store."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from carina.recipes import Section

Format = Literal["raw", "png", "jpeg"]
Bits = Literal[8, 16]


class PrepareRecipe(Section):
    """Values and their meaning stand in configs/prepare/default.yaml."""

    out: str | None
    scales: Annotated[list[Annotated[int, Field(ge=16, le=4096)]], Field(min_length=1)]
    fit: Literal["pad", "stretch", "crop"]
    window: Literal["auto", "header", "percentile", "full"]
    for_processing: Literal["reject", "log"]
    frames: Literal["reject", "first"]
    equalize: Literal["none", "clahe"]
    encoding: Format | dict[int, Format]
    bits: Bits | dict[int, Bits]
    jpeg_quality: Annotated[int, Field(ge=1, le=100)]
    source: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] | None
    synthetic: bool
    keep: Literal["frontal", "chest", "all"]
    router: str | None
    reject_below: Annotated[float, Field(ge=0.5, lt=1)]
    burned_in: Literal["reject", "keep"]
    markers: Literal["keep", "inpaint", "clip"]
    lungs: bool
    duplicates: bool
    official_split: bool
    patient: str | None
    patient_regex: str | None
    study: str | None
    view: str | None
    sex: str | None
    age: str | None
    year: str | None
    split: str | None
    labels: list[str] | dict[str, str]
    boxes: str | None
    mask: str | None
    lesions: dict[str, str]
    key: str | None
    workers: Annotated[int, Field(ge=1)] | None
    backend: Literal["processes", "dask", "ray"]
    cluster: str | None


class RelabelRecipe(Section):
    """``carina prepare STORE labels=new.csv``: a table with image_id or path, and a column a label."""

    labels: str
    key: str | None = None
