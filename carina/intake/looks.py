"""Pictures of a store to look at: the contact sheet, and the tiles and histograms of the data sheet."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from carina.data.store import LABEL, read_images, read_masks, unit
from carina.draws import permutation
from carina.files import write_bytes

COLUMNS, ROWS, SIDE = 10, 6, 160
OUTLINE = (80, 200, 255)  # BGR amber: readable on black and on white
TILE = 128  # side of a tile of the data sheet
TILES = 20  # pictures of one contact sheet of the data sheet
SHEETS = 12  # contact sheets of one kind; the others are named
COPIES = 8  # groups of copies that are shown
SAMPLED = 24  # images of a source whose intensities are counted
BINS = 64


def tile(folder: Path, table: pd.DataFrame, position: int, scale: int, side: int) -> np.ndarray:
    """(side, side, 3) uint8 BGR: one image of a store with the outline of its lung mask, where there is one."""
    gray = np.round(unit(read_images(folder, table, [position], scale)[0]) * 255).astype(np.uint8)
    picture = cv2.cvtColor(_to_side(gray, side, cv2.INTER_LINEAR), cv2.COLOR_GRAY2BGR)
    mask = _to_side(read_masks(folder, table, [position], scale)[0].astype(np.uint8), side, cv2.INTER_NEAREST)
    outline, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outline, -1, OUTLINE, 1)
    return picture


def _to_side(picture: np.ndarray, side: int, enlarge: int) -> np.ndarray:
    method = cv2.INTER_AREA if picture.shape[0] > side and enlarge != cv2.INTER_NEAREST else enlarge
    return cv2.resize(picture, (side, side), interpolation=method)


def contact_sheet(folder: Path, table: pd.DataFrame, scale: int) -> None:
    """Write contact.png: up to 60 images drawn evenly over the store, with the outline of their lung masks."""
    count = min(len(table), COLUMNS * ROWS)
    chosen = np.sort(permutation(len(table), "contact sheet")[:count])
    rows = -(-count // COLUMNS)
    sheet = np.zeros((rows * SIDE, COLUMNS * SIDE, 3), dtype=np.uint8)
    for place, position in enumerate(chosen):
        y, x = divmod(place, COLUMNS)
        sheet[y * SIDE : (y + 1) * SIDE, x * SIDE : (x + 1) * SIDE] = tile(folder, table, position, scale, SIDE)
    write_bytes(folder / "contact.png", _encode(".png", sheet))


def embedded_tile(folder: Path, table: pd.DataFrame, position: int, scale: int) -> str:
    """That tile as a data address, 3 to 5 kB."""
    data = _encode(".jpg", tile(folder, table, position, scale, TILE), [cv2.IMWRITE_JPEG_QUALITY, 82])
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def intensities(folder: Path, table: pd.DataFrame, positions: np.ndarray, scale: int) -> np.ndarray:
    """(64,) shares of all pixels of some images by intensity, from 0 to 1 in equal bins; they add up to 1."""
    counts = np.zeros(BINS)
    for position in positions:
        values = unit(read_images(folder, table, [position], scale)[0])
        counts += np.histogram(values, bins=BINS, range=(0, 1))[0]
    return counts / max(counts.sum(), 1)


def _encode(kind: str, picture: np.ndarray, options: list[int] | None = None) -> bytes:
    done, data = cv2.imencode(kind, picture, options or [])
    if not done:
        raise RuntimeError("a picture to look at could not be encoded")
    return data.tobytes()


def known_or_not(column: pd.Series) -> pd.Series:
    """Values as text, unknown ones in one word."""
    return column.astype(object).where(column.notna() & (column != ""), "unknown").astype(str)


def sheet_pictures(folder: Path, info: dict[str, Any], table: pd.DataFrame) -> dict[str, Any]:
    """What the template of the data sheet shows of the pixels: contact sheets and intensity histograms."""
    enough = [scale for scale in info["scales"] if scale >= TILE]
    scale, smallest = min(enough) if enough else max(info["scales"]), min(info["scales"])

    def show(positions: np.ndarray) -> list[dict[str, str]]:
        return [
            {"source": embedded_tile(folder, table, int(p), scale), "name": str(table["image_id"].iat[int(p)])}
            for p in positions
        ]

    def sheet(title: str, where: np.ndarray) -> dict[str, Any]:
        chosen = _drawn(where, TILES, "data sheet", title)
        return {"title": title, "total": len(where), "tiles": show(chosen)}

    names = known_or_not(table["source"])
    sources = [(str(name), np.flatnonzero(names == name)) for name in names.value_counts().index]
    labels = sorted(
        ((c[len(LABEL) :], np.flatnonzero(table[c] == 1)) for c in table.columns if c.startswith(LABEL)),
        key=lambda entry: -len(entry[1]),
    )
    labels = [entry for entry in labels if len(entry[1])]
    doubtful = []
    if "polarity" in table.columns:
        doubtful.append(("May be inverted", np.flatnonzero(table["polarity"] != "ok")))
    if "lungs_plausible" in table.columns:
        wrong = ~table["lungs_plausible"] & (table["lungs_source"] != "none")
        doubtful.append(("Implausible lungs", np.flatnonzero(wrong)))
    histograms = []
    for name, where in sources[:SHEETS]:
        chosen = _drawn(where, SAMPLED, "intensities", name)
        histograms.append({"title": name, "images": len(chosen), "path": _area(folder, table, chosen, smallest)})
    return {
        "scale": scale,
        "smallest": smallest,
        "histograms": histograms,
        "copied": [
            {"title": name[:8], "total": len(where), "tiles": show(where[:4])} for name, where in _groups(table)
        ],
        "doubtful": [sheet(name, where) for name, where in doubtful if len(where)],
        "by_source": [sheet(name, where) for name, where in sources[:SHEETS]],
        "by_label": [sheet(name, where) for name, where in labels[:SHEETS]],
        "not_shown": {
            "sources": [name for name, _ in sources[SHEETS:]],
            "labels": [name for name, _ in labels[SHEETS:]],
        },
    }


def _drawn(where: np.ndarray, most: int, *key: str) -> np.ndarray:
    return where[np.sort(permutation(len(where), *key)[:most])]


def _groups(table: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
    """Some groups of copies with their rows; those that differ in pixels or in patients are worth a look first."""
    if "duplicates" not in table.columns:
        return []
    copied = table[table["duplicates"].fillna("") != ""]
    counted = copied.groupby("duplicates").agg(patients=("patient_id", "nunique"), contents=("content_hash", "nunique"))
    first = counted.sort_values(["patients", "contents"], ascending=False, kind="stable").index[:COPIES]
    return [(str(name), np.flatnonzero(table["duplicates"] == name)) for name in first]


def _area(folder: Path, table: pd.DataFrame, positions: np.ndarray, scale: int) -> str:
    """An SVG path, 64 by 30 units, of intensities; its height is cut at 8 %, because black borders would dwarf it."""
    heights = 30 * np.minimum(intensities(folder, table, positions, scale) / 0.08, 1)
    steps = " ".join(f"V{30 - height:.2f} H{i + 1}" for i, height in enumerate(heights))
    return f"M0 30 {steps} V30 Z"
