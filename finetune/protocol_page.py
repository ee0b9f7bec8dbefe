"""How figures and tables of a protocol are shown: as a page of Markdown, and on a terminal."""

from __future__ import annotations

from typing import Any

Grid = tuple[str, list[str], list[list[str]], list[str]]  # title, heads, rows, sentences


def figure(found: dict[str, Any] | None, sign: str = "") -> str:
    if found is None:
        return "-"
    if found["value"] is None:
        return found["reason"]
    text = f"{found['value']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"
    return text if found["estimable"] else f"{text}, not estimable"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def pages(result: dict[str, Any], found: list[Grid]) -> str:
    """A page of Markdown."""
    parts = [f"# {result['title']}", result["about"], *result["remarks"]]
    if result["left_out"]:
        parts.append(f"Left out: {'; '.join(result['left_out'])}.")
    for title, heads, rows, said in found:
        lines = [f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows]]
        parts += [f"## {title}", *said, "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def tables(result: dict[str, Any], found: list[Grid]) -> Any:
    """The same as a group of rich tables."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    parts: list[Any] = [escape(text) for text in (result["about"], *result["remarks"]) if text]
    if result["left_out"]:
        parts.append(escape(f"Left out: {'; '.join(result['left_out'])}."))
    for title, heads, rows, notes in found:
        table = Table(
            title=escape(title), title_justify="left", caption=escape("\n".join(notes)), caption_justify="left"
        )
        for head in heads:
            table.add_column(head, no_wrap=head == "AUROC")
        for row in rows:
            marked = "**primary**" in row[0]
            table.add_row(*(escape(cell.replace("**", "")) for cell in row), style="bold" if marked else "")
        parts.append(table)
    return Group(*parts)
