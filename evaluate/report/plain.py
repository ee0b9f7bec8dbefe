"""The report as Markdown, its tables for LaTeX (booktabs) and as CSV, and every drawn point as CSV."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from carina.evaluate.report.document import (
    Charts,
    Code,
    Flow,
    Heading,
    Pictures,
    Section,
    Table,
    Text,
    cell_text,
    count,
    guarded,
    slug,
    table_frame,
)

LONG = 40  # rows beyond which a LaTeX table may break over pages
NUMBERS = ("count", "number", "signed")
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\u2013": "--",
    "\u2212": r"\ensuremath{-}",
    "\u2265": r"\ensuremath{\geq}",
    "\u2264": r"\ensuremath{\leq}",
    "\u00a0": "~",
    "\u202f": r"\,",
}


def latex(text: str) -> str:
    """Any text as LaTeX shows it, for pdflatex with its usual encoding."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.splitlines()))


def latex_table(table: Table, synthetic: bool) -> str:
    """A float with booktabs; more than LONG rows make a longtable."""
    names = [latex(column.name) for column in table.columns]
    align = "".join("r" if column.kind in NUMBERS else "p{0.4\\textwidth}" if _wide(table, number) else "l"
                    for number, column in enumerate(table.columns))  # fmt: skip
    # Without {} a row that begins with [ or * would be taken for an option of the rule or the \\ before it.
    head = "{}" + " & ".join(names) + r" \\"
    rows = [
        "{}" + " & ".join(latex(cell_text(*pair)) for pair in zip(table.columns, row)) + r" \\" for row in table.rows
    ]
    caption = latex(table.caption + (" (synthetic images)" if synthetic else "") + ". " + table.below).strip()
    label = rf"\label{{tab:{slug(table.name)}}}"
    lines = [r"% needs \usepackage{booktabs}" + (", longtable" if len(rows) > LONG else "")]
    if len(rows) > LONG:
        lines += [
            rf"\begin{{longtable}}{{{align}}}",
            rf"\caption{{{caption}}}{label}\\",
            r"\toprule",
            head,
            r"\midrule",
        ]
        lines += [r"\endfirsthead", r"\toprule", head, r"\midrule", r"\endhead", r"\bottomrule", r"\endlastfoot", *rows]
        return "\n".join([*lines, r"\end{longtable}", ""])
    lines += [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}{label}", rf"\begin{{tabular}}{{{align}}}"]
    lines += [r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def _wide(table: Table, number: int) -> bool:
    """Whether a column of words needs lines of its own."""
    return any(len(cell_text(table.columns[number], row[number])) > 60 for row in table.rows)


def tables_of(sections: Iterable[Section]) -> list[Table]:
    return [block for section in sections for block in section.blocks if isinstance(block, Table)]


def write_tables(folder: Path, sections: Sequence[Section], synthetic: bool) -> None:
    """Every table twice: .tex rounded, .csv with all digits."""
    for table in tables_of(sections):
        stem = slug(table.name)
        (folder / f"{stem}.tex").write_text(latex_table(table, synthetic), encoding="utf-8")
        table_frame(table).to_csv(folder / f"{stem}.csv", index=False)


def write_points(folder: Path, sections: Sequence[Section]) -> None:
    """A file for every group of charts, one row a drawn point."""
    for block in (block for section in sections for block in section.blocks if isinstance(block, Charts)):
        frames = [chart.data for chart in block.charts]
        guarded(pd.concat([*frames, *block.more], ignore_index=True)).to_csv(
            folder / f"{slug(block.name)}.csv", index=False
        )


def markdown(head: Mapping[str, Any], sections: Sequence[Section]) -> str:
    word = " (synthetic)" if head["synthetic"] else ""
    lines = [f"# {_safe(head['title'])}{word}", "", *_paragraphs(head["lead"])]
    lines += [line for sentence in head["warnings"] for line in (f"> {_safe(sentence)}", "")]
    lines += (
        [_safe(head["judged"]), "", *(f"* {_safe(sentence)}" for sentence in head["said"]), ""] if head["said"] else []
    )
    for section in sections:
        lines += [f"## {_safe(section.title)}{word if section.figures else ''}", ""]
        for block in section.blocks:
            lines += _block(block)
    lines += ["Made by carina. For research only: not a medical device, not for diagnosis."]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _block(block: Any) -> list[str]:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Heading):
        return [f"### {_safe(block.text)}", ""]
    if isinstance(block, Text):
        said = [f"* {_safe(s)}" for s in block.sentences] if block.listed else _paragraphs(block.sentences)
        return [*said, ""]
    if isinstance(block, Code):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
        return [fence, block.text, fence, ""]
    if isinstance(block, Charts):
        labels = [f"{_safe(chart.title)} {chart.words}".strip() for chart in block.charts if chart.title]
        shown = [": ".join([f"**{_safe(block.name)}**", "; ".join(labels)]) if labels else f"**{_safe(block.name)}**"]
        where = f"Points: figures/{slug(block.name)}.csv."
        return [shown[0] + ".", "", " ".join(part for part in (_safe(block.words), where) if part), ""]
    if isinstance(block, Pictures):
        return [*(f"* {_safe(picture['caption'])}" for picture in block.pictures), ""]
    assert isinstance(block, Flow)
    return [*(_step(step) for step in block.steps), ""]


def _step(step: Mapping[str, Any]) -> str:
    text = f"* {_safe(step['step'])}: {count(step['images'])} images, {count(step['patients'])} patients"
    return text + (f" ({_safe(step['note'])})" if step["note"] else "")


def _table(table: Table) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(_safe(cell) for cell in cells) + " |"

    rule = "| " + " | ".join("---:" if column.kind in NUMBERS else "---" for column in table.columns) + " |"
    rows = [line(cell_text(column, cell) for column, cell in zip(table.columns, row)) for row in table.rows]
    notes = [f"* {_safe(label)}: {_safe(note)}" for label, note in table.notes]
    lines = [f"**{_safe(table.caption)}**", "", line(column.name for column in table.columns), rule, *rows, ""]
    return [*lines, _safe(table.below), "", *notes, ""]


def _paragraphs(sentences: Sequence[str]) -> list[str]:
    return [line for sentence in sentences for line in (_safe(sentence), "")]


def _safe(text: str) -> str:
    """Markdown that shows a text as it is: no tags, no markup, no broken tables."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", " ".join(text.splitlines()).strip().replace("\\", "\\\\"))
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|`*_\[\]]|^[#~]|^[-+](?=\s)|(?<=^\d)[.)](?=\s))", r"\\\1", text)
