"""Overall against within one view: how much of a figure is knowledge of how the picture was taken.

    python benchmarks/within_view.py store=STORE work=FOLDER [out=FILE.json] [labels=[abnormal,Effusion,...]]
                                     [backbones=[imagenet-lite0,random]] [scale=224] [folds=5] [resamples=2000]

Each backbone is frozen and probed in patient folds (`carina finetune classify folds=`), the folds' scores are pooled and
evaluated (`carina evaluate split=fold`); runs that are in `work` already are taken as they are. Every row is of one label:
AUROC over all images, over pairs of one view, within each view, and the paired difference of the first two, patients
resampled. `among negatives` is the AUROC of being of the view in which the label is more frequent, by the scores of images
without it: above 0.5 the score knows the view. The rows `view alone` rank by the view and nothing else, by the share of
positives in it: what a model could get without looking at a lung.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from common import console, script
from pydantic import Field
from rich.table import Table

from carina.evaluate.score import evaluate
from carina.files import write_json
from carina.finetune.run import finetune
from carina.metrics.intervals import patient_bootstrap
from carina.recipes import Section


class Arguments(Section):
    store: str
    work: str
    out: str | None
    labels: Annotated[list[str], Field(min_length=1)]
    backbones: Annotated[list[str], Field(min_length=1)]
    scale: int
    folds: Annotated[int, Field(ge=2)]
    resamples: Annotated[int, Field(ge=100)]


DEFAULTS = {
    "out": None,
    "labels": ["abnormal", "Atelectasis", "Effusion", "Infiltration", "Edema"],
    "backbones": ["imagenet-lite0", "random"],
    "scale": 224,
    "folds": 5,
    "resamples": 2000,
}


def evaluated(given: Arguments, backbone: str) -> tuple[dict[str, Any], pd.DataFrame]:
    """metrics.json and predictions of a frozen probe on `backbone`, its folds pooled."""
    place = Path(given.work) / "".join(c if c.isalnum() else "-" for c in backbone)
    runs = [place / f"fold-{fold}" for fold in range(given.folds)]
    for fold, run in enumerate(runs):
        if not (run / "predictor").is_dir():
            recipe = {
                "store": given.store, "backbone": backbone, "labels": given.labels, "scale": given.scale,
                "folds": given.folds, "fold": fold, "cache": str(Path(given.work) / "cache"), "out": str(run),
                "threads": 1, "wandb": "off",
            }  # fmt: skip
            finetune("classify", recipe, quiet=True)
    out = place / "evaluation"
    asked = {"store": given.store, "split": "fold", "out": str(out), "resamples": given.resamples, "examples": 0}
    result = evaluate(",".join(map(str, runs)), asked, quiet=True)
    return result, pd.read_parquet(out / "predictions.parquet")


def view_alone(frame: pd.DataFrame, label: str, resamples: int) -> dict[str, Any]:
    """AUROC of the view's share of positives: nothing of the picture is read."""
    rows = frame[(frame["label"] == label) & frame["target"].notna()]
    share = rows.groupby("view")["target"].transform("mean")
    found = patient_bootstrap(rows["target"], share, rows["patient_id"].to_numpy(), resamples=resamples)
    return found.to_dict()


def work(given: Arguments) -> None:
    rows, sentences = [], {}
    for backbone in given.backbones:
        result, frame = evaluated(given, backbone)
        mixed = {entry["label"]: entry for entry in result["confounders"] if entry["variable"] == "view"}
        for label, entry in mixed.items():
            figures = {"overall": entry["overall"], "within": entry["within"], **entry["groups"]}
            rows.append({"backbone": backbone, "label": label, **figures, "difference": entry["difference"],
                         "among_negatives": entry["among_negatives"], "prevalence": entry["prevalence"],
                         "p_corrected": entry["p_corrected"]})  # fmt: skip
            sentences[f"{backbone}, {label}"] = entry["sentence"]
    rows += [
        {"backbone": "view alone", "label": label, "overall": view_alone(frame, label, given.resamples)}
        for label in given.labels
    ]
    views = sorted({view for row in rows for view in row if view.isupper()})
    table = Table(
        title=f"{result['images']} images of {result['patients']} patients, {given.folds} patient folds pooled"
    )
    names = ["backbone", "label", "overall", "within a view", *views, "overall - within", "p (Holm)", "among negatives"]
    for name in names:
        table.add_column(name)
    for row in rows:
        cells = [_told(row.get(name)) for name in ("overall", "within", *views)]
        p = row.get("p_corrected")
        table.add_row(row["backbone"], row["label"], *cells, _told(row.get("difference"), "+"),
                      "" if p is None else f"{p:.4f}", _told(row.get("among_negatives")))  # fmt: skip
    if given.out:
        counts = {name: result[name] for name in ("images", "patients", "resamples", "store_hashes")}
        settings = {name: value for name, value in given.model_dump().items() if name not in ("store", "work", "out")}
        write_json(Path(given.out), {"settings": settings, **counts, "rows": rows, "sentences": sentences})
    console(220).print(table)
    print(*(f"{name}: {sentence}" for name, sentence in sentences.items()), sep="\n")


def _told(found: dict[str, Any] | None, sign: str = "") -> str:
    if not found or found["value"] is None or np.isnan(found["value"]):
        return ""
    span = "" if found["low"] is None else f" ({found['low']:{sign}.3f} to {found['high']:{sign}.3f})"
    return f"{found['value']:{sign}.3f}{span}"


if __name__ == "__main__":
    sys.exit(script(None, "within_view", __doc__, Arguments, DEFAULTS, work))
