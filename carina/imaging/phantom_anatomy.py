"""The anatomy behind a synthetic chest radiograph: a patient, and what a projection of a chest consists of.

Lengths are centimeters in the plane of the chest. x is 0 at the midline and grows to the right of the picture (the
patient's left); y is 0 at the apices of the lungs and grows downward. Every map is (S, S) float32; thickness is in cm.
Proportions follow ordinary radiographic anatomy (e.g. Fraser and Pare, Diagnosis of Diseases of the Chest): the right
dome stands higher, the heart lies to the patient's left, ribs fall from back to front.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from carina.imaging.phantom_canvas import Grid, dome, generator

# Linear attenuation per cm near 70 keV (NIST XCOM, rounded): water-like tissue, inflated lung, and what bone adds.
MU_SOFT, MU_LUNG, MU_BONE = 0.19, 0.048, 0.31


@dataclass(frozen=True)
class Patient:
    """What stays the same in every picture of one patient. Lengths in cm."""

    key: tuple
    sex: str
    age: int
    width: float  # half the inner width of the chest
    height: float  # apex to right dome, at full inspiration
    wall: float  # chest wall, skin to pleura, at the side
    depth: float  # of the chest cavity, front to back
    step: float  # how much lower the left dome stands
    heart: float  # scale of the heart, 1 = a transverse diameter of about 45 % of the chest
    slope: float  # how steeply the ribs fall, 1 = usual
    bone: float  # mineral density, 1 = usual
    arch: float  # prominence of the aortic arch
    breast: tuple[float, float, float]  # thickness, distance from the midline, size; thickness 0 in men
    bend: float  # sideways curve of the spine
    bubble: tuple[float, float, float]  # gas in the stomach: width, height, thickness


@lru_cache(maxsize=64)
def patient_of(*key: object) -> Patient:
    """The patient that `key` stands for."""
    u = generator(*key, "body").random(24).tolist()
    sex = "F" if u[0] < 0.47 else "M"
    age = int(18 + 72 * (0.55 * u[1] + 0.45 * u[2]))
    small = 0.94 if sex == "F" else 1.0
    fat = u[3] ** 2
    return Patient(
        key=key,
        sex=sex,
        age=age,
        width=small * (13.2 + 1.8 * u[4]),
        height=small * (20.5 + 4.0 * u[5]),
        wall=2.5 + 3.4 * fat,
        depth=small * (14.0 + 3.5 * u[6]),
        step=0.5 + 1.4 * u[7],
        heart=0.9 + 0.16 * u[8] + 0.05 * (age > 60),
        slope=0.8 + 0.45 * u[9],
        bone=(1.08 - 0.005 * max(age - 45, 0)) * (0.85 + 0.3 * u[10]),
        arch=0.6 + 0.5 * u[11] + 0.012 * max(age - 50, 0),
        breast=((1.0 + 4.0 * u[12] ** 1.5) if sex == "F" else 0.0, 7.5 + 2.0 * u[13], 0.85 + 0.4 * u[14]),
        bend=1.2 * (u[15] - 0.5),
        bubble=(1.6 + 2.6 * u[16], 1.0 + 1.4 * u[17], 5.0 * u[18] if u[19] < 0.6 else 0.0),
    )


@dataclass
class Chest:
    """One projection of a patient: what `phantom` sums and what lesions replace.

    All maps are (S, S): soft: tissue without bone, lungs counted as tissue; cavity: the pleural space with lungs and
    what lies between them; solid, heart: mediastinum and heart in it; vessels: blood in the lungs; bone; field: 1 where
    there is lung above the diaphragm, else 0. wall: x of the inner chest wall, (S, 1). height: y of the right dome.
    heart_line: outline of the heart, (N, 2).
    """

    grid: Grid
    patient: Patient
    view: str
    height: float
    soft: np.ndarray
    cavity: np.ndarray
    solid: np.ndarray
    heart: np.ndarray
    vessels: np.ndarray
    bone: np.ndarray
    field: np.ndarray
    wall: np.ndarray
    heart_line: np.ndarray

    @cached_property
    def air(self) -> np.ndarray:
        """Depth of inflated lung, (S, S) cm."""
        return self.air_beside(self.heart)

    def air_beside(self, heart: np.ndarray) -> np.ndarray:
        """Depth of inflated lung, (S, S) cm, were `heart` (S, S) the depth of the heart."""
        return np.maximum(self.cavity - self.solid - heart, 0)

    def lungs(self, heart_line: np.ndarray | None = None) -> np.ndarray:
        """(S, S) float32, 1 in the lung fields beside heart and mediastinum."""
        outside = 1 - self.grid.fill(self.heart_line if heart_line is None else heart_line)
        # Seen from the side the mediastinum lies between two lungs and hides neither.
        return self.field * outside * (1 if self.view == "LATERAL" else self.solid < 3.0)

    def enlarged(self, factor: float) -> tuple[np.ndarray, np.ndarray]:
        """Outline (N, 2) and depth (S, S) of the heart when its transverse diameter grows by `factor`."""
        line = self.heart_line.copy()
        top, bottom = line[:, 1].min(), line[:, 1].max()
        share = np.clip((line[:, 1] - top) / (0.45 * (bottom - top)), 0, 1)
        share = share * share * (3 - 2 * share)
        pivot = 0.0 if self.view != "LATERAL" else line[:, 0].mean()
        line[:, 0] = pivot + (line[:, 0] - pivot) * (1 + (factor - 1) * share)
        return line, dome(self.grid, line, 13.5 * factor**0.5)


def wall_at(y: np.ndarray, width: float, height: float) -> np.ndarray:
    """Half the inner width of the chest at height `y`, 0 above the apices."""
    t = np.clip(y / (0.8 * height), 0, 1)
    rounded = np.sqrt(1 - (1 - t) ** 2.8)
    return (width * rounded * (1 - 0.035 * np.clip(y / height - 0.85, 0, 1))).astype(np.float32)


@lru_cache(maxsize=64)
def tree(key: tuple, side: int) -> list[tuple[np.ndarray, float]]:
    """Branches (N, 4, 2) of one lung's vessels, by generation, with their diameter in cm; the hilum is the origin."""
    rng = generator(*key, "vessels", side)
    angle = np.radians(np.linspace(-84, 78, 10) + rng.uniform(-12, 12, 10))
    start = np.stack([0.4 * rng.standard_normal(10), 1.9 * np.sin(angle)], 1)
    length, diameter = 2.9, 0.5
    levels = []
    for _ in range(6):
        count = len(angle)
        run = length * rng.uniform(0.7, 1.25, count)
        turn = rng.uniform(-0.55, 0.55, count)
        t = np.linspace(0, 1, 4)[None, :]
        heading = angle[:, None] + turn[:, None] * t
        step = np.stack([np.cos(heading), np.sin(heading)], -1) * (run[:, None, None] / 3)
        line = start[:, None, :] + np.concatenate([np.zeros((count, 1, 2)), np.cumsum(step[:, 1:], 1)], 1)
        levels.append((line, diameter))
        fork = rng.uniform(0.22, 0.55, (count, 2)) * (-1, 1)
        angle = (heading[:, -1:] + fork).ravel()
        start = np.repeat(line[:, -1], 2, axis=0)
        length, diameter = length * 0.82, diameter * 0.76
    return levels
