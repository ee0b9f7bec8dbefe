"""One file -> what the store keeps of it. Runs in worker processes; knows nothing of the store's layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import BrokenProcessPool

from carina.imaging.dicom import Unreadable, read_radiograph
from carina.imaging.lungs import lung_mask
from carina.imaging.photometry import Geometry, Photometry, resize, resize_mask
from carina.intake.sources import VIEWS, Item

ISOLATED_SECONDS = 120


@dataclass(frozen=True)
class Settings:
    scales: tuple[int, ...]
    photometry: Photometry
    geometry: Geometry
    lungs: bool


@dataclass
class Prepared:
    """Images (S, S) uint8 and masks as packed bits by scale, and the facts of the row; or the reason of a rejection."""

    reason: str = ""
    images: dict[int, bytes] = field(default_factory=dict)
    masks: dict[int, dict[str, bytes]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    patient: str | None = None
    study: str | None = None


def _read_mask(path: str, shape: tuple[int, int], what: str) -> np.ndarray:
    data = cv2.imread(path, cv2.IMREAD_GRAYSCALE)
    if data is None:
        raise Unreadable(f"its {what} cannot be read")
    if data.shape != shape:
        raise Unreadable(f"its {what} has {data.shape[1]} x {data.shape[0]} pixels, the image {shape[1]} x {shape[0]}")
    return data > 127


def prepare_file(item: Item, settings: Settings) -> Prepared:
    """Read, scale and mask one file. Never raises for a bad file: the reason is in the result."""
    try:
        return _prepare_file(item, settings)
    except Unreadable as error:
        return Prepared(reason=str(error))
    except Exception as error:  # libraries fail on broken files in many ways; one file never ends a run
        return Prepared(reason=f"it could not be processed ({type(error).__name__})")


def _prepare_file(item: Item, settings: Settings) -> Prepared:
    radiograph = read_radiograph(item.path, settings.photometry)
    image, facts = radiograph.image, radiograph.facts
    spacing = facts.get("spacing")
    masks: dict[str, np.ndarray] = {}
    source, plausible = "none", False
    if item.mask:
        masks["lungs"], source, plausible = _read_mask(item.mask, image.shape, "lung mask"), "file", True
    for label, path in item.lesions.items():
        masks[f"lesion.{label}"] = _read_mask(path, image.shape, f"mask of {label}")

    result = Prepared(patient=radiograph.patient, study=radiograph.study)
    largest = max(settings.scales)
    stored, affine = resize(image, largest, settings.geometry, spacing)
    if settings.lungs and "lungs" not in masks:
        found = lung_mask(stored)
        source, plausible = found.source, bool(found.plausible)
        lungs_stored = found.mask
    else:
        lungs_stored = None
    for scale in settings.scales:
        pixels = stored if scale == largest else resize(image, scale, settings.geometry, spacing)[0]
        result.images[scale] = np.round(pixels * 255).astype(np.uint8).tobytes()
        packed = {}
        for name, mask in masks.items():
            packed[name] = np.packbits(resize_mask(mask, scale, settings.geometry, spacing)).tobytes()
        if lungs_stored is not None:
            shrunk = cv2.resize(lungs_stored.astype(np.float32), (scale, scale), interpolation=cv2.INTER_AREA) >= 0.5
            packed["lungs"] = np.packbits(shrunk).tobytes()
        result.masks[scale] = packed
    boxes = []
    for name, mask in masks.items():
        if name != "lungs" and mask.any():
            ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            ax, bx, ay, by = affine
            corners = (ax * xs[0] + bx, ay * ys[0] + by, ax * (xs[-1] + 1) + bx, ay * (ys[-1] + 1) + by)
            x0, y0, x1, y1 = (float(np.clip(c, 0, 1)) for c in corners)
            boxes.append({"label": name.split(".", 1)[1], "x0": x0, "y0": y0, "x1": x1, "y1": y1, "origin": "mask"})
    age = facts.get("age")
    result.facts = {
        "view": item.view or VIEWS.get(str(facts.get("view") or "").upper(), ""),
        "sex": item.sex or facts.get("sex") or "",
        "age": item.age if item.age is not None else (float("nan") if age is None else float(age)),
        "manufacturer": facts.get("manufacturer") or "",
        "boxes": boxes,
        "height": image.shape[0],
        "width": image.shape[1],
        "affine": [float(value) for value in affine],
        "bits": int(facts.get("bits") or 8),
        "photometric": facts.get("photometric") or "",
        "window": facts.get("window") or "",
        "polarity": facts.get("polarity") or "ok",
        "lungs_source": source,
        "lungs_plausible": plausible,
        "content_hash": hashlib.blake2b(result.images[largest], digest_size=16).hexdigest(),
    }
    return result


def prepare_files(items: Sequence[Item], settings: Settings) -> list[Prepared]:
    """A chunk of files in one worker process, single-threaded because the processes fill the cores."""
    cv2.setNumThreads(1)
    return [prepare_file(item, settings) for item in items]


def prepare_isolated(items: Sequence[Item], settings: Settings) -> Iterator[Prepared]:
    """One result after another from one other process, which is replaced when a file kills or hangs it."""
    pool = None
    for item in items:
        pool = pool or ProcessPoolExecutor(1)
        try:
            yield from pool.submit(prepare_files, [item], settings).result(timeout=ISOLATED_SECONDS)
        except (BrokenProcessPool, TimeoutError) as error:
            pool.shutdown(kill_workers=True)
            pool = None
            hung = isinstance(error, TimeoutError)
            yield Prepared(reason="its decoder hung" if hung else "its decoder crashed")
    if pool is not None:
        pool.shutdown()
