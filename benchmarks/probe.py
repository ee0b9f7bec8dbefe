"""The sweep of the linear probe beside scikit-learn's loop, on one machine in one process.

    python benchmarks/probe.py out=benchmarks/results/probe.json threads=[1,2]

10,000 training images of 2,048 features, 14 labels, 45 strengths from 1e-6 to 1e5 (the grid of DINOv2's logistic
regression, Oquab et al., arXiv 2304.07193): 630 fits. Features are drawn as a network's are: 400 latent numbers of falling
variance, mixed, with noise, rectified, each feature on a scale of its own. A label is a noisy threshold on sixty latent
numbers, with prevalences from 0.30 to 0.01. *synthetic*

The loop is LogisticRegression(C=..., max_iter=20000) a label and strength on the standardized features in float32, which
it takes as they are (float64 doubles its time). Its times are summed over every fit, or with peer=N over N strengths spread
evenly and multiplied, which the table says. At its default tolerance it stops before the minimum, the earlier the rarer the
label and the weaker the regularization; that is the time to beat. Areas under the curve, on 2,000
further images, are those of fits at the minimum: in float64 with tol=1e-8, of every label at the strength where its area is
largest and of three labels at 1e-4, 1e-2 and 1. How far the loop as it is lies from us is shown beside it.

Then probes of few patients, as the protocol of few labels makes thousands of: 64 and 256 images, 512 features, the six
default strengths and three folds, which is 24 fits.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated, Any

import numpy as np
import torch
from common import console, script
from pydantic import Field
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from carina.files import write_json
from carina.finetune.probe import fit_many, probe
from carina.finetune.recipe import ProbeSettings
from carina.recipes import Section

BAR_FASTER, BAR_AUROC = 10.0, 1e-3
DEFAULT = ProbeSettings(strengths=[1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0], folds=3)


class Arguments(Section):
    out: str
    images: int
    held_out: int
    features: int
    labels: int
    strengths: int
    peer: Annotated[int, Field(ge=1)]
    threads: list[int]
    seed: int


DEFAULTS = {
    "images": 10000,
    "held_out": 2000,
    "features": 2048,
    "labels": 14,
    "strengths": 45,
    "peer": 45,
    "threads": [1, 2],
    "seed": 0,
}


def draw(given: Arguments) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) float32 and targets (N, L) of training and held-out images."""
    rng = np.random.default_rng(given.seed)
    count, width = given.images + given.held_out, min(given.features, 400)
    latent = rng.normal(size=(count, width)) * np.arange(1, width + 1) ** -0.5
    mixed = latent @ rng.normal(size=(width, given.features)) + 0.3 * rng.normal(size=(count, given.features))
    features = np.maximum(mixed, 0) * rng.uniform(0.1, 3, given.features)
    signal = latent[:, :60] @ rng.normal(size=(min(60, width), given.labels))
    score = 1.5 * signal / signal.std(axis=0) + rng.logistic(size=signal.shape)
    prevalence = np.geomspace(0.3, 0.01, given.labels)
    levels = [np.quantile(column, 1 - share) for column, share in zip(score.T, prevalence)]
    return features.astype(np.float32), (score > np.array(levels)).astype(np.float64)


def aurocs(features: np.ndarray, targets: np.ndarray, weights: np.ndarray, biases: np.ndarray) -> list[float]:
    scores = features.astype(np.float64) @ weights.T + biases
    return [float(roc_auc_score(targets[:, label], scores[:, label])) for label in range(targets.shape[1])]


def measure(given: Arguments, threads: int, features: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    strengths = np.logspace(-6, 5, given.strengths)
    train, labels = slice(given.images), range(given.labels)
    held, truth = features[given.images :], targets[given.images :]
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        began = time.perf_counter()
        fitted = [(w, b) for _, w, b in fit_many(features[train], targets[train], strengths.tolist())]
        ours = time.perf_counter() - began
        areas = np.array([aurocs(held, truth, w, b) for w, b in fitted])
        mean = features[train].mean(axis=0, dtype=np.float64)
        scale = features[train].std(axis=0, dtype=np.float64)
        standard = ((features - mean) / scale).astype(np.float32)
        picked = np.unique(np.linspace(0, given.strengths - 1, given.peer).round().astype(int))
        theirs, seconds, rounds = np.full(areas.shape, np.nan), [], []
        for place in picked:
            for label in labels:
                began = time.perf_counter()
                model = LogisticRegression(C=strengths[place], max_iter=20000)
                model.fit(standard[train], targets[train, label])
                seconds.append(time.perf_counter() - began)
                rounds.append(int(model.n_iter_[0]))
                theirs[place, label] = roc_auc_score(truth[:, label], model.decision_function(standard[given.images :]))
            print(f"threads {threads}, C {strengths[place]:.1e}: {np.sum(seconds):.0f} s", file=sys.stderr)
        best = areas.argmax(axis=0)
        spread = [int(np.abs(strengths - value).argmin()) for value in (1e-4, 1e-2, 1.0)]
        places = [
            *zip(best, labels),
            *((s, label) for s in spread for label in (0, given.labels // 2, given.labels - 1)),
        ]
        exact = (features - mean) / scale
        close = []
        for place, label in places:
            model = LogisticRegression(C=strengths[place], max_iter=50000, tol=1e-8)
            model.fit(exact[train], targets[train, label])
            area = roc_auc_score(truth[:, label], model.decision_function(exact[given.images :]))
            close.append(abs(area - areas[place, label]))
    loop = float(np.sum(seconds)) * given.strengths / len(picked)
    apart = np.abs(areas - theirs)
    return {
        "threads": threads,
        "seconds": ours,
        "loop_seconds": loop,
        "loop_strengths_run": len(picked),
        "loop_rounds": float(np.mean(rounds)),
        "faster": loop / ours,
        "auroc_difference_at_the_best_strength": float(max(close[: given.labels])),
        "auroc_difference_at_others": float(max(close[given.labels :], default=0.0)),
        "auroc_difference_of_the_loop": [None if np.isnan(v) else float(v) for v in apart.max(axis=1)],
        "best_strengths": strengths[best].tolist(),
    }


def few(threads: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    torch.set_num_threads(threads)
    rows = []
    for images in (64, 256):
        features = np.maximum(rng.normal(size=(images, 40)) @ rng.normal(size=(40, 512)), 0).astype(np.float32)
        target = (features[:, :1] + rng.normal(size=(images, 1)) > 1).astype(float)
        given = (features, target, [str(i) for i in range(images)], ["a"], DEFAULT, 0)
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            probe(*given)
            seconds.append(time.perf_counter() - began)
        rows.append({"images": images, "features": 512, "fits": 24, "seconds": float(np.median(seconds[1:]))})
    return rows


def work(given: Arguments) -> None:
    features, targets = draw(given)
    rows = [measure(given, threads, features, targets) for threads in given.threads]
    result = {
        "arguments": given.model_dump(exclude={"out"}),
        "cores": os.cpu_count(),
        "rows": rows,
        "few": few(given.threads[0]),
        "bars": {"faster": BAR_FASTER, "auroc": BAR_AUROC},
        "passed": all(
            row["faster"] >= BAR_FASTER
            and max(row["auroc_difference_at_the_best_strength"], row["auroc_difference_at_others"]) <= BAR_AUROC
            for row in rows
        ),
        "synthetic": True,
    }
    write_json(given.out, result)
    table = Table(
        title=f"{given.images:,} x {given.features:,} features, {given.labels} labels, {given.strengths} strengths "
        f"(synthetic; {'passed' if result['passed'] else 'NOT passed'})"
    )
    for name in ("threads", "ours, s", "the loop, s", "faster", "AUROC apart at the best", "at others", "of the loop"):
        table.add_column(name, justify="right")
    for row in rows:
        part = "" if row["loop_strengths_run"] == given.strengths else f" (of {row['loop_strengths_run']})"
        loop = max(v for v in row["auroc_difference_of_the_loop"] if v is not None)
        table.add_row(
            str(row["threads"]),
            f"{row['seconds']:.1f}",
            f"{row['loop_seconds']:.0f}{part}",
            f"{row['faster']:.1f}",
            f"{row['auroc_difference_at_the_best_strength']:.5f}",
            f"{row['auroc_difference_at_others']:.5f}",
            f"{loop:.5f}",
        )
    console().print(table)
    small = Table(title="a probe of few images, cross-fitted (synthetic)")
    for name in ("images", "features", "fits", "ms"):
        small.add_column(name, justify="right")
    for row in result["few"]:
        small.add_row(str(row["images"]), str(row["features"]), str(row["fits"]), f"{row['seconds'] * 1e3:.0f}")
    console().print(small)


if __name__ == "__main__":
    sys.exit(script(None, "probe", __doc__, Arguments, DEFAULTS, work))
