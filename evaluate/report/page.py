"""Build `report.html`: headline figures first, then the curves, then everything needed to check them."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import yaml

from carina.evaluate.compare import split_runs
from carina.evaluate.report import figures
from carina.files import write_text

KEYS = {
    "title": "",
    "kind": "classify",
    "score": None,
    "synthetic": False,
    "summary": (),
    "data_flow": (),
    "metrics": (),
    "units": "images",
    "scales": None,
    "controls": (),
    "localization": (),
    "localization_words": "",
    "predictions": None,
    "examples": (),
    "audits": (),
    "overlap": None,
    "labels_used": "",
    "recipe": {},
    "environment": {},
    "warnings": (),
    "how_to_cite": (),
}
_PATH = re.compile(r"(?<![\w:/.\-])(?:~?/|[A-Za-z]:\\)(?:[^\s'\",;/\\]+[/\\])+(?=[^\s'\",;/\\]|\b|$)")


def build_report(out: Path, content: dict[str, Any]) -> Path:
    """Write `out`/report.html, one file without scripts or network, and return its path.

    content, of which `title` and `predictions` are needed:
      title           str
      kind            "classify" or "anomaly"
      score           "probability" or "distance"; default: probability for classify. Only probabilities are calibrated
      synthetic       True marks the page and every figure with the word *synthetic*
      summary         sentences for the top of the page
      warnings        sentences that a reader must see before the figures
      metrics         rows {label, n, positives, auroc, ap, note}; auroc and ap as `Interval.to_dict()` gives them (or
                      None); a row labelled "macro" is the mean over labels and comes first. Of anomaly detection also
                      fpr95, the false-positive rate where 95 % of the abnormal images are found
      units           what has one score and one target: images (default), studies or patients
      scales          `scales` of metrics.json, of a stack of several scales
      controls        rows {control, method, auroc, ap, fpr95, missing}: methods that know nothing of lungs or lesions
      localization    rows {name, found, chance, words}, found as auroc above; localization_words: a sentence on them
      predictions     frame, one row per image and label: image_id, patient_id, seed, label, target, score
      examples        rows {image (H, W) in [0, 1], heat (H, W) in [0, 1] or None, lungs (H, W) mask or None, caption}
      data_flow       rows {what, images, patients or None, note}, in the order in which rows were chosen
      labels_used     a sentence: none, the normal flag, n patients, validation
      audits          rows {name, sentence}: what else may explain the figures
      overlap         {sentence, counts: {what: number}} on test patients that the backbone has seen; None is unknown,
                      and is said to be unknown
      recipe          the resolved recipe          environment     versions and devices, nested or not
      how_to_cite     a text or a list of them

    Identifiers of patients and images appear only where a caption holds them. Of absolute file paths in any text only
    the last name is kept, so a page can be passed on.
    """
    unknown = set(content) - set(KEYS)
    assert not unknown, f"build_report does not know {sorted(unknown)}; it takes {', '.join(KEYS)}"
    page = KEYS | {key: _printable(value) for key, value in content.items() if key not in ("predictions", "examples")}
    synthetic, frame = bool(page["synthetic"]), content["predictions"]
    probability = (page["score"] or ("probability" if page["kind"] == "classify" else "distance")) == "probability"
    rows = sorted(page["metrics"], key=lambda row: row["label"] != "macro")
    chart = {row["label"]: row for row in rows}
    labels = [row["label"] for row in rows if row["label"] != "macro"]
    labels += [label for label in pd.unique(frame["label"]) if label not in chart]
    cite = page["how_to_cite"]
    page |= {
        "metrics": rows,
        "scales": _scales(page["scales"], synthetic),
        "num_images": frame["image_id"].nunique(),
        "num_patients": frame["patient_id"].nunique(),
        "num_runs": len(split_runs(frame)),
        "figure_groups": _figure_groups(frame, labels, chart, probability, synthetic),
        "examples": [_example(row, synthetic) for row in content.get("examples", ())],
        "recipe_text": yaml.safe_dump(page["recipe"], sort_keys=False, allow_unicode=True) if page["recipe"] else "",
        "environment": list(_flat(page["environment"])),
        "how_to_cite": [cite] if isinstance(cite, str) else list(cite),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"three": _three, "count": _count}
    path = Path(out) / "report.html"
    write_text(path, environment.get_template("report.html").render(page))
    return path


def _printable(value: Any) -> Any:
    """Plain Python values with absolute paths cut down to their last name."""
    if isinstance(value, dict):
        return {str(key): _printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_printable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _printable(value.tolist())
    if isinstance(value, (str, Path)):
        return _PATH.sub("", str(value))
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _flat(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _three(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.3f}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}".replace(",", "\u202f")


def _embedded(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _example(row: dict[str, Any], synthetic: bool) -> dict[str, Any]:
    picture = figures.example(row["image"], row.get("heat"), row.get("lungs"), synthetic)
    return {"source": _embedded(picture, "png"), "caption": row.get("caption", ""), "wide": row.get("heat") is not None}


def _scales(found: dict[str, Any] | None, synthetic: bool) -> dict[str, Any] | None:
    """The chart of weights and the rows of the table, by finding, with the best scale marked."""
    if not found:
        return None
    rows = []
    for label in dict.fromkeys(row["label"] for row in found["rows"]):
        best = found["best"].get(label, {})
        words = {best.get("scale"): "here", best.get("chosen"): "in training"}
        if best.get("scale") == best.get("chosen"):
            words = {best.get("scale"): "here and in training"}
        rows += [{**row, "best": words.get(row["scale"], "")} for row in found["rows"] if row["label"] == label]
    chart = _embedded(figures.stack_chart(found, synthetic), "svg+xml")
    return {"rows": rows, "chart": chart, "source": found["from"]}


def _with_interval(found: dict[str, Any] | None) -> str:
    if not found or found["value"] is None:
        return ""
    if not found.get("estimable", True):
        return f"{_three(found['value'])}, interval not estimable"
    return f"{_three(found['value'])} ({_three(found['low'])} to {_three(found['high'])})"


def _figure_groups(
    frame: pd.DataFrame, labels: list[str], chart: dict[str, dict], probability: bool, synthetic: bool
) -> list[dict[str, Any]]:
    """The figures in groups of one kind, one small figure per label that has both classes."""
    word = "Synthetic: " if synthetic else ""
    groups = {
        "ROC curves": "How many sick images are found (up) for how many false alarms (right). The band is the 95 % "
        "interval at each point, patients resampled; the dashed line is chance. Several runs are drawn as thin lines, "
        "a label with too few patients without a band.",
        "Precision and recall": "Of the images that are called, how many have the finding (up), and how many of all "
        "findings that reaches (right). The dashed line is the share of images with the finding.",
        "Scores": "The scores of images with and without the finding, each as shares of its class.",
        "Calibration": "Images in ten groups of equal size: the probability they were given against the share that has "
        "the finding. On the dashed line a probability means what it says. Bars: 95 % by images (Wilson).",
    }
    panels: dict[str, list[dict[str, str]]] = {name: [] for name in groups}
    for label in labels:
        part = frame[frame["label"] == label]
        runs = [
            (run["target"].to_numpy(float), run["score"].to_numpy(float), run["patient_id"].to_numpy())
            for run in split_runs(part)
        ]
        if not {0.0, 1.0} <= set(np.unique(runs[0][0])):
            continue
        row = chart.get(label, {})
        auroc, ap = row.get("auroc"), row.get("ap")
        band = auroc is None or auroc.get("estimable", True)
        target, score = (np.concatenate([run[i] for run in runs]) for i in (0, 1))
        drawn = [
            ("ROC curves", figures.roc(runs, band, synthetic), _with_interval(auroc)),
            ("Precision and recall", figures.precision_recall(runs, synthetic), _with_interval(ap)),
            ("Scores", figures.histogram(target, score, probability, synthetic), ""),
        ]
        if probability:
            drawn.append(("Calibration", figures.calibration(target, score, synthetic), ""))
        for name, svg, figure in drawn:
            alternative = f"{word}{name} of {label}" + (f": {figure}" if figure else "")
            panels[name].append(
                {"label": label, "figure": figure, "alt": alternative, "source": _embedded(svg, "svg+xml")}
            )
    return [{"name": name, "words": groups[name], "panels": panels[name]} for name in groups if panels[name]]
