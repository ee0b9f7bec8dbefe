"""One radiograph -> its square frames at every scale: what a store holds, and what predict feeds to a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from carina.imaging.geometry import Affine, Geometry, resize_mask, resize_scales
from carina.imaging.lungs import LungMask, lung_mask
from carina.imaging.photometry import Photometry

if TYPE_CHECKING:
    from carina.imaging.markers import Marker

_MARKERS_AT = 512  # the side at which markers are looked for at least: small letters are missed below


@dataclass(frozen=True)
class Frames:
    """images: scale -> (S, S) float32 in [0, 1]. affine: as of `resize_scales`.

    lungs: (L, L) bool at the largest scale, None where none were given or asked for. found: how they were found, None
    where they were given. markers: each with the side of the frame that its pixels count in, None where none were looked
    for.
    """

    images: dict[int, np.ndarray]
    affine: Affine
    lungs: np.ndarray | None
    found: LungMask | None
    markers: list[tuple[Marker, int]] | None


def make_frames(
    image: np.ndarray,
    scales: Sequence[int],
    photometry: Photometry,
    geometry: Geometry,
    spacing: tuple[float, float] | None = None,
    lungs: np.ndarray | None = None,
    find_lungs: bool = False,
) -> Frames:
    """image: (H, W) float32 in [0, 1]. lungs: (H, W) bool, where they are known; else found when asked for.

    Markers are taken out as `photometry` says, on a frame of 512 pixels or the largest scale, never inside the lungs;
    all scales are then made from that frame.
    """
    largest = max(scales)
    side = max(_MARKERS_AT, largest) if photometry.markers != "keep" else largest
    images, affine = resize_scales(image, sorted({*scales, side}, reverse=True), geometry, spacing)
    found = None
    if lungs is not None:
        field = resize_mask(lungs, largest, geometry, spacing)
    elif find_lungs or photometry.markers != "keep":
        found = lung_mask(images[largest])
        field = found.mask
    else:
        field = None
    markers = None
    if photometry.markers != "keep":
        from carina.imaging.markers import clip, find_markers, inpaint  # half a second, only where needed

        whole = Geometry("stretch")
        near = resize_mask(field, side, whole)
        markers = find_markers(images[side], near)
        if markers:
            without = inpaint(images[side], markers, near)
            changed = without if photometry.markers == "inpaint" else clip(images[side], without)
            images = resize_scales(changed, sorted(scales, reverse=True), whole)[0]
    return Frames(
        images={scale: images[scale] for scale in scales},
        affine=affine,
        lungs=field if lungs is not None or find_lungs else None,
        found=found if find_lungs else None,
        markers=None if markers is None else [(marker, side) for marker in markers],
    )
