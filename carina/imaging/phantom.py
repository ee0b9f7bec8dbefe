"""Synthetic chest radiographs with known truth.

Anatomy is summed as thickness along the beam, attenuated by Beer-Lambert's law, seen by a detector with scatter, beam
falloff and quantum noise, and shown through a logarithm and a window, as a digital radiograph is. All draws are
counter-based: an image depends on (seed, patient, study, image) alone. Nothing else in carina is tuned to these
pictures, and figures measured on them are called *synthetic*.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import cv2
import numpy as np

from carina.errors import CarinaError, nearest
from carina.imaging.phantom_anatomy import MU_BONE, MU_LUNG, MU_SOFT, Chest, Patient, patient_of
from carina.imaging.phantom_canvas import Grid, generator
from carina.imaging.phantom_frontal import frontal
from carina.imaging.phantom_lateral import lateral
from carina.imaging.phantom_lesions import FINDINGS, Lesions
from carina.imaging.phantom_markers import markers_of

VIEWS = ("PA", "AP", "LATERAL")
_SMALLEST, _LARGEST = 16, 4096
_DRAWN = 192  # smaller pictures are drawn at a multiple of their size and reduced by area

__all__ = ["FINDINGS", "VIEWS", "Phantom", "drawn_findings", "phantom"]


@dataclass
class Phantom:
    """A synthetic radiograph and its truth.

    image: (S, S) float32 in [0, 1], bright = dense. lungs: (S, S) bool, the lung fields beside heart and mediastinum
    and above the diaphragm (fluid and free air in the pleural space count as lung field). lesions: for each finding
    present, (S, S) bool; Cardiomegaly is the heart's outline. markers: (text, x0, y0, x1, y1), half-open, in fractions
    of the frame. view: "PA", "AP" or "LATERAL". sex: "F" or "M". age: years. labels: 0 or 1 for each of FINDINGS.
    """

    image: np.ndarray
    lungs: np.ndarray
    lesions: dict[str, np.ndarray]
    markers: list[tuple[str, float, float, float, float]]
    view: str
    sex: str
    age: int
    labels: dict[str, int]


def drawn_findings(seed: int, patient: int, study: int = 0) -> tuple[str, ...]:
    """The findings that a study shows when none are asked for: about half of the patients never have any.

    A finding belongs to the patient and is seen in most, not all, of the patient's studies.
    """
    u = generator(seed, patient, "findings").random(7)
    if u[0] < 0.5:
        return ()
    chosen = [name for name, draw in zip(FINDINGS, u[1:6]) if draw < 0.34] or [FINDINGS[int(u[6] * len(FINDINGS))]]
    seen = generator(seed, patient, study, "course").random(len(FINDINGS))
    return tuple(name for name in chosen if seen[FINDINGS.index(name)] < 0.82)


def phantom(
    seed: int,
    patient: int,
    study: int = 0,
    image: int = 0,
    *,
    size: int = 256,
    view: str | None = None,
    findings: Collection[str] | None = None,
    marker: bool | None = None,
) -> Phantom:
    """A synthetic radiograph of `size` x `size` pixels (16 to 4096).

    Anatomy depends on (seed, patient); where a finding lies on these and its name; how strong it is on the study; pose,
    exposure, noise and marker on the image. view: None draws PA (60 %), AP (35 %) or LATERAL (5 %). findings: a
    collection of names from FINDINGS, empty for a normal chest, None for a draw. Only the pixels under and at the rim
    of a finding differ from the same call with ``findings=()``. marker: None draws (70 %). Raises CarinaError for a
    size, view or finding that there is not.
    """
    if not _SMALLEST <= size <= _LARGEST:
        raise CarinaError(f"a phantom of {size} px cannot be drawn; choose a size from {_SMALLEST} to {_LARGEST}")
    if view is not None and view not in VIEWS:
        raise CarinaError(f"a phantom has no view {view!r}{nearest(view, VIEWS)}; choose from {', '.join(VIEWS)}")
    findings = drawn_findings(seed, patient, study) if findings is None else findings
    if isinstance(findings, str):
        raise CarinaError(f"the findings of a phantom are a collection of names, not one text; write ({findings!r},)")
    for name in findings:
        if name not in FINDINGS:
            raise CarinaError(
                f"a phantom has no finding {name!r}{nearest(name, FINDINGS)}; choose from {', '.join(FINDINGS)}"
            )

    key = (seed, patient, study, image)
    if view is None:
        draw = generator(*key, "view").random()
        view = "PA" if draw < 0.6 else "AP" if draw < 0.95 else "LATERAL"
    person = patient_of(seed, patient)
    multiple = -(-_DRAWN // size) if size < _DRAWN else 1
    pose = _Pose(key, person, view, size * multiple)
    chest = pose.project(person, view)

    lesions = Lesions(chest, (seed, patient), (seed, patient, study))
    # The heart first: it decides how much lung is left for the rest.
    for name in sorted(findings, key=lambda name: name != "Cardiomegaly"):
        lesions.plant(name)

    normal = pose.turn(MU_SOFT * chest.soft - (MU_SOFT - MU_LUNG) * chest.air + MU_BONE * chest.bone)
    normal += pose.turn((MU_SOFT - MU_LUNG) * chest.vessels * _share(chest.air) + _parenchyma(key, chest))
    change = pose.turn(lesions.change) if findings else None
    if view == "LATERAL":
        # A lateral picture is taken with a harder beam, which the thicker chest stops less of.
        normal *= 0.72
        change = None if change is None else change * 0.72
    if view == "AP":
        normal += _leads(key, chest.grid)
    lead, printed, markers = markers_of(key, size * multiple, view, pose.borders, marker)
    picture = _exposed(key, chest.grid, normal, change, lead, ap=view == "AP")
    picture = pose.collimated(picture)
    picture = np.maximum(picture, printed)

    def reduced(plane: np.ndarray) -> np.ndarray:
        return cv2.resize(plane, (size, size), interpolation=cv2.INTER_AREA) if multiple > 1 else plane

    lungs = reduced(pose.turn(lesions.lungs)) > 0.5
    masks = {name: reduced(pose.turn(mask)) >= 0.5 for name, mask in lesions.masks.items()}
    for name in set(masks) - {"Cardiomegaly"}:
        masks[name] &= lungs
    return Phantom(
        image=np.clip(reduced(picture), 0, 1).astype(np.float32, copy=False),
        lungs=lungs,
        lesions={name: masks[name] for name in FINDINGS if name in masks},
        markers=markers,
        view=view,
        sex=person.sex,
        age=person.age,
        labels={name: int(name in masks) for name in FINDINGS},
    )


class _Pose:
    """Where the patient stands before the detector: field of view, shift, turn, breath, collimation."""

    def __init__(self, key: tuple, patient: Patient, view: str, size: int):
        u = generator(*key, "pose").random(16).tolist()
        ap = view == "AP"
        self.inspiration = 0.95 + 0.05 * u[0] if not ap else 0.78 + 0.17 * u[0]
        self.shoulder = 0.2 + 0.8 * u[1] if not ap else -1 + 1.1 * u[1]
        tall = patient.height + 5.5
        if view == "LATERAL":
            span = max(2.9 * (patient.depth / 2 + patient.wall), tall + 6.0) * (1.0 + 0.15 * u[2])
            middle = 0.8 * (u[3] - 0.5) + 0.5
        else:
            span = 2 * patient.width * (1.1 + 0.24 * u[2] + 0.35 * u[2] ** 8)
            span = max(span, tall * self.inspiration + 2.5)
            middle = 2.2 * (u[3] - 0.5)
        spare = max(span - tall * self.inspiration, 3.0)
        top = -min(spare * (0.35 + 0.35 * u[4]), 8.0)
        self.grid = Grid(size, size / span, middle - span / 2, top)
        angle = (2 * u[5] - 1) * (2.0 if not ap else 4.5)
        self._matrix = cv2.getRotationMatrix2D((size / 2 - 0.5, size / 2 - 0.5), angle, 1.0)
        self.size = size
        # A shutter at times: dark borders, of different width on each side.
        self.borders = np.zeros(4)
        self.tilt = 0.0
        if u[6] < 0.4:
            self.borders = np.array([0.01 + 0.055 * w if c < 0.6 else 0.0 for c, w in zip(u[7:11], u[11:15])]) * size
            self.tilt = 1.6 * (u[15] - 0.5)

    def project(self, patient: Patient, view: str) -> Chest:
        if view == "LATERAL":
            return lateral(patient, self.grid, inspiration=self.inspiration)
        return frontal(patient, self.grid, inspiration=self.inspiration, shoulder=self.shoulder, ap=view == "AP")

    def turn(self, plane: np.ndarray) -> np.ndarray:
        """(S, S) turned about the center of the frame; what comes in from outside repeats the border."""
        plane = plane.astype(np.float32, copy=False)
        return cv2.warpAffine(
            plane, self._matrix, (self.size, self.size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )

    def collimated(self, picture: np.ndarray) -> np.ndarray:
        if not self.borders.any():
            return picture
        left, top, right, bottom = self.borders
        size = self.size
        corners = np.array([(left, top), (size - right, top), (size - right, size - bottom), (left, size - bottom)])
        matrix = cv2.getRotationMatrix2D((size / 2, size / 2), self.tilt, 1.0)
        corners = corners @ matrix[:, :2].T + matrix[:, 2]
        # A side that is not collimated reaches beyond the frame, however the shutter is turned.
        far = 0.1 * size
        for side, (axis, sign) in enumerate(((0, -1), (1, -1), (0, 1), (1, 1))):
            if self.borders[side] == 0:
                edge = [(0, 3), (0, 1), (1, 2), (2, 3)][side]
                corners[list(edge), axis] += sign * far
        open_ = np.zeros((size, size), np.uint8)
        cv2.fillPoly(open_, [np.round((corners - 0.5) * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
        return picture * (open_.astype(np.float32) / 255)


def _share(air: np.ndarray) -> np.ndarray:
    return np.clip(air / 3.0, 0, 1)


def _parenchyma(key: tuple, chest: Chest) -> np.ndarray:
    """Fine mottle of lung and soft tissue: smooth noise at three widths, stronger where there is lung."""
    rng = generator(*key[:2], "texture")
    total = np.zeros((12, 12), np.float32)
    for cells, weight in ((12, 0.03), (40, 0.022), (110, 0.016)):
        total = cv2.resize(total, (cells, cells), interpolation=cv2.INTER_CUBIC)
        total += np.float32(weight) * rng.standard_normal((cells, cells), dtype=np.float32)
    total = cv2.resize(total, (chest.grid.size, chest.grid.size), interpolation=cv2.INTER_CUBIC)
    return total * (0.35 + 0.65 * _share(chest.air)) * (chest.soft > 1)


def _leads(key: tuple, grid: Grid) -> np.ndarray:
    """Wires and electrodes on the patients of some portable pictures, as attenuation."""
    rng = generator(*key, "leads")
    if rng.random() > 0.4:
        return np.zeros((grid.size, grid.size), np.float32)
    size = grid.size / grid.scale
    wires, pads = [], []
    turn = np.linspace(0, 2 * np.pi, 13)
    for _ in range(1 + int(3 * rng.random())):
        end = np.array([grid.left + size * (0.2 + 0.6 * rng.random()), grid.top + size * (0.25 + 0.5 * rng.random())])
        start = np.array([end[0] + size * (rng.random() - 0.5), grid.top - 1.0])
        bow = size * 0.25 * (rng.random(2) - 0.5)
        t = np.linspace(0, 1, 24)[:, None]
        wires.append((1 - t) ** 2 * start + 2 * t * (1 - t) * ((start + end) / 2 + bow) + t * t * end)
        pads.append(end + 0.55 * np.stack([np.cos(turn), np.sin(turn)], 1))
    return 0.5 * grid.strokes([(np.stack(wires), 0.14, 1.0)]) + 0.45 * grid.fill(*pads)


def _exposed(
    key: tuple, grid: Grid, normal: np.ndarray, change: np.ndarray | None, lead: np.ndarray, *, ap: bool
) -> np.ndarray:
    """Attenuation to the picture: exposure, scatter, noise, logarithm, window.

    Scatter, window and low frequencies come from the normal chest, also when there is a lesion: a lesion changes its
    own pixels and no others.
    """
    u = generator(*key, "exposure").random(10).tolist()
    size = grid.size
    at = (np.arange(size, dtype=np.float32) / size - 0.5)[None, :]
    x, y = at - 0.25 * (u[0] - 0.5), at.T - 0.25 * (u[1] - 0.5)
    beam = (1 + (0.35 * (u[2] - 0.5)) * y + (0.25 * (u[3] - 0.5)) * x) / (1 + 0.35 * (x * x + y * y))

    primary = cv2.exp(-normal) * beam
    ratio = (0.35 + 0.5 * u[4]) if not ap else (0.5 + 0.7 * u[4])  # portable pictures have no or a coarse grid
    scatter = 0.028 * ratio + 0.22 * ratio * grid.blur(np.minimum(primary, 0.35), 3.2)
    seen_normal = primary + scatter
    primary = cv2.exp(-(normal + (0 if change is None else change) + 3.0 * lead)) * beam
    seen = primary + scatter * (1 - 0.75 * np.minimum(lead, 1))

    dose = (5e4 if not ap else 3e4) * (0.6 + 1.2 * u[5])
    noise = generator(*key, "noise").standard_normal((size, size), dtype=np.float32)
    # Photons per cm2 and not per pixel: the noise of a reduced picture is that of the picture reduced.
    spread = np.float32(np.sqrt(grid.scale / 6.4) / np.sqrt(dose))
    seen = seen * np.maximum(1 + noise * spread / np.sqrt(np.maximum(seen, 1e-3)), 0.3)

    base, value = -cv2.log(seen_normal), -cv2.log(seen)
    coarse = base[:: max(1, size // 64), :: max(1, size // 64)]
    body = coarse[coarse > 0.45]
    low, high = np.percentile(body if body.size > 100 else coarse, (3.0, 98.0)).tolist()
    # Multi-scale processing of digital systems, in its simplest form: low frequencies are compressed.
    flat = 0.25 * u[6]
    pivot = (low + high) / 2
    value = value - flat * (grid.blur(base, 2.5) - pivot)
    spread_out = (high - low) * (1 - 0.55 * flat)
    level = (value - pivot) / spread_out + 0.5 + 0.2 * (u[7] - 0.4)
    steep = 2.7 + 1.8 * u[8] if not ap else 1.9 + 1.8 * u[8]
    picture = 1 / (1 + cv2.exp((-steep * (level - 0.47)).astype(np.float32)))
    # Air lies below the window: nearly black where contrast is high, dark gray where it is low.
    floor = 1 / (1 + float(np.exp((0.75 + 0.35 * u[9]) * steep)))
    picture = (picture - 0.8 * floor) / (0.985 - 0.8 * floor)
    picture = cv2.GaussianBlur(picture, (3, 3), 0.35 + 0.3 * u[9])
    return np.clip(picture, 0, 1)
