"""Dask and Ray do the work of prepare, one local worker each, and write the bytes that processes write."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest

from carina.imaging.phantom import phantom


def digest(store: Path) -> dict[str, bytes]:
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def radiographs(tmp_path_factory) -> Path:
    """More files than a worker takes at a time, and one that cannot be used."""
    folder = tmp_path_factory.mktemp("backends")
    for number in range(40):
        image = phantom(6, number // 2, image=number % 2, size=64).image
        cv2.imwrite(str(folder / f"p{number // 2:02d}_{number:02d}.png"), np.round(image * 255).astype(np.uint8))
    (folder / "p07_14.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def by_processes(radiographs, carina, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("stores") / "processes"
    carina("prepare", radiographs, f"out={out}", "scales=[32,48]", r"patient_regex=p\d+", "workers=2")
    return digest(out)


@pytest.mark.parametrize(
    "backend, package", [("dask", "distributed"), pytest.param("ray", "ray", marks=pytest.mark.slow)]
)
def test_a_cluster_of_one_worker_writes_the_same_bytes(backend, package, radiographs, by_processes, carina, tmp_path):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'carina-cxr[cluster]'")
    out = tmp_path / backend
    words = ("prepare", radiographs, f"out={out}", "scales=[32,48]", r"patient_regex=p\d+", "workers=1")
    carina(*words, f"backend={backend}", env={"RAY_USAGE_STATS_ENABLED": "0"})
    assert digest(out) == by_processes


def test_an_unknown_backend_is_a_sentence(radiographs, carina, tmp_path):
    done = carina("prepare", radiographs, f"out={tmp_path / 'x'}", "backend=spark", code=2)
    assert "backend" in done.stderr and "dask" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_cluster_address_needs_a_cluster(radiographs, carina, tmp_path):
    done = carina("prepare", radiographs, f"out={tmp_path / 'x'}", "cluster=tcp://127.0.0.1:1", code=2)
    assert "backend=dask" in done.stderr and not (tmp_path / "x").exists()
