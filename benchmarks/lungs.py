"""Lung masks against masks drawn by people, beside what is easier or was published.

    python benchmarks/lungs.py tables=[DIR/labels.csv,...] [out=FILE.json] [sheet=FILE.png] [worst=FILE.png]
                               [every=22 count=40] [columns=8 side=192] [resamples=2000] [workers=1]

A table has the columns path and patient_id and, for the comparison, lung_mask (white = lung, of the size of the
picture); rows without a mask are passed over, and a table without that column is only drawn and counted. Everything
is measured at the aspect of the file, and once more in the square that a store holds. Intervals are percentile
intervals of the patient bootstrap. `sheet` draws `count` pictures, every `every`-th of the sorted paths (ours amber,
the drawn mask cyan; a red frame marks an implausible one); `worst` draws the twelve of lowest overlap.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import pandas as pd
from common import console, script
from joblib import Parallel, delayed
from pydantic import Field
from rich.table import Table
from skimage.exposure import equalize_adapthist
from skimage.filters import threshold_otsu
from skimage.measure import label as components
from skimage.segmentation import clear_border

from carina.errors import CarinaError
from carina.files import write_bytes, write_json
from carina.imaging.dicom import read_radiograph
from carina.imaging.geometry import Geometry, resize, resize_mask
from carina.imaging.lungs import LungMask, lung_mask
from carina.metrics.resampling import patient_codes, patient_resamples
from carina.recipes import Section

STORED = 256  # side of the square in which masks are compared once more
COMMON = 128  # grid on which the drawn masks are averaged
AMBER, CYAN, RED = (255, 176, 0), (0, 220, 255), (230, 40, 40)
POOR, GOOD = 0.3, 0.7


class Arguments(Section):
    tables: Annotated[list[str], Field(min_length=1)]
    out: str | None
    sheet: str | None
    worst: str | None
    every: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=1)]
    columns: Annotated[int, Field(ge=1)]
    side: Annotated[int, Field(ge=32)]
    resamples: Annotated[int, Field(ge=100)]
    workers: Annotated[int, Field(ge=1)]


DEFAULTS = {
    "out": None,
    "sheet": None,
    "worst": None,
    "every": 22,
    "count": 40,
    "columns": 8,
    "side": 192,
    "resamples": 2000,
    "workers": 1,
}


@dataclass
class Picture:
    """One row: where it lies, and what was found. ious and forms: by method."""

    source: str
    path: Path
    patient: str
    mask: Path | None
    ours: LungMask | None = None
    drawn: np.ndarray | None = field(default=None, repr=False)  # (COMMON, COMMON) float32, share of lung in each cell
    ious: dict[str, float] = field(default_factory=dict)
    forms: dict[str, tuple[bool, bool, bool]] = field(default_factory=dict)


def read_tables(paths: Sequence[str]) -> list[Picture]:
    """Rows of all tables, sorted by path within each."""
    pictures = []
    for name in paths:
        file = Path(name)
        if not file.is_file():
            raise CarinaError(f"{file} is not there; give tables=[DIR/labels.csv,...]")
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        missing = {"path", "patient_id"} - set(table.columns)
        if missing:
            raise CarinaError(f"{file} has no column {sorted(missing)[0]}; a table needs path and patient_id")
        if "lung_mask" in table.columns:
            table = table[table["lung_mask"] != ""]
        for row in table.sort_values("path").to_dict("records"):
            mask = file.parent / row["lung_mask"] if "lung_mask" in row else None
            source = file.parent.name
            pictures.append(Picture(source, file.parent / row["path"], f"{source}/{row['patient_id']}", mask))
    if not pictures:
        raise CarinaError("the tables name no picture to measure; fill their column lung_mask, or leave it out")
    return pictures


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks; 0 when both are empty."""
    return float((one & other).sum() / max((one | other).sum(), 1))


def published_step(image: np.ndarray) -> np.ndarray:
    """(H, W) bool: the threshold published with AnatPaste (Sato et al., iScience 2023), from its description.

    At 256 x 256: adaptive equalization (clip limit 0.01), the dark side of Otsu's threshold, opening 3 x 3, nothing
    that touches the frame, dilation 3 x 3, nothing under 400 pixels.
    """
    square = np.clip(cv2.resize(image, (256, 256), interpolation=cv2.INTER_AREA), 0, 1)
    equal = equalize_adapthist(square, clip_limit=0.01, nbins=256)
    dark = (equal < threshold_otsu(equal, nbins=256)).astype(np.uint8)
    kernel = np.ones((3, 3), np.uint8)
    inner = clear_border(cv2.morphologyEx(dark, cv2.MORPH_OPEN, kernel))
    labels = components(cv2.dilate(inner, kernel), connectivity=1)
    kept = np.bincount(labels.ravel()) >= 400
    kept[0] = False
    return cv2.resize(kept[labels].astype(np.float32), image.shape[::-1], interpolation=cv2.INTER_LINEAR) >= 0.5


def two_ellipses(height: int, width: int) -> np.ndarray:
    """Two upright ellipses, the same in every picture: centers at 30 % and 70 % of the width and 45 % of the height."""
    y, x = (np.mgrid[:height, :width] + 0.5) / np.array([height, width])[:, None, None]
    return np.logical_or(*(((x - center) / 0.15) ** 2 + ((y - 0.45) / 0.33) ** 2 < 1 for center in (0.3, 0.7)))


def form(mask: np.ndarray, middle: int) -> tuple[bool, bool, bool]:
    """Whether there is a lung on both sides of column `middle`, 10 to 65 % of the frame, and at most three components.

    A lung is 3 % of the frame: less is no field of an adult's or a child's lung in a chest picture.
    """
    both = min(mask[:, :middle].sum(), mask[:, middle:].sum()) >= 0.03 * mask.size
    count, *_ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return bool(both), bool(0.10 <= mask.mean() <= 0.65), count - 1 <= 3


def measure(picture: Picture) -> Picture:
    """Fill in everything that needs this picture alone."""
    cv2.setNumThreads(1)
    image = read_radiograph(picture.path).image
    picture.ours = lung_mask(image)
    masks = {"carina": picture.ours.mask}
    middle = image.shape[1] // 2
    if picture.mask is not None:
        drawn = _drawn(picture.mask, image.shape)
        columns = np.flatnonzero(drawn.any(axis=0))
        middle = int(columns[0] + columns[-1] + 1) // 2
        picture.drawn = cv2.resize(drawn.astype(np.float32), (COMMON, COMMON), interpolation=cv2.INTER_AREA)
        masks["AnatPaste's step"] = published_step(image)
        masks["two fixed ellipses"] = two_ellipses(*image.shape)
        picture.ious = {name: overlap(mask, drawn) for name, mask in masks.items()}
        square = lung_mask(resize(image, STORED, Geometry("pad"))[0]).mask
        picture.ious["carina, in a store"] = overlap(square, resize_mask(drawn, STORED, Geometry("pad")))
    picture.forms = {name: form(mask, middle) for name, mask in masks.items()}
    return picture


def _drawn(path: Path, shape: tuple[int, int]) -> np.ndarray:
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if mask is None or mask.shape != shape:
        raise CarinaError(f"{path} is not a mask of the size of its picture; mend the column lung_mask")
    if not mask.any():
        raise CarinaError(f"{path} is empty, so nothing can be compared with it; leave its row out")
    return mask > 127


def mean_masks(pictures: Sequence[Picture]) -> None:
    """The mean of the masks of all *other* patients, cut at one half, as one more row: it knows what people draw."""
    total = np.sum([picture.drawn for picture in pictures], axis=0, dtype=np.float64)
    own: dict[str, list[np.ndarray]] = {}
    for picture in pictures:
        own.setdefault(picture.patient, []).append(picture.drawn)
    for picture in pictures:
        masks = own[picture.patient]
        others = len(pictures) - len(masks)
        if others:
            mean = ((total - np.sum(masks, axis=0, dtype=np.float64)) / others).astype(np.float32)
            drawn = _drawn(picture.mask, cv2.imread(str(picture.mask), cv2.IMREAD_GRAYSCALE).shape)
            large = cv2.resize(mean, drawn.shape[::-1], interpolation=cv2.INTER_LINEAR) >= 0.5
            picture.ious["mean drawn mask"] = overlap(large, drawn)


def _interval(values: np.ndarray, patients: Sequence[str], resamples: int) -> dict[str, float]:
    """The mean of `values` (n,) and its 95 % percentile interval, patients drawn."""
    codes = patient_codes(np.array(patients))
    sums, counts = np.bincount(codes, values), np.bincount(codes)
    means = np.concatenate([sums @ w / (counts @ w) for w in patient_resamples(codes, resamples, 0)])
    low, high = np.percentile(means, (2.5, 97.5))
    return {"value": float(np.mean(values)), "low": float(low), "high": float(high)}


def summarize(pictures: Sequence[Picture], resamples: int) -> dict[str, Any]:
    """All figures of one set of pictures."""
    patients = [picture.patient for picture in pictures]
    implausible = np.array([not picture.ours.plausible for picture in pictures])
    result: dict[str, Any] = {
        "images": len(pictures),
        "patients": len(set(patients)),
        "implausible": int(implausible.sum()),
        "methods": {},
    }
    for name in dict.fromkeys((*pictures[0].ious, *pictures[0].forms)):
        row: dict[str, Any] = {}
        if name in pictures[0].ious:
            values = np.array([picture.ious[name] for picture in pictures])
            row["iou"] = _interval(values, patients, resamples)
            row["median_iou"] = float(np.median(values))
            row["share_under_0.3"] = _interval((values < POOR).astype(float), patients, resamples)
            row["share_from_0.7"] = float((values >= GOOD).mean())
        if name in pictures[0].forms:
            forms = np.array([picture.forms[name] for picture in pictures])
            row["well_formed"] = _interval(forms.all(axis=1).astype(float), patients, resamples)
            row |= dict(zip(("both_lungs", "area_10_to_65", "at_most_3_components"), forms.mean(axis=0).tolist()))
        result["methods"][name] = row
    if pictures[0].ious:
        values = np.array([picture.ious["carina"] for picture in pictures])
        result["iou_where_plausible"] = float(values[~implausible].mean()) if not implausible.all() else None
        result["iou_where_implausible"] = float(values[implausible].mean()) if implausible.any() else None
        result["under_0.3_found_implausible"] = int(implausible[values < POOR].sum())
    return result


def tile(picture: Picture, side: int) -> np.ndarray:
    """(side, side, 3) uint8: the picture with the outlines of both masks, and its overlap."""
    square = Geometry("pad")
    image = resize(read_radiograph(picture.path).image, side, square)[0]
    canvas = np.repeat(np.round(image * 255).astype(np.uint8)[..., None], 3, axis=2)
    outlines = [(picture.ours.mask, AMBER)]
    if picture.mask is not None:
        outlines.insert(0, (_drawn(picture.mask, picture.ours.mask.shape), CYAN))
    for mask, color in outlines:
        small = resize_mask(mask, side, square).astype(np.uint8)
        contours, _ = cv2.findContours(small, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, contours, -1, color, max(1, side // 160), cv2.LINE_AA)
    if not picture.ours.plausible:
        cv2.rectangle(canvas, (0, 0), (side - 1, side - 1), RED, 2)
    if picture.ious:
        words = f"{picture.ious['carina']:.2f}"
        cv2.putText(canvas, words, (4, side - 5), cv2.FONT_HERSHEY_SIMPLEX, side / 480, (255, 255, 255), 1, cv2.LINE_AA)
    return canvas


def draw(pictures: Sequence[Picture], file: str, columns: int, side: int) -> None:
    """A sheet of tiles, as PNG or by the ending of the name as JPEG or WebP."""
    tiles = [tile(picture, side) for picture in pictures]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    done, data = cv2.imencode(Path(file).suffix or ".png", np.concatenate(rows)[..., ::-1])
    if not done:
        raise CarinaError(f"{file} has no ending of a picture; name it .png")
    write_bytes(file, data.tobytes())


def run(arguments: Arguments) -> tuple[dict[str, Any], list[Picture]]:
    """All pictures measured: the figures by set, and the pictures."""
    found = Parallel(n_jobs=arguments.workers)(delayed(measure)(p) for p in read_tables(arguments.tables))
    sets = {source: [p for p in found if p.source == source] for source in dict.fromkeys(p.source for p in found)}
    compared = [picture for picture in found if picture.mask is not None]
    if compared:
        mean_masks(compared)
    if len(compared) == len(found) and len(sets) > 1:
        sets["all together"] = compared
    return {
        "benchmark": "lungs",
        "sets": {name: summarize(pictures, arguments.resamples) for name, pictures in sets.items()},
    }, found


def _figure(value: dict[str, float] | None, digits: int = 3) -> str:
    return (
        "" if value is None else f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    )


def shown(name: str, result: dict[str, Any]) -> Table:
    """The figures of one set as a table for the terminal."""
    caption = f"{result['images']} images of {result['patients']} patients; {result['implausible']} found implausible"
    if result.get("iou_where_plausible") is not None:
        caption += f"; mean IoU where plausible {result['iou_where_plausible']:.3f}"
    if result.get("iou_where_implausible") is not None:
        caption += f", where not {result['iou_where_implausible']:.3f}"
    table = Table(title=name, caption=caption, title_justify="left", caption_justify="left")
    for head in ("method", "mean IoU", "median", "IoU < 0.3", "IoU >= 0.7", "both, 10-65 %, <= 3 parts"):
        table.add_column(head)
    for method, row in result["methods"].items():
        scores = [f"{row[key]:.3f}" if key in row else "" for key in ("median_iou", "share_from_0.7")]
        poor = _figure(row.get("share_under_0.3"))
        table.add_row(method, _figure(row.get("iou")), scores[0], poor, scores[1], _figure(row.get("well_formed")))
    return table


def work(given: Arguments) -> None:
    result, pictures = run(given)
    if given.out:
        write_json(given.out, result)
    if given.sheet:
        draw(pictures[:: given.every][: given.count], given.sheet, given.columns, given.side)
    if given.worst:
        compared = [picture for picture in pictures if picture.ious]
        if not compared:
            raise CarinaError("worst= needs masks to compare with; give a table with the column lung_mask")
        draw(sorted(compared, key=lambda p: p.ious["carina"])[:12], given.worst, 4, given.side)
    for name, figures in result["sets"].items():
        console().print(shown(name, figures))


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "lungs", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
