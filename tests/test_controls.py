"""The control rows: features see what they say, nobody is scored by a fit on themselves, and shortcuts are found."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carina.data.splits import patient_subset
from carina.data.store import select
from carina.files import read_json
from carina.intake.prepare import prepare
from carina.recipes import merge, validate


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "controls.py"
    spec = importlib.util.spec_from_file_location("controls_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """96 noise images of 48 patients: abnormal ones are brighter and their files wider, nothing else differs."""
    folder, random = tmp_path_factory.mktemp("controls"), np.random.default_rng(0)
    rows = []
    for i in range(96):
        abnormal = (i // 2) % 2
        noise = random.integers(0, 120, (128, 140 if abnormal else 128)).astype(np.uint8)
        cv2.imwrite(str(folder / f"{i:03d}.png"), cv2.GaussianBlur(noise, (0, 0), 3) + 60 * abnormal)
        split = ("train", "train", "val", "test")[(i // 4) % 4]
        rows.append({"path": f"{i:03d}.png", "patient": f"p{i // 2}", "split": split, "abnormal": abnormal})
    rows[0]["abnormal"] = None
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    words = ["patient=patient", "split=split", "labels=[abnormal]", "scales=[128]", "fit=stretch", "lungs=false"]
    prepare(str(folder / "labels.csv"), [*words, "workers=1", f"out={folder / 'store'}"], quiet=True)
    return folder / "store"


def arguments(script, **given):
    return validate(script.Arguments, merge(script.DEFAULTS, given), "controls")


def by_row(result):
    return {(row["control"], row["method"]): row for row in result["rows"]}


def slow_hog(image):
    """One pixel, one cell, one block at a time."""
    histogram = np.zeros((8, 8, 9))
    for y in range(128):
        for x in range(128):
            down = image[y + 1, x] - image[y - 1, x] if 0 < y < 127 else 0.0
            right = image[y, x + 1] - image[y, x - 1] if 0 < x < 127 else 0.0
            degrees = np.degrees(np.arctan2(down, right)) % 180
            low = int(np.floor(degrees / 20 - 0.5))
            share = degrees / 20 - 0.5 - low
            histogram[y // 16, x // 16, low % 9] += (1 - share) * np.hypot(down, right)
            histogram[y // 16, x // 16, (low + 1) % 9] += share * np.hypot(down, right)
    blocks = np.empty((7, 7, 9, 2, 2))
    for y in range(7):
        for x in range(7):
            block = np.moveaxis(histogram[y : y + 2, x : x + 2], 2, 0)
            block = np.minimum(block / np.sqrt((block**2).sum() + 1e-10), 0.2)
            blocks[y, x] = block / np.sqrt((block**2).sum() + 1e-10)
    return blocks.ravel()


def test_hog_is_the_definition(script):
    image = cv2.GaussianBlur(np.random.default_rng(1).random((128, 128)), (0, 0), 2)
    image[40:60, 30:90] = 0.5  # flat cells as in masked images
    got = script.hog(np.stack([image, np.zeros_like(image)]))
    np.testing.assert_allclose(got[0], slow_hog(image), atol=2e-4)
    assert got.shape == (2, 1764)
    assert not got[1].any()


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_features_see_only_what_they_name(script, seed):
    random = np.random.default_rng(seed)
    lungs = np.zeros((128, 128), dtype=bool)
    lungs[30:100, 20:55] = lungs[30:100, 70:110] = True
    image = random.integers(0, 256, (128, 128)).astype(np.uint8)
    fresh = random.integers(0, 256, (128, 128)).astype(np.uint8)
    middle = np.zeros_like(lungs)
    middle[13:-13, 13:-13] = True
    sizes = np.array([[128, 128]])
    rows = {control.name: control for control in script.controls(128, 0) if "ResNet" not in control.name}

    def same(name, changed):
        pictures = image, np.where(changed, fresh, image)
        one, two = (rows[name].describe(script.Rows(p[None], lungs[None], sizes)) for p in pictures)
        return np.array_equal(one, two)

    assert same("HOG, background only", lungs) and not same("HOG, background only", ~lungs)
    assert same("HOG, lungs only", ~lungs) and not same("HOG, lungs only", lungs)
    assert same("HOG, mask silhouette", lungs | ~lungs) and same("file size", lungs | ~lungs)
    assert same("HOG, outer ring", middle) and not same("HOG, outer ring", ~middle)
    assert same("pixels, outer ring", middle) and not same("pixels, outer ring", ~middle)
    assert not same("raw pixels", middle) and not same("nine intensity statistics", middle)


def test_statistics(script):
    image = np.repeat(np.arange(0, 256, 51, dtype=np.uint8), 6).reshape(1, 6, 6)  # 0, 0.2, ..., 1
    got = script.statistics(script.Rows(image, None, None))[0]
    np.testing.assert_allclose(got[[0, 2, 3, 6]], [0.5, 0, 1, 0.5], atol=1e-6)
    assert got[1] == pytest.approx(np.sqrt(np.mean((np.arange(6) / 5 - 0.5) ** 2)))


def test_random_network_with_blocks_opened_uses_its_blocks(script):
    rows = {control.name: control for control in script.controls(128, 0)}
    image = np.random.default_rng(0).integers(0, 256, (2, 128, 128)).astype(np.uint8)
    closed, opened = (
        rows[name].describe(script.Rows(image, None, None))
        for name in ("random ResNet-18", "random ResNet-18, blocks opened")
    )
    assert closed.shape == opened.shape == (2, 512)
    assert not np.allclose(closed, opened)


@pytest.mark.parametrize("given", [{}, {"split": "val+test"}, {"folds": 3}])
def test_no_patient_is_scored_by_a_fit_on_themselves(script, store, given):
    bench = script.Bench(arguments(script, store=str(store), task="classify", **given), select(store))
    assert len(bench.target) == 95  # one label is unknown
    for train, scored in bench.fits:
        assert not set(bench.patients[train]) & set(bench.patients[scored])
        assert train.any() and scored.any()
    assert bench.scored.sum() == {"": 24, "split": 48, "folds": 95}[next(iter(given), "")]


def test_few_labels_use_only_their_patients(script, store):
    """Turning every label outside a draw's patients changes no score of that draw."""
    bench = script.Bench(arguments(script, store=str(store), task="classify", patients=12, draws=2), select(store))
    features, truth, train = np.random.default_rng(0).random((95, 5)), bench.target, bench.fits[0][0]
    scores = bench.scores(features, None)
    assert not np.array_equal(scores[0][bench.scored], scores[1][bench.scored])
    for draw in range(2):
        used = np.zeros(len(train), dtype=bool)
        used[train] = patient_subset(bench.patients[train].tolist(), 12, draw)
        bench.target = np.where(used, truth, 1 - truth)
        np.testing.assert_array_equal(bench.scores(features, None)[draw], scores[draw])


def test_shortcuts_are_found(script, store, tmp_path, capsys):
    common = [f"store={store}", "split=val+test", "resamples=100"]
    assert script.main([*common, "task=anomaly", f"out={tmp_path / 'a.json'}"]) == 0
    assert "not estimable" in capsys.readouterr().out.replace("\n", " ")
    result = read_json(tmp_path / "a.json")
    rows = by_row(result)
    for row in (("nine intensity statistics", "gaussian, standardized"), ("file size", "gaussian, standardized")):
        assert rows[row]["auroc"]["value"] == 1
    assert rows["HOG, mask silhouette", "gaussian"]["missing"] == "the store holds no lung masks"
    assert result["lungs_minus_background"] is None
    assert result["data"]["trained"] == {"images": 23, "patients": 12, "positives": 0}
    assert str(store.parent) not in (tmp_path / "a.json").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (["task=anomaly", "lable=abnormal"], "did you mean 'label'"),
        (["task=anomaly", "label=Mass"], "leave label= out"),
        (["task=classify", "label=Mass"], "has no label 'Mass'"),
        (["task=classify", "folds=3", "split=test"], "give one of them"),
        (["task=classify", "split=train"], "trained on"),
        (["task=classify", "split=val+exam"], "no row has split=exam"),
        (["task=anomaly", "patients=8"], "every normal"),
        (["task=classify", "draws=3"], "give patients="),
    ],
)
def test_mistakes_are_sentences(script, store, capsys, words, message):
    assert script.main([f"store={store}", *words]) == 2
    assert message in capsys.readouterr().err
