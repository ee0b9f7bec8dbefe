"""What a catalog is: one public archive, how its tables become items, what its owner allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from carina.errors import CarinaError
from carina.intake.items import Box, Item, Labels

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
    boxes, masks, lesions: by row number. box_frame: (width, height) that the boxes refer to. found_by: the table's
    name, for messages. source: the archive that owns the pictures, patients_of: that numbers the patients, when it is
    another one. raw: the ending of files that are no image files and that `read_content` makes into one.
    """

    table: pd.DataFrame
    labels: Labels
    found_by: str
    boxes: dict[int, list[Box]] = field(default_factory=dict)
    masks: dict[int, str | list[str]] = field(default_factory=dict)
    lesions: dict[int, dict[str, str]] = field(default_factory=dict)
    box_frame: tuple[int, int] | None = None
    source: str = ""
    patients_of: str = ""
    raw: str = ""


@dataclass(frozen=True)
class Catalog:
    """One public archive. read: folder -> Records. locate: (folder, relative names) -> paths below the folder.

    lineage: the catalogs whose pictures or patients these are. split: the official split in words, "" without one.
    patients: "table" (named in the tables), "header" (DICOM says) or "picture" (unknown: one each).
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
    patients: Literal["table", "header", "picture"] = "table"

    def items(self, folder: str | Path, recipe: Any = None) -> list[Item]:
        """Every picture of the tables, also those whose file is missing: prepare counts and lists these."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CarinaError(f"{folder} is not a folder; give the one that holds {self.layout} as {self.name}:FOLDER")
        records = self.read(folder)
        _refuse_columns(self.name, recipe)
        wanted = getattr(recipe, "labels", None)
        if wanted:
            records.labels = records.labels.select(wanted, self.name)
        if not getattr(recipe, "official_split", True):
            records.table = records.table.drop(columns="split", errors="ignore")
        _check_splits(records, self.name)
        places = self.locate(folder, records.table["relative"].tolist())
        if not places:
            raise CarinaError(f"{folder}: {records.found_by} has no rows; download it again from {self.homepage}")
        return _items(folder, records, places)

    def provenance(self) -> dict[str, Any]:
        """What store.json and the card say of the archive; plain values only."""
        return {
            "name": self.name,
            "title": self.title,
            "lineage": list(self.lineage),
            "homepage": self.homepage,
            "official_split": bool(self.split),
            "patients": self.patients,
            "terms": dict(vars(self.terms)),
        }


_COLUMNS = ("patient", "study", "view", "sex", "age", "year", "split", "mask", "lesions", "boxes")


def _refuse_columns(name: str, recipe: Any) -> None:
    given = [key for key in _COLUMNS if getattr(recipe, key, None)]
    if given:
        raise CarinaError(
            f"{given[0]}= names a column of a CSV, but the catalog {name} knows its own; leave {given[0]}= out"
        )


def _check_splits(records: Records, name: str) -> None:
    table = records.table
    if "split" not in table or "patient" not in table:
        return
    known = table[(table["split"] != "") & (table["patient"] != "")]
    several = int((known.groupby("patient")["split"].nunique() > 1).sum())
    if several:
        raise CarinaError(
            f"{name}: {several} patients stand in more than one official split ({records.found_by}), so training would "
            "see test patients; download the tables again, or give official_split=false"
        )


def _items(folder: Path, records: Records, places: list[str]) -> list[Item]:
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
        item = Item(
            path=root + place,
            relative=relative,
            source=records.source,
            patients_of=records.patients_of,
            patient=patient or None,
            study=study or None,
            view=view,
            sex=sex,
            age=age,
            year=year,
            split=split,
            labels=labels,
            original_labels=original,
            boxes=records.boxes.get(i, ()),
            box_frame=records.box_frame if i in records.boxes else None,
            mask=records.masks.get(i),
        )
        if i in records.lesions:
            item.lesions = records.lesions[i]
        if records.raw and place.upper().endswith(records.raw):
            item.content = (item.path, 0)
        items.append(item)
    return items
