"""The bones of a synthetic frontal chest radiograph. Lengths are in cm."""

from __future__ import annotations

import numpy as np

from carina.imaging.phantom_anatomy import Patient, wall_at
from carina.imaging.phantom_canvas import Grid, fourth, smooth_line

_NUMBERS = np.arange(1, 12)


def _ribs(patient: Patient, height: float) -> tuple[np.ndarray, np.ndarray]:
    """Center line and upper edge of the ribs on the patient's left: (2, 11, 15, 2), rear halves and front halves.

    A rib is a ring that falls from back to front; seen from the front its rear half is an arch, convex upward, and its
    front half runs steeply down toward the middle.
    """
    back = np.interp(_NUMBERS, [1, 2, 3, 4, 5, 11], [-2.3, -0.9, 0.9, 2.9, 5.0, 19.6]) * (height / 22)
    drop = patient.slope * np.interp(_NUMBERS, [1, 2, 4, 7, 11], [3.4, 5.4, 8.2, 10.2, 10.6])
    side = wall_at(back + 0.5 * drop + 0.2, patient.width, height) + 0.25
    end = np.pi * np.interp(_NUMBERS, [1, 3, 6, 8, 11], [0.86, 0.82, 0.78, 0.7, 0.56])
    thick = np.interp(_NUMBERS, [1, 2, 11], [1.15, 1.0, 0.9])
    back, drop, side, thick = (values[None, :, None] for values in (back, drop, side, thick))
    start = np.array([0.015, 0.5])[:, None, None] * np.pi
    stop = np.stack([np.full(11, 0.52 * np.pi), end])[:, :, None]
    t = start + (stop - start) * np.linspace(0, 1, 15)
    x = 1.4 * np.exp(-t / 0.25) + side * np.sin(t) ** 0.92
    y = back + drop * (1 - np.cos(t)) / 2 - 0.5 * np.sin(2 * t).clip(0)
    dx, dy = np.gradient(x, axis=-1), np.gradient(y, axis=-1)
    half = (0.32 + 0.25 * np.abs(np.cos(t))) * thick / np.hypot(dx, dy)
    center = np.stack([x, y], -1)
    return center, center + np.stack([-dy * half, dx * half], -1)


def skeleton(patient: Patient, grid: Grid, height: float, part: np.ndarray, shoulder: float, ap: bool) -> np.ndarray:
    """Depth of bone (S, S): ribs, spine, clavicles, shoulder blades, upper arms.

    part: distance from the midline over the distance of the chest wall, (S, S).
    """
    bone = _rib_cage(patient, grid, height, part)
    column, outlines = _spine(patient, grid, height)
    bone += _girdle(grid, shoulder, ap)
    bone += 0.35 * outlines
    # One blur for all: no edge of a bone is sharper than the focal spot and the patient's breath allow.
    return np.float32(patient.bone) * (grid.blur(bone, 0.075) + column)


def _rib_cage(patient: Patient, grid: Grid, height: float, part: np.ndarray) -> np.ndarray:
    center, upper = _ribs(patient, height)
    both = np.array([[[[1.0, 1.0]]], [[[-1.0, 1.0]]]])
    maps = []
    for half in (0, 1):  # rear, front
        middle = (center[half] * both).reshape(22, 15, 2)
        above = (upper[half] * both).reshape(22, 15, 2)
        below = 2 * middle - above
        outlines = np.concatenate([above, below[:, ::-1]], axis=1)
        # The first rib lies flat and the second nearly so: the beam crosses little of them.
        flat = np.isin(np.arange(22) % 11, (0, 1))
        filled = np.maximum(grid.fill(*outlines[~flat]), 0.5 * grid.fill(*outlines[flat]))
        first = np.arange(22) % 11 == 0
        inset = np.concatenate([0.9 * above + 0.1 * middle, 0.9 * below + 0.1 * middle])
        edges = grid.strokes([(inset[~np.tile(first, 2)], 0.16, 0.9)])
        maps.append((filled, edges))
    (rear, rear_edges), (front, front_edges) = maps
    # At the side the beam runs along the rib.
    tangential = 0.52 + 0.3 * fourth(np.minimum(part * part, 1))
    return rear * tangential + 0.27 * front + 0.4 * rear_edges + 0.27 * front_edges


def _spine(patient: Patient, grid: Grid, height: float) -> tuple[np.ndarray, np.ndarray]:
    """Bodies and discs (S, S), and the outlines of two pedicles and a spinous process at each level (S, S)."""
    x, y = grid.x, grid.y
    column = (x - patient.bend * np.sin((y - 2) / 9.0)) / 2.0
    pitch = 0.104 * height
    disc = np.clip(np.cos(2 * np.pi * (y + 1.0) / pitch) * 3 - 2.1, 0, 1)
    bodies = 0.9 * np.sqrt(np.clip(1 - fourth(column), 0, 1)) * (1 - 0.45 * disc)
    turn = np.linspace(0, 2 * np.pi, 13)
    circle = np.stack([np.cos(turn), np.sin(turn)], 1)
    levels = np.arange(-1.0 - 3.5 * pitch, height + 12, pitch)
    shift = patient.bend * np.sin((levels - 2) / 9.0)
    ovals = [
        circle * radii + np.stack([shift + dx, levels + dy], 1)[:, None]
        for dx, dy, radii in ((-1.25, -0.25, (0.34, 0.52)), (1.25, -0.25, (0.34, 0.52)), (0.0, 0.9, (0.25, 0.6)))
    ]
    return bodies, grid.strokes([(np.concatenate(ovals), 0.22, 0.8)])


def _girdle(grid: Grid, shoulder: float, ap: bool) -> np.ndarray:
    """Clavicles, shoulder blades and upper arms; AP pictures show the blades over the lungs and flatter clavicles."""
    turn = np.linspace(0, 2 * np.pi, 13)
    lift = 1.5 * shoulder + (0.0 if not ap else 1.6)
    tilt = 0.35 if ap else 1.0
    clavicles, blades, heads, shafts, rims, borders = [], [], [], [], [], []
    out = -1.2 if ap else 1.4 + 0.8 * shoulder
    for sign in (-1, 1):
        path = smooth_line(
            np.array([(1.7, 2.9), (4.2, 2.5), (7.5, 1.1), (10.5, -0.4), (14.0, -0.9), (17.0, -0.3)])
            * (1, tilt) + (0, (1 - tilt) * 0.9) - lift * np.array([(0, 0.15), (0, 0.2), (0, 0.5), (0, 0.8), (0, 1), (0, 1)]),
            closed=False,
        )  # fmt: skip
        wide = np.interp(np.linspace(0, 1, len(path)), [0, 0.12, 0.4, 0.8, 1], [0.95, 0.75, 0.55, 0.55, 0.65])
        tangent = np.gradient(path, axis=0)
        tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
        half = np.stack([-tangent[:, 1], tangent[:, 0]], 1) * wide[:, None]
        mirror = (sign, 1)
        clavicles.append(np.concatenate([path + half, (path - half)[::-1]]) * mirror)
        rims += [(path + 0.88 * half) * mirror, (path - 0.88 * half) * mirror]
        blade = np.array([(16.8, 0.8), (17.4, 3.4), (15.2, 8.0), (13.2, 13.4), (12.2, 13.2), (11.6, 8.0), (11.8, 1.5)])
        blade = smooth_line((blade + np.array([out, -0.6 * lift])) * mirror)
        blades.append(blade)
        borders.append(blade[8:28])
        spot = np.array([17.9 + 0.3 * out, 1.6 - 0.8 * lift])
        heads.append((spot + 2.2 * np.stack([np.cos(turn), np.sin(turn)], 1)) * mirror)
        far = np.array([22.0 + 6.5 * (0.5 + 0.5 * shoulder), 38.0])
        across = np.array([1.05, 0.0])
        shafts.append(np.array([spot - across * 1.5, spot + across * 1.6, far + across, far - across]) * mirror)
    bone = 0.6 * grid.fill(*clavicles) + 0.6 * grid.strokes([(np.stack(rims), 0.2, 0.8)])
    bone += 0.45 * grid.fill(*blades) + 0.8 * grid.strokes([(np.stack(borders), 0.35, 0.9)])
    ball = grid.fill(*heads)
    bone += 1.5 * ball + 1.4 * np.clip(grid.fill(*shafts) - 0.4 * ball, 0, 1)
    return bone
