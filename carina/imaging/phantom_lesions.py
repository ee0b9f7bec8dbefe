"""Findings of a synthetic radiograph: what each changes in the attenuation, and where."""

from __future__ import annotations

import cv2
import numpy as np

from carina.imaging.phantom_anatomy import MU_LUNG, MU_SOFT, Chest
from carina.imaging.phantom_canvas import generator

FINDINGS = ("Opacity", "Nodule", "Effusion", "Cardiomegaly", "Pneumothorax")
_GAIN = np.float32(MU_SOFT - MU_LUNG)  # what a cm of tissue in place of a cm of lung adds


class Lesions:
    """Plants findings in a chest one after another.

    chest: the normal anatomy. place: key of what stays between studies (where, which side). course: key of what
    changes (how much). After `plant`, ``change`` (S, S) is what to add to the attenuation (0 where nothing is
    changed) and ``masks[name]`` (S, S) float32 is 1 where the finding lies. The changes of several findings add up.
    """

    def __init__(self, chest: Chest, place: tuple, course: tuple):
        self.chest, self.place, self.course = chest, place, course
        self.air = chest.air
        self.heart_line = chest.heart_line
        self.lungs = chest.lungs()
        self.change = np.zeros_like(self.air)
        self.masks: dict[str, np.ndarray] = {}

    def plant(self, name: str) -> None:
        fixed, varied = generator(*self.place, name), generator(*self.course, name)
        self.masks[name] = getattr(self, f"_{name.lower()}")(fixed, varied)

    def _site(self, rng: np.random.Generator, margin: float) -> tuple[float, float]:
        """A place (x, y) in the lung fields, where there is one at least `margin` cm from their edge."""
        grid = self.chest.grid
        distance = cv2.distanceTransform((self.lungs > 0.5).astype(np.uint8), cv2.DIST_L2, 3)
        # Chosen in coordinates of the lung, not by counting pixels, so that the place hardly depends on the resolution.
        side, down, across = rng.integers(0, 2), rng.random(), rng.random()
        columns = (grid.x[0] > 0) == bool(side) if self.chest.view != "LATERAL" else np.full(grid.size, True)
        allowed = (distance >= min(margin * grid.scale, 0.8 * distance[:, columns].max())) & columns[None, :]
        rows = np.flatnonzero(allowed.any(1))
        row = rows[min(int(down * len(rows)), len(rows) - 1)]
        found = np.flatnonzero(allowed[row])
        column = found[min(int(across * len(found)), len(found) - 1)]
        return float(grid.x[0, column]), float(grid.y[row, 0])

    def _opacity(self, fixed: np.random.Generator, varied: np.random.Generator) -> np.ndarray:
        """Patchy consolidation: a soft blob of 3 to 10 cm with a ragged edge, 2 to 8 cm deep."""
        grid = self.chest.grid
        long, short = (r := 1.8 + 3.4 * fixed.random()), r * (0.6 + 0.35 * fixed.random())
        x0, y0 = self._site(fixed, 0.7 * short)
        turn = np.pi * fixed.random()
        grow = 0.85 + 0.3 * varied.random()
        dx, dy = grid.x - x0, grid.y - y0
        u = (dx * np.cos(turn) + dy * np.sin(turn)) / (long * grow)
        v = (dy * np.cos(turn) - dx * np.sin(turn)) / (short * grow)
        cells = fixed.standard_normal((2, 24, 24)).astype(np.float32)
        ragged = np.zeros_like(self.air)
        for noise, step, weight in zip(cells, (0.9, 0.4), (0.3, 0.12)):
            # The noise is laid out around the lesion's center, in cm: the same pattern at any size of the picture.
            at_x, at_y = dx / step + 12, dy / step + 12
            maps = np.broadcast_to(at_x, self.air.shape), np.broadcast_to(at_y, self.air.shape)
            maps = (np.ascontiguousarray(m, np.float32) for m in maps)
            ragged += weight * cv2.remap(noise, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        body = np.clip(1.05 - u * u - v * v + ragged * np.exp(-0.4 * (u * u + v * v)), 0, 1)
        body = grid.blur(np.where(u * u + v * v < 1.6, body, 0).astype(np.float32), 0.2) * (self.lungs > 0.5)
        depth = 2.0 + 6.0 * (0.5 * fixed.random() + 0.5 * varied.random())
        added = np.minimum(depth * body * (0.85 + 0.3 * np.clip(ragged + 0.5, 0, 1)), 0.9 * self.air)
        self.change += _GAIN * added.astype(np.float32)
        return (body > 0.15).astype(np.float32)

    def _nodule(self, fixed: np.random.Generator, varied: np.random.Generator) -> np.ndarray:
        """One to three round nodules of 0.8 to 3 cm; some hold calcium."""
        grid = self.chest.grid
        mask = np.zeros_like(self.air)
        count = 1 + int(fixed.random() < 0.2) + int(fixed.random() < 0.1)
        calcified = 1.9 if fixed.random() < 0.25 else 1.25
        strength = calcified * (0.75 + 0.6 * varied.random())
        for _ in range(count):
            radius = (0.45 + 1.05 * fixed.random() ** 1.3) * (0.9 + 0.2 * varied.random())
            x0, y0 = self._site(fixed, radius + 0.3)
            waves = 0.07 * fixed.standard_normal(3)
            dx, dy = grid.x - x0, grid.y - y0
            turn = np.arctan2(dy, dx)
            lumpy = 1 + sum(w * np.cos((k + 2) * turn + k) for k, w in enumerate(waves))
            inside = np.clip(1 - (dx * dx + dy * dy) / (radius * lumpy) ** 2, 0, None) * (self.lungs > 0.5)
            self.change += _GAIN * strength * 2 * radius * np.sqrt(inside).astype(np.float32)
            mask = np.maximum(mask, (inside > 0).astype(np.float32))
        return mask

    def _effusion(self, fixed: np.random.Generator, varied: np.random.Generator) -> np.ndarray:
        """Fluid that fills the costophrenic angle and climbs along the chest wall (the meniscus)."""
        chest, grid = self.chest, self.chest.grid
        which, both = fixed.random(), fixed.random() < 0.25
        amount = 1.5 + 8.0 * (0.5 * fixed.random() + 0.5 * varied.random()) ** 1.4
        fill = np.zeros_like(self.air)
        if chest.view == "LATERAL":
            back = float(chest.wall[0, 0])
            level = chest.height + 3.2 - amount - (1.5 + 0.2 * amount) * np.clip(grid.x / back, 0, 1) ** 3
            fill = np.clip((grid.y - level) / 0.9, 0, 1) * (grid.x > -0.2 * back)
        else:
            for side in (-1, 1):
                if side != (-1 if which < 0.5 else 1) and not both:
                    continue
                size = amount if side == (-1 if which < 0.5 else 1) else 0.6 * amount
                toward = np.clip(side * grid.x / np.maximum(chest.wall, 1), 0, 1)
                angle = chest.height + chest.patient.step * (side > 0) + 4.0
                level = angle - size - (1.0 + 0.45 * size) * toward**5
                fill += np.clip((grid.y - level) / 0.9, 0, 1) * (side * grid.x > 1.5)
        depth = self.air * fill * (0.75 + 0.2 * varied.random())
        depth[depth < 0.05] = 0
        self.change += _GAIN * depth.astype(np.float32)
        return ((fill > 0.2) & (self.lungs > 0.5) & (depth > 0.3)).astype(np.float32)

    def _cardiomegaly(self, fixed: np.random.Generator, varied: np.random.Generator) -> np.ndarray:
        """A heart 12 to 45 % wider than the patient's own, mostly toward the left."""
        factor = 1.12 + 0.27 * fixed.random() + 0.06 * varied.random()
        line, depth = self.chest.enlarged(factor)
        air = self.chest.air_beside(np.maximum(depth, self.chest.heart))
        self.change += _GAIN * (self.air - air)
        # What comes after is planted in the smaller lungs.
        self.air, self.heart_line, self.lungs = air, line, self.chest.lungs(line)
        inside = (self.chest.grid.fill(line) > 0.5) & (self.chest.cavity > 0.25 * self.chest.patient.depth)
        return inside.astype(np.float32)

    def _pneumothorax(self, fixed: np.random.Generator, varied: np.random.Generator) -> np.ndarray:
        """Air outside the lung at apex and side: no vessels there, and the thin line of the pleura at its inner edge."""
        chest, grid = self.chest, self.chest.grid
        side = -1 if fixed.random() < 0.5 else 1
        wide = 1.0 + 3.0 * (0.6 * fixed.random() + 0.4 * varied.random()) ** 1.3
        if chest.view == "LATERAL":
            half = chest.grid.y - (1.5 + 1.6 * wide) - 0.05 * grid.x**2
            outside = np.clip(-half / 0.15, 0, 1) * (chest.field > 0.5)
            line = np.exp(-((half / 0.12) ** 2)) * (chest.field > 0.5)
        else:
            fade = np.clip(1.15 - grid.y / (0.85 * chest.height), 0, 1) ** 0.7
            # The lung's own edge: the inner wall, drawn in and lowered at the apex.
            lowered = np.interp(grid.y[:, 0] - 1.5 * wide, grid.y[:, 0], chest.wall[:, 0], left=0.0)[:, None]
            inner = np.minimum(chest.wall - wide * fade, lowered + 0.35 * wide)
            inner = np.where(grid.y < 1.5 * wide, lowered, inner)
            gap = side * grid.x - inner
            open_ = (side * grid.x > 0) & (fade > 0.02) & (self.lungs > 0.5)
            outside = np.clip(gap / 0.15, 0, 1) * open_
            line = np.exp(-((gap / 0.11) ** 2)) * open_ * (fade > 0.12)
            line[line < 0.02] = 0
        away = MU_LUNG * self.air + MU_SOFT * chest.vessels
        self.change -= (outside * away).astype(np.float32)
        self.change += (0.11 * line).astype(np.float32)
        return np.maximum(outside > 0.5, line > 0.5).astype(np.float32)
