"""Two arms on the same test images: who ranks better, by how much, and how sure is that.

An arm is one or more runs (seeds, draws) of the same recipe, each a folder that `carina evaluate` wrote. The macro
AUROC is the primary contrast, named before looking; every other row is exploratory and corrected with all the others
(Holm). A difference counts when the interval of the paired difference excludes 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import Field

from carina.errors import CarinaError
from carina.evaluate.mcnemar import decision_tests, thresholds_of
from carina.evaluate.terminal import plain, three
from carina.files import read_json
from carina.metrics.delong import auroc_difference, auroc_interval
from carina.metrics.intervals import ALPHA, MIN_POSITIVES, Difference, Interval, difference, holm, interval
from carina.metrics.resampling import Replicates, replicate
from carina.recipes import Section

COLUMNS = ("image_id", "patient_id", "split", "fold", "seed", "label", "target", "score")
METRIC_NAMES = {"auroc": "AUROC", "average_precision": "average precision"}
Method = Literal["bootstrap", "delong"]


class CompareSettings(Section):
    """a, b: folders of each arm, as a list or ``DIR,DIR``. method: of AUROC by label; delong is Obuchowski's where patients
    have several images. resamples: of patients. out: where comparison.json goes."""

    a: str | list[str]
    b: str | list[str]
    method: Method = "bootstrap"
    resamples: Annotated[int, Field(ge=1)] = 10_000
    out: str | None = None


def read_predictions(folder: str | Path) -> pd.DataFrame:
    """The long table of a folder that `carina evaluate` wrote: one row per image and label (and seed)."""
    path = Path(folder) / "predictions.parquet"
    if not path.is_file():
        raise CarinaError(f"{folder} holds no predictions.parquet; give a folder that `carina evaluate` wrote")
    try:
        frame = pd.read_parquet(path)
    except pa.ArrowException as error:
        raise CarinaError(f"{path} cannot be read ({error}); it may be damaged: evaluate the run again") from error
    missing = [column for column in COLUMNS if column not in frame]
    if missing:
        raise CarinaError(f"{path} lacks the columns {', '.join(missing)}; evaluate the run again")
    if frame.empty:
        raise CarinaError(f"{path} has no rows; evaluate the run again on a split that has images")
    return frame


def split_runs(frame: pd.DataFrame, name: str = "the predictions") -> list[pd.DataFrame]:
    """One frame per run. Folds of one seed are pooled; where images repeat, every seed is a run of its own."""
    key = ["image_id", "label"]
    if not frame.duplicated(key).any():
        return [frame]
    runs = [run for _, run in frame.groupby("seed", sort=True, dropna=False)]
    repeated = sum(int(run.duplicated(key).sum()) for run in runs)
    if repeated:
        raise CarinaError(
            f"{repeated} rows of {name} repeat an image and label within one seed; evaluate the run again, or keep one "
            "row per image, label and seed"
        )
    return runs


def _same_images(reference: pd.DataFrame, run: pd.DataFrame, names: tuple[str, str]) -> None:
    """Refuse two runs, indexed by (image_id, label), that were not made on the same images, targets and patients."""
    only = len(reference.index.difference(run.index)), len(run.index.difference(reference.index))
    if any(only):
        raise CarinaError(
            f"{names[0]} and {names[1]} are not on the same images: {only[0]} image-label pairs are only in the first "
            f"and {only[1]} only in the second; evaluate both on one store with the same split and labels"
        )
    run = run.loc[reference.index]
    before, after = reference["target"].to_numpy(float), run["target"].to_numpy(float)
    differing = int((~((before == after) | (np.isnan(before) & np.isnan(after)))).sum())
    if differing:
        raise CarinaError(
            f"{names[0]} and {names[1]} disagree about {differing} of {len(reference)} targets; evaluate both with the "
            "same label policy"
        )
    patients = [frame.reset_index().groupby("image_id")["patient_id"].first() for frame in (reference, run)]
    moved = int((patients[0].astype(str) != patients[1].astype(str)).sum())
    if moved:
        raise CarinaError(
            f"{names[0]} and {names[1]} give {moved} of {len(patients[0])} images to different patients; evaluate both "
            "on one store, or on stores made with the same key"
        )


def _arrays(arms: Sequence[Sequence[str | Path]]) -> tuple[list[str], pd.DataFrame, np.ndarray, list[np.ndarray]]:
    """Labels (L), one row per image, targets (n, L) and the scores (k, n, L) of each arm, all in one order."""
    reference, reference_name, scores = None, "", []
    for folders in arms:
        arm = []
        for folder in folders:
            for run in split_runs(read_predictions(folder), str(folder)):
                run = run.set_index(["image_id", "label"]).sort_index()
                if reference is None:
                    reference, reference_name = run, str(folder)
                _same_images(reference, run, (reference_name, str(folder)))
                arm.append(run["score"].unstack("label").to_numpy(float))
        scores.append(np.stack(arm))
    target = reference["target"].unstack("label")
    images = reference.reset_index().groupby("image_id").first().loc[target.index]
    return list(target.columns), images, target.to_numpy(float), scores


def _figures(found: Interval) -> str:
    return f"{found.value:+.3f} ({100 * found.level:g} % interval {found.low:+.3f} to {found.high:+.3f})"


def _sentence(
    what: str, metric: str, a: Interval, b: Interval, found: Difference, verdict: dict[str, Any], names: tuple[str, str]
) -> str:
    """What a row says, for a reader who is no statistician."""
    if np.isnan(found.value):
        return f"{what}: nothing can be said, {found.reason}."
    start = f"{what}: {METRIC_NAMES[metric]} {a.value:.3f} with {names[0]}, {b.value:.3f} with {names[1]}; "
    start += f"the difference is {_figures(found)}. "
    if found.low == found.high == 0:
        return start + "The two arms rank these images alike."
    if not found.estimable:
        return start + f"This is too little to rely on: {found.reason}."
    better, worse = names if found.value > 0 else names[::-1]
    if verdict["differs"]:
        return start + f"{better[0].upper() + better[1:]} ranks better than {worse}; chance is an unlikely explanation."
    if verdict["excludes_zero"]:
        return start + "The interval excludes 0, but among this many comparisons such a row can be chance."
    return start + "This test cannot tell the arms apart."


Found = tuple[Interval, Interval, Difference]


def _resampled(arms: tuple[Replicates, Replicates], column: int | None) -> Found:
    return interval(arms[0], column), interval(arms[1], column), difference(*arms, column)


def _by_variance(target: np.ndarray, scores: Sequence[np.ndarray], patients: np.ndarray) -> Found:
    first, second = (auroc_interval(target, score, patients) for score in scores)
    return first, second, auroc_difference(target, *scores, patients)


def _row(name: str, role: str, metric: str, figures: Found) -> tuple[dict[str, Any], Interval, Interval, Difference]:
    first, second, found = figures
    row = {"label": name, "metric": metric, "role": role, "a": first.to_dict(), "b": second.to_dict()}
    return row | {"difference": found.to_dict()}, first, second, found


def _judged(
    rows: list[tuple[dict[str, Any], Interval, Interval, Difference]], names: tuple[str, str], mean: str
) -> list[dict[str, Any]]:
    """Rows with p-values (exploratory ones corrected together), the verdict and its sentence."""
    p_values = np.array(
        [found.p_value if found.estimable or found.low == found.high == 0 else np.nan for *_, found in rows]
    )
    exploratory = np.array([row["role"] == "exploratory" for row, *_ in rows])
    corrected = np.where(exploratory, holm(np.where(exploratory, p_values, np.nan)), p_values)
    judged = []
    for (row, a, b, found), p, final in zip(rows, p_values, corrected):
        excludes_zero = bool(found.low > 0 or found.high < 0)
        verdict = {
            "p_value": None if np.isnan(p) else float(p),
            "p_corrected": None if np.isnan(final) else float(final),
            "excludes_zero": excludes_zero,
            "differs": bool(excludes_zero and final < ALPHA),
        }
        what = f"{mean} ({row['role']})" if row["label"] == "macro" else f"{row['label']} ({row['role']})"
        judged.append(row | verdict | {"sentence": _sentence(what, row["metric"], a, b, found, verdict, names)})
    return judged


def compare(
    a: Sequence[str | Path],
    b: Sequence[str | Path],
    resamples: int = 10_000,
    seed: int = 0,
    names: tuple[str, str] = ("a", "b"),
    method: Method = "bootstrap",
) -> dict[str, Any]:
    """Paired differences a - b of AUROC and average precision, per label and as the mean over labels.

    a, b: folders with predictions.parquet, the runs of each arm; equally many runs are paired in the order given.
    `names` are what the sentences call them. The mean ("macro") is over the labels with at least 20 patients in each class;
    the others are named. Patients are resampled together for all runs, labels and arms. method=delong: AUROC by label from
    its variance instead (DeLong's, Obuchowski's where patients have several images), for one run an arm; the mean and
    average precision are resampled all the same. Where both arms are one run with thresholds, `mcnemar` tests their
    decisions. Returns values that JSON can hold. Raises CarinaError for a folder
    without predictions and for arms on different images, targets or patients.
    """
    if not a or not b:
        raise CarinaError("compare needs two arms; give a=DIR[,DIR...] and b=DIR[,DIR...]")
    labels, images, target, scores = _arrays([a, b])
    single = max(map(len, scores)) == 1
    if method == "delong" and not single:
        raise CarinaError(
            f"method=delong compares one run with one run and these arms have {len(scores[0])} and {len(scores[1])}; use "
            "method=bootstrap, which resamples runs too"
        )
    patients = images["patient_id"].to_numpy()
    replicates = {
        metric: tuple(replicate(target, arm, patients, metric, resamples, seed) for arm in scores)
        for metric in METRIC_NAMES
    }
    counts = replicates["auroc"][0].counts
    enough = (counts[:, 3:5] >= MIN_POSITIVES).all(axis=1)
    if not enough.any():
        enough = (counts[:, :2] > 0).all(axis=1)
    several = len(labels) > 1
    rows = []
    for metric, arms in replicates.items():
        if several:
            role = "primary" if metric == "auroc" else "exploratory"
            chosen = tuple(arm.select(enough) for arm in arms) if enough.any() else arms
            rows.append(_row("macro", role, metric, _resampled(chosen, None)))
        for column, label in enumerate(labels):
            role = "exploratory" if several or metric != "auroc" else "primary"
            if method == "delong" and metric == "auroc":
                figures = _by_variance(target[:, column], [arm[0, :, column] for arm in scores], patients)
            else:
                figures = _resampled(arms, column)
            rows.append(_row(label, role, metric, figures))
    tests = []
    if single and len(a) == len(b) == 1:
        limits = [thresholds_of(folder) for folder in (a[0], b[0])]
        tests = decision_tests(labels, target, [arm[0] for arm in scores], limits, patients, names, seed)
    mean = "Mean over labels" if enough.all() else f"Mean over the {enough.sum()} labels with enough patients"
    return {
        "a": {"folders": [str(folder) for folder in a], "runs": len(scores[0])},
        "b": {"folders": [str(folder) for folder in b], "runs": len(scores[1])},
        "synthetic": any(_synthetic(folder) for folder in (*a, *b)),
        "primary": f"AUROC, {'mean over labels' if several else labels[0]}",
        "images": len(images),
        "patients": int(pd.unique(images["patient_id"].astype(str)).size),
        "splits": sorted(str(split) for split in images["split"].unique()),
        "labels": labels,
        "macro_leaves_out": [label for label, taken in zip(labels, enough) if several and not taken],
        "resamples": resamples,
        "seed": seed,
        "resampled": "patients" if single else "patients and runs",
        "method": method,
        "correction": "Holm, over all exploratory rows that can be estimated",
        "rows": _judged(rows, names, mean),
        "mcnemar": tests,
    }


def _synthetic(folder: str | Path) -> bool:
    path = Path(folder) / "metrics.json"
    return path.is_file() and bool(read_json(path).get("synthetic", False))


def main(
    a: str | Sequence[str],
    b: str | Sequence[str],
    resamples: int = 10_000,
    seed: int = 0,
    method: Method = "bootstrap",
) -> dict[str, Any]:
    """`compare` for the command line: `a` and `b` may be lists or "DIR,DIR"."""
    split = [[p for p in arm.split(",") if p] if isinstance(arm, str) else list(arm) for arm in (a, b)]
    return compare(*split, resamples=resamples, seed=seed, method=method)


def table(result: dict[str, Any]) -> Any:
    """The result of `compare` as a `rich.table.Table` for the terminal."""
    from rich.table import Table

    synthetic = "synthetic images; " if result["synthetic"] else ""
    shown = Table(
        title=f"a - b on {result['images']} images of {result['patients']} patients",
        caption=f"{synthetic}primary: {plain(result['primary'])}; the other rows are exploratory, their p-values "
        f"corrected (Holm); {result['resampled']} resampled {result['resamples']} times"
        + (", AUROC by label from its variance (DeLong)" if result["method"] == "delong" else ""),
    )
    for heading in ("label", "metric", "a", "b", "a - b", "95 % interval", "p", "verdict"):
        shown.add_column(heading, justify="left" if heading in ("label", "metric", "verdict") else "right")
    for row in result["rows"]:
        found = row["difference"]
        if row["p_corrected"] is None:
            verdict = "not estimable"
        elif row["differs"]:
            verdict = "a is better" if found["value"] > 0 else "b is better"
        elif row["excludes_zero"]:
            verdict = "not after correction"
        else:
            verdict = "cannot tell"
        shown.add_row(
            plain(row["label"]),
            "AUROC" if row["metric"] == "auroc" else "AP",
            three(row["a"]["value"]),
            three(row["b"]["value"]),
            three(found["value"], "+"),
            f"{three(found['low'], '+')} to {three(found['high'], '+')}",
            "-" if row["p_corrected"] is None else f"{row['p_corrected']:.4f}",
            verdict,
            style="bold" if row["role"] == "primary" else "",
        )
    return shown
