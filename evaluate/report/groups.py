"""Sections of a report on groups of patients and on data from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carina.evaluate.report.document import Block, Column, Drawn, Section, Table, Text, label_name
from carina.models.hub.few import FEWER

VARIABLES = {"view": "View", "sex": "Sex", "age": "Age", "manufacturer": "Manufacturer", "source": "Source"}
MANY = 12  # sentences or rows that are read at a glance


def subgroups(c: Mapping[str, Any]) -> Section | None:
    result = c["result"]
    rows, confounders, worst = (result.get(key) or [] for key in ("subgroups", "confounders", "worst"))
    blocks: list[Block] = []
    said = [row["sentence"] for row in [*_told(confounders, "difference"), *_told(worst, "gap")]]
    if said:
        blocks.append(Text(said, listed=True))
    if confounders:
        blocks.append(_confounders(confounders))
    if worst:
        blocks.append(_weakest(worst))
    if rows:
        blocks.append(_forest(rows, result["table"], c["units"]))
    return Section("Subgroups", blocks) if blocks else None


def _variable(row: Mapping[str, Any]) -> str:
    return VARIABLES.get(row["variable"], str(row["variable"]))


def _group(row: Mapping[str, Any]) -> str:
    return f"{row['group']} (not shown)" if row["n"] is None and row["auroc"] is None else str(row["group"])


def _told(rows: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """Rows whose sentence is worth reading: those that can be estimated; of many, those whose interval excludes 0."""
    apart = [row for row in rows if row.get("sentence") and row.get("separated")]  # the variable alone tells the label
    sure = [row for row in rows if row.get("sentence") and row[key] and row[key].get("estimable")]
    if len(sure) > MANY:
        sure = [row for row in sure if row[key]["low"] > 0 or row[key]["high"] < 0]
    return apart + [row for row in sure if not row.get("separated")]


def _confounders(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = [Column("Variable"), Column("Label"), Column("Share of positives, by group", "note")]
    columns += [
        Column("Overall", "figure"),
        Column("Within groups", "figure"),
        Column("Overall minus within", "difference"),
    ]
    known = any(row.get("among_negatives") for row in rows)
    columns += [Column("Group, among negatives", "figure")] * known
    cells = []
    for row in rows:
        shares = ", ".join(f"{group} {share:.0%}" for group, share in row["prevalence"].items() if share is not None)
        figures = [row["overall"], row["within"], row["difference"], *[row.get("among_negatives")] * known]
        cells.append([_variable(row), label_name(row["label"]), shares, *figures])
    below = (
        "AUROC. Within: positives are ranked only against negatives of their own group, averaged over groups by the number "
        "of such pairs. Overall also counts pairs across groups, which differ in how often or how plainly the finding "
        "shows; what it gains over within can be knowledge of the variable."
    )
    if known:
        below += (
            " Group, among negatives: how well the scores of images without the finding tell the groups in which it is more "
            "frequent; above 0.5 they know the group."
        )
    return Table("confounders", "AUROC overall and within groups", columns, cells, below=below, folded=len(rows) > MANY)


def _weakest(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = [Column("Label"), Column("Variable"), Column("Weakest group"), Column("AUROC", "drawn", chance=0.5)]
    columns.append(Column("Gap to the rest", "difference"))
    cells = [[label_name(r["label"]), _variable(r), str(r["group"]), r["auroc"], r["gap"]] for r in rows]
    below = (
        "Gap: the AUROC of the other groups, over pairs of one group each, minus that of this one, patients resampled. With "
        "many groups one is weak by chance."
        if any(row.get("chosen_from") for row in rows)
        else "Gap: the AUROC of the rest minus that of the group, patients resampled. With many groups one is weak by "
        "chance."
    )
    return Table("worst", "The weakest group of each label", columns, cells, below=below)


def _forest(rows: Sequence[Mapping[str, Any]], table: Sequence[Mapping[str, Any]], units: str) -> Table:
    """All groups, folded by label; the dashed line is the AUROC of all patients."""
    overall = {row["label"]: (row["auroc"] or {}).get("value") for row in table}
    sure = [row for row in rows if row["auroc"] and row["auroc"].get("estimable") and row["auroc"]["low"] is not None]
    low = int(min([0.5, *(row["auroc"]["low"] for row in sure)]) * 10) / 10
    names = [(key, key.capitalize()) for key in ("sensitivity", "specificity") if any(row.get(key) for row in rows)]
    columns = [Column("Label"), Column("Variable"), Column("Group"), Column(units.capitalize(), "count")]
    columns += [Column("Patients", "count"), Column("Positive", "count"), Column("AUROC", "drawn", low=low)]
    columns += [Column("Average precision", "figure"), *(Column(name, "figure") for _, name in names)]
    labels, variables = (list(dict.fromkeys(row[key] for row in rows)) for key in ("label", "variable"))
    order = sorted(rows, key=lambda row: (labels.index(row["label"]), variables.index(row["variable"])))
    cells = [
        [
            *(label_name(row["label"]), _variable(row), _group(row), row["n"], row["patients"], row["positives"]),
            *(Drawn(row["auroc"], overall.get(row["label"])), row["ap"], *(row.get(key) for key, _ in names)),
        ]
        for row in order
    ]
    below = (
        f"The drawings run from {low:g} to 1; the dashed mark is the AUROC of all patients. Pale italics: not estimable. "
        "The groups of a variable are other patients, so their figures may differ by chance alone."
    )
    if any(row["n"] is None for row in rows):
        below += (
            f" Not shown: groups of {FEWER} patients, and counts from which those of such a group could be computed."
        )
    opened = {label_name(row["label"]) for row in sure}
    return Table("subgroups", "Figures by group", columns, cells, below=below, folded=True, opened=opened)


def external(c: Mapping[str, Any]) -> Section | None:
    found = c["result"].get("external")
    if not found:
        return None
    blocks: list[Block] = [Text([found["sentence"]])] if found.get("sentence") else []
    shift = found.get("shift")
    if shift and c["result"]["kind"] == "classify":  # an anomaly detector learns from normal images alone
        columns = [
            Column("Label"),
            Column("In training", "number"),
            Column("Here", "number"),
            Column("Times as common", "number"),
        ]
        columns += [Column("Known in training", "count"), Column("Known here", "count")]
        cells = [
            [label_name(row["label"]), *(row[f"{w}_prevalence"] for w in ("train", "test")), _times(row)]
            + [row.get(f"{w}_n") for w in ("train", "test")]
            for row in shift
        ]
        below = "Predictive values and probabilities move with the share of positives, AUROC does not."
        blocks.append(Table("shift", "Share of positives in training and here", columns, cells, below=below))
    if rows := found.get("recalibration"):
        names = [("brier", "Brier score"), ("ece", "ECE"), ("slope", "Slope"), ("intercept", "Intercept")]
        columns = [Column("Label"), Column("When"), *(Column(name, "figure") for _, name in names)]
        columns += [Column("Temperature", "number"), Column("Shift", "signed")]
        cells = []
        for row in rows:
            for when in ("before", "after"):
                fitted = [row["temperature"], row["intercept"]] if when == "after" else [None, None]
                part = row.get(when) or {}
                cells.append([label_name(row["label"]), when, *(part.get(key) for key, _ in names), *fitted])
        most = max((row.get("patients_fitted") or 0 for row in rows), default=0)
        below = (
            f"A temperature and a shift are fitted on half of these patients (up to {most:,}) and judged on the other half, "
            "both ways: what labels of a few patients from the new place would mend."
        )
        blocks.append(Table("recalibration", "Before and after recalibration", columns, cells, below=below))
    return Section(origin_title(found), blocks) if blocks else None


def origin_title(found: Mapping[str, Any]) -> str:
    titles = {"external": "External test", "internal": "Internal test"}
    return titles.get(found["kind"], "Where the test data come from")


def _times(row: Mapping[str, Any]) -> str:
    before, now = row.get("train_prevalence"), row.get("test_prevalence")
    return f"{now / before:.2g}" if before and now is not None else ""
