"""Side markers: lead letters and printed words near the border, found without learned weights, painted over or clipped.

Kim et al. (2022) show that a classifier reads the side marker when it goes with the label, and compare three inputs:
original, marker inpainted, and original clipped to the range of the inpainted picture. They find letters with a
trained detector. Here they are found by what lead looks like: brighter than everything near, smaller than anatomy,
edges that are sharp all around, and the shape of a letter, which is compared with letters drawn from strokes, turned
and mirrored, bare, cut out of a badge or inside a ring. Lengths are fractions of the longer side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from skimage.restoration import inpaint_biharmonic

from carina.imaging.marker_shapes import GRID, bank, unit

_SIDE = 512  # the longer side of the picture that is searched, in which pixels below are counted
_LARGEST, _SMALLEST = 0.105, 0.022  # of the side: what is larger is anatomy or a device
_LONGEST = 0.14  # of the side: plates that reach in from the border are long and narrow
_CHARACTER = (0.009, 0.035)  # of the side: the height of characters in a word
_BAND = 0.2  # of the side: markers are put this near to the border of the picture
_LEVELS = np.geomspace(0.05, 0.75, 14)  # heights above the surroundings at which things are cut out
_FAINTEST = 0.05  # contrast below which nothing is judged
_SHARP = 0.25  # how steep the edge is over three pixels, as a part of the contrast
_ASPECT = 0.3  # how far the logarithm of width over height may lie from that of the letter
_EDGE = 1.5  # pixels of soft edge that are added around
_AROUND = 8  # pixels around a box from which it is filled in
# Log odds of a marker, by logistic regression on stamped markers against what phantoms and real pictures show without:
# constant, likeness to a letter, how much more than to anything else, logarithm of contrast, in a badge or ring, other
# than L and R (bones imitate D and A).
_WEIGHTS = (-7.5, 8.5, 17.5, 2.0, 2.3, -2.8)
_SUPPORTED = -3.0  # log odds that are enough for a badge or ring around a letter that was found by itself


@dataclass(frozen=True)
class Marker:
    """A mark in the picture. label: "L", "R" or "text". x0, y0, x1, y1: pixels, half-open. confidence: 0 to 1."""

    label: str
    x0: int
    y0: int
    x1: int
    y1: int
    confidence: float


def _sharp_things(raised: np.ndarray, steep: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compact bright things with sharp edges, cut out at several heights above their surroundings.

    Returns boxes (N, 4) as x0, y0, x1, y1, patches (N, D) from dark to bright, and contrasts (N,).
    """
    largest, smallest, longest_allowed = _LARGEST * _SIDE, _SMALLEST * _SIDE, _LONGEST * _SIDE
    boxes, patches, contrasts = [], [], []
    for level in _LEVELS:
        _, labels, stats, _ = cv2.connectedComponentsWithStats((raised > level).view(np.uint8), connectivity=8)
        wide, high, area = stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT], stats[:, cv2.CC_STAT_AREA]
        longest, shortest = np.maximum(wide, high), np.minimum(wide, high)
        fits = (longest <= longest_allowed) & (shortest <= largest) & (longest >= smallest)
        fits &= (shortest >= 0.3 * longest) & (area >= 0.12 * wide * high)
        for index in np.flatnonzero(fits[1:]) + 1:
            x, y, w, h = stats[index, :4].tolist()
            window = (slice(max(y - 1, 0), y + h + 1), slice(max(x - 1, 0), x + w + 1))
            thing = (labels[window] == index).view(np.uint8)
            rest = raised[window][thing == 0]
            if not len(rest):
                continue
            base = float(np.percentile(rest, 20))
            contrast = float(np.percentile(raised[window][thing > 0], 75)) - base
            if contrast < _FAINTEST:
                continue
            rim = thing > cv2.erode(thing, np.ones((3, 3), np.uint8), borderValue=0)
            if np.percentile(steep[window][rim], 25) < _SHARP * contrast:
                continue
            patch = np.clip((raised[y : y + h, x : x + w] - base) / contrast, 0, 1)
            method = cv2.INTER_AREA if min(w, h) > GRID else cv2.INTER_LINEAR
            boxes.append((x, y, x + w, y + h))
            patches.append(cv2.resize(patch, (GRID, GRID), interpolation=method).ravel())
            contrasts.append(contrast)
    return (
        np.array(boxes, int).reshape(-1, 4),
        np.array(patches, np.float32).reshape(-1, GRID**2),
        np.array(contrasts, float),
    )


def _letters(raised: np.ndarray, steep: np.ndarray) -> list[tuple[bool, Marker]]:
    """Things that look like a letter more than like anything else; (in a badge or ring, marker)."""
    boxes, patches, contrast = _sharp_things(raised, steep)
    if not len(boxes):
        return []
    shapes = bank()
    patches = unit(patches)
    aspects = np.log((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1]))
    alike = patches @ shapes.patches.T
    alike[np.abs(aspects[:, None] - shapes.aspects) > _ASPECT] = -1
    best = alike.argmax(axis=1)
    alike = alike.max(axis=1)
    unlike = (patches @ shapes.decoys.T).max(axis=1)
    plated, other = shapes.plated[best], shapes.labels[best] == "text"
    features = np.stack([np.ones(len(boxes)), alike, alike - unlike, np.log(contrast), plated, other])
    odds = np.array(_WEIGHTS) @ features
    encloses = shapes.encloses[best]
    odds = np.where(encloses & (odds < 0), _supported(boxes, shapes.labels[best], odds, encloses), odds)
    confidence = 1 / (1 + np.exp(-odds))
    return [
        (bool(encloses[k]), Marker(str(shapes.labels[best[k]]), *boxes[k].tolist(), float(confidence[k])))
        for k in np.flatnonzero(odds >= 0)
    ]


def _supported(boxes: np.ndarray, labels: np.ndarray, odds: np.ndarray, encloses: np.ndarray) -> np.ndarray:
    """Log odds (N,), those of the surest letter inside where a faint badge or ring of the same letter surrounds it."""
    low, high = boxes[:, :2], boxes[:, 2:]
    center, size = (low + high) / 2, (high - low).max(axis=1)
    inside = ((center[None] > low[:, None]) & (center[None] < high[:, None])).all(axis=2)
    # The letter takes between a third and three quarters of the badge.
    inside &= (size[None] > size[:, None] / 3) & (size[None] < 0.75 * size[:, None])
    inside &= (labels[None] == labels[:, None]) & ~encloses[None] & (odds >= 0)[None] & (odds > _SUPPORTED)[:, None]
    return np.maximum(odds, np.where(inside, odds[None], -np.inf).max(axis=1))


def _words(raised: np.ndarray, steep: np.ndarray) -> list[tuple[bool, Marker]]:
    """Rows of at least two small bright characters of one height: printed words."""
    found = []
    for level in (0.2, 0.3, 0.45):
        _, labels, stats, _ = cv2.connectedComponentsWithStats((raised > level).view(np.uint8), connectivity=8)
        wide, high, area = stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT], stats[:, cv2.CC_STAT_AREA]
        mean_steep = np.bincount(labels.ravel(), steep.ravel(), len(stats)) / np.maximum(area, 1)
        lowest, tallest = _CHARACTER[0] * _SIDE, _CHARACTER[1] * _SIDE
        fits = (high >= lowest) & (high <= tallest) & (wide <= 2.5 * high) & (wide >= 2) & (mean_steep > level)
        fits[0] = False
        chosen = stats[fits][:, :4]
        chosen = chosen[np.argsort(chosen[:, 0], kind="stable")]
        rows: list[list[np.ndarray]] = []
        for x, y, w, h in chosen:
            for row in rows:
                lx, ly, lw, lh = row[-1]
                aligned = abs((y + h / 2) - (ly + lh / 2)) < 0.25 * max(h, lh)
                # Up to one character may be missing between two.
                near = -1 <= x - lx - lw <= 1.5 * max(h, lh)
                if aligned and near and max(h, lh) <= 1.35 * min(h, lh) + 1:
                    row.append(np.array((x, y, w, h)))
                    break
            else:
                rows.append([np.array((x, y, w, h))])
        for row in rows:
            if len(row) >= 2:
                word = np.array(row)
                low, top = word[:, :2].min(axis=0), (word[:, :2] + word[:, 2:]).max(axis=0)
                found.append((True, Marker("text", *low.tolist(), *top.tolist(), 1 - 0.5 ** len(row))))
    return found


def _apart(found: list[tuple[bool, Marker]]) -> list[Marker]:
    """The best of each group of overlapping boxes: whole badges and words before the letters in them."""
    kept: list[Marker] = []
    for _, one in sorted(found, key=lambda each: (not each[0], -each[1].confidence)):
        if not any(one.x0 < k.x1 and k.x0 < one.x1 and one.y0 < k.y1 and k.y0 < one.y1 for k in kept):
            kept.append(one)
    return kept


def _content(image: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of what the zero padding of the frame surrounds."""
    rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def find_markers(image: np.ndarray, lungs: np.ndarray | None = None) -> list[Marker]:
    """The side markers and printed words of a chest radiograph, the surest first.

    image: (H, W) float32 in [0, 1], bright = dense, from about 128 px on; it may be padded with zeros. lungs: (H, W)
    bool; what touches them is not reported, nor is what lies further than a fifth of the side from the border, where
    no marker is put. Boxes hold the soft edge of the mark.
    """
    height, width = image.shape
    x0, y0, x1, y1 = _content(image)
    if min(x1 - x0, y1 - y0) < 32:
        return []
    factor = _SIDE / max(height, width)
    size = (max(1, round((x1 - x0) * factor)), max(1, round((y1 - y0) * factor)))
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    picture = cv2.resize(np.ascontiguousarray(image[y0:y1, x0:x1]), size, interpolation=method)
    largest = round(_LARGEST * _SIDE)
    # Dark all around: mirrored at the border, a letter close to it would join its own image and be too large.
    padded = cv2.copyMakeBorder(picture, *[largest] * 4, cv2.BORDER_CONSTANT, value=0)
    ground = cv2.morphologyEx(padded, cv2.MORPH_OPEN, np.ones((largest, largest), np.uint8))
    raised = picture - ground[largest:-largest, largest:-largest]
    # A picture that had to be enlarged is soft: its edges are measured over as many pixels as one had.
    reach = 2 * max(1, round(factor)) + 1
    steep = cv2.morphologyEx(picture, cv2.MORPH_GRADIENT, np.ones((reach, reach), np.uint8))

    scale = np.array([(x1 - x0) / size[0], (y1 - y0) / size[1]] * 2)
    found = []
    for one in _apart(_letters(raised, steep) + _words(raised, steep)):
        if min(one.x0, one.y0, size[0] - one.x1, size[1] - one.y1) > _BAND * _SIDE:
            continue
        soft = np.array([one.x0 - _EDGE, one.y0 - _EDGE, one.x1 + _EDGE, one.y1 + _EDGE]) * scale
        left, top = (max(int(np.floor(v)), 0) for v in soft[:2])
        right, bottom = min(int(np.ceil(soft[2])), x1 - x0), min(int(np.ceil(soft[3])), y1 - y0)
        box = (left + x0, top + y0, right + x0, bottom + y0)
        if lungs is None or not lungs[box[1] : box[3], box[0] : box[2]].any():
            found.append(Marker(one.label, *box, one.confidence))
    return sorted(found, key=lambda marker: -marker.confidence)


def inpaint(image: np.ndarray, markers: Sequence[Marker], lungs: np.ndarray | None = None) -> np.ndarray:
    """The picture with the boxes of `markers` filled in from around them, (H, W) float32 in [0, 1].

    No pixel outside the boxes changes, none inside `lungs` (H, W) bool, and none of the zero padding of the frame is
    taken for what is around. The filling solves the biharmonic equation (Damelin and Hoang 2018), which continues both
    brightness and slope across the box.
    """
    x0, y0, x1, y1 = _content(image)
    hidden = np.zeros(image.shape, dtype=bool)
    for one in markers:
        left, top, right, bottom = max(one.x0, x0), max(one.y0, y0), min(one.x1, x1), min(one.y1, y1)
        if left < right and top < bottom:  # a slice that ended below 0 would count from the other side
            hidden[top:bottom, left:right] = True
    if lungs is not None:
        hidden &= ~lungs
    filled = image.copy()
    count, _, stats, _ = cv2.connectedComponentsWithStats(
        cv2.dilate(hidden.view(np.uint8), np.ones((2 * _AROUND + 1, 2 * _AROUND + 1), np.uint8)), connectivity=8
    )
    for x, y, w, h, _ in stats[1:count].tolist():
        window = (slice(max(y, y0), min(y + h, y1)), slice(max(x, x0), min(x + w, x1)))
        inside = hidden[window]
        if inside.all():
            # A box over all there is leaves nothing to continue; what is not known is shown as air.
            filled[window] = 0.0
        else:
            solved = inpaint_biharmonic(image[window], inside).astype(np.float32)
            filled[window] = np.where(inside, np.clip(solved, 0.0, 1.0), image[window])
    return filled


def clip(image: np.ndarray, inpainted: np.ndarray) -> np.ndarray:
    """The original (H, W), clipped to the least and greatest value of the inpainted one: marks stay, but no brighter
    than the brightest anatomy (the third input of Kim et al. 2022)."""
    return np.clip(image, inpainted.min(), inpainted.max())
