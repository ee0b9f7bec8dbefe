"""The lateral projection of a synthetic chest; simpler than the frontal one, which most pictures are.

Lengths are in cm: x is 0 in the middle of the chest, negative toward the breastbone; y as in the frontal projection.
"""

from __future__ import annotations

import cv2
import numpy as np

from carina.imaging.phantom_anatomy import Chest, Patient, tree
from carina.imaging.phantom_canvas import Grid, dome, fourth, smooth_line, soft_step, table_at


def lateral(patient: Patient, grid: Grid, *, inspiration: float) -> Chest:
    """A left lateral projection: the breastbone at the picture's left, the spine at its right."""
    x, y = grid.x, grid.y
    height = patient.height * inspiration
    deep = patient.depth / 2 + 2.2
    unit = np.array([deep / 9.5, height / 22.0])
    outline = smooth_line(
        np.array(
            [
                (1.5, -0.3), (-2.8, 1.8), (-5.8, 6.0), (-7.6, 11.0), (-8.4, 16.5), (-8.6, 20.5), (-5.0, 20.6), (-1.0, 21.2),
                (3.0, 23.2), (6.6, 27.6), (8.6, 25.5), (9.2, 19.0), (9.3, 12.0), (8.2, 6.0), (5.2, 1.0),
            ]
        ) * unit
    )  # fmt: skip
    inside = grid.fill(outline)
    distance = cv2.distanceTransform((inside > 0.5).astype(np.uint8), cv2.DIST_L2, 3) / np.float32(grid.scale)
    out = np.clip(1 - distance / 4.5, 0, 1)
    cavity = 2 * 0.72 * patient.width * np.sqrt(np.maximum(1 - out * out, 0.05)) * inside

    front = table_at(y, [(-10, -4.5), (-3, -4.0), (1, -6.5), (6, -9.0), (14, -11.2), (24, -11.6), (40, -11.4)]) * float(
        unit[0]
    )
    back = table_at(y, [(-10, 5.5), (-3, 6.5), (1, 9.5), (6, 12.0), (14, 12.6), (24, 11.8), (40, 11.2)]) * float(
        unit[0]
    )
    front, back = front - 0.6 * patient.wall, back + 0.6 * patient.wall
    middle, half = (front + back) / 2, (back - front) / 2
    u = (x - middle) / half
    square = u * u
    thick = table_at(y, [(-8, 14), (-1, 30), (4, 33), (9, 31), (24, 30), (40, 31)]) + patient.wall
    soft = thick * np.sqrt(np.clip(1 - square * square, 0, 1))
    amount, _, size = patient.breast
    if amount:
        dx, dy = (x - front - 1.2) / (2.6 * size), (y - 0.72 * height) / (4.6 * size)
        soft = np.maximum(soft, 6 * np.sqrt(np.clip(1 - dx * dx - dy * dy, 0, 1)) * amount**0.5)
    tube = 0.9**2 - (x - (1.0 + 0.12 * y)) ** 2
    soft = soft - 2.4 * np.sqrt(np.clip(tube, 0, None)) * soft_step(0.42 * height - y, 2.5)

    heart_line = smooth_line(
        np.array(
            [(0.6, 9.0), (-3.4, 10.6), (-6.0, 14.0), (-7.3, 18.5), (-6.8, 21.6), (-2.0, 22.4), (2.4, 21.2), (4.0, 17.0),
             (3.4, 12.5)]
        ) * unit * (patient.heart, 1)
    )  # fmt: skip
    heart = dome(grid, heart_line, 10.5)
    hilum = np.exp(-(((x - 1.6) / 1.8) ** 2) - ((y - 0.42 * height) / 2.2) ** 2)

    pitch, turn = 0.104 * height, np.linspace(0, 2 * np.pi, 13)
    curve = (6.4 + 1.5 * np.sin(np.clip(y, -6, 30) / 8.5)) * float(unit[0])
    disc = np.clip(np.cos(2 * np.pi * (y + 1.0) / pitch) * 3 - 1.9, 0, 1)
    bone = 2.2 * np.sqrt(np.clip(1 - fourth((x - curve) / 1.6), 0, 1)) * (1 - 0.6 * disc)
    ribs = []
    for number in range(1, 12):
        for shift in (-0.45, 0.5):
            start = np.array(
                [float(np.interp(number, [1, 6, 11], [6.0, 8.6, 8.4])), -1.2 + number * 0.1 * height + shift]
            )
            drop = patient.slope * np.interp(number, [1, 4, 8, 11], [3.5, 7.5, 9.5, 8.0])
            t = np.linspace(0, np.interp(number, [1, 7, 11], [0.85, 0.8, 0.45]), 12)
            px = start[0] - 15.0 * t**1.15 * np.interp(number, [1, 4, 11], [0.6, 0.95, 1.0])
            ribs.append(np.stack([px * float(unit[0]), start[1] + drop * t**0.8], 1))
    bone += 0.42 * grid.blur(grid.strokes([(np.stack(ribs), 0.9, 0.5)]), 0.08)
    for edge in (-0.42, 0.42):
        bone += 0.25 * grid.blur(grid.strokes([(np.stack(ribs) + np.array([0, edge]), 0.16, 0.9)]), 0.06)
    sternum = np.stack([(front[:, 0] + 1.6)[:: max(1, grid.size // 64)], y[:: max(1, grid.size // 64), 0]], 1)
    sternum = sternum[(sternum[:, 1] > 1) & (sternum[:, 1] < 0.8 * height)]
    bone += 0.8 * grid.blur(grid.strokes([(sternum[None], 0.9, 0.9)]), 0.12)
    blade = smooth_line(np.array([(4.0, 1.0), (7.5, 5.5), (10.3, 11.5), (10.9, 10.6), (9.4, 4.0)]) * unit)
    bone += 0.35 * grid.blur(grid.fill(blade), 0.15)
    head = np.stack([2.0 + 2.5 * np.cos(turn), -0.5 + 2.5 * np.sin(turn)], 1)
    bone += 0.7 * grid.blur(grid.fill(head), 0.2)

    paths = []
    for side, sign in ((0, -1), (1, 1)):
        for line, diameter in tree(patient.key, side):
            at = np.array([1.6, 0.42 * height])
            paths.append((line * (0.75 * sign, 0.95) * unit + at, diameter, min(1.0, 0.1 + diameter / 0.9)))
    vessels = 1.1 * grid.blur(grid.strokes(paths), 0.07) * (cavity > 0.5)
    inside = (inside > 0.5).astype(np.float32)
    return Chest(
        grid, patient, "LATERAL", height, soft, cavity, 3.0 * hilum, heart, vessels,
        bone * np.float32(patient.bone), inside, np.broadcast_to(np.float32(deep), y.shape), heart_line,
    )  # fmt: skip
