"""One file to prepare, and its labels as a view on one matrix: a million items stay near 1 KB each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from carina.data.labels import harmonize
from carina.errors import CarinaError, nearest

Box = tuple[str, float, float, float, float, str]  # label, x0, y0, x1, y1, origin
OLDEST = 120  # years; above it a table holds a slip of the pen

_UNKNOWN = -128  # labels are 1, 0, -1 or unknown: a byte each, where float32 would take 776 bytes a row of PadChest
_VALUES = {1: 1.0, 0: 0.0, -1: -1.0, _UNKNOWN: float("nan")}


class Labels:
    """The labels of many items. names: columns in order; original: their names in the archive; values by row.

    values: (N, L) floats of 1 present, 0 absent, -1 uncertain, NaN unknown; kept as one byte each.
    """

    def __init__(self, names: Sequence[str], values: np.ndarray, original: Sequence[str] | None = None):
        self.names = list(names)
        self.original = list(original if original is not None else names)
        if values.dtype != np.int8:
            values = np.where(np.isnan(values), _UNKNOWN, values).astype(np.int8)
        self.codes = values.reshape(len(values), len(self.names))
        self.index = {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.codes)

    def column(self, name: str) -> np.ndarray:
        """(N,) float32 of one label."""
        codes = self.codes[:, self.index[name]]
        return np.where(codes == _UNKNOWN, np.float32(np.nan), codes).astype(np.float32)

    def rows(self) -> list[LabelRow]:
        return [LabelRow(self, row) for row in range(len(self))]

    def take(self, rows: np.ndarray) -> Labels:
        return Labels(self.names, self.codes[rows], self.original)

    def blank(self, rows: np.ndarray) -> None:
        """Make every label of the rows (a boolean mask) unknown."""
        self.codes[rows] = _UNKNOWN

    def select(self, wanted: Sequence[str] | Mapping[str, str], where: str) -> Labels:
        """Only the labels that a recipe names, by their name here or in the archive; a mapping renames them."""
        pairs = wanted if isinstance(wanted, Mapping) else {name: name for name in wanted}
        known = {**dict(zip(self.original, self.names)), **{name: name for name in self.names}}
        unknown = [name for name in pairs.values() if name not in known]
        if unknown:
            raise CarinaError(
                f"{where} has no label '{unknown[0]}'{nearest(unknown[0], known)}; it has {', '.join(self.names)}"
            )
        renamed = isinstance(wanted, Mapping)
        columns = [self.index[known[name]] for name in pairs.values()]
        names = [key if renamed else known[key] for key in pairs]
        return Labels(names, self.codes[:, columns], [self.original[column] for column in columns])


class LabelRow(Mapping):
    """The labels of one item by name, read from the matrix of all; copied or pickled it becomes a plain dict."""

    __slots__ = ("_labels", "_row")

    def __init__(self, labels: Labels, row: int):
        self._labels, self._row = labels, row

    def __getitem__(self, name: str) -> float:
        return _VALUES[int(self._labels.codes[self._row, self._labels.index[name]])]

    def __iter__(self) -> Iterator[str]:
        return iter(self._labels.names)

    def __len__(self) -> int:
        return len(self._labels.names)

    def _dict(self) -> dict[str, float]:
        codes = self._labels.codes[
            self._row
        ].tolist()  # all at once: one look-up each would take minutes a million rows
        return dict(zip(self._labels.names, (_VALUES[code] for code in codes)))

    def items(self):
        return self._dict().items()

    def values(self):
        return self._dict().values()

    def __repr__(self) -> str:
        return repr(self._dict())

    def __reduce__(self):
        return dict, (self._dict(),)

    def __deepcopy__(self, memo: dict) -> dict[str, float]:
        return self._dict()


@dataclass
class Item:
    """One picture to prepare, with what its archive says of it. `relative` names it below the source.

    source: the archive that the picture belongs to when it is not the recipe's (CXR-LT labels pictures of MIMIC).
    patients_of: the archive whose numbers the patients have, "" for the recipe's own: a catalog's name, so that
    RSNA's patients meet NIH's whatever the recipe calls its source.
    content: an Arrow or Parquet file and the row in it, when the picture is not a file of its own (`read_content`).
    path, content, mask and lesions are absolute, so that workers elsewhere find them; links are not resolved.
    patient_in_name: found by patient_regex. view: the archive's word, which `carina.imaging.routing.view_of` reads.
    sex: F, M or "". age: years, by `age_of`.
    year: of the examination, None where the archive shifts its dates. split: train, val, test or "".
    labels: 1 present, 0 absent, -1 uncertain, NaN unknown; every item of a source has the same names.
    original_labels: the archive's own words. boxes: label, x0, y0, x1, y1, origin; pixels, half-open.
    box_frame: (width, height) of the picture that the boxes were drawn on, None for the original's own size.
    mask: the lungs, as `read_mask` takes it; lesions: the same by label.
    """

    path: str
    relative: str
    source: str = ""
    patients_of: str = ""
    content: tuple[str, int] | None = None
    patient: str | None = None
    patient_in_name: str | None = None
    study: str | None = None
    view: str = ""
    sex: str = ""
    age: float | None = None
    year: int | None = None
    split: str = ""
    labels: Mapping[str, float] = field(default_factory=dict)
    original_labels: str = ""
    boxes: Sequence[Box] = ()
    box_frame: tuple[int, int] | None = None
    mask: str | list[str] | None = None
    lesions: dict[str, str] = field(default_factory=dict)


def age_of(years: float | None) -> float | None:
    """Years of life as any source gives them; None where unknown, negative or beyond human age."""
    return float(years) if years is not None and 0 <= years <= OLDEST else None


def label_columns(wanted: Sequence[str] | Mapping[str, str], where: str) -> dict[str, str]:
    """Label -> the source's own name of it. A list is harmonized, a mapping keeps its names."""
    if isinstance(wanted, Mapping):
        return dict(wanted)
    columns: dict[str, str] = {}
    for name in wanted:
        label = harmonize(name)
        if label in columns:
            raise CarinaError(
                f"{where}: labels={columns[label]} and labels={name} both mean {label}; keep one, or name them with "
                "labels={NAME: COLUMN}"
            )
        columns[label] = name
    return columns


def settle_splits(items: Sequence[Item], where: str, mend: str) -> None:
    """Rows without a split take the given one of their patient where a table names the patient.

    Raises CarinaError, which ends in `mend`, when rows of one patient are given several splits.
    """
    given: dict[tuple[str, str], str] = {}
    several = set()
    for item in items:
        patient = item.patient or item.patient_in_name
        if patient and item.split:
            who = (item.patients_of or item.source, patient)
            if given.setdefault(who, item.split) != item.split:
                several.add(who)
    if several:
        raise CarinaError(
            f"{where}: rows of one patient stand in more than one split ({len(several)} such patients), so training "
            f"would see test patients; {mend}"
        )
    if not given:
        return
    for item in items:
        if item.patient and not item.split:
            item.split = given.get((item.patients_of or item.source, item.patient), "")
