"""Markers stamped into real radiographs, as lead letters come out in pictures; what the benchmarks of markers share.

A stamp is a letter, plain, cut out of a badge, or inside a ring; 3 to 8 % of the side, turned by up to 20 degrees,
soft-edged, as bright as the densest thing in the picture. The fonts are those of matplotlib, which the detector has
not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from carina.draws import hash64
from carina.errors import CarinaError
from carina.imaging.geometry import Geometry, resize, resize_mask
from carina.imaging.lungs import lung_mask

FONTS = ("DejaVuSans-Bold", "DejaVuSans", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "STIXGeneralBol")
KINDS = ("plain", "badge", "ring")
# A stamp is put where the picture is darker than this: a letter on what is white already can be seen by nobody.
VISIBLE = 0.75


@dataclass(frozen=True)
class Picture:
    """A radiograph in the store's frame. image: (S, S) float32. lungs: (S, S) bool. content: x0, y0, x1, y1 of the
    picture inside its zero padding. boxes: (label, x0, y0, x1, y1) in pixels of the frame, drawn by hand."""

    name: str
    patient: str
    image: np.ndarray
    lungs: np.ndarray
    content: tuple[int, int, int, int]
    boxes: tuple[tuple[str, float, float, float, float], ...]


@dataclass(frozen=True)
class Stamp:
    """A stamped marker. image: (S, S) with it. box: x0, y0, x1, y1, half-open, all pixels that it changes visibly."""

    image: np.ndarray
    letter: str
    kind: str
    size: float
    box: tuple[int, int, int, int]


def half_of(patient: str) -> str:
    return ("report", "tune")[hash64("markers", patient) % 2]


def read_table(folder: Path) -> pd.DataFrame:
    """path, patient, mask of every picture of nih_cxr14 and kermany."""
    tables = []
    for name, mask in (("nih_cxr14", None), ("kermany", "lung_mask")):
        source = folder / name / "labels.csv"
        if not source.is_file():
            raise CarinaError(f"{source} is not there; give the folder of the radiographs as data=FOLDER")
        table = pd.read_csv(source, dtype=str)
        masks = name + "/" + table[mask] if mask else pd.Series([None] * len(table))
        tables.append(pd.DataFrame({"path": name + "/" + table.path, "patient": table.patient_id, "mask": masks}))
    return pd.concat(tables, ignore_index=True)


def read_boxes(folder: Path) -> dict[str, list[tuple[str, int, int, int, int]]]:
    boxes: dict[str, list] = {}
    for row in pd.read_csv(folder / "markers.csv").itertuples():
        boxes.setdefault(row.path, []).append((row.label, row.x0, row.y0, row.x1, row.y1))
    return boxes


def read_picture(folder: Path, row, boxes: Sequence[tuple[str, int, int, int, int]], side: int) -> Picture:
    pixels = cv2.imread(str(folder / row.path), cv2.IMREAD_GRAYSCALE)
    if pixels is None:
        raise CarinaError(f"{folder / row.path} is not a picture; get the radiographs again")
    image, (ax, bx, ay, by) = resize(pixels.astype(np.float32) / 255, side, Geometry())
    if isinstance(row.mask, str):
        truth = cv2.imread(str(folder / row.mask), cv2.IMREAD_GRAYSCALE) > 0
        lungs = resize_mask(truth, side, Geometry())
    else:
        lungs = lung_mask(image).mask
    height, width = pixels.shape
    content = tuple(round(side * f) for f in (bx, by, ax * width + bx, ay * height + by))
    framed = tuple(
        (label, *(side * f for f in (ax * x0 + bx, ay * y0 + by, ax * x1 + bx, ay * y1 + by)))
        for label, x0, y0, x1, y1 in boxes
    )
    return Picture(row.path, row.patient, image, lungs, content, framed)


@lru_cache(maxsize=64)
def _glyph(letter: str, font: str) -> np.ndarray:
    """The letter 200 px high, uint8, cut to its ink."""
    ttf = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"), 280)
    canvas = Image.new("L", (500, 500))
    ImageDraw.Draw(canvas).text((100, 60), letter, fill=255, font=ttf)
    ink = np.asarray(canvas.crop(canvas.getbbox()))
    return cv2.resize(ink, (round(ink.shape[1] * 200 / ink.shape[0]), 200), interpolation=cv2.INTER_AREA)


def _drawing(letter: str, font: str, kind: str, square: bool) -> np.ndarray:
    """(N, N) float32: the density of a marker, 1 where lead is thickest."""
    glyph = _glyph(letter, font).astype(np.float32) / 255
    canvas = np.zeros((400, 400), np.float32)
    top, left = 100, 200 - glyph.shape[1] // 2
    canvas[top : top + 200, left : left + glyph.shape[1]] = glyph
    if kind == "plain":
        return canvas
    plate = np.zeros_like(canvas)
    if square:
        cv2.rectangle(plate, (65, 65), (335, 335), 1.0, -1 if kind == "badge" else 16)
    else:
        cv2.circle(plate, (200, 200), 160, 1.0, -1 if kind == "badge" else 16)
    return plate - canvas * (plate > 0) if kind == "badge" else np.maximum(plate, canvas)


def stamp(image: np.ndarray, letter: str, kind: str, place: tuple[float, float], size: float, seed: object) -> Stamp:
    """Put a marker `size` (fraction of the side, its larger extent) around `place` (x, y in pixels)."""
    rng = np.random.default_rng(hash64("stamp", seed))
    side = image.shape[0]
    drawing = _drawing(letter, FONTS[rng.integers(len(FONTS))], kind, bool(rng.random() < 0.4))
    angle = rng.uniform(-20, 20)
    rows, columns = np.flatnonzero(drawing.any(1)), np.flatnonzero(drawing.any(0))
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    factor = size * side / extent
    softness = rng.uniform(0.4, 1.1) * side / 512
    drawing = cv2.GaussianBlur(drawing, (0, 0), 0.5 / factor)
    matrix = cv2.getRotationMatrix2D((200, 200), angle, factor)
    matrix[:, 2] += np.array(place) - 200
    alpha = cv2.warpAffine(drawing, matrix, (side, side), flags=cv2.INTER_LINEAR)
    alpha = np.clip(cv2.GaussianBlur(alpha, (0, 0), softness), 0, 1)
    alpha[alpha < 0.02] = 0
    level = max(rng.uniform(0.85, 1.0), float(np.percentile(image, 99.5)))
    marked = image + alpha * np.maximum(level - image, 0)
    seen = alpha > 0.1
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Stamp(np.clip(marked, 0, 1, dtype=np.float32), letter, kind, size, box)


def place_of(picture: Picture, size: float, seed: object, side: str | None = None) -> tuple[float, float] | None:
    """A place near the border where a marker would be seen: no lungs, no box drawn by hand, not white already.

    side: "L" for the patient's left (the right of the picture), "R" for the right, None for either.
    """
    rng = np.random.default_rng(hash64("place", seed, picture.name))
    x0, y0, x1, y1 = picture.content
    frame = picture.image.shape[0]
    reach = 0.75 * size * frame
    for _ in range(200):
        fx, fy = rng.uniform(0, 1, 2)
        x, y = x0 + reach + fx * (x1 - x0 - 2 * reach), y0 + reach + fy * (y1 - y0 - 2 * reach)
        if min(x - x0, x1 - x, y - y0) - reach > 0.16 * (x1 - x0):
            continue
        if side and (x > (x0 + x1) / 2) != (side == "L"):
            continue
        window = (slice(int(y - reach), int(y + reach) + 1), slice(int(x - reach), int(x + reach) + 1))
        if picture.lungs[window].any() or np.percentile(picture.image[window], 90) > VISIBLE:
            continue
        if any(x + reach > b[1] and b[3] > x - reach and y + reach > b[2] and b[4] > y - reach for b in picture.boxes):
            continue
        return float(x), float(y)
    return None
