"""The script of the control rows: nobody is scored by a fit on themselves, and shortcuts are found."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from carina.data.splits import patient_subset
from carina.data.store import select
from carina.files import read_json
from carina.intake.prepare import prepare
from carina.recipes import merge, validate


@pytest.fixture(scope="module")
def script():
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    spec = importlib.util.spec_from_file_location("controls_script", folder / "controls.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)  # the script imports its neighbor, as it does when it is run
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


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
