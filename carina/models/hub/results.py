"""What evaluations found, as Markdown for a card: tables with intervals, sentences, groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = {"auroc": "AUROC", "ap": "average precision", "sensitivity": "sensitivity", "specificity": "specificity"}


def evaluation_table(metrics: Mapping[str, Any]) -> str:
    """metrics.json of an evaluation: figures by label with their intervals, what they mean, and the groups."""
    pooled = f", {metrics['level']} level ({metrics['pool']})" if metrics.get("pool") else ""
    title = f"{metrics['kind']}, mode {metrics['mode']}, split `{metrics['split']}`{pooled}"
    title += " (*synthetic*)" if metrics["synthetic"] else ""
    about = [f"{title}, {metrics['patients']:,} patients; labels used: {metrics['labels_used']}."]
    about += [metrics["overlap_sentence"]] if metrics.get("overlap_sentence") else []
    about += ["Intervals are of 95 % and resample patients; sensitivity and specificity are those at the threshold."]
    shown = [name for name in COLUMNS if any(row.get(name) is not None for row in metrics["table"])]
    rows = [
        f"| label | {' | '.join(COLUMNS[name] for name in shown)} | positives | note |",
        "| --- |" + " ---: |" * (len(shown) + 1) + " --- |",
        *(
            f"| {row['label']} | {' | '.join(_figure(row.get(name)) for name in shown)} | {_positives(row)} | "
            f"{row['note']} |"
            for row in metrics["table"]
        ),
    ]
    said = [f"* {sentence}" for sentence in metrics.get("sentences") or ()]
    parts = [" ".join(about), "\n".join(rows), "\n".join(said), _groups(metrics.get("subgroups") or ())]
    return "\n\n".join(part for part in parts if part)


def _figure(value: Any) -> str:
    """A number, or one with its interval ({"value", "low", "high"}); a dash where there is none."""
    figure = value if isinstance(value, Mapping) else {"value": value}
    if figure["value"] is None:
        return "-"
    low, high = figure.get("low"), figure.get("high")
    return f"{figure['value']:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")


def _positives(row: Mapping[str, Any]) -> str:
    """The mean over labels has none of its own."""
    if row["label"] == "macro" or row["positives"] is None:
        return ""
    return f"{row['positives']:,} of {row['n']:,}"


def _groups(rows: Any) -> str:
    """Subgroups, folded away: there may be many."""
    if not rows:
        return ""
    lines = [
        f"| {row['label']} | {row['variable']} | {row['group']} | {_positives(row)} | {_figure(row['auroc'])} | "
        f"{row.get('note') or ''} |"
        for row in rows
    ]
    head = ["| label | by | group | positives | AUROC | note |", "| --- | --- | --- | ---: | ---: | --- |"]
    folded = ["<details><summary>Within groups of patients and images</summary>", "", *head, *lines, "", "</details>"]
    return "\n".join(folded)
