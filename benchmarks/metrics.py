"""Intervals and tests: how fast they are beside scikit-learn's loop, and how often they are right in simulated studies.

    python benchmarks/metrics.py [out=FILE.json] [parts=[speed,delong,coverage,tests,clusters]] [studies=10000]
                                 [images=100000] [labels=14] [resamples=1000] [loop=20]

speed: AUROC and average precision of images x labels (prevalence 20 to 0.2 %, scores with ties) under patient resamples,
beside a loop over scikit-learn on `loop` of these resamples; both give the same numbers.
delong: the variance from ranks on 100,000 scores beside the quadratic form (timed on 4,000, scaled by the square).
coverage: shares of simulated studies, seed fixed beforehand, whose 95 % interval holds the true AUROC.
tests: shares of studies in which two equally good arms are told apart at 5 %. clusters: several images a patient.
Parts that are not asked for stay in out= as they are, when seed and number of studies are the same.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from common import console, script
from pydantic import Field
from rich.table import Table
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from carina.errors import CarinaError
from carina.files import read_json, write_json
from carina.metrics.agreement import mcnemar_test, stuart_maxwell
from carina.metrics.delong import auroc_difference, auroc_interval
from carina.metrics.intervals import interval, paired_difference, patient_bootstrap
from carina.metrics.resampling import patient_codes, patient_resamples, replicate
from carina.progress import Progress
from carina.recipes import Section

SEED = 20261123
BARS = {"auroc": 30, "average_precision": 10, "delong": 100}
COVERAGE, ERRORS = (0.94, 0.96), (0.04, 0.06)
Part = Literal["speed", "delong", "coverage", "tests", "clusters"]


class Arguments(Section):
    out: str | None
    parts: Annotated[list[Part], Field(min_length=1)]
    studies: Annotated[int, Field(ge=10)]
    images: Annotated[int, Field(ge=1000)]
    labels: Annotated[int, Field(ge=1)]
    resamples: Annotated[int, Field(ge=10)]
    loop: Annotated[int, Field(ge=1)]


DEFAULTS = {
    "out": None, "parts": ["speed", "delong", "coverage", "tests", "clusters"], "studies": 10_000, "images": 100_000,
    "labels": 14, "resamples": 1000, "loop": 20,
}  # fmt: skip


def speed(arguments: Arguments) -> dict[str, Any]:
    rng = np.random.default_rng(SEED)
    shape = (arguments.images, arguments.labels)
    target = (rng.random(shape) < np.geomspace(0.2, 0.002, arguments.labels)).astype(float)
    scores = np.round(rng.normal(size=shape) + 1.2 * target, 2)
    patients = rng.integers(0, arguments.images // 3, arguments.images)
    codes = patient_codes(patients)
    few = np.concatenate(list(patient_resamples(codes, arguments.loop, SEED)), axis=1)[codes]
    result = {}
    for name, theirs in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
        began = time.perf_counter()
        found = replicate(target, scores[None], patients, name, arguments.resamples, SEED)
        interval(found)
        ours = (time.perf_counter() - began) / arguments.resamples  # the jackknife for BCa included
        began = time.perf_counter()
        loop = np.array(
            [
                [theirs(target[:, j], scores[:, j], sample_weight=weights) for j in range(arguments.labels)]
                for weights in few.T
            ]
        )
        seconds = (time.perf_counter() - began) / arguments.loop
        again = replicate(target, scores[None], patients, name, arguments.loop, SEED)
        result[name] = {
            "ours_seconds": ours * arguments.resamples,
            "loop_seconds": seconds * arguments.resamples,
            "ratio": seconds / ours,
            "largest_gap": float(np.abs(again.boot[:, 0] - loop).max()),
            "passed": bool(seconds / ours >= BARS[name] and np.abs(again.boot[:, 0] - loop).max() < 1e-9),
        }
    return result


def delong_speed(count: int = 100_000, small: int = 4000) -> dict[str, Any]:
    rng = np.random.default_rng(SEED)
    target = (rng.random(count) < 0.5).astype(float)
    score = rng.normal(size=count) + target
    began = time.perf_counter()
    auroc_interval(target, score, np.arange(count))
    ours = time.perf_counter() - began
    t, s = target[:small], score[:small]
    began = time.perf_counter()
    wins = (s[t == 1][:, None] > s[t == 0][None]) + 0.5 * (s[t == 1][:, None] == s[t == 0][None])
    v10, v01 = wins.mean(axis=1), wins.mean(axis=0)
    variance = v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01)
    theirs = (time.perf_counter() - began) * (count / small) ** 2
    found = auroc_interval(t, s, np.arange(small), "none")
    gap = abs((found.high - found.low) / 2 / norm.ppf(0.975) - np.sqrt(variance))
    return {
        "ours_seconds": ours,
        "quadratic_seconds": theirs,
        "ratio": theirs / ours,
        "largest_gap": float(gap),
        "passed": bool(theirs / ours >= BARS["delong"] and gap < 1e-9),
    }


def _study(rng: np.random.Generator, positives: int, negatives: int, area: float) -> tuple[np.ndarray, np.ndarray]:
    target = np.repeat([1.0, 0.0], [positives, negatives])
    return target, rng.normal(size=len(target)) + np.sqrt(2) * norm.ppf(area) * target


def coverage(studies: int) -> list[dict[str, Any]]:
    """Three negatives a positive; the default interval (BCa over patients), percentiles, DeLong and its logit."""
    rows = []
    cases = [(p, a) for p in (10, 20, 50, 100, 200) for a in (0.7, 0.8, 0.9)]
    with Progress("coverage", len(cases) * studies, unit="studies") as progress:
        for positives, area in cases:
            rng = np.random.default_rng([SEED, positives, round(100 * area)])
            held = dict.fromkeys(("bca", "percentile", "delong", "logit delong"), 0)
            for number in range(studies):
                target, score = _study(rng, positives, 3 * positives, area)
                patients = np.arange(len(target))
                found = replicate(target[:, None], score[None, :, None], patients, "auroc", 1000, number)
                intervals = (
                    interval(found, 0),
                    interval(found, 0, "percentile"),
                    auroc_interval(target, score, patients, "none"),
                    auroc_interval(target, score, patients),
                )
                for name, one in zip(held, intervals):
                    held[name] += one.low <= area <= one.high
                progress.advance(1)
            shares = {name: count / studies for name, count in held.items()}
            inside = COVERAGE[0] <= shares["bca"] <= COVERAGE[1]
            rows.append(
                {"positives": positives, "auroc": area, **shares, "passed": inside if positives >= 100 else None}
            )
    return rows


def paired_tests(studies: int) -> list[dict[str, Any]]:
    rng, wrong = (
        np.random.default_rng([SEED, 1]),
        dict.fromkeys(("delong", "bootstrap", "mcnemar", "stuart_maxwell"), 0),
    )
    with Progress("tests", studies, unit="studies") as progress:
        for number in range(studies):
            target, common = _study(rng, 100, 300, 0.8)
            a, b = common + 0.7 * rng.normal(size=(2, 400))
            patients = np.arange(400)
            wrong["delong"] += auroc_difference(target, a, b, patients).p_value < 0.05
            gap = paired_difference(target, a[None], b[None], patients, resamples=1000, seed=number)
            wrong["bootstrap"] += gap.p_value < 0.05
            wrong["mcnemar"] += mcnemar_test(target, a > 1, b > 1)["p_value"] < 0.05
            wrong["stuart_maxwell"] += stuart_maxwell(np.digitize(a, [0, 1]), np.digitize(b, [0, 1]))["p_value"] < 0.05
            progress.advance(1)
    rows = []
    for name, count in wrong.items():
        low = ERRORS[0] if name in ("delong", "bootstrap") else 0.0  # tests on counts may be cautious
        rows.append({"test": name, "error": count / studies, "passed": low <= count / studies <= ERRORS[1]})
    return rows


def clusters(studies: int) -> dict[str, Any]:
    """Four images a patient that hardly differ: drawn by patient and, wrongly, by image."""
    rng, held = np.random.default_rng([SEED, 2]), {"patients": 0, "obuchowski": 0, "images": 0}
    truth = 0.8
    with Progress("clusters", studies, unit="studies") as progress:
        for number in range(studies):
            target, own = _study(rng, 100, 100, truth)
            shift = np.sqrt(2) * norm.ppf(truth) * target
            score = np.repeat((own - shift) * 0.9**0.5 + shift, 4) + rng.normal(size=800) * 0.1**0.5
            target, patients = np.repeat(target, 4), np.repeat(np.arange(200), 4)
            for name, found in (
                ("patients", patient_bootstrap(target, score, patients, resamples=1000, seed=number)),
                ("obuchowski", auroc_interval(target, score, patients)),
                ("images", patient_bootstrap(target, score, np.arange(800), resamples=1000, seed=number)),
            ):
                held[name] += found.low <= truth <= found.high
            progress.advance(1)
    shares = {name: count / studies for name, count in held.items()}
    return {**shares, "passed": COVERAGE[0] <= shares["patients"] <= COVERAGE[1] and shares["images"] < COVERAGE[0]}


def work(arguments: Arguments) -> None:
    result: dict[str, Any] = {"seed": SEED, "studies": arguments.studies}
    out = console()
    for part in arguments.parts:
        if part == "speed":
            found: Any = speed(arguments)
            table = Table("metric", "ours s", "loop s", "ratio", "largest gap", "passed", title="speed")
            for name, row in found.items():
                table.add_row(name, *(f"{row[k]:.3g}" for k in list(row)[:4]), str(row["passed"]))
        elif part == "delong":
            found = delong_speed()
            table = Table(*found, title="DeLong, 100,000 scores")
            table.add_row(*(f"{value:.3g}" for value in list(found.values())[:4]), str(found["passed"]))
        elif part in ("coverage", "tests"):
            found = coverage(arguments.studies) if part == "coverage" else paired_tests(arguments.studies)
            table = Table(*found[0], title=f"{part}, {arguments.studies} simulated studies")
            for row in found:
                table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        else:
            found = clusters(arguments.studies)
            table = Table(*found, title="four images a patient: share of intervals that hold the truth")
            table.add_row(*map(str, found.values()))
        out.print(table)
        result[part] = found
    if arguments.out:
        before = read_json(arguments.out) if Path(arguments.out).is_file() else {}
        same = all(before.get(key) == result[key] for key in ("seed", "studies"))
        write_json(arguments.out, {**(before if same else {}), **result})
    rows = [row for part in arguments.parts for row in _rows(result[part])]
    missed = sum(row.get("passed") is False for row in rows)
    if missed:
        raise CarinaError(f"{missed} of {len(rows)} figures miss their bar")


def _rows(found: Any) -> list[dict[str, Any]]:
    if isinstance(found, list):
        return found
    return [found] if "passed" in found else list(found.values())


if __name__ == "__main__":
    sys.exit(script(None, "metrics", __doc__, Arguments, DEFAULTS, work))
