"""The store: images of every scale in Arrow shards, their table, and what made them.

STORE/table.parquet            one row an image
STORE/images/<scale>/*.arrow   Arrow streams (readable by ``datasets.Dataset.from_file``): image_id, image (its bytes,
                               encoded as the schema's metadata say)
STORE/masks/<scale>/*.arrow    image_id, lungs and lesion.<Label> as packed bits, null where there is none
STORE/store.json               schema version, scales, photometry, geometry, counts, hashes
STORE/rejected.parquet         image_id and reason of every file left out
STORE/contact.png              a contact sheet to look at
STORE/sheet.html               the data sheet: counts, histograms, contact sheets by label and source
STORE/labels/0001.parquet      every version of the labels, once they were changed
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from carina.data.encoding import Encoding
from carina.data.splits import LEFT_OUT
from carina.errors import CarinaError, nearest
from carina.files import read_json, write_table

SCHEMA_VERSION = 2
SHARD_SIZE = 1024
LABEL = "label."
LABELS_HASH = b"labels_hash"  # metadata of table.parquet: tells which version of the labels it holds
TEXT_COLUMNS = ("image_id", "patient_id", "study_id", "view", "sex", "manufacturer", "split", "source")
BOX = pa.struct(
    [("label", pa.string()), *((c, pa.float32()) for c in ("x0", "y0", "x1", "y1")), ("origin", pa.string())]
)


def table_schema(labels: Sequence[str]) -> pa.Schema:
    """Columns of table.parquet; `affine` maps original pixel edges to fractions: x * ax + bx, y * ay + by.

    markers is null where none were looked for. chest and view_confidence are a router's probabilities, NaN without one.
    """
    return pa.schema(
        [
            *((name, pa.string()) for name in TEXT_COLUMNS),
            ("age", pa.float32()),
            ("year", pa.int16()),
            *((LABEL + name, pa.float32()) for name in labels),
            ("original_labels", pa.string()),
            ("boxes", pa.list_(BOX)),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("affine", pa.list_(pa.float32(), 4)),
            ("bits", pa.int16()),
            ("photometric", pa.string()),
            ("window", pa.string()),
            ("polarity", pa.string()),
            ("view_source", pa.string()),
            ("view_confidence", pa.float32()),
            ("chest", pa.float32()),
            ("route", pa.string()),
            ("markers", pa.list_(BOX)),
            ("lungs_source", pa.string()),
            ("lungs_plausible", pa.bool_()),
            ("content_hash", pa.string()),
            ("descriptor", pa.binary(256)),
            ("duplicates", pa.string()),
            ("shard", pa.int32()),
            ("row", pa.int32()),
        ]
    )


def store_hash(table: pd.DataFrame, photometry: dict, geometry: dict) -> str:
    """Over sorted (image_id, content_hash), photometry and geometry."""
    digest = hashlib.blake2b(digest_size=16)
    for image_id, content in sorted(zip(table["image_id"], table["content_hash"])):
        digest.update(f"{image_id} {content}\n".encode())
    digest.update(repr((sorted(photometry.items()), sorted(geometry.items()))).encode())
    return digest.hexdigest()


def labels_hash(table: pd.DataFrame) -> str:
    columns = sorted(c for c in table.columns if c.startswith(LABEL))
    ordered = table.sort_values("image_id")
    digest = hashlib.blake2b("\n".join(columns).encode(), digest_size=16)
    digest.update("\n".join(ordered["image_id"]).encode())
    digest.update(np.ascontiguousarray(ordered[columns].to_numpy(np.float32)).tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _open_stream(path: str, written: int) -> pa.Table:
    """`written` tells a shard from one that took its place."""
    with pa.memory_map(path) as source:
        return pa.ipc.open_stream(source).read_all()


def _shard(folder: Path, kind: str, scale: int, shard: int) -> pa.Table:
    path = folder / kind / str(scale) / f"{shard:05d}.arrow"
    return _open_stream(str(path), path.stat().st_mtime_ns)


def read_images(folder: Path, table: pd.DataFrame, rows: Sequence[int], scale: int) -> np.ndarray:
    """(B, S, S) uint8 or uint16, as stored: the pixels of a store's rows at the positions `rows` of its table."""
    out = np.empty((0, scale, scale), dtype=np.uint8)
    shards, places = table["shard"].to_numpy(), table["row"].to_numpy()
    for i, position in enumerate(rows):
        shard = _shard(folder, "images", scale, int(shards[position]))
        encoding = Encoding.from_metadata(shard.schema.metadata)
        if i == 0:
            out = np.empty((len(rows), scale, scale), dtype=encoding.dtype)
        out[i] = encoding.decode(shard["image"][int(places[position])].as_buffer(), scale)
    return out


def unit(images: np.ndarray) -> np.ndarray:
    """Stored pixels (uint8 or uint16) as float32 in [0, 1]."""
    return images.astype(np.float32) / np.float32(np.iinfo(images.dtype).max)


def read_masks(folder: Path, table: pd.DataFrame, rows: Sequence[int], scale: int, name: str = "lungs") -> np.ndarray:
    """(B, S, S) bool masks, all False where there is none. `name`: lungs or lesion.<Label>."""
    out = np.zeros((len(rows), scale, scale), dtype=bool)
    shards, places = table["shard"].to_numpy(), table["row"].to_numpy()
    for i, position in enumerate(rows):
        shard = _shard(folder, "masks", scale, int(shards[position]))
        if name not in shard.column_names:
            continue
        value = shard[name][int(places[position])]
        if value.is_valid:
            bits = np.unpackbits(np.frombuffer(value.as_buffer(), dtype=np.uint8), count=scale * scale)
            out[i] = bits.reshape(scale, scale).astype(bool)
    return out


def check_version(folder: Path, info: dict[str, Any]) -> None:
    version = info.get("schema_version")
    if version != SCHEMA_VERSION:
        raise CarinaError(
            f"{folder} has schema version {version}, this carina reads version {SCHEMA_VERSION}; prepare it again"
        )


def write_store_table(folder: Path, table: pa.Table) -> None:
    """table.parquet, with the hash of the labels that it holds in its metadata."""
    digest = labels_hash(
        table.select([c for c in table.column_names if c == "image_id" or c.startswith(LABEL)]).to_pandas()
    )
    write_table(folder / "table.parquet", table.replace_schema_metadata({LABELS_HASH: digest.encode()}))


class Store:
    """One store, opened for reading. Attributes: folder, info (store.json), table (pandas, one row an image)."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "store.json").is_file():
            if (self.folder / "plan.json").is_file():
                raise CarinaError(f"{folder} is a store that prepare has not finished; give its prepare command again")
            raise CarinaError(f"{folder} is not a store (no store.json in it); make one with carina prepare")
        self.info: dict[str, Any] = read_json(self.folder / "store.json")
        check_version(self.folder, self.info)
        table = pq.read_table(self.folder / "table.parquet")
        if (table.schema.metadata or {}).get(LABELS_HASH, b"").decode() != self.info["labels_hash"]:
            raise CarinaError(f"{folder}: a change of its labels was stopped half way; give that prepare command again")
        self.table = table.to_pandas()
        self.scales: list[int] = self.info["scales"]
        self.labels: list[str] = [c[len(LABEL) :] for c in self.table.columns if c.startswith(LABEL)]

    def __len__(self) -> int:
        return len(self.table)

    def check_scale(self, scale: int) -> None:
        if scale not in self.scales:
            raise CarinaError(
                f"{self.folder} holds scale {', '.join(map(str, self.scales))}, not {scale}; choose one of them or "
                f"prepare the store again with scales=[{scale}]"
            )

    def check_label(self, label: str) -> None:
        if label not in self.labels:
            raise CarinaError(
                f"{self.folder} has no label '{label}'{nearest(label, self.labels)}; it has "
                f"{', '.join(self.labels) or 'none'}"
            )


def check_splits(table: pd.DataFrame, where: str) -> None:
    """Raise CarinaError when a patient stands in more than one split."""
    several = int((table.groupby("patient_id")["split"].nunique() > 1).sum())
    if several:
        raise CarinaError(
            f"{several} patients of {where} stand in more than one split, so training would see test patients; give "
            "every patient one split when preparing"
        )


class Selection:
    """Rows of one or several stores, read as one: the unit that every stage works on.

    table: pandas frame of the rows (columns as in the store); `positions` say where each lies.
    """

    def __init__(self, stores: Sequence[Store], table: pd.DataFrame):
        self.stores = list(stores)
        self.table = table.reset_index(drop=True)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def labels(self) -> list[str]:
        return [c[len(LABEL) :] for c in self.table.columns if c.startswith(LABEL)]

    @property
    def photometry(self) -> dict[str, Any]:
        return self.stores[0].info["photometry"]

    @property
    def geometry(self) -> dict[str, Any]:
        return self.stores[0].info["geometry"]

    @property
    def hashes(self) -> list[str]:
        return [store.info["store_hash"] for store in self.stores]

    @property
    def labels_hashes(self) -> list[str]:
        """Which version of the labels each store held."""
        return [store.info["labels_hash"] for store in self.stores]

    @property
    def key_check(self) -> str:
        return self.stores[0].info["key_check"]

    @property
    def synthetic(self) -> bool:
        return any(store.info.get("synthetic", False) for store in self.stores)

    @property
    def origins(self) -> dict[str, dict[str, Any]]:
        """By source: lineage and terms, as the catalogs know them."""
        return {name: origin for store in self.stores for name, origin in store.info["origins"].items()}

    def where(self, rows: np.ndarray) -> Selection:
        """The rows that a boolean mask or an array of positions picks."""
        return Selection(self.stores, self.table[rows] if rows.dtype == bool else self.table.iloc[rows])

    def split(self, *names: str) -> Selection:
        return self.where(self.table["split"].isin(names).to_numpy())

    def targets(self, labels: Sequence[str]) -> np.ndarray:
        """(N, L) float32 as stored: 1, 0, NaN unknown, -1 uncertain."""
        for label in labels:
            for store in self.stores:
                store.check_label(label)
        return self.table[[LABEL + label for label in labels]].to_numpy(np.float32)

    def check_lungs(self) -> None:
        """Raise CarinaError unless every row has a lung mask: without one pasting would change nothing."""
        without = int((self.table["lungs_source"] == "none").sum())
        if without:
            raise CarinaError(
                f"pasting and regions need lung masks, and {without} of {len(self)} rows have none; prepare the store again "
                "with lungs=true or mask=COLUMN"
            )

    def _by_store(self, rows: Sequence[int]) -> Iterable[tuple[int, np.ndarray, np.ndarray]]:
        stores = self.table["_store"].to_numpy()[rows]
        positions = self.table["_position"].to_numpy()[rows]
        for number in np.unique(stores):
            places = np.flatnonzero(stores == number)
            yield int(number), places, positions[places]

    def images(self, rows: Sequence[int], scale: int) -> np.ndarray:
        """(B, S, S) uint8, or uint16 when one of the stores keeps 16 bits."""
        parts = [
            (places, read_images(self.stores[number].folder, self.stores[number].table, positions, scale))
            for number, places, positions in self._by_store(rows)
        ]
        deep = any(images.dtype == np.uint16 for _, images in parts)
        out = np.empty((len(rows), scale, scale), dtype=np.uint16 if deep else np.uint8)
        for places, images in parts:
            # 257 takes the 256 values of 8 bits onto the same fractions of 16 bits.
            out[places] = images.astype(np.uint16) * 257 if deep and images.dtype == np.uint8 else images
        return out

    def masks(self, rows: Sequence[int], scale: int, name: str = "lungs") -> np.ndarray:
        """(B, S, S) bool."""
        out = np.zeros((len(rows), scale, scale), dtype=bool)
        for number, places, positions in self._by_store(rows):
            store = self.stores[number]
            out[places] = read_masks(store.folder, store.table, positions, scale, name)
        return out


def select(
    stores: str | Path | Sequence[str | Path],
    *,
    rows: str = "all",
    where: str | None = None,
    scales: Sequence[int] = (),
) -> Selection:
    """Open one store, or several made under one key, and pick rows.

    rows: all, or a split's name; what was left out of every split as a copy is in neither.
    where: a condition on the columns, as in ``view == 'PA' and age >= 18``
    (labels are written as in the table without their dot: ``label_Pneumonia == 1``).
    """
    paths = [stores] if isinstance(stores, (str, Path)) else list(stores)
    if not paths:
        raise CarinaError("no store is given; name one with store=FOLDER")
    opened = [Store(path) for path in paths]
    for store in opened:
        for scale in scales:
            store.check_scale(scale)
    first = opened[0]
    for store in opened[1:]:
        if store.info["key_check"] != first.info["key_check"]:
            raise CarinaError(
                f"{store.folder} and {first.folder} were made under different keys, so their patients cannot be "
                "told apart; prepare one of them again with the other's key"
            )
        if store.info["photometry"] != first.info["photometry"] or store.info["geometry"] != first.info["geometry"]:
            raise CarinaError(
                f"{store.folder} and {first.folder} differ in photometry or geometry; prepare one again to match"
            )
    frames = []
    for number, store in enumerate(opened):
        frames.append(store.table.assign(_store=number, _position=np.arange(len(store.table))))
    table = pd.concat(frames, ignore_index=True)
    if len(opened) > 1:
        contents = table.groupby("image_id")["content_hash"].nunique()
        if (contents > 1).any():
            raise CarinaError(
                f"{(contents > 1).sum()} images of these stores share an image_id but not their pixels; prepare "
                "archives that use the same file names under different names with source=NAME"
            )
        table = table.drop_duplicates("image_id", keep="first")
    table = table[table["split"] != LEFT_OUT]
    selection = Selection(opened, table)
    if where:
        selection = selection.where(_condition(selection.table, where))
        if not len(selection):
            raise CarinaError(f"no row meets where='{where}'; loosen the condition")
    if len(opened) > 1:
        _check_together(selection.table)
    if rows != "all":
        have = ", ".join(sorted(set(selection.table["split"])))
        selection = selection.split(rows)
        if not len(selection):
            raise CarinaError(
                f"no row of {first.folder} has split={rows} (it has {have}); give rows= or split= to match"
            )
    return selection


def _check_together(table: pd.DataFrame) -> None:
    """Raise CarinaError when joined stores put a patient, or the same pixels, into more than one split."""
    mend = (
        "prepare them again with official_split=false or without split=: patients are then dealt alike in every store"
    )
    for column, what in (("patient_id", "patients"), ("content_hash", "images")):
        several = int((table.groupby(column)["split"].nunique() > 1).sum())
        if several:
            raise CarinaError(
                f"{several} {what} of these stores together stand in more than one split, so training would see test "
                + (f"patients; {mend}" if column == "patient_id" else "images; leave one of the copies out with where=")
            )


def _condition(table: pd.DataFrame, where: str) -> np.ndarray:
    if "@" in where or "__" in where:  # pandas' query would reach Python variables and attributes with these
        raise CarinaError(f"where='{where}' may use the table's columns, comparisons, and, or, not, in")
    columns = {c: c.replace(LABEL, "label_") for c in table.columns if not c.startswith("_")}
    plain = table[list(columns)].rename(columns=columns)
    unknown = [w for w in re.findall(r"\blabel_\w+", where) if w not in plain.columns]
    try:
        result = plain.query(where, engine="python")
    except Exception as error:  # pandas raises many kinds for a condition it cannot read
        raise CarinaError(
            f"where='{where}' cannot be applied ({error})" + (nearest(unknown[0], plain.columns) if unknown else "")
        ) from None
    if not isinstance(result, pd.DataFrame):
        raise CarinaError(f"where='{where}' must be a condition on rows")
    return plain.index.isin(result.index)
