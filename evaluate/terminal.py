"""The result of an evaluation as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def terminal_table(result: dict[str, Any]) -> Any:
    """The metric table for a terminal; for anomaly detection with control rows and, where lesions are marked,
    localization."""
    from rich.console import Group

    from carina.evaluate import anomaly

    detects = result["kind"] == "anomaly"
    title = f"{result['kind']} {result['mode']}, split {result['split']}, {result['patients']} patients"
    title += f", level {result['level']} ({result['pool']})" if result["pool"] else ""
    title += f", {result['scorer']}, {result['region']}" if detects else ""
    title += " (synthetic)" if result["synthetic"] else ""
    names = ["label", "AUROC", "95 % interval", "average precision"]
    names += ["FPR at 95 % TPR"] * detects + ["positives"] + ["pretext saw", "labels used"] * detects + ["note"]
    rows = []
    for row in result["table"]:
        count = "" if row["positives"] is None else f"{row['positives']} of {row['n']}"
        cells = [row["label"], *_figures(row["auroc"]), three(row["ap"]["value"])]
        cells += [three(row.get("fpr95"))] * detects + [count]
        rows.append([*cells, *[result["pretext_saw"], result["labels_used"]] * detects, row["note"]])
    shown = [_table(title, result["overlap_sentence"], names, rows)]
    if result.get("scales"):
        shown.append(_scales_table(result["scales"]))
    if result.get("controls"):
        names = ["control", "method", "AUROC", "95 % interval", "average precision", "FPR at 95 % TPR"]
        rows = []
        for row in result["controls"]:
            figures = [row["missing"]]
            if not row["missing"]:
                figures = [*_figures(row["auroc"]), three(row["ap"]["value"]), three(row["fpr95"])]
            rows.append([row["control"], row["method"], *figures])
        shown.append(_table("control rows", "pretext saw: nothing; labels used: the normal flag", names, rows))
    if result.get("localization"):
        found = result["localization"]
        rows = [
            [row["name"], *_figures(row["found"]), three(row["chance"]), row["words"]]
            for row in anomaly.localization_rows(found)
        ]
        names = ["", "value", "95 % interval", "chance", "what it is"]
        shown.append(_table("localization", anomaly.localization_words(found), names, rows))
    return Group(*shown, *(plain(text) for text in (*result.get("words", []), *result.get("sentences", []))))


def plain(text: Any) -> str:
    """Text as it is, for rich: names come from files and may hold markup or codes that steer a terminal."""
    from rich.markup import escape

    return escape("".join(char if char.isprintable() else " " for char in str(text)))


def _table(title: str, caption: str, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    from rich.table import Table

    table = Table(title=plain(title), caption=plain(caption))
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*map(plain, row))
    return table


def _scales_table(found: dict[str, Any]) -> Any:
    rows = []
    for label in dict.fromkeys(row["label"] for row in found["rows"]):
        best = found["best"].get(label, {})
        for row in (row for row in found["rows"] if row["label"] == label):
            words = [
                word for word, key in (("here", "scale"), ("in training", "chosen")) if best.get(key) == row["scale"]
            ]
            cells = [label, row["scale"], three(row["weight"]), *_figures(row["auroc"])]
            rows.append([*cells, *_figures(row["stack_minus"]), " and ".join(words)])
    names = ["label", "scale", "weight", "AUROC", "95 % interval", "stack minus scale", "95 % interval", "best"]
    caption = f"weights from {found['from']}; the best scale of these images flatters itself"
    return _table("scales", caption, names, rows)


def _figures(found: dict[str, Any]) -> tuple[str, str]:
    """A figure and its interval, as cells."""
    none = found["value"] is None or found["low"] is None
    return three(found["value"]), "-" if none else f"{found['low']:.3f} to {found['high']:.3f}"


def three(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"
