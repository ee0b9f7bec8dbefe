"""What the protocols of few labels found, as the figures and tables of docs/few-labels.md.

    carina finetune protocol kermany_labels store=STORE out=KERMANY backbones.moco_anatpaste=RUN ...
    carina finetune protocol nih_labels store=STORE out=NIH backbones.moco_anatpaste=RUN ...
    python benchmarks/few_labels.py protocols=[KERMANY,NIH]

For every folder it writes benchmarks/results/few_labels_SET.json (rounded) and .png, and it puts the tables between the
marks in the page, so that no figure there is typed by hand.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

from common import console, script
from pydantic import Field

from carina.errors import CarinaError
from carina.files import read_json, write_text
from carina.finetune.few_labels_page import OVERALL, pair
from carina.finetune.protocol_page import figure
from carina.recipes import Section

HERE = Path(__file__).resolve().parent


class Arguments(Section):
    """protocols: folders of finished or unfinished protocols of few labels."""

    protocols: Annotated[list[str], Field(min_length=1)]
    page: str
    results: str


def main(words: list[str] | None = None) -> int:
    defaults = {"page": str(HERE.parent / "docs" / "few-labels.md"), "results": str(HERE / "results")}
    return script(words, "few_labels.py", __doc__, Arguments, defaults, show)


def show(arguments: Arguments) -> None:
    page = Path(arguments.page).read_text(encoding="utf-8")
    for folder in map(Path, arguments.protocols):
        result = read_json(folder / "table.json")
        if result.get("task") != "classify":
            raise CarinaError(f"{folder} holds no protocol of few labels; give the out= of one")
        for table in result["tables"]:
            name = f"few_labels_{table['set']}"
            write_text(Path(arguments.results) / f"{name}.json", compact(table))
            shutil.copyfile(folder / "figure.png", Path(arguments.results) / f"{name}.png")
            mark = re.compile(rf"(<!-- {table['set']} -->\n).*?(<!-- end -->)", re.DOTALL)
            if not mark.search(page):
                raise CarinaError(
                    f"{arguments.page} has no place for the set {table['set']}; add <!-- {table['set']} -->"
                )
            text = "\n\n".join(parts(table))
            page = mark.sub(lambda found, text=text: f"{found[1]}\n{text}\n\n{found[2]}", page)
            console().print(text, markup=False)
    write_text(arguments.page, page)


def compact(table: dict[str, Any]) -> str:
    """What a reader may want to compute with, as JSON with a line an entry: figures as [value, low, high]."""

    def line(entry: dict[str, Any], *more: str) -> str:
        kept = {key: entry[key] for key in more if key in entry}
        for key in ("auroc", "difference"):
            if key in entry:
                kept[key] = [short(entry[key][end]) for end in ("value", "low", "high")]
                kept["estimable"] = entry[key]["estimable"]
        return json.dumps({key: short(value) for key, value in kept.items()})

    kind = ("arm", "mode", "patients", "label", "group", "draws")
    pairs = ("row", "reference", "patients", "label", "draws")
    about = {key: table[key] for key in ("set", "counts", "labels", "cells")}
    about["arms"] = {
        row["arm"]: {key: row[key] for key in ("pretext_saw", "seen_patients", "transductive")} for row in table["rows"]
    }
    lists = {
        "rows": [line(row, *kind, "average_precision") for row in table["rows"]],
        "exploratory": [line(entry, *pairs, "p_holm") for entry in table["exploratory"]],
        "permuted": [line(row, *kind, "at_chance") for row in table["permuted"]],
    }
    primary = line(table["primary"], *pairs, "sentence") if table["primary"] else "null"
    rest = [f'"{key}": {json.dumps(value)}' for key, value in about.items()] + [f'"primary": {primary}']
    rest += [f'"{key}": [\n  ' + ",\n  ".join(lines) + "\n]" for key, lines in lists.items()]
    return "{\n" + ",\n".join(rest) + "\n}\n"


def short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def parts(table: dict[str, Any]) -> list[str]:
    """The tables of a set: AUROC by arm and count, frozen and full, then what the permuted labels gave."""
    counts, folds = table["counts"], table["counts"]["folds"]
    labels = ", ".join(f"{name} {n['positive']}/{n['negative']}" for name, n in counts["labels"].items())
    found = [
        f"{counts['test_images']} test images of {counts['test_patients']} patients (positive/negative: {labels})"
        + (f", {folds} patient folds pooled" if folds else "")
        + f"; {table['cells']['done']} of {table['cells']['asked']} cells are done."
    ]
    if table["primary"]:
        found.append(f"**{table['primary']['sentence']}**")
    groups = list(dict.fromkeys((row["label"], row["group"]) for row in table["rows"]))
    several = len(table["labels"]) > 1
    kept = [g for g in groups if g[0] == table["labels"][0] or (several and g == (groups[-1][0], OVERALL))]
    for label, group in kept:
        for mode in dict.fromkeys(row["mode"] for row in table["rows"]):
            rows = [r for r in table["rows"] if (r["label"], r["group"], r["mode"]) == (label, group, mode)]
            found += [f"*{label}{'' if group == OVERALL else ', ' + group}, {mode}*", matrix(rows)]
    if several:
        rows = [r for r in table["rows"] if (r["group"], r["mode"], r["patients"]) == (OVERALL, "frozen", "all")]
        found += ["*Every label, frozen, all patients*", matrix(rows, "label")]
    best = [entry for entry in table["exploratory"] if entry["reference"]["arm"] == partner(entry["row"]["arm"])]
    if best:
        every = len(table["exploratory"])
        said = f"Exploratory: minus ImageNet weights at the same size; p by Holm over all {every} contrasts"
        found += [f"*{said}*", against(best)]
    inside, wide = sum(row["at_chance"] for row in table["permuted"]), len(table["permuted"])
    if wide:
        out = [row for row in table["permuted"] if not row["at_chance"]]
        text = "; ".join(
            f"{r['mode']}, {r['patients']} patients, {r['label']}, {r['group']}: {figure(r['auroc'])}" for r in out
        )
        found.append(
            f"Permuted labels: {inside} of {wide} intervals hold 0.5." + (f" Those that do not: {text}." if out else "")
        )
    return found


def partner(arm: str) -> str:
    """The arm of ImageNet weights that sees images of the same size."""
    return "imagenet_224" if arm.endswith("_224") else "imagenet"


def matrix(rows: list[dict[str, Any]], across: str = "patients") -> str:
    """Markdown: an arm a line, a count of labelled patients (or a label) a column; draws in the head."""
    heads = list(dict.fromkeys(row[across] for row in rows))
    lines = [["arm", *heads], ["---"] * (len(heads) + 1)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = {row[across]: f"{figure(row['auroc'])}, {row['draws']}" for row in rows if row["arm"] == arm}
        lines.append([arm, *(cells.get(head, "-") for head in heads)])
    return markdown(lines)


def against(entries: list[dict[str, Any]]) -> str:
    heads = list(dict.fromkeys(entry["patients"] for entry in entries))
    lines = [["contrast", *heads], ["---"] * (len(heads) + 1)]
    for name in dict.fromkeys(map(pair, entries)):
        cells = {
            e["patients"]: f"{figure(e['difference'], '+')}, p {e['p_holm']:.3f}" for e in entries if pair(e) == name
        }
        lines.append([name, *(cells.get(head, "-") for head in heads)])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
