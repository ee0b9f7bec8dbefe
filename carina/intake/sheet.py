"""The data sheet of a store, after Gebru et al., "Datasheets for Datasets" (CACM 64, 2021): what is in it, to look at.

One HTML file without scripts, pictures inside. It shows radiographs and real counts, so it stays with the store.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from carina.data.splits import LEFT_OUT, SPLITS
from carina.data.store import LABEL
from carina.files import write_text
from carina.intake.looks import known_or_not, sheet_pictures

BARS = 12  # lines of one list of counts
LABEL_ROWS = 60
STATES = (("positive", 1), ("negative", 0), ("uncertain", -1))


def write_sheet(folder: Path, info: dict[str, Any], table: pd.DataFrame, rejected: pd.DataFrame) -> None:
    """Write STORE/sheet.html.

    info: what store.json says. table: its rows in the order of table.parquet; of the columns that stores of the first
    schema had not, those that are absent are not shown.
    rejected: image_id and reason of the files left out. Reads a few hundred images at most, however large the store.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "percent": _percent, "many": _many}
    table = table.reset_index(drop=True)
    page = {
        "info": info,
        "num_images": len(table),
        "num_patients": table["patient_id"].nunique(),
        "num_files": len(table) + len(rejected),
        "num_rejected": len(rejected),
        "reasons": _bars(rejected["reason"], BARS),
        "warnings": list(_warnings(table)),
        "divisions": list(_divisions(table)),
        "ages": _ages(table),
        "lists": list(_lists(table)),
        "checks": list(_checks(table)),
        "labels": _labels(table),
        "copies": _copies(info, table),
        **sheet_pictures(Path(folder), info, table),
    }
    write_text(Path(folder) / "sheet.html", environment.get_template("sheet.html").render(page))


def _count(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def _many(number: int, word: str) -> str:
    return f"{_count(number)} {word}{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    """Per cent that never say 0 or 100 of what is neither none nor all."""
    if 0 < share < 0.005:
        return "<1 %"
    return ">99 %" if 0.995 <= share < 1 else f"{100 * share:.0f} %"


def _splits(table: pd.DataFrame) -> list[str]:
    present = set(table["split"])
    return [name for name in (*SPLITS, LEFT_OUT) if name in present] + sorted(present - {*SPLITS, LEFT_OUT})


def _bars(column: pd.Series, most: int, in_order: bool = False) -> list[dict[str, Any]]:
    """Counts of values, {name, count, share}; the most frequent first, or in their own order; the rest as one line."""
    counts = known_or_not(column).value_counts()
    counts = counts.sort_index() if in_order else counts
    shown = [(str(name), int(number)) for name, number in counts.iloc[:most].items()]
    if len(counts) > most:
        shown.append((f"{len(counts) - most} others", int(counts.iloc[most:].sum())))
    return [{"name": name, "count": number, "share": number / max(len(column), 1)} for name, number in shown]


def _warnings(table: pd.DataFrame):
    nameless = int(table["patient_id"].str.startswith("file-").sum())
    if nameless:
        yield f"Of {_many(nameless, 'image')} no patient is known: each such image counts as a patient, so splits may leak."
    if "lungs_plausible" in table.columns:
        wrong = int((~table["lungs_plausible"] & (table["lungs_source"] != "none")).sum())
        if wrong:
            yield f"Of {_many(wrong, 'lung mask')} the shape is implausible (column lungs_plausible)."
    inverted = int((table["polarity"] != "ok").sum()) if "polarity" in table.columns else 0
    if inverted:
        yield f"{_many(inverted, 'image')} may be inverted (column polarity)."
    left_out = int((table["split"] == LEFT_OUT).sum())
    if left_out:
        yield f"{_many(left_out, 'image')} in no split: a given split holds a copy of a picture of their patients."


def _divisions(table: pd.DataFrame):
    """One table by split and, where there are several, one by source."""
    names = {"split": _splits(table), "source": sorted(set(known_or_not(table["source"])))}
    for column, order in names.items():
        if column == "source" and len(order) < 2:
            continue
        known = table[["patient_id", "age"]].assign(
            **{name: known_or_not(table[name]) for name in (column, "view", "sex")}
        )
        views, sexes = (sorted(set(known[name]), key=lambda v: (v == "unknown", v)) for name in ("view", "sex"))
        rows = []
        for name in [*order, None]:
            part = known if name is None else known[known[column] == name]
            patients, age = part["patient_id"].nunique(), part["age"].dropna()
            rows.append(
                {
                    "name": name or "all",
                    "images": len(part),
                    "patients": patients,
                    "per_patient": len(part) / max(patients, 1),
                    "views": [int((part["view"] == view).sum()) for view in views],
                    "sexes": [int((part["sex"] == sex).sum()) for sex in sexes],
                    "age": [float(q) for q in age.quantile([0.25, 0.5, 0.75])] if len(age) else None,
                }
            )
        yield {"by": column, "views": views, "sexes": sexes, "rows": rows}


def _ages(table: pd.DataFrame) -> dict[str, Any] | None:
    """Counts of images by age: single years for children only, else decades."""
    if not table["age"].notna().any():
        return None
    age = np.floor(table["age"].dropna().to_numpy(np.float64))
    step = 1 if age.max() < 20 else 10
    bins = np.arange(age.min() // step * step, age.max() + step + 1e-6, step)
    counts, _ = np.histogram(age, bins=bins)
    names = [f"{low:.0f}" if step == 1 else "90+" if low >= 90 else f"{low:.0f}–{low + 9:.0f}" for low in bins[:-1]]
    columns = [{"name": n, "count": int(c), "share": c / counts.max()} for n, c in zip(names, counts)]
    return {"columns": columns, "unknown": int(table["age"].isna().sum())}


def _lists(table: pd.DataFrame):
    """Where the images come from: short lists of counts."""
    images = table.groupby("patient_id").size()
    groups = pd.cut(images, [0, 1, 2, 3, 5, 10, np.inf], labels=["1", "2", "3", "4–5", "6–10", "more than 10"])
    counts = groups.value_counts(sort=False)
    shares = [{"name": str(n), "count": int(c), "share": c / len(images)} for n, c in counts.items() if c]
    yield {"title": "Images per patient", "unit": "patients", "rows": shares}
    for column, title, in_order in (("year", "Year", True), ("manufacturer", "Manufacturer", False)):
        if column in table.columns and (known_or_not(table[column]) != "unknown").any():
            values = table[column]
            if column == "year":
                values = values.map(lambda year: "" if pd.isna(year) else f"{year:.0f}")
            yield {"title": title, "unit": "images", "rows": _bars(values, 24 if in_order else BARS, in_order)}
    for column, title in (("photometric", "Photometric interpretation"), ("window", "Window"), ("bits", "Bits stored")):
        if column in table.columns:
            yield {"title": title, "unit": "images", "rows": _bars(table[column], BARS)}


def _checks(table: pd.DataFrame):
    """What carina decided or found, to be doubted by whoever looks."""
    if "lungs_source" in table.columns:
        words = table["lungs_source"] + np.where(
            table["lungs_source"] == "none", "", np.where(table["lungs_plausible"], ", plausible", ", implausible")
        )
        yield {"title": "Lung masks", "unit": "images", "rows": _bars(words, BARS)}
    if "polarity" in table.columns:
        yield {"title": "Polarity", "unit": "images", "rows": _bars(table["polarity"], BARS)}
    if "markers" in table.columns and table["markers"].notna().any():
        found = table["markers"].map(_marker_words)
        yield {"title": "Side markers and text", "unit": "images", "rows": _bars(found, BARS)}
    for column, title in (("view_source", "View known from"), ("route", "Why it was kept")):
        if column in table.columns and (known_or_not(table[column]) != "unknown").any():
            yield {"title": title, "unit": "images", "rows": _bars(table[column], BARS)}
    for column, title in (("chest", "Router: chest"), ("view_confidence", "Router: view")):
        if column in table.columns and table[column].notna().any():
            bins = pd.cut(table[column], [-0.01, 0.5, 0.9, 0.99, 1], labels=["to 0.5", "to 0.9", "to 0.99", "to 1"])
            rows = _bars(bins.astype(object), BARS)
            yield {"title": f"{title} (probability)", "unit": "images", "rows": rows}


def _marker_words(boxes: Any) -> str:
    if boxes is None:
        return "not looked for"
    return " + ".join(sorted({box["label"] for box in boxes})) or "none found"


def _labels(table: pd.DataFrame) -> dict[str, Any]:
    names = [column for column in table.columns if column.startswith(LABEL)]
    names.sort(key=lambda name: -int((table[name] == 1).sum()))
    splits = _splits(table)
    rows = []
    for name in names[:LABEL_ROWS]:
        cells = []
        for split in splits:
            values = table.loc[table["split"] == split, name]
            found = {word: int((values == value).sum()) for word, value in STATES}
            found["unknown"] = len(values) - sum(found.values())
            cells.append({"counts": found, "total": len(values)})
        positive = table[name] == 1
        rows.append(
            {
                "name": name[len(LABEL) :],
                "cells": cells,
                "positive": int(positive.sum()),
                "patients": table.loc[positive, "patient_id"].nunique(),
            }
        )
    return {"splits": splits, "rows": rows, "others": [name[len(LABEL) :] for name in names[LABEL_ROWS:]]}


def _copies(info: dict[str, Any], table: pd.DataFrame) -> dict[str, Any] | None:
    """Counts of groups of copies; None where they were not looked for."""
    report = info.get("duplicates")
    if "duplicates" not in table.columns or (isinstance(report, dict) and not report.get("searched", True)):
        return None
    copied = table[table["duplicates"].fillna("") != ""]
    found = {
        "groups": copied["duplicates"].nunique(),
        "images": len(copied),
        "exact": int(copied.duplicated("content_hash", keep=False).sum()),
        "across_patients": int((copied.groupby("duplicates")["patient_id"].nunique() > 1).sum()),
        "moved": 0,
        "left_out": int((table["split"] == LEFT_OUT).sum()),
    }
    if isinstance(report, dict):
        found["moved"] = int(report.get("moved", 0))
    return found
