"""Build the report of an evaluation: one HTML file, the same as Markdown, tables for LaTeX, and all numbers as CSV."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count as counter
from pathlib import Path
from typing import Any

import jinja2

from carina.evaluate.report import checklists, evidence, figures, groups, performance, plain, private, provenance
from carina.evaluate.report.document import Drawn, cell_figure, cell_text, count, label_name, slug, span, three, told
from carina.files import atomic_folder, write_text

SECTIONS = (
    provenance.flow,
    performance.discrimination,
    performance.curves,
    performance.thresholds,
    performance.calibration,
    performance.decisions,
    groups.subgroups,
    groups.external,
    performance.scales,
    evidence.controls,
    evidence.localization,
    evidence.audits,
    evidence.pictures,
    provenance.seen,
    provenance.recipe,
    provenance.environment,
    provenance.cite,
    checklists.section,
)
DEFAULTS: dict[str, Any] = {
    "examples": (),
    "switched_off": False,
    "people": (),
    "sources": {},
    "backbone": {},
    "model": "",
    "input": "",
    "preparation": {},
    "versions": {},
    "recipe": {},
    "environment": {},
}
RESULT: dict[str, Any] = {
    "kind": "classify",
    "mode": "unknown",
    "backbone": "unknown",
    "split": "unknown",
    "where": None,
    "level": "image",
    "pool": None,
    "synthetic": False,
    "labels_used": "not recorded",
    "pretext_saw": "unknown",
    "thresholds_from": "unknown",
    "overlap": None,
    "overlap_sentence": "What the backbone was trained on is unknown, so it may have seen these patients.",
    "resamples": 0,
    "table": (),
}
UNITS = {"image": "images", "study": "studies", "patient": "patients"}


def build_report(out: Path, content: dict[str, Any]) -> Path:
    """Write report.html (without scripts or network), report.md, tables/ and figures/ into `out`; the path of the first.

    content, of which `title`, `result` and `predictions` are needed:
      title         str
      result        what metrics.json says; keys that an older one lacks may be absent, sections without figures are left out
      predictions   frame, one row per image and label: image_id, patient_id, seed, label, target, score
      examples      rows {image (H, W) in [0, 1], heat (H, W) in [0, 1] or None, lungs (H, W) mask or None, right, caption}
      switched_off  True says how pictures are switched on
      people        (name, facts) of each set of images, as `corpus_facts` gives them
      sources       origins of the images by name: title, lineage, terms
      backbone      {name, origin, license}      model, input     sentences on network and normalization
      preparation   photometry and geometry       versions         of packages
      recipe        the resolved recipe           environment      versions and devices, nested or not

    Identifiers of patients and images appear nowhere. Of file paths only the last name is kept, a condition on rows is shown
    where it is made of columns that name nobody, and groups of few patients without their counts and figures, so a report
    can be passed on.
    """
    c = assembled(content)
    sections = [section for build in SECTIONS if (section := build(c)) is not None]
    head = _head(c)
    out = Path(out)
    html = (
        _environment()
        .get_template("report.html")
        .render(head=head, sections=sections, synthetic=c["result"]["synthetic"])
    )
    write_text(out / "report.html", "\n".join(line for line in html.splitlines() if line.strip()) + "\n")
    write_text(out / "report.md", plain.markdown(head, sections))
    with atomic_folder(out / "tables") as folder:
        plain.write_tables(folder, sections, c["result"]["synthetic"])
    with atomic_folder(out / "figures") as folder:
        plain.write_points(folder, sections)
    return out / "report.html"


def assembled(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with defaults and plain Python values, and without what a report keeps to itself."""
    unknown = set(content) - set(DEFAULTS) - {"title", "result", "predictions"}
    assert not unknown, (
        f"build_report does not know {sorted(unknown)}; it takes title, result, predictions, {', '.join(DEFAULTS)}"
    )
    given = {**content, **{key: private.settings(content.get(key) or {}) for key in ("recipe", "environment")}}
    c = DEFAULTS | {k: v if k in ("predictions", "examples") else private.printable(v) for k, v in given.items()}
    c["examples"] = [{**row, "caption": private.printable(row["caption"])} for row in c["examples"]]
    units, patients, runs = performance.frame_facts(c["predictions"])
    result = RESULT | {"images": units, "units": units, "patients": patients} | private.told(c["result"])
    result.setdefault("labels", list(dict.fromkeys(c["predictions"]["label"])))
    result.setdefault("score", "probability" if result["kind"] == "classify" else "distance")
    result["table"] = sorted(result["table"], key=lambda row: row["label"] != "macro")
    return c | {"result": result, "units": UNITS[result["level"]], "runs": runs}


def _head(c: Mapping[str, Any]) -> dict[str, Any]:
    result, synthetic = c["result"], c["result"]["synthetic"]
    warnings = []
    if synthetic:
        warnings.append("These radiographs are synthetic: the figures say that the software runs, nothing of patients.")
    found = result["overlap"]
    if found and (any(stage["patients"] for stage in found["stages"].values()) or found["doubts"]):
        warnings.append(result["overlap_sentence"])
    warnings += result.get("words") or []
    said = [sentence for sentence in result.get("sentences") or [] if sentence not in warnings]
    kind = {"classify": "findings", "anomaly": "anomaly detection"}.get(result["kind"], result["kind"])
    return {
        "title": c["title"],
        "kind": kind,
        "synthetic": synthetic,
        "lead": [_headline(c), f"Backbone: {result['backbone']}. {result['overlap_sentence']}"],
        "judged": _judged(c),
        "said": said,
        "warnings": warnings,
        "tiles": _tiles(c),
    }


def _headline(c: Mapping[str, Any]) -> str:
    result = c["result"]
    if not result["table"]:
        return "No figures were computed."
    first = result["table"][0]
    if first["auroc"]["value"] is None:
        return f"Nothing can be estimated: {first['note']}"
    auroc, what = first["auroc"], label_name(first["label"])
    if first["label"] == "macro":
        what = "the mean over labels"
        if sure := _estimable(result):
            auroc, what = sure["auroc"], f"the mean over the {len(sure['labels'])} labels with enough patients"
            if len(sure["labels"]) == 1:
                what = f"{label_name(sure['labels'][0])}, the one label with enough patients"
    word = "synthetic " if result["synthetic"] else ""
    pooled = f", the {result['pool']} of their images' scores" if result["pool"] else ""
    of = f" of {result['patients']:,} patients" if result["level"] != "patient" else ""
    return f"AUROC {told(auroc)} for {what} on {result['units']:,} {word}{c['units']}{of}{pooled}."


def _estimable(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The mean over the labels that have enough patients, where some have not."""
    return next((row for row in result.get("averages") or () if row["name"] == "estimable" and row["auroc"]), None)


def _judged(c: Mapping[str, Any]) -> str:
    result, units = c["result"], c["units"]
    if result["level"] == "image":
        return "Every figure judges images, each by its own score; intervals resample patients."
    how = f", each by the {result['pool']} of its images' scores" if result["pool"] else ""
    return f"Every figure judges {units}, not images{how}; intervals resample patients."


def _tiles(c: Mapping[str, Any]) -> list[dict[str, str]]:
    result, tiles = c["result"], []
    if result["table"]:
        first = result["table"][0]
        sure = _estimable(result) or first
        for name, found in (("AUROC", sure["auroc"]), ("average precision", sure["ap"])):
            if found and found["value"] is not None:
                what = f"mean {name}" if first["label"] == "macro" else f"{name}, {label_name(first['label'])}"
                under = f"95 % interval {span(found)}" if found["estimable"] else "interval not estimable"
                under += f"; {len(sure['labels'])} of {len(result['labels'])} labels" if sure is not first else ""
                tiles.append({"name": what, "value": three(found["value"]), "under": under, "figure": True})
    units, patients, runs = performance.frame_facts(c["predictions"])
    tiles.append({"name": f"Test {c['units']}", "value": count(units), "under": "", "figure": False})
    if c["units"] != "patients":
        under = f"{runs} runs" if runs > 1 else ""
        tiles.append({"name": "Test patients", "value": count(patients), "under": under, "figure": False})
    return tiles


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"three": three, "count": count, "span": span, "distinct": figures.distinct, "slug": slug}
    environment.globals |= {"cell_figure": cell_figure, "cell_text": cell_text, "whisker": whisker}
    environment.globals["next_number"] = counter(1).__next__
    return environment


def whisker(column: Any, cell: Any) -> dict[str, Any] | None:
    """Where a figure, its interval and chance lie between the ends of a column, in hundredths; None without a value."""
    found = cell_figure(cell)
    if not found or found.get("value") is None:
        return None
    chance = cell.chance if isinstance(cell, Drawn) else column.chance

    def place(value: float | None) -> float | None:
        return (
            None if value is None else round(100 * min(max((value - column.low) / (column.high - column.low), 0), 1), 1)
        )

    return {
        "value": place(found["value"]),
        "low": place(found.get("low")),
        "high": place(found.get("high")),
        "chance": place(chance),
        "sure": found.get("estimable", True),
    }
