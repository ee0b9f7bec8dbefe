"""A compressed memory of a million features: what it finds of the true nearest, how large it is, how long it takes.

    python benchmarks/memory.py [count=1000000] [dimension=512] [clusters=2000] [intrinsic=16] [queries=1000] [threads=1]
                                [out=FILE.json] [work=FOLDER]

Vectors (synthetic) come from a generator in pieces and are never there as a whole: each is the center of one of the
clusters, a unit vector, plus a point of the cluster's own `intrinsic` dimensions (spread 0.5), plus noise in all
dimensions (spread 0.2); queries are further draws. Every part runs in a process of its own, whose largest resident set
is read at its end: `stream` only draws all vectors, and its memory is the baseline; `exact` finds the true neighbors,
piece by piece; `build` fits the scorer knn with compress=true on the stream, which is drawn three times for that, and
saves it; `search` loads it and scores the queries, whose ten neighbors are compared with the true ones.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import torch
from common import console, script
from pydantic import Field
from rich.table import Table

from carina.files import write_json
from carina.models.checkpoints import load_tensors, save_tensors
from carina.models.scorers import SCORERS, ScorerSettings
from carina.models.scorers.base import pieces
from carina.recipes import Section

BLOCK = 1024  # vectors that are drawn at a time
NEAREST = 10
BAR_RECALL, BAR_PEAK = 0.9, 2.0  # share; GB beside the stream


class Arguments(Section):
    count: Annotated[int, Field(ge=1000)]
    dimension: Annotated[int, Field(ge=8)]
    clusters: Annotated[int, Field(ge=1)]
    intrinsic: Annotated[int, Field(ge=1)]
    queries: Annotated[int, Field(ge=10)]
    threads: Annotated[int, Field(ge=1)]
    out: str | None
    work: str | None


DEFAULTS = {
    "count": 1_000_000,
    "dimension": 512,
    "clusters": 2000,
    "intrinsic": 16,
    "queries": 1000,
    "threads": 1,
    "out": None,
    "work": None,
}
SETTINGS = ScorerSettings(
    name="knn",
    layers=None,
    sizes=None,
    normalize=True,
    components=None,
    bandwidth=None,
    neighbors=NEAREST,
    compress=True,
    patches=[1.0],
    reach=0.0,
    dimensions=None,
    coreset=1.0,
    seed=0,
)


class Stream:
    """Clustered vectors (N, D) float32 that exist while they are looked at; the same ones each time."""

    def __init__(self, given: Arguments):
        self.shape = (given.count, given.dimension)
        self.seconds = 0.0  # spent on drawing
        random = np.random.default_rng(0)
        self.centers = random.normal(size=(given.clusters, given.dimension)).astype(np.float32)
        self.centers /= np.linalg.norm(self.centers, axis=1, keepdims=True)
        self.axes = random.standard_normal((given.clusters, given.intrinsic, given.dimension), dtype=np.float32)
        self.axes *= 0.5 / np.sqrt(given.intrinsic * given.dimension)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start = time.perf_counter()
        first, last = rows.start // BLOCK, -(-rows.stop // BLOCK)
        drawn = np.concatenate([self.block(number) for number in range(first, last)])
        self.seconds += time.perf_counter() - start
        return drawn[rows.start - first * BLOCK : rows.stop - first * BLOCK]

    def block(self, number: int) -> np.ndarray:
        random = np.random.default_rng([1, number])
        cluster = random.integers(len(self.centers), size=BLOCK)
        places = random.standard_normal((BLOCK, 1, self.axes.shape[1]), dtype=np.float32)
        noise = random.standard_normal((BLOCK, self.shape[1]), dtype=np.float32) * (0.2 / self.shape[1] ** 0.5)
        return self.centers[cluster] + (places @ self.axes[cluster])[:, 0] + noise.astype(np.float32)

    def queries(self, count: int) -> np.ndarray:
        """Draws behind the last vector, (count, D)."""
        start = -(-len(self) // BLOCK) * BLOCK
        return self[slice(start, start + count)]


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def stream(given: Arguments, folder: Path) -> dict[str, Any]:
    vectors = Stream(given)
    for rows in pieces(vectors):
        vectors[rows]
    return {}


def exact(given: Arguments, folder: Path) -> dict[str, Any]:
    vectors = Stream(given)
    queries = unit(vectors.queries(given.queries))
    found = faiss.ResultHeap(len(queries), NEAREST)
    for rows in pieces(vectors):
        found.add_result(*_shifted(faiss.knn(queries, unit(vectors[rows]), NEAREST), rows.start))
    found.finalize()
    np.savez(folder / "exact.npz", ids=found.I, distances=np.sqrt(np.maximum(found.D, 0)))
    return {}


def _shifted(found: tuple[np.ndarray, np.ndarray], start: int) -> tuple[np.ndarray, np.ndarray]:
    return found[0], found[1] + start


def build(given: Arguments, folder: Path) -> dict[str, Any]:
    vectors, start = Stream(given), time.perf_counter()
    scorer = SCORERS["knn"].fit([vectors], SETTINGS)
    fitted = {"fit_seconds": round(time.perf_counter() - start - vectors.seconds, 1), "fit_peak_mb": peak_mb()}
    save_tensors(folder / "scorer.safetensors", scorer.state_dict())
    return {**fitted, "megabytes": round((folder / "scorer.safetensors").stat().st_size / 1e6, 1)}


def search(given: Arguments, folder: Path) -> dict[str, Any]:
    scorer = SCORERS["knn"].from_tensors(SETTINGS, load_tensors(folder / "scorer.safetensors"), {})
    queries = Stream(given).queries(given.queries)
    start = time.perf_counter()
    scorer.opened  # noqa: B018 - decodes nothing, but puts the codes into their lists
    opened = time.perf_counter()
    scores = scorer([torch.from_numpy(queries)]).numpy()
    took = time.perf_counter() - opened
    ids = scorer.opened.search(unit(queries), NEAREST)[1]
    true = np.load(folder / "exact.npz")
    hits = [len(np.intersect1d(ours, theirs)) for ours, theirs in zip(ids, true["ids"])]
    error = np.abs(scores / true["distances"].mean(axis=1) - 1)
    return {
        "open_seconds": round(opened - start, 2),
        "queries_per_second": round(len(queries) / took, 1),
        "recall_10_at_10": round(float(np.sum(hits)) / true["ids"].size, 4),
        "score_error_median": round(float(np.median(error)), 5),
        "score_error_largest": round(float(error.max()), 5),
    }


PARTS = {"stream": stream, "exact": exact, "build": build, "search": search}


def measured(name: str, given: Arguments, folder: Path) -> dict[str, Any]:
    """Run one part in this process: its figures, seconds and the largest resident set in MB."""
    torch.set_num_threads(given.threads)
    faiss.omp_set_num_threads(given.threads)
    start = time.perf_counter()
    figures = PARTS[name](given, folder)
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 1), "peak_mb": peak_mb(), **figures}


def peak_mb() -> int:
    """The largest resident set of this process so far (Linux); ru_maxrss would hold the parent's at the fork as well."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return round(int(status["VmHWM"].split()[0]) * 1024 / 1e6)


def run(given: Arguments) -> dict[str, Any]:
    parts = {}
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        for name in PARTS:
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                parts[name] = pool.submit(measured, name, given, Path(folder)).result()
    baseline = parts["stream"]["peak_mb"]
    peaks = {
        "build": parts["build"]["fit_peak_mb"],
        "saving": parts["build"]["peak_mb"],
        "search": parts["search"]["peak_mb"],
    }
    beside = {name: round((peak - baseline) / 1000, 2) for name, peak in peaks.items()}
    recall = parts["search"]["recall_10_at_10"]
    return {
        "benchmark": "memory",
        "synthetic": True,
        "machine": {
            "cores": os.cpu_count(),
            "threads": given.threads,
            "system": platform.system(),
            "load_before": round(os.getloadavg()[0], 2),
            "packages": {name: version(name) for name in ("carina-cxr", "faiss-cpu", "torch", "numpy")},
        },
        "arguments": given.model_dump(exclude={"out", "work"}),
        "parts": parts,
        "peak_beside_stream_gb": beside,
        "bars": {"recall": BAR_RECALL, "peak_gb": BAR_PEAK},
        "passed": recall >= BAR_RECALL and max(beside.values()) < BAR_PEAK,
    }


def work(given: Arguments) -> None:
    result = run(given)
    if given.out:
        write_json(given.out, result)
    out = console()
    title = f"{given.count:,} x {given.dimension} synthetic clustered vectors, {given.threads} thread(s)"
    table = Table("part", "seconds", "largest resident set, MB", "beside the stream, GB", title=title)
    built, beside = result["parts"]["build"], result["peak_beside_stream_gb"]
    for name, part in result["parts"].items():
        peak = part.get("fit_peak_mb", part["peak_mb"])
        table.add_row(name, f"{part['seconds']:g}", str(peak), str(beside.get(name, "")))
    table.add_row("saving, within build", "", str(built["peak_mb"]), str(beside["saving"]))
    out.print(table)
    found = result["parts"]["search"]
    error = f"{found['score_error_median']:.2%} (median), {found['score_error_largest']:.2%} (largest)"
    out.print(
        f"recall {NEAREST}@{NEAREST} {found['recall_10_at_10']:.3f} (bar {BAR_RECALL}), "
        f"{found['queries_per_second']:g} queries a second, error of the score {error}"
    )
    out.print(
        f"building {built['fit_seconds']:g} s less drawing and saving, {built['megabytes']:g} MB on disk, opening "
        f"{found['open_seconds']:g} s; {'passed' if result['passed'] else 'NOT passed'} (peak below {BAR_PEAK:g} GB beside "
        "the stream)"
    )


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "memory", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
