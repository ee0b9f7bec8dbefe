"""The frontal projection of a synthetic chest: lungs, heart, great vessels, trunk, belly.

Lengths are in cm, as in `carina.imaging.phantom_anatomy`.
"""

from __future__ import annotations

import numpy as np

from carina.imaging.phantom_anatomy import Chest, Patient, tree, wall_at
from carina.imaging.phantom_bones import skeleton
from carina.imaging.phantom_canvas import Grid, dome, generator, smooth_line, soft_step, table_at


def frontal(patient: Patient, grid: Grid, *, inspiration: float, shoulder: float, ap: bool) -> Chest:
    """A frontal projection (PA, or AP with its larger heart, higher clavicles and shoulder blades over the lungs).

    inspiration: 0.8 to 1, the share of full inspiration. shoulder: -1 to 1, how far the arms are raised or lowered.
    """
    width, height = patient.width, patient.height * inspiration
    x, y = grid.x, grid.y
    side = (x > 0).astype(np.float32)  # 0 is the patient's right
    away = np.abs(x)

    # The pleural space: an ellipse in cross-section, closed below by the two domes of the diaphragm.
    wall = wall_at(y, width, height)
    part = away / np.maximum(wall, 1e-3)
    depth = patient.depth * (0.25 + 0.75 * wall / width)
    profile = np.sqrt(np.clip(1 - part * part * part, 0, 1))
    crest = 6.2 + 0.8 * side
    floor = height + patient.step * side
    falling = np.clip((away - crest) / (width - crest), 0, 1)
    floor = floor + (4.2 + 0.8 * side) * falling * falling + 1.8 * (np.clip(crest - away, 0, None) / crest) ** 2
    above = floor - y
    edge = soft_step(above + 0.1, 0.2)
    lung = edge * (0.62 + 0.38 * np.clip(above / 4, 0, 1))
    recess = (1 - edge) * 0.14 * np.clip(1 + above / 3.0, 0, 1)
    inner = part < 1
    cavity = depth * profile * (lung + recess) * inner
    lungs = ((above > 0) & inner).astype(np.float32)

    heart_line = _heart_line(patient, height, ap)
    heart = dome(grid, heart_line, 13.5)
    solid = _mediastinum(patient, grid, height)
    bone = skeleton(patient, grid, height, part, shoulder, ap)
    soft = _body(patient, grid, height, wall, shoulder, ap) + _abdomen(patient, grid, floor, height)
    vessels = _vessels(patient, grid, height, width) * (cavity > 0.5)
    view = "AP" if ap else "PA"
    return Chest(grid, patient, view, height, soft, cavity, solid, heart, vessels, bone, lungs, wall, heart_line)


def _heart_line(patient: Patient, height: float, ap: bool) -> np.ndarray:
    points = np.array(
        [
            (-2.2, 0.40), (-2.8, 0.52), (-3.7, 0.66), (-4.3, 0.80), (-4.0, 0.93), (-2.6, 1.03), (1.5, 1.10), (6.0, 1.12),
            (8.4, 1.04), (8.7, 0.96), (7.9, 0.85), (6.4, 0.73), (4.7, 0.62), (3.7, 0.54), (3.4, 0.46), (2.8, 0.38),
        ]
    )  # fmt: skip
    u = generator(*patient.key, "heart").random(4).tolist()
    points[:, 0] *= patient.heart * patient.width / 14.0 * (1.1 if ap else 1.0)
    points[7:13, 0] += (u[0] - 0.5) * 1.2
    points[2:6, 0] -= (u[1] - 0.5) * 0.9
    points[:, 1] = points[:, 1] * height + (u[2] - 0.5) * 0.8
    # The heart rests on the diaphragm: its underside lies below the domes, where nothing shows it.
    points[5:8, 1] = np.maximum(points[5:8, 1], height + np.array([2.0, patient.step + 2.6, patient.step + 2.2]))
    return smooth_line(points)


def _mediastinum(patient: Patient, grid: Grid, height: float) -> np.ndarray:
    """Depth of what lies between the lungs: great vessels, aortic arch, gullet, spine."""
    x, y = grid.x, grid.y
    arch = 0.28 * height
    neck = 4.4 * np.exp(-np.clip(y, 0, None) / 1.8)
    knob = patient.arch * 1.7 * np.exp(-(((y - arch) / 1.7) ** 2))
    descending = 0.5 * patient.arch * soft_step(y - arch, 3.0)
    left = 2.3 + neck + knob + descending
    right = 2.2 + neck + 0.55 * np.exp(-(((y - 0.45 * height) / 4.0) ** 2)) - 0.5 * soft_step(y - 0.75 * height, 3.0)
    inside = np.where(x < 0, right + x, left - x)
    # Beside the heart there is no edge of its own: lung thins out gradually toward the spine.
    edge = 0.5 + 2.6 * soft_step(y - 0.42 * height, 4.0)
    return 15.0 * soft_step(inside + 0.1 + 0.5 * (edge - 0.5), edge) + 1.5 * soft_step(inside + 1.2, 1.4)


def _body(patient: Patient, grid: Grid, height: float, wall: np.ndarray, shoulder: float, ap: bool) -> np.ndarray:
    """Tissue from skin to skin: neck, shoulders, trunk, arms, breasts; the air of the windpipe taken out."""
    x, y = grid.x, grid.y
    away = np.abs(x)
    skin = patient.width + patient.wall
    lift = 1.2 * shoulder
    outline = table_at(
        y + lift,
        [
            (-12, 5.2), (-7.5, 5.8), (-5.0, 8.2), (-3.6, 12.5), (-2.4, 17.0), (-1.0, 19.8), (1.0, 21.6), (4.0, 22.4),
            (8.0, 21.6), (12.0, skin + 1.6), (15.0, skin + 0.7), (20.0, skin + 0.2), (26.0, skin - 0.6), (40.0, skin),
        ],
    )  # fmt: skip
    thick = table_at(
        y, [(-10, 11.5), (-4, 12.5), (0, 14.5), (4, 18.0), (9, 20.5), (18, 21.5), (height + 3, 22.0), (40, 22.5)]
    )
    thick = thick + 1.1 * patient.wall
    u = away / outline
    square = u * u
    trunk = thick * np.sqrt(np.clip(1 - square * square * square, 0, 1))

    spread = 1.2 + 4.0 * (0.5 + 0.5 * shoulder) - (1.6 if ap else 0.0)
    arms = []
    for sign in (-1, 1):
        line = [(16.5, 1.5), (21.5, 1.0), (23.6, 6.0), (23.4 + spread, 18), (24.6 + 1.8 * spread, 34)]
        line += [(16.0 + 1.8 * spread, 34), (16.2 + spread, 18), (17.8, 9.0)]
        arms.append(np.array(line) * (sign, 1))
    limb = np.maximum(grid.blur(grid.fill(*arms), 0.9), 0)
    trunk = np.maximum(trunk, (8.5 + patient.wall) * np.sqrt(limb))

    amount, distance, size = patient.breast
    if amount:
        top = 0.7 * height
        dx, dy = (away - distance) / (6.0 * size), (y - top) / (5.6 * size)
        dome = 1 - dx * dx - np.maximum(dy, 0) ** 2
        trunk = trunk + amount * soft_step(dome, 0.6) * soft_step(dy + 2.0, 2.4) * (trunk > 2)
    else:
        dx, dy = (away - 8.0) / 7.5, (y - 0.42 * height) / 6.5
        trunk = trunk + 1.0 * np.sqrt(np.clip(1 - dx * dx - dy * dy, 0, 1))

    # The windpipe runs to the carina, a little to the patient's right, and divides there.
    carina = 0.36 * height
    lean = patient.bend * 0.3 - 0.5 * np.clip((y + 3) / (carina + 3), 0, 1)
    gap = 0.95**2 - (x - lean) ** 2
    tube = 2.7 * np.sqrt(np.clip(gap, 0, None)) * (0.55 + 0.45 * soft_step(2.5 - y, 6.0)) * soft_step(carina - y, 2.0)
    low = float(lean[np.argmin(np.abs(y[:, 0] - carina)), 0])
    bronchi = grid.strokes(
        [
            (np.array([[(low, carina - 0.4), (low - 1.7, carina + 1.6), (low - 3.0, carina + 3.6)]]), 1.15, 0.8),
            (np.array([[(low, carina - 0.4), (low + 2.2, carina + 1.6), (low + 4.3, carina + 2.7)]]), 0.95, 0.75),
        ]
    )
    return trunk - tube - 1.4 * grid.blur(bronchi, 0.3)


def _abdomen(patient: Patient, grid: Grid, floor: np.ndarray, height: float) -> np.ndarray:
    """What the belly adds, and the gas of the stomach under the left dome."""
    wide, high, gas = patient.bubble
    added = 1.5 * soft_step(grid.y - floor, 6.0) * soft_step(patient.width + patient.wall - np.abs(grid.x), 5.0)
    if gas:
        dx = (grid.x - 6.6) / wide
        dy = (grid.y - (height + patient.step + 1.1 + high)) / high
        added = added - gas * soft_step(1 - dx * dx - dy * dy, 0.7)
    return added


def _vessels(patient: Patient, grid: Grid, height: float, width: float) -> np.ndarray:
    """Depth of blood in the lungs' vessels, (S, S) cm."""
    paths, blobs = [], []
    turn = np.linspace(0, 2 * np.pi, 17)
    stretch = np.array([width / 14.0, height / 22.0])
    for side, sign, hilum in ((0, -1, (-3.1, 0.50)), (1, 1, (3.4, 0.46))):
        at = np.array([hilum[0] * stretch[0], hilum[1] * height])
        for line, diameter in tree(patient.key, side):
            paths.append((line * stretch * (sign, 1) + at, diameter, min(1.0, 0.1 + 1.5 * diameter)))
        blobs.append(at + np.array([0.5 * sign, 0.2]) + np.stack([1.0 * np.cos(turn), 1.9 * np.sin(turn)], 1))
    drawn = grid.blur(grid.strokes(paths), 0.07)
    return 1.8 * drawn + 2.4 * grid.blur(grid.fill(*blobs), 0.7)
