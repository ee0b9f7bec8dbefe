"""What a catalog is: one public archive, how its tables become items, what its owner allows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from carina.errors import CarinaError
from carina.intake.items import Box, Item, Labels, age_of

Allowed = Literal["yes", "no", "ask"]


@dataclass(frozen=True)
class Terms:
    """What the owner of an archive allows, as the catalog's author read it; the owner's own text decides.

    redistribution: of the pictures. derived_weights: of networks trained on them. credentialed: a signed agreement
    stands before the download. clause: in our words.
    """

    license: str
    url: str
    redistribution: Allowed
    derived_weights: Allowed
    credentialed: bool
    clause: str
    citation: str


@dataclass
class Records:
    """What an archive's tables say, one row a picture; nothing of it has opened a picture.

    table: ``relative`` (the picture's name in the archive, the same in every layout) and, where known, patient,
    study, view, sex, age, year, split and original (the archive's own label text). labels: as many rows.
    boxes, masks, lesions: by row number. found_by: the table's name, for messages. patients_of: the archive that
    numbers the patients, when it is another one. box_frame: (width, height) that all boxes refer to. originals: endings
    of the files whose own pixels the boxes count; a copy with another ending may have another size, so its boxes need
    copy_frames, (width, height) of the original by row, and are left out without it.
    """

    table: pd.DataFrame
    labels: Labels
    found_by: str
    boxes: dict[int, list[Box]] = field(default_factory=dict)
    masks: dict[int, str | list[str]] = field(default_factory=dict)
    lesions: dict[int, dict[str, str]] = field(default_factory=dict)
    box_frame: tuple[int, int] | None = None
    originals: tuple[str, ...] = ()
    copy_frames: dict[int, tuple[int, int]] = field(default_factory=dict)
    patients_of: str = ""

    def boxes_of(self, row: int, file: str) -> tuple[Sequence[Box], tuple[int, int] | None]:
        """The boxes that hold for a row's file, and the frame they refer to (None: the file's own size)."""
        boxes, frame = self.boxes.get(row, ()), self.box_frame
        if boxes and self.originals and not file.lower().endswith(self.originals):
            frame = self.copy_frames.get(row)
            boxes = boxes if frame else ()
        return boxes, frame if boxes else None


@dataclass(frozen=True)
class Catalog:
    """One public archive. read: folder -> Records. locate: (folder, relative names) -> paths below the folder.

    lineage: the catalogs whose pictures or patients these are. split: the official split in words, "" without one.
    pictures_of: the catalog whose pictures these are, so that each has one image_id under both names.
    patients: "table" (named in the tables), "header" (DICOM says) or "picture" (unknown: one each); "table" as well
    where the folder holds patients_table, which some copies lack.
    layout: what the folder must hold, for messages and docs.
    """

    name: str
    title: str
    homepage: str
    terms: Terms
    layout: str
    read: Callable[[Path], Records]
    locate: Callable[[Path, list[str]], list[str]]
    lineage: tuple[str, ...] = ()
    split: str = ""
    pictures_of: str = ""
    patients: Literal["table", "header", "picture"] = "table"
    patients_table: str = ""

    def items(self, folder: str | Path, recipe: Any = None) -> list[Item]:
        """Every picture of the tables, also those whose file is missing: prepare counts and lists these."""
        folder = Path(os.path.abspath(folder))
        if not folder.is_dir():
            raise CarinaError(f"{folder} is not a folder; give the one that holds {self.layout} as {self.name}:FOLDER")
        records = self.read(folder)
        _refuse_columns(self.name, recipe)
        wanted = getattr(recipe, "labels", None)
        if wanted:
            records.labels = records.labels.select(wanted, self.name)
        if not getattr(recipe, "official_split", True):
            records.table = records.table.drop(columns="split", errors="ignore")
        places = self.locate(folder, records.table["relative"].tolist())
        if not places:
            raise CarinaError(f"{folder}: {records.found_by} has no rows; download it again from {self.homepage}")
        return _items(folder, records, places, self.pictures_of, records.patients_of or self.pictures_of or self.name)

    def provenance(self, folder: str | Path | None = None) -> dict[str, Any]:
        """What store.json and the card say of the archive, or of the copy in a folder; plain values only."""
        named = folder is not None and self.patients_table and (Path(folder) / self.patients_table).is_file()
        return {
            "name": self.name,
            "title": self.title,
            "lineage": list(self.lineage),
            "homepage": self.homepage,
            "official_split": bool(self.split),
            "patients": "table" if named else self.patients,
            "terms": dict(vars(self.terms)),
        }


_COLUMNS = ("patient", "study", "view", "sex", "age", "year", "split", "mask", "lesions", "boxes")


def _refuse_columns(name: str, recipe: Any) -> None:
    given = [key for key in _COLUMNS if getattr(recipe, key, None)]
    if given:
        raise CarinaError(
            f"{given[0]}= names a column of a CSV, but the catalog {name} knows its own; leave {given[0]}= out"
        )


def _items(folder: Path, records: Records, places: list[str], source: str = "", patients_of: str = "") -> list[Item]:
    table, count = records.table, len(records.table)

    def column(name: str, default: Any) -> list[Any]:
        if name not in table:
            return [default] * count
        values, seen = table[name].tolist(), {}
        return [seen.setdefault(value, value) for value in values]  # one object a value, not one a row

    def numbers(name: str, kind: type) -> list[Any]:
        return [None if value != value or value is None else kind(value) for value in column(name, None)]

    root = f"{folder}/"
    columns = zip(
        table["relative"].tolist(),
        places,
        records.labels.rows(),
        column("patient", ""),
        column("study", ""),
        column("view", ""),
        column("sex", ""),
        numbers("age", float),
        numbers("year", int),
        column("split", ""),
        column("original", ""),
        strict=True,
    )
    items = []
    for i, (relative, place, labels, patient, study, view, sex, age, year, split, original) in enumerate(columns):
        boxes, frame = records.boxes_of(i, place)
        item = Item(
            path=root + place,
            relative=relative,
            source=source,
            patients_of=patients_of,
            patient=patient or None,
            study=study or None,
            view=view,
            sex=sex,
            age=age_of(age),
            year=year,
            split=split,
            labels=labels,
            original_labels=original,
            boxes=boxes,
            box_frame=frame,
            mask=records.masks.get(i),
        )
        if i in records.lesions:
            item.lesions = records.lesions[i]
        items.append(item)
    return items
