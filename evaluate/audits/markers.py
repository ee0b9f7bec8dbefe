"""Side markers as a shortcut: scores with the markers as they are, painted over, and exchanged between images.

An exchange gives every image the markers of another one: of its own class, or of the other. Both disturb a picture alike,
so what separates them is the tie between marker and class alone (the swapped arm of Kim et al. 2022, made from the
pictures themselves).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from carina.data.store import Selection, unit
from carina.draws import hash64
from carina.evaluate.audits.common import NEAR, Audited, Change, entry, told, usable
from carina.imaging.markers import Marker, find_markers, inpaint
from carina.metrics.intervals import difference, interval
from carina.progress import Progress

LETTERS = ("L", "R", "text")


@dataclass(frozen=True)
class Patch:
    """A window of a picture, what is there without the marker, and the marker alone; (h, w) float32."""

    window: tuple[slice, slice]
    bare: np.ndarray
    marker: np.ndarray


class Marks:
    """The markers of all rows, found at the largest scale, and pictures with others in their place."""

    def __init__(self, selection: Selection, quiet: bool):
        self.selection = selection
        self.scale = max(set.intersection(*(set(store.scales) for store in selection.stores)))
        self.found: list[list[Marker]] = []
        self.kept: dict[tuple[int, int], list[Patch]] = {}
        with Progress("markers", len(selection), unit="images", quiet=quiet) as progress:
            for row in range(len(selection)):
                image, lungs = unit(selection.images([row], self.scale))[0], selection.masks([row], self.scale)[0]
                self.found.append(find_markers(image, lungs))
                progress.advance()

    def at(self, row: int, scale: int) -> list[Marker]:
        """Those of a row in pixels of another scale."""
        factor = scale / self.scale
        return [
            Marker(
                one.label,
                int(np.floor(one.x0 * factor)),
                int(np.floor(one.y0 * factor)),
                int(np.ceil(one.x1 * factor)),
                int(np.ceil(one.y1 * factor)),
                one.confidence,
            )
            for one in self.found[row]
        ]

    def patches(self, row: int, scale: int) -> list[Patch]:
        """What lies at the places of a row's markers, painted over and in itself."""
        if (row, scale) not in self.kept:
            image, lungs = unit(self.selection.images([row], scale))[0], self.selection.masks([row], scale)[0]
            own = self.at(row, scale)
            bare = inpaint(image, own, lungs) if own else image
            self.kept[row, scale] = [
                Patch(window, bare[window], np.maximum(image[window] - bare[window], 0))
                for window in ((slice(m.y0, m.y1), slice(m.x0, m.x1)) for m in own)
            ]
        return self.kept[row, scale]

    def picture(self, image: np.ndarray, row: int, giver: int | None) -> np.ndarray:
        """A row's picture (S, S) with its markers painted over and, where there is a giver, those of that row at their
        places there; lungs that lie in the way stay as they are."""
        scale, result = image.shape[-1], image.copy()
        for patch in self.patches(row, scale):
            result[patch.window] = patch.bare
        if giver is not None:
            others = self.patches(giver, scale)
            lungs = self.selection.masks([row], scale)[0] if others else None
            for patch in others:
                result[patch.window] += patch.marker * ~lungs[patch.window]
        return np.clip(result, 0, 1)

    def columns(self) -> np.ndarray:
        """(N, 9): how many of each letter there are, and the mean place of each in fractions of the side."""
        result = np.zeros((len(self.found), 3 * len(LETTERS)))
        for row, marks in enumerate(self.found):
            for number, letter in enumerate(LETTERS):
                own = [((m.x0 + m.x1) / 2, (m.y0 + m.y1) / 2) for m in marks if m.label == letter]
                if own:
                    result[row, 3 * number : 3 * number + 3] = len(own), *(np.mean(own, axis=0) / self.scale - 0.5)
        return result

    def change(self, givers: np.ndarray | None) -> Change:
        """Markers painted over, or replaced by those of the rows that `givers` (N,) names."""

        def change(images: torch.Tensor, lungs: torch.Tensor | None, rows: slice) -> tuple:
            own = range(rows.start, rows.stop)
            pictures = [
                self.picture(image, row, None if givers is None else int(givers[row]))
                for image, row in zip(images[:, 0].cpu().numpy(), own)
            ]
            return torch.from_numpy(np.stack(pictures)).unsqueeze(1).to(images.device), lungs

        return change


def givers(target: np.ndarray, patients: np.ndarray, seed: int, other: bool) -> np.ndarray:
    """(N,) the row whose markers each row takes: of another patient, of the other class or of its own. A row of unknown
    class, or for which there is none, keeps its own."""
    result = np.arange(len(target))
    generator = np.random.Generator(np.random.Philox(key=hash64("marker exchange", seed, other)))
    for row in np.flatnonzero(~np.isnan(target)):
        wanted = 1 - target[row] if other else target[row]
        candidates = np.flatnonzero((target == wanted) & (patients != patients[row]))
        if len(candidates):
            result[row] = generator.choice(candidates)
    return result


def audit(audited: Audited, marks: Marks | None = None) -> dict[str, Any]:
    """A row a label: AUROC as the pictures are, painted over, with markers of the own class and of the other, and of what
    can be told from the markers alone; `drop` is painted over against as they are, `tie` other against own class.

    marks: of these rows, where they were found before."""
    marks = marks or Marks(audited.selection, audited.quiet)
    bearing = sum(bool(found) for found in marks.found)
    if not bearing:
        return entry("markers", f"No side marker was found in {len(marks.found)} images, so none can be read.", [])
    targets, seed = audited.targets, audited.settings.seed
    alone, bare = audited.learned(marks.columns(), strength=1.0), audited.scores({"": marks.change(None)})[""]
    rows = []
    for column, label in enumerate(audited.labels):
        target = targets[:, [column]]

        def measured(scores: np.ndarray, column: int = column, target: np.ndarray = target):
            return audited.measured(scores[:, [column]], target)

        changes = {
            name: marks.change(givers(target[:, 0], audited.patients, seed, name == "other"))
            for name in ("own", "other")
        }
        exchanged = {name: measured(found) for name, found in audited.scores(changes).items()}
        whole, painted, told_alone = measured(audited.as_it_is), measured(bare), measured(alone)
        rows.append(
            {
                "label": label,
                "images": len(marks.found),
                "images_with_markers": bearing,
                "share_positive": _share(marks, target[:, 0] == 1),
                "share_negative": _share(marks, target[:, 0] == 0),
                "whole": interval(whole, 0).to_dict(),
                "inpainted": interval(painted, 0).to_dict(),
                "own_class": interval(exchanged["own"], 0).to_dict(),
                "other_class": interval(exchanged["other"], 0).to_dict(),
                "markers_alone": interval(told_alone, 0).to_dict(),
                "drop": difference(whole, painted, 0).to_dict(),
                "tie": difference(exchanged["own"], exchanged["other"], 0).to_dict(),
            }
        )
    return entry("markers", sentence(rows), rows)


def _share(marks: Marks, rows: np.ndarray) -> float | None:
    return float(np.mean([bool(marks.found[row]) for row in np.flatnonzero(rows)])) if rows.any() else None


def sentence(rows: list[dict[str, Any]]) -> str:
    """In words, of the label that is tied most to its markers."""
    judged = [row for row in rows if usable(row["tie"]) and usable(row["drop"])]
    first = rows[0]
    seen = f"Side markers were found in {first['images_with_markers']} of {first['images']} images"
    if not judged:
        return (
            f"{seen}, but whether they are read cannot be said: {first['whole']['reason'] or first['tie']['reason']}."
        )
    read = [row for row in judged if row["tie"]["low"] > 0 and row["tie"]["high"] >= NEAR]
    if read:
        row = max(read, key=lambda one: one["tie"]["value"])
        return (
            f"This predictor reads the side markers as a sign of {row['label']}: AUROC {told(row['whole'])} as the "
            f"pictures are, {told(row['inpainted'])} with markers painted over, {told(row['own_class'])} with those of "
            f"other images of the same class and {told(row['other_class'])} with those of the other class; {seen[0].lower()}"
            f"{seen[1:]}."
        )
    row = max(judged, key=lambda one: one["tie"]["high"])
    if usable(row["markers_alone"]) and row["markers_alone"]["low"] > 0.5:
        seen += f" (where and which they are gives {row['label']} away with {told(row['markers_alone'])})"
    figures = f"exchanging them between classes costs {told(row['tie'], signed=True)} of AUROC"
    if row["tie"]["high"] < NEAR:
        leans = "hardly leans" if row["tie"]["low"] > 0 else "does not lean"
        return f"{seen}, and this predictor {leans} on them: {figures}, painting them over {_drop(row)}."
    return (
        f"{seen}, and whether this predictor leans on them cannot be told: {figures}, painting them over {_drop(row)}."
    )


def _drop(row: dict[str, Any]) -> str:
    return told(row["drop"], signed=True)
