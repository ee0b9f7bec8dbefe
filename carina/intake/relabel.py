"""New labels for a store: `carina prepare STORE labels=new.csv`. Every version is kept; pixels are not touched."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from carina.data.labels import ABNORMAL, abnormal_from, harmonize
from carina.data.store import LABEL, check_version, labels_hash, table_schema, write_store_table
from carina.errors import CarinaError
from carina.files import read_json, write_json, write_table
from carina.intake.counts import label_counts
from carina.intake.keys import load_key
from carina.intake.recipe import RelabelRecipe
from carina.intake.sheet import write_sheet
from carina.recipes import parse_overrides, validate

UNKNOWN = "unknown"


def relabel(folder: Path, overrides: Any, *, dry_run: bool = False) -> dict[str, Any]:
    """Add or correct labels of a store from a CSV; returns what changed, or with dry_run what would.

    ``abnormal`` follows from the findings until a CSV states it; from then on, or where a table or a catalog gave it, it
    changes only when it is stated.

    The CSV has `image_id`, or `path` as it stood in the source (then the key is needed, and a column `source` where the
    store has several), and a column a label: 1, 0, -1, ``unknown``, or blank to leave what stands.
    """
    given = overrides if isinstance(overrides, dict) else parse_overrides(overrides)
    if "labels" not in given or not isinstance(given["labels"], str):
        raise CarinaError(f"{folder} is a store already; give labels=new.csv to change its labels, or another source")
    recipe = validate(RelabelRecipe, given, "prepare STORE")
    info = read_json(folder / "store.json")
    check_version(folder, info)
    table = pq.read_table(folder / "table.parquet").to_pandas()
    versions = info.get("labels_versions") or [{"version": 1, "labels_hash": info["labels_hash"]}]
    current = folder / "labels" / f"{versions[-1]['version']:04d}.parquet"
    if current.exists():
        # After a kill the table may already hold what store.json does not say yet; the version that it names is whole.
        labels = pd.read_parquet(current).set_index("image_id").loc[table["image_id"]].reset_index(drop=True)
    else:
        labels = table[[c for c in table.columns if c.startswith(LABEL)]].reset_index(drop=True)
    new = _read(Path(recipe.labels))
    rows, missing = _rows(new, table, info, recipe, Path(recipe.labels))
    before = labels.copy()
    stated_abnormal = False
    columns = {
        name: LABEL + (name if LABEL + name in labels else harmonize(name))
        for name in new.columns
        if name not in ("image_id", "path", "source")
    }
    if len(set(columns.values())) < len(columns):
        raise CarinaError(f"{recipe.labels} has two columns for one label ({', '.join(columns)}); keep one of them")
    for name, column in columns.items():
        stated_abnormal |= column == LABEL + ABNORMAL
        if column not in labels:
            labels[column] = np.float32(np.nan)
        values = _values(new[name], recipe.labels)
        stated = values.notna().to_numpy() & (rows >= 0)
        target = values[stated].replace(UNKNOWN, np.nan).to_numpy(np.float32)
        labels.loc[rows[stated], column] = target
    labels = labels.astype(np.float32)
    if stated_abnormal:
        info["abnormal"] = "given"
    if LABEL + ABNORMAL in labels and info["abnormal"] == "derived":
        plain = {c[len(LABEL) :]: labels[c].to_numpy() for c in labels}
        labels[LABEL + ABNORMAL] = abnormal_from(plain)
    version = _version(info, table, before, labels, versions[-1]["version"] + 1, Path(recipe.labels), missing)
    if not dry_run:
        if not current.exists():
            write_table(current, _version_table(table["image_id"], before))
        _commit(folder, info, table, labels, versions, version)
    return {"store": str(folder), **version}


def _read(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise CarinaError(f"{path} is not there; check the path") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise CarinaError(f"{path} cannot be read as CSV ({error})") from None
    if "image_id" not in table.columns and "path" not in table.columns:
        raise CarinaError(f"{path} has neither a column 'image_id' nor 'path'; one of them must name the images")
    if not len(table) or not set(table.columns) - {"image_id", "path", "source"}:
        raise CarinaError(f"{path} holds no labels; give a column a label and a row an image")
    return table


def _rows(
    new: pd.DataFrame, table: pd.DataFrame, info: dict[str, Any], recipe: RelabelRecipe, path: Path
) -> tuple[np.ndarray, int]:
    """For each row of the CSV its position in the store, -1 where it is not there, and how many those are."""
    if "image_id" in new.columns:
        ids = new["image_id"].str.strip()
    else:
        key, _ = load_key(recipe.key)
        if key.check != info["key_check"]:
            raise CarinaError(
                f"the store was made under another key, so the paths in {path} cannot be matched; give the key it was "
                "made with (key=), or a column image_id"
            )
        if "source" not in new.columns and len(info["sources"]) > 1:
            raise CarinaError(f"the store has sources {', '.join(info['sources'])}; {path} needs a column 'source'")
        sources = new["source"] if "source" in new.columns else pd.Series(info["sources"][0], index=new.index)
        names = new["path"].map(lambda name: Path(name.strip()).as_posix())
        ids = pd.Series([key.hash("image", source, name, "0") for source, name in zip(sources, names)], index=new.index)
    if ids.duplicated().any():
        raise CarinaError(f"{path} names {int(ids.duplicated().sum())} images twice; keep one row an image")
    place = pd.Series(np.arange(len(table)), index=table["image_id"])
    rows = place.reindex(ids).fillna(-1).to_numpy(np.int64)
    missing = int((rows < 0).sum())
    if missing == len(rows):
        raise CarinaError(f"{path} names no image of this store; check its column {new.columns[0]}")
    return rows, missing


def _values(column: pd.Series, path: str) -> pd.Series:
    """1, 0, -1, `unknown`, or None for what is left as it stands."""
    text = column.str.strip()
    numbers = pd.to_numeric(text.where(~text.isin(["", UNKNOWN])), errors="coerce")
    wrong = text[(text != "") & (text != UNKNOWN) & ~numbers.isin((0, 1, -1))]
    if len(wrong):
        raise CarinaError(
            f"{path}: column '{column.name}' holds '{wrong.iloc[0]}'; labels are 1, 0, -1, {UNKNOWN}, or blank to leave "
            "what stands"
        )
    values = numbers.astype(object).where(numbers.notna(), None)
    return values.where(text != UNKNOWN, UNKNOWN)


def _version_table(ids: pd.Series, labels: pd.DataFrame) -> pa.Table:
    arrays = {"image_id": pa.array(ids.tolist(), pa.string())}
    # NaN stays NaN: as a null it would come back as one too, but not with the same bytes.
    arrays |= {c: pa.array(labels[c].to_numpy(np.float32), pa.float32()) for c in labels}
    return pa.table(arrays)


def _with_labels(table: pa.Table, labels: pd.DataFrame) -> pa.Table:
    schema = table_schema([c[len(LABEL) :] for c in labels])
    arrays = [pa.array(labels[n].to_numpy(), pa.float32()) if n in labels else table[n] for n in schema.names]
    return pa.table(arrays, schema=schema)


def _version(
    info: dict[str, Any],
    table: pd.DataFrame,
    before: pd.DataFrame,
    labels: pd.DataFrame,
    number: int,
    source: Path,
    missing: int,
) -> dict[str, Any]:
    """What store.json says of a version: how many values of each label it changed."""
    changed = {}
    for column in labels:
        old = before[column].to_numpy() if column in before else np.full(len(labels), np.nan, np.float32)
        new = labels[column].to_numpy()
        changed[column[len(LABEL) :]] = int((~((old == new) | (np.isnan(old) & np.isnan(new)))).sum())
    return {
        "version": number,
        "labels_hash": labels_hash(pd.concat([table["image_id"], labels], axis=1)),
        "file_hash": hashlib.blake2b(source.read_bytes(), digest_size=16).hexdigest(),
        "added": [c[len(LABEL) :] for c in labels if c not in before],
        "changed": {name: count for name, count in changed.items() if count},
        "not_in_store": missing,
    }


def _commit(
    folder: Path,
    info: dict[str, Any],
    table: pd.DataFrame,
    labels: pd.DataFrame,
    versions: list[dict[str, Any]],
    version: dict[str, Any],
) -> None:
    """The version, then the table, then store.json: killed between them, the same command mends the store."""
    frame = pd.concat([table[[c for c in table.columns if not c.startswith(LABEL)]], labels], axis=1)
    names = [c[len(LABEL) :] for c in labels]
    same = not version["added"] and not version["changed"]
    if not same:
        write_table(folder / "labels" / f"{version['version']:04d}.parquet", _version_table(table["image_id"], labels))
        versions = [*versions, version]
    # Where nothing changes the table is written all the same: it may hold what a stopped command had put there.
    write_store_table(folder, _with_labels(pq.read_table(folder / "table.parquet"), labels))
    info = {
        **info,
        "labels": names,
        "labels_hash": version["labels_hash"],
        "labels_versions": versions,
        "counts": {**info["counts"], **label_counts(frame, names)},
    }
    write_sheet(folder, info, frame, pd.read_parquet(folder / "rejected.parquet"))
    write_json(folder / "store.json", info)
