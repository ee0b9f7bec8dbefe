"""One file -> what the store keeps of it. Runs in worker processes; knows nothing of the store's layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from carina.data.encoding import Encoding
from carina.imaging.dicom import Unreadable, read_radiograph
from carina.imaging.frames import make_frames
from carina.imaging.geometry import Affine, Geometry, resize, resize_mask
from carina.imaging.photometry import Photometry
from carina.imaging.routing import Route, by_header, decide
from carina.intake.duplicates import descriptor
from carina.intake.hub_datasets import read_content
from carina.intake.items import Item
from carina.intake.masks import read_mask
from carina.isolation import isolated

_HASHED = Encoding("raw", 8)  # one image has one content hash, however a store encodes it


@dataclass(frozen=True)
class Settings:
    """What a worker needs of the recipe. router: scale and geometry of the picture that a router wants to see."""

    encodings: dict[int, Encoding]
    photometry: Photometry
    geometry: Geometry
    lungs: bool
    keep: str
    reject_below: float
    burned_in: str
    router: tuple[int, Geometry] | None


@dataclass
class Prepared:
    """Encoded images and masks (packed bits) by scale, and the facts of the row; or the reason of a rejection.

    route: what the header says. routing: (R, R) uint8 for the router, when there is one to ask.
    """

    reason: str = ""
    images: dict[int, bytes] = field(default_factory=dict)
    masks: dict[int, dict[str, bytes]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    route: Route | None = None
    routing: np.ndarray | None = None
    patient: str | None = None
    study: str | None = None


def prepare_file(item: Item, settings: Settings) -> Prepared:
    """Read, judge, scale and mask one file. Never raises for a bad file: the reason is in the result."""
    try:
        return _prepare_file(item, settings)
    except Unreadable as error:
        return Prepared(reason=str(error))
    except Exception as error:  # libraries fail on broken files in many ways; one file never ends a run
        return Prepared(reason=f"it could not be processed ({type(error).__name__})")


def _prepare_file(item: Item, settings: Settings) -> Prepared:
    radiograph = read_radiograph(read_content(item) if item.content else item.path, settings.photometry)
    image, facts = radiograph.image, radiograph.facts
    if facts["burned_in"] == "YES" and settings.burned_in == "reject":
        raise Unreadable("the header says that identifying text is burned into its pixels; burned_in=keep takes it")
    route = by_header(facts, item.view)
    if settings.router is None:
        route = decide(route, None, settings.keep, settings.reject_below)
        if not route.keep:
            raise Unreadable(route.reason)

    spacing, geometry = facts.get("spacing"), settings.geometry
    masks: dict[str, np.ndarray] = {}
    if item.mask:
        masks["lungs"] = read_mask(item.mask, image.shape)
    for label, reference in item.lesions.items():
        masks[f"lesion.{label}"] = read_mask(reference, image.shape)

    scales = sorted(settings.encodings, reverse=True)
    lungs_given = masks.pop("lungs", None)
    frames = make_frames(
        image, scales, settings.photometry, geometry, spacing, lungs=lungs_given, find_lungs=settings.lungs
    )
    largest = frames.images[scales[0]]
    packed = {
        scale: {name: np.packbits(resize_mask(mask, scale, geometry, spacing)) for name, mask in masks.items()}
        for scale in scales
    }
    for scale in scales:
        if lungs_given is not None:
            packed[scale]["lungs"] = np.packbits(resize_mask(lungs_given, scale, geometry, spacing))
        elif frames.lungs is not None:
            packed[scale]["lungs"] = np.packbits(resize_mask(frames.lungs, scale, Geometry("stretch")))
    if lungs_given is not None:
        lungs_source, plausible = "file", bool(lungs_given.any())
    elif frames.found is not None:
        lungs_source, plausible = frames.found.source, bool(frames.found.plausible)
    else:
        lungs_source, plausible = "none", False

    result = Prepared(route=route, patient=radiograph.patient, study=radiograph.study)
    for scale, encoding in settings.encodings.items():
        result.images[scale] = encoding.encode(encoding.quantize(frames.images[scale]))
        result.masks[scale] = {name: bits.tobytes() for name, bits in packed[scale].items()}
    if settings.router is not None:
        side, its_geometry = settings.router
        result.routing = _HASHED.quantize(resize(image, side, its_geometry, spacing)[0])
    eight = _HASHED.quantize(largest)
    result.facts = {
        **_row_facts(item, facts),
        "boxes": _boxes(item, image.shape, masks, frames.affine),
        "height": image.shape[0],
        "width": image.shape[1],
        "affine": [float(value) for value in frames.affine],
        "lungs_source": lungs_source,
        "lungs_plausible": plausible,
        "markers": None if frames.markers is None else [_marker_box(*found) for found in frames.markers],
        "content_hash": hashlib.blake2b(eight.tobytes(), digest_size=16).hexdigest(),
        "descriptor": descriptor(eight),
    }
    return result


def _row_facts(item: Item, facts: dict[str, Any]) -> dict[str, Any]:
    """What the table or the header says; the table wins."""
    age = item.age if item.age is not None else facts.get("age")
    return {
        "sex": item.sex or facts.get("sex") or "",
        # A single age above 89 can identify a person (HIPAA Safe Harbor, 45 CFR 164.514(b)(2)).
        "age": float("nan") if age is None else min(float(age), 90.0),
        "year": item.year if item.year is not None else facts.get("year"),
        "manufacturer": facts.get("manufacturer") or "",
        "original_labels": item.original_labels,
        "bits": int(facts.get("bits") or 8),
        "photometric": facts.get("photometric") or "",
        "window": facts.get("window") or "",
        "polarity": facts.get("polarity") or "ok",
    }


def _boxes(item: Item, shape: tuple[int, ...], masks: dict[str, np.ndarray], affine: Affine) -> list[dict[str, Any]]:
    """Boxes of the table and around the lesion masks, in fractions of the stored frame, cut to it."""
    wide, high = item.box_frame or (shape[1], shape[0])  # an archive's boxes also hold for resized copies of it
    right, down = shape[1] / wide, shape[0] / high
    boxes = [(label, x0 * right, y0 * down, x1 * right, y1 * down, by) for label, x0, y0, x1, y1, by in item.boxes]
    for name, mask in masks.items():
        if mask.any():
            ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            boxes.append((name.split(".", 1)[1], xs[0], ys[0], xs[-1] + 1, ys[-1] + 1, "mask"))
    ax, bx, ay, by = affine
    result = []
    for label, x0, y0, x1, y1, origin in boxes:
        ends = np.clip([ax * x0 + bx, ay * y0 + by, ax * x1 + bx, ay * y1 + by], 0, 1)
        if ends[0] < ends[2] and ends[1] < ends[3]:  # a cropped frame may not show it
            result.append({"label": label, **dict(zip(("x0", "y0", "x1", "y1"), map(float, ends))), "origin": origin})
    return result


def _marker_box(marker, side: int) -> dict[str, Any]:
    ends = {name: getattr(marker, name) / side for name in ("x0", "y0", "x1", "y1")}
    return {"label": marker.label, **ends, "origin": "detected"}


def prepare_files(items: Sequence[Item], settings: Settings) -> list[Prepared]:
    """A chunk of files in one worker process, single-threaded because the processes fill the cores."""
    cv2.setNumThreads(1)
    return [prepare_file(item, settings) for item in items]


class _One:
    """prepare_files for one item, as a thing that another process can be sent."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def __call__(self, item: Item) -> Prepared:
        return prepare_files([item], self.settings)[0]


def prepare_isolated(items: Sequence[Item], settings: Settings) -> Iterator[Prepared]:
    """One result after another from one other process, which is replaced when a file kills or hangs it."""
    for result, reason in isolated(_One(settings), items):
        yield result or Prepared(reason=reason)
