"""Sections of a report on how good the scores are: discrimination, curves, thresholds, calibration, decisions, scales."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from carina.evaluate.compare import split_runs
from carina.evaluate.report import figures
from carina.evaluate.report.document import (
    Block,
    Chart,
    Charts,
    Column,
    Drawn,
    Section,
    Table,
    Text,
    label_name,
    slug,
    told,
)
from carina.metrics.reliability import reliability

FEW = re.compile(r"only (\d+) patients? (?:has|have) a (positive|negative) image; fewer than 20 ")
MANY = 40  # labels beyond which charts are left to the files of points: a page of hundreds is heavy and nobody reads it
INTERVALS = (
    "95 % intervals resample patients, not images. The drawings run from 0 to 1; the dashed mark is chance: 0.5 for AUROC, "
    "the share of positives for average precision. Pale italics: not estimable, the interval should not be relied on."
)


def noted(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(labels, note): what is said of several labels alike, but for a count, is said once."""
    found: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        if row.get("note"):
            number = FEW.match(row["note"])
            note = (
                f"fewer than 20 patients have a {number[2]} image, too few for an interval" if number else row["note"]
            )
            found.setdefault(note, []).append((label_name(row["label"]), f" ({number[1]})" if number else ""))
    return [(", ".join(name + number for name, number in labels), note) for note, labels in found.items()]


def prevalence(row: Mapping[str, Any]) -> float | None:
    return row["positives"] / row["n"] if row.get("n") and row["label"] != "macro" else None


def discrimination(c: Mapping[str, Any]) -> Section | None:
    result, rows = c["result"], c["result"]["table"]
    if not rows:
        return None
    anomaly = result["kind"] == "anomaly"
    columns = [Column("Label"), Column(c["units"].capitalize(), "count"), Column("Positive", "count")]
    columns += [Column("AUROC", "drawn", chance=0.5), Column("Average precision", "drawn")]
    columns += [Column("FPR at 95 % TPR", "number")] * anomaly
    cells = [
        [label_name(row["label"]), row["n"], None if row["label"] == "macro" else row["positives"], row["auroc"]]
        + [Drawn(row["ap"], prevalence(row))]
        + [row.get("fpr95")] * anomaly
        for row in rows
    ]
    table = Table("results", "Discrimination by label", columns, cells, _macro(rows), INTERVALS, noted(rows))
    blocks: list[Block] = [table]
    if averages := result.get("averages"):
        columns = [Column("Average"), Column("Labels", "count"), Column("AUROC", "drawn", chance=0.5)]
        columns.append(Column("Average precision", "drawn"))
        cells = [[row["name"].capitalize(), len(row["labels"]), row["auroc"], row["ap"]] for row in averages]
        notes = [(row["name"].capitalize(), row["words"] + _left_out(row["left_out"])) for row in averages]
        blocks.append(Table("averages", "Averages over labels", columns, cells, notes=notes))
    return Section("Discrimination", blocks)


def _macro(rows: Sequence[Mapping[str, Any]]) -> frozenset[int]:
    return frozenset(number for number, row in enumerate(rows) if row["label"] == "macro")


def _left_out(labels: Sequence[str]) -> str:
    return f"; left out: {', '.join(map(label_name, labels))}" if labels else ""


def drawn_labels(c: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], list[figures.Run]]]:
    """(label, its row, its runs) of every label that has both classes, in the order of the table."""
    chart = {row["label"]: row for row in c["result"]["table"]}
    found = []
    parts = dict(tuple(c["predictions"].groupby("label", sort=False)))
    for label in dict.fromkeys([*(name for name in chart if name in parts), *parts]):
        runs = [
            (run["target"].to_numpy(float), run["score"].to_numpy(float), run["patient_id"].to_numpy())
            for run in split_runs(parts[label])
        ]
        if {0.0, 1.0} <= set(np.unique(runs[0][0])):
            found.append((label, chart.get(label, {}), runs))
    return found


def charted(c: Mapping[str, Any], labels: Iterable[str]) -> set[str]:
    """Of many labels the first MANY, those that can be estimated before others."""
    sure = {row["label"] for row in c["result"]["table"] if (row["auroc"] or {}).get("estimable", True)}
    return set(sorted(labels, key=lambda label: label not in sure)[:MANY])


def charts(
    c: Mapping[str, Any], name: str, words: str, drawings: Sequence[tuple[str, figures.Drawing, str]]
) -> list[Block]:
    """One group of charts from (label, drawing, words under the label)."""
    word = "Synthetic: " if c["result"]["synthetic"] else ""
    more = [drawing.data.assign(label=label) for label, drawing, _ in drawings if not drawing.svg]
    if more:
        words += (
            f" Drawn are {len(drawings) - len(more)} of {len(drawings)} labels, the first that can be estimated; the points "
            f"of all stand in figures/{slug(name)}.csv."
        )
    made = [
        Chart(
            label_name(label),
            under,
            drawing.svg,
            f"{word}{name} of {label_name(label)}" + (f": {under}" if under else ""),
            drawing.data.assign(label=label)[["label", *drawing.data.columns]],
        )
        for label, drawing, under in drawings
        if drawing.svg
    ]
    return [Charts(name, words, made, more)] if made else []


def curves(c: Mapping[str, Any]) -> Section | None:
    labels, synthetic, units = drawn_labels(c), c["result"]["synthetic"], c["units"]
    chosen = charted(c, [label for label, _, _ in labels])
    probability = c["result"]["score"] == "probability"

    def group(name: str, words: str, figure: str | None, draw: Callable[..., figures.Drawing]) -> list[Block]:
        made = [
            (label, draw(row, runs, label in chosen), told(row[figure]) if figure and row.get(figure) else "")
            for label, row, runs in labels
        ]
        return charts(c, name, words, made)

    def histogram(_: Mapping[str, Any], runs: list[figures.Run], shown: bool) -> figures.Drawing:
        target, score = (np.concatenate([run[i] for run in runs]) for i in (0, 1))
        return figures.histogram(target, score, probability, synthetic, shown)

    blocks = [
        *group(
            "ROC curves",
            f"How many of the positive {units} are found (up) for how many false alarms (right). The band is the 95 % "
            "interval at each point, patients resampled; the dashed line is chance. Several runs are thin lines; a label "
            "with too few patients has no band.",
            "auroc",
            lambda row, runs, shown: figures.roc(
                runs, not row or row["auroc"].get("estimable", True), synthetic, shown
            ),
        ),
        *group(
            "Precision and recall",
            f"Of the {units} that are called, how many have the finding (up), and how many of all findings that reaches "
            f"(right). The dashed line is the share of {units} with the finding.",
            "ap",
            lambda _, runs, shown: figures.precision_recall(runs, synthetic, shown),
        ),
        *group(
            "Scores",
            f"The scores of {units} with and without the finding, each as shares of its class.",
            None,
            histogram,
        ),
    ]
    return Section("Curves", blocks) if blocks else None


def thresholds(c: Mapping[str, Any]) -> Section | None:
    found = [(row.get("threshold"), row.get("sensitivity"), row) for row in c["result"]["table"]]
    rows = [row for threshold, sensitivity, row in found if threshold is not None or sensitivity is not None]
    if not rows:
        return None
    names = [
        ("sensitivity", "Sensitivity"),
        ("specificity", "Specificity"),
        ("ppv", "PPV"),
        ("npv", "NPV"),
        ("f1", "F1"),
    ]
    names = [(key, name) for key, name in names if any(row.get(key) is not None for row in rows)]
    columns = [Column("Label"), Column("Threshold", "number"), *(Column(name, "figure") for _, name in names)]
    cells = [
        [label_name(row["label"]), _threshold(row.get("threshold")), *(as_figure(row.get(key)) for key, _ in names)]
        for row in rows
    ]
    caption = f"At thresholds from {c['result']['thresholds_from']}"
    below = (
        "PPV and NPV, the predictive values, hold for the share of positives here and for no other. "
        "With 95 % intervals, patients resampled."
    )
    blocks: list[Block] = [Table("thresholds", caption, columns, cells, below=below)]
    stated = [row for row in rows if row.get("at_prevalence")]
    if stated:
        columns = [Column("Label"), Column("Stated prevalence", "number"), Column("PPV", "figure")]
        cells = [
            [label_name(row["label"])] + [row["at_prevalence"][key] for key in ("prevalence", "ppv", "npv")]
            for row in stated
        ]
        table = Table(
            "prevalence", "Predictive values at a stated prevalence", [*columns, Column("NPV", "figure")], cells
        )
        table.below = "By Bayes' rule from sensitivity and specificity, which are taken to be the same there."
        blocks.append(table)
    return Section("At the operating points", blocks)


def _threshold(value: float | None) -> str:
    """Several fits are pooled, each called at its own."""
    if value is None:
        return "each fit's own"
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}"


def as_figure(value: Any) -> Mapping[str, Any] | None:
    """A figure; of an older metrics.json a plain number."""
    return {"value": value, "low": None, "high": None} if isinstance(value, (int, float)) else value


def calibration(c: Mapping[str, Any]) -> Section | None:
    result = c["result"]
    if result["score"] != "probability":
        return None
    names = [
        ("brier", "Brier score"),
        ("ece", "ECE"),
        ("calibration_slope", "Slope"),
        ("calibration_intercept", "Intercept"),
    ]
    rows = [row for row in result["table"] if any(row.get(key) for key, _ in names)]
    blocks: list[Block] = []
    if rows:
        columns = [
            Column("Label"),
            *(Column(name, "figure") for _, name in names[:3]),
            Column("Intercept", "difference"),
        ]
        cells = [[label_name(row["label"]), *(row.get(key) for key, _ in names)] for row in rows]
        below = (
            "Brier score and expected calibration error (ECE): 0 is best. Slope of logistic recalibration: 1 is right, "
            "below 1 the probabilities are too extreme; intercept: 0 is right, below 0 they are too high."
        )
        blocks.append(Table("calibration", "Calibration by label", columns, cells, _macro(rows), below))
    bins = result.get("calibration_bins") or {}
    drawings, labels = [], drawn_labels(c)
    chosen = charted(c, [label for label, _, _ in labels])
    for label, _, runs in labels:
        target, score = (np.concatenate([run[i] for run in runs]) for i in (0, 1))
        found = bins.get(label) or reliability(target, score)
        drawings.append((label, figures.calibration(found, result["synthetic"], label in chosen), ""))
    units = c["units"]
    words = (
        f"{units.capitalize()} in groups of about equal size: the probability they were given (right) against the share "
        f"that has the finding (up). On the dashed line a probability means what it says. Bars: 95 % by {units} (Wilson)."
    )
    blocks += charts(c, "Calibration curves", words, drawings)
    return Section("Calibration", blocks) if blocks else None


def decisions(c: Mapping[str, Any]) -> Section | None:
    found = c["result"].get("decision_curves") or {}
    found = {label: one for label, one in found.items() if one}
    chosen, synthetic, units = charted(c, found), c["result"]["synthetic"], c["units"]
    drawings = [(label, figures.decision(one, synthetic, label in chosen, units), "") for label, one in found.items()]
    words = (
        f"Net benefit (Vickers and Elkin 2006) of 100 {units}: findings caught, less false alarms weighed by the threshold "
        "probability at which one would act. The model is of use where its line lies above calling all and calling none."
    )
    blocks = charts(c, "Decision curves", words, drawings)
    return Section("Decision curves", blocks) if blocks else None


def scales(c: Mapping[str, Any]) -> Section | None:
    found = c["result"].get("scales")
    if not found:
        return None
    synthetic = c["result"]["synthetic"]
    columns = [Column("Label"), Column("Scale"), Column("Weight", "number"), Column("AUROC", "drawn", chance=0.5)]
    columns += [Column("Stack minus scale", "difference"), Column("Best", "note")]
    rows = []
    for label in dict.fromkeys(row["label"] for row in found["rows"]):
        best = found["best"].get(label, {})
        for row in (row for row in found["rows"] if row["label"] == label):
            words = [w for key, w in (("scale", "here"), ("chosen", "in training")) if best.get(key) == row["scale"]]
            cells = [label_name(label), f"{row['scale']} px", row["weight"], row["auroc"], row["stack_minus"]]
            rows.append([*cells, " and ".join(words)])
    strong = frozenset(number for number, row in enumerate(rows) if row[0] == label_name("macro"))
    drawing = figures.stack_drawing(found, synthetic)
    alt = ("Synthetic: " if synthetic else "") + "Weights of the scales in the stack, by finding"
    words = (
        f"The score is the mean of the scales' probabilities, weighted for each finding. Weights come from {found['from']}, "
        "never from these images. The best scale of these very images flatters itself, so the stack is held against the "
        "hardest of them."
    )
    return Section(
        "What each scale counts",
        [
            Text([words]),
            Charts(
                "Weights of the scales", "", [Chart("", "", drawing.svg, alt, drawing.data)], wide=True, headed=False
            ),
            Table("scales", "Every scale beside the stack", columns, rows, strong),
        ],
    )


def frame_facts(frame: pd.DataFrame) -> tuple[int, int, int]:
    """Units, patients and runs of a predictions frame."""
    return frame["image_id"].nunique(), frame["patient_id"].nunique(), len(split_runs(frame))
