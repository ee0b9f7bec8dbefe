"""Datasets of pictures in Arrow or Parquet, as Hugging Face's ``datasets`` writes them: rows -> items.

Only the other columns are read here; a picture is read when its turn comes, by file and row (`read_content`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from carina.data.labels import harmonize
from carina.errors import CarinaError, nearest
from carina.imaging.photometry import Unreadable
from carina.intake.catalogs.tables import ages, positive_words
from carina.intake.items import Item, Labels, age_of, label_columns
from carina.intake.picture_tables import class_names, image_column, is_text, read_others, read_picture, read_schema

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_COLUMNS = ("patient", "study", "view", "sex", "age", "year", "split")


@dataclass(frozen=True)
class Piece:
    """One file of a dataset, the split that its place says, and its number among the files."""

    path: Path
    split: str = ""
    number: int = 0


# Finding the files


def find_dataset_items(source: str, recipe: Any) -> list[Item]:
    """One item a row. Columns are named by the recipe; labels by a column (0, 1, -1, blank) or by a class.

    Without labels= every ClassLabel column, and every list of them, becomes a label a class, under its harmonized name
    with the class's own name in original_labels. -1 in a ClassLabel is missing, as ``datasets`` has it. Items are named
    by file and row before the picture's own name, so that their order is that of the bytes on disk: a group of rows is
    read once. official_split=false leaves out the splits that names of files and folders say.
    """
    for key in ("mask", "lesions", "boxes"):
        if getattr(recipe, key, None):
            raise CarinaError(f"{key}= is not read from datasets; export {source} to files and a CSV for that")
    pieces = _pieces(source)
    if not pieces:
        raise CarinaError(f"{source} has no rows; check the dataset")
    schema = read_schema(pieces[0].path)
    image = image_column(schema, source)
    names = {key: getattr(recipe, key) for key in _COLUMNS if getattr(recipe, key, None)}
    for key, name in names.items():
        if name not in schema.names:
            raise CarinaError(f"{source} has no column '{name}' ({key}={name}){nearest(name, schema.names)}")
    classes = class_names(schema, image)
    picked = _picked(source, schema, classes, getattr(recipe, "labels", None))
    needed = sorted({*names.values(), *(column for column, _ in picked.values())})
    items: list[Item] = []
    for number, piece in enumerate(pieces):
        if read_schema(piece.path).names != schema.names:
            raise CarinaError(f"{piece.path} has other columns than {pieces[0].path}; keep one dataset in a folder")
        split = piece.split if getattr(recipe, "official_split", True) else ""
        items += _items(replace(piece, number=number, split=split), image, needed, names, classes, picked)
    if not items:
        raise CarinaError(f"{source} has no rows; check the dataset")
    return items


def _pieces(source: str) -> list[Piece]:
    path = Path(os.path.abspath(source))
    if path.is_file():
        return [Piece(path, "")]
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return [Piece(file, _split(split)) for split in splits for file in _saved(path / split)]
        if (path / "state.json").is_file():
            return [Piece(file) for file in _saved(path)]
        files = sorted(path.rglob("*.parquet"))
        if files:
            # train-00000-of-00010.parquet, as on the hub, or a folder for each split.
            return [Piece(file, _split(file.stem.split("-")[0]) or _split(file.parent.name)) for file in files]
        raise CarinaError(f"{source} holds no dataset: no dataset_dict.json, no state.json and no Parquet files")
    if not _HUB_ID.fullmatch(source) or source.endswith(".parquet"):
        raise CarinaError(f"{source} is not there; check the path, or give a hub id as hf:ORG/NAME")
    return _download(source)


def _download(name: str) -> list[Piece]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name)
    except Exception as error:  # the hub, its client and the builders fail in many ways
        reason = str(error).strip().splitlines()
        raise CarinaError(
            f"the dataset {name} cannot be had from the hub ({reason[0] if reason else type(error).__name__}); check "
            "the id, the network and your login"
        ) from None
    return [
        Piece(Path(os.path.abspath(file["filename"])), _split(split))
        for split, part in dataset.items()
        for file in part.cache_files
    ]


def _saved(folder: Path) -> list[Path]:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.get("_indices_data_files"):
        raise CarinaError(f"{folder} was saved with a selection of rows; call flatten_indices() before save_to_disk")
    return [folder / file["filename"] for file in state["_data_files"]]


def _split(name: str) -> str:
    return SPLITS.get(name.lower(), "")


# Labels


def _picked(source: str, schema: pa.Schema, classes: dict[str, list[str]], wanted: Any) -> dict[str, tuple[str, str]]:
    """Label -> (column, class in it or "")."""
    known: dict[str, tuple[str, str]] = {}
    for column, names in classes.items():
        for name in names:
            for spelling in (name, harmonize(name)):
                known.setdefault(spelling, (column, name))
    if not wanted:
        every: dict[str, tuple[str, str]] = {}
        for column, names in classes.items():
            for name in names:
                label = harmonize(name)
                every[label if label not in every else harmonize(f"{column} {name}")] = (column, name)
        return every
    columns = [f.name for f in schema if pa.types.is_boolean(f.type) or pa.types.is_primitive(f.type) or is_text(f)]
    result = {}
    for label, name in label_columns(wanted, source).items():
        if name in columns and name not in classes:
            result[label] = (name, "")
        elif name in known:
            result[label] = known[name]
        else:
            raise CarinaError(
                f"{source} has no column or class '{name}' (labels=){nearest(name, [*known, *columns])}; its classes "
                f"are {', '.join(name for names in classes.values() for name in names) or 'not stated'}"
            )
    return result


# Rows


def _items(
    piece: Piece,
    image: str,
    needed: Sequence[str],
    names: dict[str, str],
    classes: dict[str, list[str]],
    picked: dict[str, tuple[str, str]],
) -> list[Item]:
    table, paths, inside = read_others(piece.path, image, needed)
    count = len(paths)
    text = {key: _texts(table[name]) for key, name in names.items() if key not in ("age", "year")}
    years = _floats(table[names["year"]], names["year"], piece.path) if "year" in names else np.full(count, np.nan)
    old = _ages(table[names["age"]], names["age"], piece.path) if "age" in names else np.full(count, np.nan)
    values = [
        _label(table[column], name, classes.get(column, []), column, piece.path) for column, name in picked.values()
    ]
    labels = Labels(list(picked), np.stack(values, axis=1) if values else np.zeros((count, 0)))
    originals = _originals(table, classes, count)
    if values:
        words = positive_words([name or column for column, name in picked.values()], np.stack(values, axis=1))
        originals = [said or word for said, word in zip(originals, words)]
    rows = labels.rows() if values else [{} for _ in range(count)]
    items = []
    for i in range(count):
        own = {key: value[i] for key, value in text.items()}
        given = own.get("split", "")
        if given and not _split(given):
            raise CarinaError(f"{piece.path}: column '{names['split']}' holds '{given}'; use train, val or test")
        file = paths[i] or ""
        # The folder of a file elsewhere is this machine's.
        own_name = os.path.basename(file) if os.path.isabs(file) else os.path.normpath(file).replace(os.sep, "/")
        items.append(
            Item(
                path=str(piece.path) if inside[i] else os.path.abspath(piece.path.parent / file),
                relative=f"{piece.number:05d}/{i:09d}" + (f"/{own_name}" if file else ""),
                content=(str(piece.path), i) if inside[i] else None,
                patient=own.get("patient") or None,
                study=own.get("study") or None,
                view=own.get("view", ""),
                sex=own.get("sex", "")[:1].upper() if own.get("sex", "")[:1].upper() in ("F", "M") else "",
                age=age_of(old[i]),
                year=None if np.isnan(years[i]) else int(years[i]),
                split=_split(given) or piece.split,
                labels=rows[i],
                original_labels=originals[i],
            )
        )
    return items


def _texts(column: pa.ChunkedArray) -> list[str]:
    values = column.to_pylist()
    whole = {v: str(int(v)) for v in set(values) if isinstance(v, float) and v.is_integer()}
    return ["" if v is None or v != v else whole.get(v, str(v)).strip() for v in values]


def _floats(column: pa.ChunkedArray, name: str, path: Path) -> np.ndarray:
    try:
        return np.array([np.nan if v in (None, "") else float(v) for v in column.to_pylist()], dtype=np.float64)
    except (TypeError, ValueError):
        raise CarinaError(f"{path}: column '{name}' holds a value that is not a number; leave it blank there") from None


def _ages(column: pa.ChunkedArray, name: str, path: Path) -> np.ndarray:
    texts = pd.Series(_texts(column), dtype=object)
    years = ages(texts)
    wrong = texts[(texts != "") & years.isna()]
    if len(wrong):
        raise CarinaError(
            f"{path}: column '{name}' holds '{wrong.iloc[0]}', which is not a number; leave it blank there"
        )
    return years.to_numpy(np.float64)


def _label(column: pa.ChunkedArray, name: str, classes: list[str], where: str, path: Path) -> np.ndarray:
    """(N,) float32 of one label: a column's own values, or whether a row is of the class `name`."""
    if not name:
        numbers = _floats(column, where, path)
        wrong = numbers[~np.isnan(numbers) & ~np.isin(numbers, (0, 1, -1))]
        if len(wrong):
            raise CarinaError(f"{path}: column '{where}' holds {wrong[0]:g}; labels are 1, 0, blank or -1")
        return numbers.astype(np.float32)
    code = classes.index(name)
    values = column.to_pylist()
    result = np.full(len(values), np.nan, dtype=np.float32)
    for i, value in enumerate(values):
        if isinstance(value, list):
            result[i] = float(code in value)
        elif value is not None and value >= 0:
            result[i] = float(value == code)
    return result


def _originals(table: pa.Table, classes: dict[str, list[str]], count: int) -> list[str]:
    texts = [""] * count
    for column, names in classes.items():
        if column not in table.column_names:
            continue
        for i, value in enumerate(table[column].to_pylist()):
            codes = value if isinstance(value, list) else [] if value is None else [value]
            said = "|".join(names[code] for code in codes if 0 <= code < len(names))
            texts[i] = ";".join(filter(None, (texts[i], said)))
    return texts


# Pictures


def read_content(item: Item) -> bytes:
    """The bytes of the image file that lies in a dataset, for `read_radiograph`. Raises Unreadable."""
    assert item.content is not None
    path, row = item.content
    try:
        value = read_picture(path, row)
    except (pa.ArrowInvalid, OSError, IndexError):
        raise Unreadable("its dataset cannot be read") from None
    if value is None:
        raise Unreadable("its row in the dataset holds no picture")
    return value
