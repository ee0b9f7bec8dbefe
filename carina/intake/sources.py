"""What prepare is given: files, a CSV, a catalog's folder or a dataset of pictures -> one list of items."""

from __future__ import annotations

import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from carina.data.labels import harmonize
from carina.data.splits import SPLITS
from carina.errors import CarinaError, nearest
from carina.imaging.dicom import list_files
from carina.intake.catalogs import CATALOGS, find_catalog
from carina.intake.catalogs.tables import ages, positive_words
from carina.intake.hub_datasets import find_dataset_items
from carina.intake.items import Box, Item, Labels, age_of, label_columns, settle_splits

COLUMNS = ("patient", "study", "view", "sex", "age", "year", "split", "mask")
_PREFIX = re.compile(r"([A-Za-z][A-Za-z0-9_-]+):(.*)", re.DOTALL)  # two characters at least: C: is a drive


def find_items(source: str, recipe: Any) -> list[Item]:
    """The pictures of a source, sorted by their name below it; every one has the same labels.

    source: a folder, a glob, a CSV with a column `path`, ``CATALOG:FOLDER``, ``hf:DATASET`` (a hub id, a folder that
    save_to_disk wrote, Parquet files) or one Parquet file. Only a hub id touches the network. A file that a table
    names but that is missing is an item too: reading it says so. Names do not depend on how the folder was typed; paths
    are absolute. Raises CarinaError for what cannot be understood, and for patients in two of the splits given.
    """
    kind, place = _kind(source)
    if kind == "hf":
        items = find_dataset_items(place, recipe)
    elif kind:
        items = find_catalog(kind).items(_place(kind, place), recipe)
    elif source.lower().endswith(".csv"):
        items = _from_csv(Path(source), recipe)
    else:
        items = _from_files(source, recipe)
    if recipe.patient_regex:
        _patients_from_names(items, recipe.patient_regex)
    settle_splits(items, source, _split_mend(kind, recipe))
    items.sort(key=lambda item: item.relative)
    twice = sum(a.relative == b.relative for a, b in pairwise(items))
    if twice:
        raise CarinaError(f"{source} lists {twice} paths twice; keep one row a file")
    return items


def _split_mend(kind: str, recipe: Any) -> str:
    if getattr(recipe, "split", None):
        mend = "give every patient one split, or leave split= out"
    elif kind == "hf":
        mend = "give official_split=false"
    else:
        mend = "download its tables again, or give official_split=false"
    return f"{mend}, or a patient_regex= that tells them apart" if recipe.patient_regex else mend


def find_provenance(source: str, recipe: Any) -> dict[str, Any]:
    """Where the pictures come from and what their owner allows, as plain values for store.json and the card.

    Keys: name, title, lineage (names of the catalogs that the pictures or patients come from), homepage,
    official_split, patients (table | header | picture: how far they are known), terms (license, url, redistribution and
    derived_weights as yes | no | ask, credentialed, clause, citation) and others (the same, without others, of every
    catalog whose name items carry as their source). Of what is no catalog nothing is known, so everything is "ask".
    """
    kind, place = _kind(source)
    if kind and kind != "hf":
        catalog = find_catalog(kind)
        parents = [catalog.pictures_of] if catalog.pictures_of else []
        others = {name: find_catalog(name).provenance(place) for name in parents}
        return {**catalog.provenance(place), "others": others}
    name = getattr(recipe, "source", None) or "archive"
    known = any(getattr(recipe, key, None) for key in ("patient", "patient_regex"))
    return {
        "name": name,
        "title": place if kind == "hf" and not Path(place).exists() else name,
        "lineage": [],
        "homepage": "",
        "official_split": bool(getattr(recipe, "split", None)),
        "patients": "table" if known else "header",
        "terms": {
            "license": "",
            "url": "",
            "redistribution": "ask",
            "derived_weights": "ask",
            "credentialed": False,
            "clause": "Not stated: ask the owner of the pictures before publishing.",
            "citation": "",
        },
        "others": {},
    }


def _kind(source: str) -> tuple[str, str]:
    """("hf" or a catalog's name, the rest), or ("", source) for files and CSVs."""
    if source.lower().endswith(".parquet") and not source.startswith("hf:"):
        return "hf", source
    match = _PREFIX.fullmatch(source)
    if match is None or Path(source).exists() or next(glob.iglob(source), None):
        return "", source
    kind = match[1].lower()
    if kind != "hf":
        find_catalog(kind)
    return kind, match[2]


def _place(kind: str, place: str) -> str:
    if not place:
        raise CarinaError(f"{kind}: needs the folder of the archive, as {kind}:FOLDER ({CATALOGS[kind].layout})")
    return place


def _from_files(source: str, recipe: Any) -> list[Item]:
    columns = [name for name in (*COLUMNS, "boxes") if getattr(recipe, name, None)]
    if columns or recipe.labels or recipe.lesions:
        raise CarinaError(f"{(columns or ['labels'])[0]}= names a column of a CSV, but {source} is not a CSV file")
    files = [Path(os.path.abspath(file)) for file in list_files(source)]
    root = Path(os.path.abspath(source)) if Path(source).is_dir() else _common_root(files)
    items = [Item(str(file), file.relative_to(root).as_posix()) for file in files]
    if not items:
        raise CarinaError(f"{source} holds no files that could be images; check the path")
    return items


def _common_root(files: list[Path]) -> Path:
    if not files:
        return Path()
    parents = [set(file.parents) for file in files]
    return max(set.intersection(*parents), key=lambda parent: len(parent.parts))


def _patients_from_names(items: list[Item], pattern: str) -> None:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise CarinaError(f"patient_regex='{pattern}' is not a regular expression ({error})") from None
    found = 0
    for item in items:
        match = compiled.search(Path(item.relative).name)
        if match:
            item.patient_in_name = match.group(1) if compiled.groups else match.group(0)
            found += 1
    if not found:
        raise CarinaError(f"patient_regex='{pattern}' matches no file name; try it on one name first")


def _read_csv(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise CarinaError(f"{path} is not there; check the path")
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise CarinaError(f"{path} cannot be read as CSV ({error})") from None


def _from_csv(path: Path, recipe: Any) -> list[Item]:
    table = _read_csv(path)

    def column(key: str, name: str | None) -> pd.Series | None:
        if name is None:
            return None
        if name not in table.columns:
            raise CarinaError(f"{path} has no column '{name}' ({key}={name}){nearest(name, table.columns)}")
        return table[name].str.strip()

    folder = os.path.abspath(path.parent)
    names = [_relative(name, folder) for name in column("path", "path")]
    if not len(table):
        raise CarinaError(f"{path} has no rows; add one a file")
    columns = {key: column(key, getattr(recipe, key, None)) for key in COLUMNS}
    wanted = label_columns(recipe.labels, str(path))
    labels = {label: _label_values(column("labels", name), path, name) for label, name in wanted.items()}
    lesions = {label: column("lesions", name) for label, name in recipe.lesions.items()}
    old = None if columns["age"] is None else _ages(columns["age"], path, recipe.age)
    years = None if columns["year"] is None else _years(columns["year"], path, recipe.year)
    if columns["split"] is not None:
        wrong = set(columns["split"]) - {*SPLITS, ""}
        if wrong:
            raise CarinaError(
                f"{path}: column '{recipe.split}' holds '{sorted(wrong)[0]}'; use train, val, test or leave it blank"
            )
    boxes = _boxes(Path(recipe.boxes), folder, set(names), wanted) if getattr(recipe, "boxes", None) else {}
    values = [value.to_numpy(np.float32) for value in labels.values()]
    matrix = Labels(list(labels), np.stack(values, axis=1) if values else np.zeros((len(table), 0)))
    texts = {key: [""] * len(table) if value is None else value.tolist() for key, value in columns.items()}
    said = positive_words(list(wanted.values()), np.stack(values, axis=1)) if values else [""] * len(table)
    items = []
    for i, (name, row) in enumerate(zip(names, matrix.rows() if values else [{} for _ in names])):
        text = {key: value[i] for key, value in texts.items()}
        items.append(
            Item(
                path=_below(folder, name),
                relative=name,
                patient=text["patient"] or None,
                study=text["study"] or None,
                view=text["view"],
                sex=text["sex"][:1].upper() if text["sex"][:1].upper() in ("F", "M") else "",
                age=None if old is None else age_of(old.iloc[i]),
                year=None if years is None or pd.isna(years.iloc[i]) else int(years.iloc[i]),
                split=text["split"],
                labels=row,
                original_labels=said[i],
                boxes=boxes.get(name, ()),
                mask=_below(folder, text["mask"]) if text["mask"] else None,
                lesions={label: _below(folder, value.iloc[i]) for label, value in lesions.items() if value.iloc[i]},
            )
        )
    return items


def _below(folder: str, name: str) -> str:
    """An absolute path; run lengths of a mask stay as they are."""
    return name if name.startswith("rle:") else os.path.abspath(os.path.join(folder, name))


def _relative(name: str, folder: str) -> str:
    """One name a file, whether it was written as a.png, ./a.png, b/../a.png or with the folder before it."""
    whole = _below(folder, name)
    inside = whole.startswith(folder.rstrip(os.sep) + os.sep)
    return (os.path.relpath(whole, folder) if inside else os.path.normpath(name)).replace(os.sep, "/")


def _boxes(path: Path, folder: str, names: set[str], labels: Iterable[str]) -> dict[str, list[Box]]:
    """The boxes of a second CSV by path: label, x0, y0, x1, y1 (pixels of the original, half-open), origin if given.

    folder: of the CSV of pictures, below which the paths lie. labels: names that the recipe gave, kept as they are.
    """
    table = _read_csv(path)
    needed = ("path", "label", "x0", "y0", "x1", "y1")
    for name in needed:
        if name not in table.columns:
            raise CarinaError(f"{path} (boxes=) has no column '{name}'{nearest(name, table.columns)}")
    of = [_relative(name, folder) for name in table["path"].str.strip()]
    strange = set(of) - names
    if strange:
        raise CarinaError(f"{path} (boxes=) has a box for '{min(strange)}', which the CSV of pictures does not list")
    corners = [_numbers(table[name].str.strip(), path, name) for name in needed[2:]]
    flat = (corners[0] < corners[2]) & (corners[1] < corners[3])
    if not flat.all():
        raise CarinaError(f"{path} (boxes=): the box in row {int(flat.argmin()) + 2} is empty; x0 < x1 and y0 < y1")
    origins = table["origin"] if "origin" in table.columns else pd.Series("table", index=table.index)
    boxes = defaultdict(list)
    for name, label, x0, y0, x1, y1, origin in zip(of, table["label"].str.strip(), *corners, origins):
        label = label if label in labels else harmonize(label)
        boxes[name].append((label, float(x0), float(y0), float(x1), float(y1), origin))
    return dict(boxes)


def _label_values(values: pd.Series, path: Path, name: str) -> pd.Series:
    numbers = _numbers(values, path, name)
    wrong = numbers[numbers.notna() & ~numbers.isin((0, 1, -1))]
    if len(wrong):
        raise CarinaError(f"{path}: column '{name}' holds {wrong.iloc[0]:g}; labels are 1, 0, blank or -1")
    return numbers


def _years(values: pd.Series, path: Path, name: str) -> pd.Series:
    """The first four digits of a year or a date that begins with it."""
    years = _numbers(values.str.extract(r"^(\d{4})(?!\d)|^(\d{4})\d{4}$").bfill(axis=1)[0].fillna(values), path, name)
    wrong = years[years.notna() & ~years.between(1895, 2200)]
    if len(wrong):
        raise CarinaError(f"{path}: column '{name}' holds {wrong.iloc[0]:g}, which is not a year; give it as 2016")
    return years


def _ages(values: pd.Series, path: Path, name: str) -> pd.Series:
    return _all_known(values, ages(values), path, name)


def _numbers(values: pd.Series, path: Path, name: str) -> pd.Series:
    return _all_known(values, pd.to_numeric(values.replace("", None), errors="coerce"), path, name)


def _all_known(values: pd.Series, numbers: pd.Series, path: Path, name: str) -> pd.Series:
    wrong = values[(values != "") & (values.str.lower() != "nan") & numbers.isna()]
    if len(wrong):
        raise CarinaError(
            f"{path}: column '{name}' holds '{wrong.iloc[0]}', which is not a number; leave it blank where it "
            "is unknown"
        )
    return numbers
