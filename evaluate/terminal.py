"""The result of an evaluation as tables for a terminal."""

from __future__ import annotations

from typing import Any

from carina.evaluate import anomaly


def terminal_table(result: dict[str, Any]) -> Any:
    """The metric table for a terminal; for anomaly detection with control rows and, where lesions are marked,
    localization."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    detects = result["kind"] == "anomaly"
    title = f"{result['kind']} {result['mode']}, split {result['split']}, {result['patients']} patients"
    title += f", level {result['level']} ({result['pool']})" if result["pool"] else ""
    title += f", {result['scorer']}, {result['region']}" if detects else ""
    table = Table(title=title + (" (synthetic)" if result["synthetic"] else ""), caption=result["overlap_sentence"])
    names = ["label", "AUROC", "95 % interval", "average precision"]
    names += ["FPR at 95 % TPR"] * detects + ["positives"] + ["pretext saw", "labels used"] * detects + ["note"]
    for name in names:
        table.add_column(name)
    for row in result["table"]:
        cells = [row["label"], *_figures(row["auroc"]), _three(row["ap"]["value"])]
        cells += [_three(row.get("fpr95"))] * detects + [f"{row['positives']} of {row['n']}"]
        cells += [result["pretext_saw"], result["labels_used"]] * detects
        table.add_row(*cells, row["note"])
    shown = [table]
    if result.get("scales"):
        shown.append(_scales_table(result["scales"]))
    if result.get("controls"):
        shown.append(Table(title="control rows", caption="pretext saw: nothing; labels used: the normal flag"))
        for name in ("control", "method", "AUROC", "95 % interval", "average precision", "FPR at 95 % TPR"):
            shown[-1].add_column(name)
        for row in result["controls"]:
            figures = [row["missing"]]
            if not row["missing"]:
                figures = [*_figures(row["auroc"]), _three(row["ap"]["value"]), _three(row["fpr95"])]
            shown[-1].add_row(row["control"], row["method"], *figures)
    if result.get("localization"):
        found = result["localization"]
        shown.append(Table(title="localization", caption=anomaly.localization_words(found)))
        for name in ("", "value", "95 % interval", "chance", "what it is"):
            shown[-1].add_column(name)
        for row in anomaly.localization_rows(found):
            shown[-1].add_row(row["name"], *_figures(row["found"]), _three(row["chance"]), row["words"])
    return Group(*shown, *(escape(text) for text in (*result.get("words", []), *result.get("sentences", []))))


def _scales_table(found: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(
        title="scales", caption=f"weights from {found['from']}; the best scale of these images flatters itself"
    )
    for name in ("label", "scale", "weight", "AUROC", "95 % interval", "stack minus scale", "95 % interval", "best"):
        table.add_column(name)
    for label in dict.fromkeys(row["label"] for row in found["rows"]):
        best = found["best"].get(label, {})
        for row in (row for row in found["rows"] if row["label"] == label):
            words = [
                word for word, key in (("here", "scale"), ("in training", "chosen")) if best.get(key) == row["scale"]
            ]
            cells = [label, str(row["scale"]), _three(row["weight"]), *_figures(row["auroc"])]
            table.add_row(*cells, *_figures(row["stack_minus"]), " and ".join(words))
    return table


def _figures(found: dict[str, Any]) -> tuple[str, str]:
    """A figure and its interval, as cells."""
    none = found["value"] is None or found["low"] is None
    return _three(found["value"]), "-" if none else f"{found['low']:.3f} to {found['high']:.3f}"


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
