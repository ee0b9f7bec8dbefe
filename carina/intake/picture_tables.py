"""Tables with a column of pictures, in Arrow or Parquet: their schema, their other columns, one picture at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from carina.errors import CarinaError


def read_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path) if _is_parquet(path) else _arrow(str(path)).schema
    except (pa.ArrowInvalid, OSError) as error:
        raise CarinaError(f"{path} cannot be read as Arrow or Parquet ({error})") from None


def _is_parquet(path: Path | str) -> bool:
    return str(path).lower().endswith(".parquet")


@lru_cache(maxsize=64)
def _arrow(path: str) -> pa.Table:
    with pa.memory_map(path) as source:
        return pa.ipc.open_stream(source).read_all()


def _features(schema: pa.Schema) -> dict[str, Any]:
    text = (schema.metadata or {}).get(b"huggingface")
    return json.loads(text)["info"].get("features", {}) if text else {}


def image_column(schema: pa.Schema, source: str) -> str:
    features = _features(schema)
    images = [name for name in schema.names if isinstance(features.get(name), dict)]
    images = [name for name in images if features[name].get("_type") == "Image"]
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and {"bytes", "path"} <= set(_fields(f.type))]
    binary = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    texts = [name for name in ("path", "image", "file_name") if name in schema.names and is_text(schema.field(name))]
    for found in (images, structs, binary, texts):
        if found:
            return "image" if "image" in found else found[0]
    raise CarinaError(
        f"{source} has no column of pictures among {', '.join(schema.names)}; it needs an Image feature, a binary "
        "column, or paths in a column path"
    )


def _fields(type_: pa.DataType) -> list[str]:
    return [type_.field(i).name for i in range(type_.num_fields)]


def is_text(field: pa.Field) -> bool:
    return pa.types.is_string(field.type) or pa.types.is_large_string(field.type)


def class_names(schema: pa.Schema, image: str) -> dict[str, list[str]]:
    """Names of the classes of every ClassLabel column, and of every list of ClassLabels."""
    result = {}
    for name, feature in _features(schema).items():
        if isinstance(feature, list) and feature:
            feature = feature[0]
        elif isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList"):
            feature = feature.get("feature")
        if name != image and isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            result[name] = [str(one) for one in feature["names"]]
    return result


def read_others(path: Path, image: str, needed: Sequence[str]) -> tuple[pa.Table, list[str | None], list[bool]]:
    """(the columns needed, the picture's path, whether its bytes lie in the file), reading no picture's bytes."""
    if not _is_parquet(path):
        table = _arrow(str(path))
        column = table[image]
    else:
        file = pq.ParquetFile(path)
        struct = pa.types.is_struct(file.schema_arrow.field(image).type)
        leaves = [f"{image}.path"] if struct else [image] if is_text(file.schema_arrow.field(image)) else []
        table = file.read(columns=[*needed, *leaves])
        count = file.metadata.num_rows
        column = table[image] if leaves else None
        if column is None:
            return table, [None] * count, [True] * count
        if struct:
            paths = [None if value is None else value["path"] for value in column.to_pylist()]
            return table, paths, _have_bytes(file, image)
    if pa.types.is_struct(column.type):
        pieces = [chunk.flatten() for chunk in column.chunks]
        place = {name: i for i, name in enumerate(_fields(column.type))}
        paths = [value for chunk in pieces for value in chunk[place["path"]].to_pylist()]
        inside = [bool(value) for chunk in pieces for value in chunk[place["bytes"]].is_valid().to_pylist()]
        return table, paths, inside
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return table, column.to_pylist(), [False] * len(column)
    return table, [None] * len(column), [True] * len(column)


def _have_bytes(file: pq.ParquetFile, image: str) -> list[bool]:
    """Whether the picture of each row lies in the file: by the statistics of a group, else by reading that group."""
    inside: list[bool] = []
    leaf = next(i for i in range(len(file.schema)) if file.schema.column(i).path == f"{image}.bytes")
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group)
        statistics = rows.column(leaf).statistics
        nulls = statistics.null_count if statistics is not None and statistics.has_null_count else None
        if nulls in (0, rows.num_rows):
            inside += [nulls == 0] * rows.num_rows
        else:
            column = file.read_row_group(group, columns=[f"{image}.bytes"])[image]
            inside += [value is not None and value["bytes"] is not None for value in column.to_pylist()]
    return inside


def read_picture(path: str, row: int) -> bytes | None:
    """The bytes of the picture in a row of the file; None where it holds none."""
    value = _from_parquet(path, row) if _is_parquet(path) else _from_arrow(path, row)
    return value["bytes"] if isinstance(value, dict) else value


def _from_arrow(path: str, row: int) -> Any:
    return _pictures(path)[row].as_py()


@lru_cache(maxsize=64)
def _pictures(path: str) -> pa.ChunkedArray:
    table = _arrow(path)
    return table[image_column(table.schema, path)]


def _from_parquet(path: str, row: int) -> Any:
    starts, image = _groups(path)
    group = int(np.searchsorted(starts, row, side="right")) - 1
    return _group(path, group, image)[row - int(starts[group])].as_py()


@lru_cache(maxsize=64)
def _groups(path: str) -> tuple[np.ndarray, str]:
    file = pq.ParquetFile(path)
    rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return np.concatenate([[0], np.cumsum(rows)[:-1]]), image_column(file.schema_arrow, path)


@lru_cache(maxsize=1)  # rows are read in order, and one group may hold a gigabyte of pictures
def _group(path: str, group: int, image: str) -> pa.ChunkedArray:
    return pq.ParquetFile(path).read_row_group(group, columns=[image])[image]
