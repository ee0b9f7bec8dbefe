"""Sections of a report on where it all comes from: images, patients, what was seen before, recipe, versions, citations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from carina import __version__
from carina.evaluate.report.document import Block, Code, Column, Flow, Section, Table, Text, count, label_name
from carina.models.hub.few import FEW, OLDEST, counted

KNOWN = "known "  # how the steps of the flow that concern one label begin

CARINA = f"""@software{{carina,
  title   = {{carina: self-supervised pretraining, few-label fine-tuning and honest evaluation for chest X-rays}},
  author  = {{{{The carina developers}}}},
  version = {{{__version__}}},
  license = {{Apache-2.0}}
}}"""
GUIDELINES = (
    "Reporting guidelines: CLAIM 2024 (Tejani et al., Radiology: Artificial Intelligence 2024, "
    "doi:10.1148/ryai.240300) and TRIPOD+AI (Collins et al., BMJ 2024, doi:10.1136/bmj-2023-078378)."
)


def flow(c: Mapping[str, Any]) -> Section | None:
    result = c["result"]
    steps = [dict(step) for step in result.get("flow") or []]
    blocks: list[Block] = []
    spine = [step for step in steps if not step["step"].startswith(KNOWN)]
    for before, step in zip([None, *spine], spine):
        step["lost"] = None
        if before is not None:
            lost = [
                None if None in (before[key], step[key]) else before[key] - step[key] for key in ("images", "patients")
            ]
            step["lost"] = lost if lost[0] else None
    if spine:
        blocks.append(Flow(spine))
    known = [step for step in steps if step["step"].startswith(KNOWN)]
    known = known or _known(c)
    if len({(step["images"], step["patients"]) for step in known}) > 1:
        columns = [
            Column("Label"),
            Column("Known images", "count"),
            Column("Patients", "count"),
            Column("Note", "note"),
        ]
        cells = [[label_name(s["step"].removeprefix(KNOWN)), s["images"], s["patients"], s["note"]] for s in known]
        blocks.append(Table("flow", "Images with a known target, by label", columns, cells))
    elif known:
        units = f"{count(known[0]['images'])} {c['units']}"
        blocks.append(Text([f"Every label is known of the same {units} ({count(known[0]['patients'])} patients)."]))
    if people := _people(c):
        blocks.append(people)
    return Section("Data", blocks, figures=False) if blocks else None


def _known(c: Mapping[str, Any]) -> list[dict[str, Any]]:
    known = c["predictions"].dropna(subset="target").drop_duplicates(["image_id", "label"])
    return [
        {"step": KNOWN + label, "images": len(rows), "patients": rows["patient_id"].nunique(), "note": ""}
        for label, rows in known.groupby("label", sort=False)
    ]


def _people(c: Mapping[str, Any]) -> Table | None:
    """A column a set of images: pretraining, training, test."""
    people = c["people"]
    if not people:
        return None
    rows = [
        ["Images", *(count(facts["images"]) for _, facts in people)],
        ["Patients", *(count(facts["patients"]) for _, facts in people)],
        ["Age in years: median (5th to 95th percentile)", *(_age(facts) for _, facts in people)],
    ]
    for name, key in (("Sex", "sex"), ("View", "view"), ("Source", "source")):
        rows.append([name, *(_shares(facts.get(key) or {}, facts["images"]) for _, facts in people)])
    columns = [Column(""), *(Column(name) for name, _ in people)]
    below = f"Ages, one a patient, are told of {FEW} patients and more; older than {OLDEST} counts as {OLDEST}."
    return Table("people", "Who is shown, by image", columns, rows, below=below)


def _age(facts: Mapping[str, Any]) -> str:
    """Without the youngest and the oldest, which an earlier carina kept."""
    if facts.get("age_median") is None or facts["patients"] < FEW:
        return "unknown or too few"
    between = facts.get("age_percentiles")
    return f"{facts['age_median']:.0f}" + (f" ({between[0]:.0f} to {between[1]:.0f})" if between else "")


def _shares(counts: Mapping[str, int | None], total: int) -> str:
    if not counts:
        return "unknown"
    several = len(counts) > 1
    return ", ".join(f"{name} {counted(n)}" + (f" ({n / total:.0%})" if several and n and n >= FEW else "")
                     for name, n in counts.items())  # fmt: skip


def seen(c: Mapping[str, Any]) -> Section:
    result, found = c["result"], c["result"]["overlap"]
    known = bool(found and found["known"])
    unclear = (
        "Unknown. Nothing records which patients the backbone was trained on, so an overlap with the test patients cannot "
        "be excluded."
    )
    sentences = [
        result["overlap_sentence"] if known else unclear,
        f"The pretext saw: {result['pretext_saw']}. Labels used: {result['labels_used']}. "
        f"{left_out(c)} Thresholds from {result['thresholds_from']}.",
    ]
    blocks: list[Block] = [Text(sentences)]
    if known and found["stages"]:
        names = ("patients", "images_of_those", "identical_images", "near_identical_images")
        words = ("Patients shared", "Images of those", "Identical images", "Nearly identical")
        cells = [[stage, *(counts.get(name) for name in names)] for stage, counts in found["stages"].items()]
        columns = [Column("Stage"), *(Column(word, "count") for word in words)]
        blocks.append(Table("overlap", "What training and test share", columns, cells))
    return Section("What the model had seen", blocks, figures=False)


def left_out(c: Mapping[str, Any]) -> str:
    unknown = int(c["predictions"]["target"].isna().sum())
    if not unknown:
        return "Every target is known."
    return f"{unknown:,} unknown or uncertain targets of {len(c['predictions']):,} were left out, label by label."


def recipe(c: Mapping[str, Any]) -> Section | None:
    if not c["recipe"]:
        return None
    text = yaml.safe_dump(c["recipe"], sort_keys=False, allow_unicode=True).strip()
    return Section("Recipe", [Code(text, columns=True)], figures=False)


def environment(c: Mapping[str, Any]) -> Section | None:
    rows = [[name.removeprefix("packages."), value] for name, value in _flat(c["environment"])]
    columns = [Column("What"), Column("Version or value")]
    table = Table("environment", "Versions and machine", columns, rows)
    return Section("Environment", [table], figures=False) if rows else None


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif value is not None:
            yield f"{before}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def cite(c: Mapping[str, Any]) -> Section:
    lines = [source_line(name, origin) for name, origin in c["sources"].items()]
    backbone = c["backbone"]
    if backbone:
        license = f"; license of its weights: {backbone['license']}" if backbone.get("license") else ""
        lines.append(
            f"Backbone: {backbone['name']} of timm (Wightman, doi:10.5281/zenodo.4414861), {backbone['origin']}{license}."
        )
    return Section(
        "How to cite",
        [
            Text(["This software, the sources of the images, and the backbone:"]),
            Code(CARINA),
            Text([*lines, GUIDELINES], True),
        ],
        figures=False,
    )


def source_line(name: str, origin: Mapping[str, Any]) -> str:
    """What is known of a source's license and how its owners want to be cited."""
    terms = origin.get("terms") or {}
    title = origin.get("title") or name
    parents = f", drawn from {', '.join(origin['lineage'])}" if origin.get("lineage") else ""
    cited = terms.get("citation") or "how to cite it is not known to carina: ask its owner"
    license = terms.get("license") or "not known to carina"
    return f"Images: {title}{parents}. Cite: {cited.rstrip('.')}. License: {license}."
