"""Sections of a report on what else may explain the figures, and on single images."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from carina.evaluate import anomaly
from carina.evaluate.report import figures
from carina.evaluate.report.document import (
    Block,
    Chart,
    Charts,
    Column,
    Drawn,
    Heading,
    Kind,
    Pictures,
    Section,
    Table,
    Text,
    label_name,
)

WORDS = {
    "auroc": "AUROC",
    "ap": "Average precision",
    "missing": "Note",
    "own_class": "Markers of own class",
    "other_class": "Of other class",
}
MANY = 12  # rows that are read at a glance
SIGNED = ("drop", "tie", "difference", "score_change")
SWITCHED_OFF = (
    "Pictures are left out, because they would show radiographs of patients; carina evaluate with pixels=true puts them in, "
    "with heat maps and lung outlines."
)


def controls(c: Mapping[str, Any]) -> Section | None:
    rows = c["result"].get("controls")
    if not rows:
        return None
    columns = [Column("Control"), Column("Method"), Column("AUROC", "drawn", chance=0.5)]
    columns += [Column("Average precision", "figure"), Column("FPR at 95 % TPR", "number")]
    columns += [Column("Note", "note")] * any(row["missing"] for row in rows)
    cells = [
        [row["control"], row["method"], row.get("auroc"), row.get("ap"), row.get("fpr95")]
        + ([row["missing"]] if len(columns) > 5 else [])
        for row in rows
    ]
    words = (
        "Methods that know nothing of lungs or lesions, fitted on the same normal images and scored on the same test "
        "images. A detector has seen disease only as far as it beats them. Pretext: none. Labels used: the normal flag."
    )
    return Section("Control rows", [Text([words]), Table("controls", "Control rows", columns, cells)])


def localization(c: Mapping[str, Any]) -> Section | None:
    found = c["result"].get("localization")
    if not found:
        return None
    rows = anomaly.localization_rows(found)
    columns = [Column("Figure"), Column("Value", "drawn"), Column("Chance", "number"), Column("What it is", "note")]
    cells = [[row["name"], Drawn(row["found"], row["chance"]), row["chance"], row["words"]] for row in rows]
    doubts = [row["found"]["reason"] for row in rows if row["found"].get("reason")]
    table = Table("localization", "Localization", columns, cells, below=" ".join(dict.fromkeys(doubts)))
    return Section("Where the anomaly maps point", [Text([anomaly.localization_words(found)]), table])


# -- audits -------------------------------------------------------------------------------------------------------------


def audits(c: Mapping[str, Any]) -> Section | None:
    blocks: list[Block] = []
    for found in c["result"].get("audits") or []:
        blocks += [Heading(found["name"].capitalize()), Text([found["sentence"]])]
        if curve := found.get("curve"):
            blocks += _curve(found["name"], curve, c["result"]["synthetic"])
        blocks += _tables(found["name"], found.get("rows") or [])
    return Section("Audits", blocks) if blocks else None


def _curve(name: str, curve: Mapping[str, Any], synthetic: bool) -> list[Block]:
    """Series of one unit in one chart, others in a chart each."""
    level = curve.get("target", (curve.get("start") or {}).get("value"))
    units = {one.get("unit", "") for one in curve["series"]}
    groups = [[one] for one in curve["series"]] if len(units) > 1 else [curve["series"]]
    word = "Synthetic: " if synthetic else ""
    charts = []
    for group in groups:
        title, unit = group[0]["name"].capitalize() if len(groups) > 1 else "", group[0].get("unit", "")
        drawing = figures.audit_curve(group, curve["x"], curve["y"], level, synthetic)
        alt = f"{word}{curve['y']} against {curve['x']}" + (f" of {title.lower()} ({unit})" if title else "")
        charts.append(Chart(title, unit if title else "", drawing.svg, alt, drawing.data))
    line = "the unchanged images" if "start" in curve else "the target"
    words = f"{curve['y']} with its 95 % interval, patients resampled; the dashed line is {line}."
    return [Charts(f"audit {name}", words, charts, headed=False)]


def _tables(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    """A table for all rows that have the same keys; columns in which nothing stands are left out."""
    alike: dict[frozenset[str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if not _empty(row):
            alike.setdefault(frozenset(row), []).append(row)
    below = "Rows that cannot be computed are left out." if any(map(_empty, rows)) else ""
    blocks: list[Block] = []
    for number, group in enumerate(alike.values()):
        used = [key for key in group[0] if any(row[key] not in (None, "", []) for row in group) and key != "unit"]
        same = [
            key
            for key in used
            if key in ("label", "kind", "what") and len({row[key] for row in group}) == 1 < len(group)
        ]
        used = [key for key in used if key not in same]
        caption = f"{name.capitalize()} audit" + "".join(f", {_cell(key, group[0][key])}" for key in same)
        stem = f"audit {name}" + (f" {number + 1}" if number else "")
        if len(group) == 1 and len(used) > 6:
            blocks += _upright(stem, name, used, group[0])
            continue
        labels = list(dict.fromkeys(row["label"] for row in group)) if "label" in used else []
        folded = 1 < len(labels) < len(group) and len(group) > MANY
        if folded:
            used = ["label", *(key for key in used if key != "label")]
            group = sorted(group, key=lambda row: labels.index(row["label"]))
        columns = [Column(WORDS.get(key, _plain(key)), _kind(key, [row[key] for row in group])) for key in used]
        cells = [[_cell(key, row[key]) for key in used] for row in group]
        strong = frozenset() if folded else _strong(group)
        blocks.append(Table(stem, caption, columns, cells, strong, below, folded=folded))
    return blocks


def _empty(row: Mapping[str, Any]) -> bool:
    """Whether a row has figures, none of which has a value, and no word on why."""
    found = [value for value in row.values() if isinstance(value, Mapping)]
    return bool(found) and all(one["value"] is None for one in found) and not row.get("missing")


def _upright(stem: str, name: str, keys: Sequence[str], row: Mapping[str, Any]) -> list[Block]:
    """One row with many columns, turned: its figures, and its counts before them."""
    plain = [key for key in keys if not isinstance(row[key], Mapping)]
    found = [key for key in keys if isinstance(row[key], Mapping)]
    blocks: list[Block] = []
    columns = [Column(WORDS.get(key, _plain(key)), _kind(key, [row[key]])) for key in plain]
    if plain:
        blocks.append(
            Table(f"{stem} counts", f"{name.capitalize()} audit: counts", columns, [[_cell(k, row[k]) for k in plain]])
        )
    if found:
        signed = [key in SIGNED for key in found]
        for kind, chosen in (("figure", False), ("difference", True)):
            cells = [[WORDS.get(key, _plain(key)), row[key]] for key, one in zip(found, signed) if one is chosen]
            what = "AUROC" if kind == "figure" else "Difference of AUROC"
            if cells:
                caption = f"{name.capitalize()} audit: {what[0].lower() + what[1:] if kind == 'difference' else what}"
                columns = [Column("What"), Column(what, kind)]
                blocks.append(Table(f"{stem} {'differences' if chosen else 'figures'}", caption, columns, cells))
    return blocks


def _strong(rows: Sequence[Mapping[str, Any]]) -> frozenset[int]:
    labels = {row.get("label") for row in rows}
    return frozenset(i for i, row in enumerate(rows) if row.get("label") == "macro") if len(labels) > 1 else frozenset()


def _plain(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _kind(key: str, values: Sequence[Any]) -> Kind:
    told = [value for value in values if value is not None]
    if any(isinstance(value, Mapping) for value in told):
        return "difference" if key in SIGNED else "figure"
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in told):
        if all(float(value).is_integer() for value in told) and any(isinstance(value, int) for value in told):
            return "count"
        return "signed" if key in SIGNED else "number"
    return "note" if key in ("missing", "note", "why") else "text"


def _cell(key: str, value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "strength" and value is not None:
        return f"{value:g}"
    if key == "label" and value is not None:
        return label_name(value)
    return value


# -- single images ------------------------------------------------------------------------------------------------------


def pictures(c: Mapping[str, Any]) -> Section | None:
    """Right ones and wrong ones apart. examples: rows {image, heat, lungs, label, kind, right, caption}."""
    if not c["examples"]:
        return Section("Examples", [Text([SWITCHED_OFF])], figures=False) if c["switched_off"] else None
    synthetic = c["result"]["synthetic"]
    words = (
        "Chosen to illustrate, not to prove: the most certain of right and wrong. Left the image as the network gets it, "
        "right the same with a heat map: warm colors show where the score comes from. The pale line is the outline of the "
        "lungs. A map is no evidence that the model saw the lesion."
    )
    blocks: list[Block] = [Text([words])]
    for title, right in (("Wrong", False), ("Right", True)):
        made = [
            {
                "source": "data:image/webp;base64,"
                + base64.b64encode(
                    figures.example(row["image"], row["heat"], row["lungs"], synthetic, "webp")
                ).decode(),
                "caption": row["caption"],
                "alt": f"{'Synthetic example' if synthetic else 'Example'}: {row['caption']}",
                "wide": row["heat"] is not None,
            }
            for row in c["examples"]
            if row["right"] is right
        ]
        blocks += [Heading(title), Pictures(made)] if made else []
    return Section("Examples", blocks)
