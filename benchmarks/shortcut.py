"""The shortcut experiment: a marker goes with the label; what is the classifier worth when it no longer does?

    python benchmarks/shortcut.py data=FOLDER [side=512] [out=FILE.json]

After Kim et al. (2022), on nih_cxr14, split by patient (its suggested split: train against val and test together).
Abnormal pictures get an R at the patient's right shoulder, normal ones an L at the left. HOG with logistic regression,
its strength chosen inside the training patients, is trained on marked pictures and tested where markers go with the
label as in training (same), the other way round (swapped), and on pictures as they came (clean). Then `find_markers`
and `inpaint` (or `clip`) are applied to training and test pictures alike; the detector is not told where the stamps
are. Intervals are of the patient bootstrap; differences are paired.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import pandas as pd
from common import console, script
from markers import OVERLAP, best_of
from pydantic import Field
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from stamps import KINDS, Picture, Stamp, place_of, read_picture, stamp

from carina.draws import hash64
from carina.errors import CarinaError
from carina.files import write_json
from carina.imaging.lungs import lung_mask
from carina.imaging.markers import clip, find_markers, inpaint
from carina.metrics.intervals import paired_difference, patient_bootstrap
from carina.metrics.ranking import auroc
from carina.models.controls import HOG_SIDE, hog
from carina.recipes import Section

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2)
TREATMENTS = ("nothing", "inpainted", "clipped")
TESTS = ("same", "swapped", "clean")


class Arguments(Section):
    data: str
    side: Annotated[int, Field(ge=128)]
    resamples: Annotated[int, Field(ge=100)]
    out: str | None


DEFAULTS = {"side": 512, "resamples": 2000, "out": None}


def shoulder(picture: Picture, letter: str, size: float) -> tuple[float, float] | None:
    """Where a radiographer puts the letter: beside the patient's shoulder, outside the lungs; else near the border."""
    rng = np.random.default_rng(hash64("shoulder", picture.name, letter))
    x0, y0, x1, y1 = picture.content
    reach = 0.75 * size * picture.image.shape[0]
    for _ in range(100):
        across, down = rng.uniform(0.06, 0.14), rng.uniform(0.06, 0.16)
        x = x0 + across * (x1 - x0) if letter == "R" else x1 - across * (x1 - x0)
        y = y0 + down * (y1 - y0)
        window = (slice(max(int(y - reach), 0), int(y + reach) + 1), slice(max(int(x - reach), 0), int(x + reach) + 1))
        if not picture.lungs[window].any():
            return float(x), float(y)
    return place_of(picture, size, "shoulder", letter)


def marked(picture: Picture, letter: str) -> Stamp | None:
    rng = np.random.default_rng(hash64("marked", picture.name))
    size, kind = float(rng.uniform(0.045, 0.07)), KINDS[rng.choice(3, p=(0.6, 0.25, 0.15))]
    place = shoulder(picture, letter, size)
    return None if place is None else stamp(picture.image, letter, kind, place, size, picture.name)


def treated(image: np.ndarray) -> tuple[dict[str, np.ndarray], list]:
    """The picture as it is, inpainted, and clipped, each (128, 128); and the markers that were found."""
    lungs = lung_mask(image).mask
    markers = find_markers(image, lungs)
    filled = inpaint(image, markers, lungs)
    versions = {"nothing": image, "inpainted": filled, "clipped": clip(image, filled)}
    small = (HOG_SIDE, HOG_SIDE)
    return {name: cv2.resize(v, small, interpolation=cv2.INTER_AREA) for name, v in versions.items()}, markers


def classifier(features: np.ndarray, targets: np.ndarray, patients: np.ndarray):
    """Logistic regression; the strength with the best AUROC over five folds of the training patients."""
    models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)) for c in STRENGTHS]
    folds = GroupKFold(5)

    def quality(model) -> float:
        scores = cross_val_predict(model, features, targets, groups=patients, cv=folds, method="decision_function")
        return auroc(targets, scores)

    return max(models, key=quality).fit(features, targets)


def prepared(given: Arguments) -> tuple[pd.DataFrame, dict[str, dict[str, np.ndarray]], dict]:
    """Rows, pictures by arm ("same", ...) and treatment, and how many stamps were found."""
    folder = Path(given.data)
    if not (folder / "nih_cxr14" / "labels.csv").is_file():
        raise CarinaError(f"{folder} holds no nih_cxr14/labels.csv; give the folder of the radiographs as data=FOLDER")
    table = pd.read_csv(folder / "nih_cxr14" / "labels.csv", dtype=str)
    rows, small, hits = [], {test: {t: [] for t in TREATMENTS} for test in TESTS}, []
    for row in table.itertuples():
        source = pd.Series({"path": f"nih_cxr14/{row.path}", "patient": row.patient_id, "mask": None})
        picture = read_picture(folder, source, (), given.side)
        abnormal = row.No_Finding == "0"
        stamps = {
            "same": marked(picture, "R" if abnormal else "L"),
            "swapped": marked(picture, "L" if abnormal else "R"),
        }
        if None in stamps.values():
            continue
        rows.append({"patient": row.patient_id, "target": int(abnormal), "train": row.suggested_split == "train"})
        for test in TESTS:
            if rows[-1]["train"] and test == "swapped":
                versions = dict.fromkeys(TREATMENTS, np.zeros((HOG_SIDE, HOG_SIDE), np.float32))
            else:
                image = picture.image if test == "clean" else stamps[test].image
                versions, found = treated(image)
                if test != "clean":
                    hits.append(best_of(found, stamps[test].box)[0] >= OVERLAP)
            for name, version in versions.items():
                small[test][name].append(version)
    arms = {test: {name: np.stack(images) for name, images in by.items()} for test, by in small.items()}
    return pd.DataFrame(rows), arms, {"stamps": len(hits), "found": int(sum(hits)), "left_out": len(table) - len(rows)}


def run(given: Arguments) -> dict:
    table, arms, counts = prepared(given)
    train, target, patients = (table[name].to_numpy() for name in ("train", "target", "patient"))
    rows = []
    for treatment in TREATMENTS:
        features = {test: hog(arms[test][treatment]) for test in TESTS}
        for trained in ("same", "clean"):
            model = classifier(features[trained][train], target[train], patients[train])
            scores = {test: model.decision_function(features[test][~train]) for test in TESTS}
            held = target[~train].astype(float), patients[~train]
            figures = {
                test: patient_bootstrap(held[0], scores[test], held[1], resamples=given.resamples) for test in TESTS
            }
            fall = paired_difference(
                held[0], scores["same"][None], scores["swapped"][None], held[1], resamples=given.resamples
            )
            rows.append(
                {
                    "pictures": treatment,
                    "trained_on": "marked" if trained == "same" else "clean",
                    "strength": model[-1].C,
                    **{test: {"value": f.value, "low": f.low, "high": f.high} for test, f in figures.items()},
                    "fall": {"value": fall.value, "low": fall.low, "high": fall.high},
                }
            )
    return {
        "benchmark": "shortcut",
        "arguments": given.model_dump(exclude={"data", "out"}),
        "data": {
            "train_images": int(train.sum()),
            "test_images": int((~train).sum()),
            "test_patients": len(set(patients[~train])),
            "test_abnormal": int(target[~train].sum()),
            **counts,
        },
        "rows": rows,
    }


def shown(result: dict) -> Table:
    data = result["data"]
    table = Table(
        title="AUROC of abnormal where the marker goes with the label (same), against it (swapped), is not added (clean)",
        caption=f"nih_cxr14, HOG and logistic regression; {data['train_images']} training images, "
        f"{data['test_images']} test images of {data['test_patients']} patients; {data['found']} of {data['stamps']} "
        "stamps found; 95 % intervals, patients drawn",
        title_justify="left",
        caption_justify="left",
    )
    for head in ("pictures", "trained on", *TESTS, "same - swapped"):
        table.add_column(head)
    for row in result["rows"]:
        figures = [f"{row[k]['value']:.3f} [{row[k]['low']:.3f}, {row[k]['high']:.3f}]" for k in (*TESTS, "fall")]
        table.add_row("as they are" if row["pictures"] == "nothing" else row["pictures"], row["trained_on"], *figures)
    return table


def work(given: Arguments) -> None:
    cv2.setNumThreads(1)
    result = run(given)
    if given.out:
        write_json(given.out, result)
    console().print(shown(result))


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "shortcut", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
