"""What a report is made of, whatever it is written as: sections of text, tables, charts, pictures and a flow of counts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pandas as pd

DASH = "–"
Kind = Literal["text", "note", "count", "number", "signed", "figure", "difference", "drawn"]
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?")
FIGURES: tuple[Kind, ...] = ("figure", "difference", "drawn")


@dataclass(frozen=True)
class Column:
    """kind: text, note (quiet text), count, number (three decimals), signed (with its sign), figure (`Interval.to_dict()`),
    difference (a figure with its sign), drawn (a figure that HTML also draws between `low` and `high`, with `chance`)."""

    name: str
    kind: Kind = "text"
    low: float = 0.0
    high: float = 1.0
    chance: float | None = None


@dataclass(frozen=True)
class Drawn:
    """A figure whose row has a chance of its own."""

    figure: Mapping[str, Any] | None
    chance: float | None


@dataclass
class Table:
    """rows: a cell a column. strong, quiet: numbers of rows that stand out or step back. folded: HTML folds the rows by
    their first column, but those that `opened` names (default: the first)."""

    name: str
    caption: str
    columns: list[Column]
    rows: list[list[Any]]
    strong: frozenset[int] = frozenset()
    below: str = ""
    notes: list[tuple[str, str]] = field(default_factory=list)
    folded: bool = False
    opened: Collection[str] = ()
    quiet: frozenset[int] = frozenset()
    type: ClassVar[str] = "table"

    @property
    def parts(self) -> list[tuple[str, list[int], bool]]:
        """(first cell, numbers of its rows, whether it is open) of a folded table."""
        names = list(dict.fromkeys(row[0] for row in self.rows))
        opened = self.opened or names[:1]
        return [(name, [i for i, row in enumerate(self.rows) if row[0] == name], name in opened) for name in names]

    @property
    def crowded(self) -> bool:
        """Whether intervals had better stand below their figures."""
        return len(self.columns) + sum(column.kind in FIGURES for column in self.columns) > 10


@dataclass(frozen=True)
class Chart:
    """svg: one element. alt: what a listener is told. data: one row a drawn point."""

    title: str
    words: str
    svg: str
    alt: str
    data: pd.DataFrame


@dataclass
class Charts:
    """Charts of one kind; `name` is that of the file which holds all their points."""

    name: str
    words: str
    charts: list[Chart]
    more: Sequence[pd.DataFrame] = ()  # points of charts that are not drawn
    wide: bool = False
    headed: bool = True
    type: ClassVar[str] = "charts"


@dataclass
class Text:
    sentences: list[str]
    listed: bool = False
    type: ClassVar[str] = "text"


@dataclass
class Heading:
    text: str
    type: ClassVar[str] = "heading"


@dataclass
class Code:
    text: str
    columns: bool = False
    type: ClassVar[str] = "code"


@dataclass
class Pictures:
    """pictures: {source, caption, alt, wide}."""

    pictures: list[dict[str, Any]]
    type: ClassVar[str] = "pictures"


@dataclass
class Flow:
    """steps: {step, images, patients, note, lost: (images, patients) since the step before, or None}."""

    steps: list[dict[str, Any]]
    type: ClassVar[str] = "flow"


Block = Table | Charts | Text | Heading | Code | Pictures | Flow


@dataclass
class Section:
    """figures: it shows figures, which of synthetic images must say so."""

    title: str
    blocks: Sequence[Block]
    figures: bool = True

    @property
    def id(self) -> str:
        return slug(self.title)


def slug(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def label_name(label: str) -> str:
    return "Mean over labels" if label == "macro" else label.replace("_", " ")


def three(value: float | None, signed: bool = False) -> str:
    """Three decimals, or a dash where there is no value; a proper minus sign."""
    if value is None or value != value:
        return DASH
    text = f"{value:{'+' if signed else ''}.3f}"
    return text.replace("-", "\u2212")


def count(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


def span(figure: Mapping[str, Any] | None, signed: bool = False) -> str:
    """The interval of a figure, empty where there is none."""
    if not figure or figure.get("low") is None or figure.get("high") is None:
        return ""
    return f"{three(figure['low'], signed)} to {three(figure['high'], signed)}"


def told(figure: Mapping[str, Any] | None, signed: bool = False) -> str:
    """A figure with its interval in one line."""
    if not figure or figure.get("value") is None:
        return DASH
    if not figure.get("estimable", True):
        return f"{three(figure['value'], signed)} (interval not estimable)"
    return f"{three(figure['value'], signed)}" + (f" ({found})" if (found := span(figure, signed)) else "")


def cell_figure(value: Any) -> Mapping[str, Any] | None:
    return value.figure if isinstance(value, Drawn) else value


def cell_text(column: Column, value: Any) -> str:
    """A cell as plain text, as Markdown and LaTeX show it."""
    if column.kind in FIGURES:
        return told(cell_figure(value), column.kind == "difference")
    if value is None:
        return DASH if column.kind != "note" else ""
    if column.kind == "count":
        return count(value)
    if column.kind in ("number", "signed"):
        return value if isinstance(value, str) else three(value, column.kind == "signed")
    return str(value)


def table_frame(table: Table) -> pd.DataFrame:
    """A table's numbers unrounded, for CSV; a figure has its interval in two more columns."""
    found: dict[str, list[Any]] = {}
    for number, column in enumerate(table.columns):
        cells = [row[number] for row in table.rows]
        if column.kind not in FIGURES:
            found[column.name] = cells
            continue
        parts = [cell_figure(cell) or {} for cell in cells]
        found[column.name] = [part.get("value") for part in parts]
        found[f"{column.name}, low"] = [part.get("low") for part in parts]
        found[f"{column.name}, high"] = [part.get("high") for part in parts]
        found[f"{column.name}, estimable"] = [part.get("estimable", True) if part else None for part in parts]
    return guarded(pd.DataFrame(found))


def guarded(frame: pd.DataFrame) -> pd.DataFrame:
    """Words that a spreadsheet would run as a formula begin with an apostrophe; numbers stay numbers.

    OWASP, CSV injection.
    """

    def quoted(cell: Any) -> Any:
        formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
        return f"'{cell}" if formula and not _NUMBER.fullmatch(cell) else cell

    words = [name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])]
    return frame.assign(**{name: frame[name].map(quoted) for name in words}).rename(columns=quoted)
