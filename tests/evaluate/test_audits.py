"""Audits: planted shortcuts, leaks and falls are found and said in words; what is clean is cleared."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import faiss
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from carina.data.store import select
from carina.draws import Draws
from carina.errors import CarinaError
from carina.evaluate import audits
from carina.evaluate.audits import convergence, leakage, markers, robustness, shortcut
from carina.evaluate.audits.common import Audited, AuditSettings, cross_fitted
from carina.files import write_json
from carina.imaging.markers import Marker, inpaint
from carina.models.backbones import load_backbone
from carina.models.predictor import Member, Predictor


class Light(Member):
    """Scores an image by the mean of a part of it: what it reads is known."""

    def __init__(self, part=(slice(None), slice(None))):
        super().__init__(load_backbone("random:resnet10t", size=32), 64, None, None)
        self.part, self.nothing = part, nn.Parameter(torch.zeros(1))

    def scores(self, images, lungs=None):
        rows, columns = self.part
        return images[:, :, rows, columns].mean(dim=(1, 2, 3))[:, None].double()


def predictor(*part):
    return Predictor({"labels": ["abnormal"], "stack": {"abnormal": [1.0]}, "temperature": {}}, [Light(*part)])


def labelled(store, target):
    """Every row of a store, with `target` (a function of the selection) for a label."""
    rows = select(str(store))
    rows.table["label.abnormal"] = np.asarray(target(rows), dtype=np.float32)
    return rows


def pixels(rows):
    return rows.images(range(len(rows)), 64).astype(np.float32) / 255


def background(rows):
    """Whether the part of a picture outside the lungs is bright."""
    images, lungs = pixels(rows), rows.masks(range(len(rows)), 64)
    mean = (images * ~lungs).sum(axis=(1, 2)) / (~lungs).sum(axis=(1, 2))
    return mean > np.median(mean)


def audited(store, rows, what=None, **given):
    return Audited(what or predictor(), rows, str(store), AuditSettings(resamples=300, **given), True)


# -- what can be read -----------------------------------------------------------------------------------------------------


def test_cross_fitting_is_that_of_scikit_learn_and_says_nothing_of_noise():
    generator = np.random.default_rng(0)
    folds, features = np.arange(200) % 5, generator.normal(size=(200, 6))
    target = (features[:, 0] + generator.normal(size=200) > 0).astype(float)
    target[:7] = np.nan
    found = cross_fitted(features, target, folds, 0.5)
    for fold in range(5):
        fitted = (folds != fold) & ~np.isnan(target)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=1000))
        model.fit(features[fitted], target[fitted])
        expected = model.decision_function(features[folds == fold]) - model[-1].intercept_
        np.testing.assert_allclose(found[folds == fold], expected, atol=1e-6)
    # with its intercept a fit on a column that says nothing would rank the pooled folds far below chance
    areas = []
    for _ in range(30):
        target = (generator.random(200) < 0.3).astype(float)
        areas.append(roc_auc_score(target, cross_fitted(generator.normal(size=(200, 1)) * 1e-3, target, folds, 0.01)))
    assert abs(np.mean(areas) - 0.5) < 0.03
    assert np.isnan(cross_fitted(features, np.r_[1.0, np.zeros(199)], folds, 1.0)).all()


def test_a_label_beside_the_lungs_is_found_and_said(phantom_store):
    look = audited(phantom_store, labelled(phantom_store, background))
    entry = shortcut.regions(look)
    rows = {(row["kind"], row["input"]): row for row in entry["rows"]}
    assert {kind for kind, _ in rows} == {"predictor", "learned", "control", "metadata"}
    images, lungs, target = pixels(look.selection), look.selection.masks(range(len(look.selection)), 64), look.targets
    for name, mask in (("whole", np.ones_like(lungs)), ("lungs only", lungs), ("background only", ~lungs)):
        expected = roc_auc_score(target[:, 0], (images * mask).mean(axis=(1, 2)))
        assert rows["predictor", name]["auroc"]["value"] == pytest.approx(expected, abs=1e-9), name
    drop = rows["predictor", "lungs only"]["drop"]
    assert drop["value"] == pytest.approx(
        rows["predictor", "whole"]["auroc"]["value"] - rows["predictor", "lungs only"]["auroc"]["value"]
    )
    assert rows["learned", "background only"]["auroc"]["value"] > 0.8
    assert re.match(
        r"(The label|A part of the label) can be read (nearly as well )?without the lungs", entry["sentence"]
    )
    assert "background only" in entry["sentence"] and "this predictor, unchanged, keeps" in entry["sentence"]
    ring = rows["predictor", "outer ring only"]["auroc"]["value"]
    inner = np.ones((64, 64), dtype=bool)
    inner[6:-6, 6:-6] = False
    assert ring == pytest.approx(roc_auc_score(target[:, 0], (images * inner).mean(axis=(1, 2))), abs=1e-9)


def test_metadata_that_gives_the_label_away(phantom_store):
    rows = labelled(phantom_store, lambda rows: (rows.table["view"] == "PA") ^ (np.arange(len(rows)) % 10 == 0))
    entry = shortcut.regions(audited(phantom_store, rows))
    found = {row["input"]: row for row in entry["rows"] if row["kind"] == "metadata"}
    expected = roc_auc_score(rows.table["label.abnormal"], rows.table["view"] == "PA")
    assert found["view"]["auroc"]["value"] == pytest.approx(expected, abs=0.02)
    assert found["source"]["missing"] == "the same for every image"
    assert "without looking at any pixel, view alone gives 0.8" in entry["sentence"]


def test_metadata_columns():
    table = pd.DataFrame({"age": [30.0, np.nan, 50.0], "view": ["AP", None, "PA"]})
    assert shortcut.metadata_columns(table, "view").shape == (3, 3)
    np.testing.assert_allclose(shortcut.metadata_columns(table, "age"), [[-10, 100, 1], [0, 0, 0], [10, 100, 1]])


def test_acquisition(phantom_store):
    rows = labelled(phantom_store, background)
    bright = pixels(rows).mean(axis=(1, 2))
    rows.table["manufacturer"] = np.where(bright > np.median(bright), "A", "B")
    entry = shortcut.acquisition(audited(phantom_store, rows))
    (row,) = [row for row in entry["rows"] if row["column"] == "manufacturer"]
    assert row["auroc"]["value"] > 0.8 and "the manufacturer (A: AUROC" in entry["sentence"]
    rows.table["manufacturer"], rows.table["view"] = "A", ""
    assert "nothing can be told apart" in shortcut.acquisition(audited(phantom_store, rows))["sentence"]


# -- markers --------------------------------------------------------------------------------------------------------------

CORNERS = {"R": (0, 0), "L": (52, 0)}


@pytest.fixture
def stamped(phantom_store, monkeypatch):
    """A selection whose pictures bear a bright square, on the left of positives and on the right of negatives; where it
    is, is known."""
    rows = labelled(phantom_store, lambda rows: np.arange(len(rows)) % 2)
    plain, where = type(rows).images, {}

    def images(self, which, scale):
        found = plain(self, which, scale).copy()
        for picture, row in zip(found, which):
            letter = "R" if self.table["label.abnormal"].iloc[row] == 1 else "L"
            x, y = (round(value * scale / 64) for value in CORNERS[letter])
            side = round(12 * scale / 64)
            picture[y : y + side, x : x + side] = 255
            where[picture.tobytes()] = [Marker(letter, x, y, x + side, y + side, 1.0)]
        return found

    monkeypatch.setattr(type(rows), "images", images)
    monkeypatch.setattr(
        markers, "find_markers", lambda image, lungs: where[np.round(255 * image).astype(np.uint8).tobytes()]
    )
    return rows


def test_a_marker_that_is_read_is_found_and_one_that_is_not_is_cleared(stamped, phantom_store):
    reads = predictor((slice(0, 12), slice(0, 12)))
    entry = markers.audit(audited(phantom_store, stamped, reads))
    (row,) = entry["rows"]
    assert row["images_with_markers"] == row["images"] == len(stamped)
    assert row["whole"]["value"] > 0.95 and row["other_class"]["value"] < 0.2 and row["own_class"]["value"] > 0.95
    assert row["markers_alone"]["value"] == 1 and row["tie"]["low"] > 0.5
    assert entry["sentence"].startswith("This predictor reads the side markers as a sign of abnormal: AUROC 1.00")
    # the lower half holds no marker, so nothing that is done to markers moves a score
    entry = markers.audit(audited(phantom_store, stamped, predictor((slice(32, 64), slice(None)))))
    (row,) = entry["rows"]
    assert row["tie"]["value"] == row["drop"]["value"] == 0 and row["markers_alone"]["value"] == 1
    assert "reads the side markers" not in entry["sentence"]


def test_markers_are_painted_over_and_given_to_others(stamped, phantom_store):
    marks = markers.Marks(stamped, True)
    first, second = (int(np.flatnonzero(stamped.table["label.abnormal"] == value)[0]) for value in (1, 0))
    images, lungs = pixels(stamped), stamped.masks(range(len(stamped)), 64)
    bare = [inpaint(images[row], marks.at(row, 64), lungs[row]) for row in (first, second)]
    np.testing.assert_array_equal(marks.picture(images[first], first, None), bare[0])
    given = marks.picture(images[first], first, second)
    marker = np.clip(bare[0] + np.maximum(images[second] - bare[1], 0) * ~lungs[first], 0, 1)
    np.testing.assert_allclose(given, marker, atol=1e-6)
    assert (given[:12, 52:] > bare[0][:12, 52:]).any() and marks.at(first, 32)[0].x1 == 6


def test_without_markers_nothing_is_scored(phantom_store, monkeypatch):
    monkeypatch.setattr(markers, "find_markers", lambda image, lungs: [])
    look = audited(phantom_store, labelled(phantom_store, background))
    monkeypatch.setattr(look, "scores", None)
    assert markers.audit(look)["sentence"].startswith("No side marker was found in")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, np.nan]), min_size=1, max_size=30), st.booleans())
def test_givers(target, other):
    target, patients = np.array(target), np.arange(len(target)) // 2
    found = markers.givers(target, patients, 0, other)
    for row, giver in enumerate(found):
        if giver != row:
            assert patients[giver] != patients[row] and (target[giver] != target[row]) == other
        else:
            wanted = 1 - target[row] if other else target[row]
            assert np.isnan(target[row]) or not ((target == wanted) & (patients != patients[row])).any()


def test_words_of_the_marker_audit():
    def row(tie, low, high):
        sure = {"estimable": True}
        figures = {name: {"value": 0.9, "low": 0.8, "high": 0.95, **sure} for name in (
            "whole", "inpainted", "own_class", "other_class", "markers_alone"
        )}  # fmt: skip
        tie = {"value": tie, "low": low, "high": high, **sure}
        counts = {"label": "abnormal", "images": 9, "images_with_markers": 5}
        return {**counts, **figures, "tie": tie, "drop": {"value": 0.0, "low": -0.01, "high": 0.01, **sure}}

    assert markers.sentence([row(0.2, 0.1, 0.3)]).startswith("This predictor reads")
    assert "does not lean" in markers.sentence([row(0.01, -0.01, 0.03)])
    assert "hardly leans" in markers.sentence([row(0.01, 0.005, 0.02)])
    assert "cannot be told" in markers.sentence([row(0.04, -0.05, 0.13)])


# -- robustness -----------------------------------------------------------------------------------------------------------


def disc(side=64, x=40.0, y=24.0, radius=5.0):
    rows, columns = np.mgrid[:side, :side] + 0.5
    return torch.from_numpy(np.clip(radius + 0.5 - np.hypot(columns - x, rows - y), 0, 1)).float()[None, None]


def center(image):
    rows, columns = ndimage.center_of_mass(image[0, 0].numpy())
    return np.array([columns + 0.5 - 32, rows + 0.5 - 32])


DRAWS = Draws(0, 0, np.array([5], dtype=np.uint64))


@pytest.mark.parametrize("kind", robustness.STRENGTHS)
def test_strengths_are_what_they_say(kind):
    image, before = disc(), center(disc())
    noisy = 0.5 + 0.2 * torch.sin(torch.arange(64.0))[None, None, None].expand(1, 1, 64, 64)
    for strength in robustness.STRENGTHS[kind][1]:
        after = robustness.disturbed(image, kind, strength, DRAWS)
        assert after.shape == image.shape and after.min() >= 0 and after.max() <= 1 + 1e-6
        if kind == "rotation":
            turn = np.degrees(np.arctan2(*center(after)[::-1]) - np.arctan2(*before[::-1]))
            assert abs(turn) == pytest.approx(strength, abs=0.3)
        elif kind == "shift":
            assert np.hypot(*(center(after) - before)) == pytest.approx(64 * strength, abs=0.2)
        elif kind == "scale":
            ratio = np.hypot(*center(after)) / np.hypot(*before)
            assert max(ratio, 1 / ratio) == pytest.approx(strength, rel=0.02)
        elif kind == "gamma":
            bent = robustness.disturbed(noisy, kind, strength, DRAWS)
            exponent = (bent.log() / noisy.log()).numpy()
            assert np.ptp(exponent) < 1e-4 and max(exponent.flat[0], 1 / exponent.flat[0]) == pytest.approx(strength)
        elif kind == "contrast":
            ratio = float(robustness.disturbed(0.45 + 0.1 * noisy, kind, strength, DRAWS).std() / (0.1 * noisy).std())
            assert max(ratio, 1 / ratio) == pytest.approx(strength, rel=1e-3)
        elif kind == "noise":
            flat = robustness.disturbed(torch.full((1, 1, 64, 64), 0.5), kind, strength, DRAWS)
            assert float(flat.std()) == pytest.approx(strength, rel=0.05)
        else:
            point = disc(256, x=128, y=128, radius=0.6)
            blurred = robustness.disturbed(point, kind, strength, DRAWS)[0, 0].numpy()
            columns = np.arange(256) + 0.5 - 128
            variance = [(i.sum(axis=0) * columns**2).sum() / i.sum() for i in (blurred, point[0, 0].numpy())]
            # kernels end at three sigma and narrow ones are sampled coarsely
            assert variance[0] - variance[1] == pytest.approx((256 * strength) ** 2, rel=0.1, abs=0.06)


def test_robustness_of_a_predictor_that_reads_brightness(phantom_store):
    def bright(rows):
        mean = pixels(rows).mean(axis=(1, 2))
        return (mean > np.median(mean)) ^ (np.arange(len(rows)) % 20 == 0)

    rows = labelled(phantom_store, bright)
    entry = robustness.audit(audited(phantom_store, rows))
    assert len(entry["rows"]) == sum(len(strengths) for _, strengths in robustness.STRENGTHS.values())
    falls = robustness.first_falls(entry["rows"])
    assert "gamma" in falls and "blur" not in falls  # a blur keeps the mean, a gamma of random direction does not
    assert f"gamma {falls['gamma']['strength']:g}" in entry["sentence"] and "blur up to 0.02" in entry["sentence"]
    before = [row for row in entry["rows"] if row["kind"] == "gamma" and row["strength"] < falls["gamma"]["strength"]]
    assert all(row["drop"]["low"] <= 0 for row in before)
    series = {one["name"]: one for one in entry["curve"]["series"]}
    assert series["gamma"]["x"] == list(robustness.STRENGTHS["gamma"][1])
    start = roc_auc_score(rows.table["label.abnormal"], pixels(rows).mean(axis=(1, 2)))
    assert series["gamma"]["value"][-1] < entry["curve"]["start"]["value"] == pytest.approx(start, abs=1e-9)


# -- leakage --------------------------------------------------------------------------------------------------------------


def test_near_copies_are_those_of_brute_force():
    generator = np.random.default_rng(1)
    train, people = generator.normal(size=(600, 16)) + 3, np.arange(600) // 2
    train[1::2] = train[::2] + 0.1 * generator.normal(size=(300, 16))  # two images of a patient are alike
    test, others = generator.normal(size=(200, 16)) + 3, 1000 + np.arange(200)

    def oracle(test):
        middle = train.mean(axis=0)
        a, b = ((x - middle) / np.linalg.norm(x - middle, axis=1, keepdims=True) for x in (train, test))
        usual = np.where(people[:, None] == people, -2, a @ a.T).max(axis=1)
        return np.quantile(usual, 0.999), (b @ a.T).max(axis=1)

    found = leakage.near_copies(train, people, test, others)
    limit, nearest = oracle(test)
    assert found["limit"] == pytest.approx(limit, abs=1e-5) and found["above"] == int((nearest > found["limit"]).sum())
    assert not found["more_than_chance"]
    test[:10] = train[:10] + 0.02 * generator.normal(size=(10, 16))
    found = leakage.near_copies(train, people, test, others)
    assert found["above"] >= 10 and found["more_than_chance"] and found["highest"] > 0.99
    one = np.zeros(600, dtype=int)  # a single person: nobody else is near
    index = faiss.IndexFlatIP(16)
    index.add(train.astype(np.float32))
    assert (leakage.nearest_others(index, train[:3].astype(np.float32), one, one[:3]) == -1).all()


@pytest.fixture(scope="module")
def runs(phantom_store, tmp_path_factory):
    """Short trainings with kept checkpoints, and a frozen probe."""
    from carina.finetune.run import finetune

    folder = tmp_path_factory.mktemp("audited")
    common = {"store": str(phantom_store), "labels": ["abnormal"], "scale": 32, "wandb": "off", "threads": 1}
    short = {"mode": "full", "steps": 4, "batch_size": 8, "checkpoint_every": 2, "keep_every": 2}
    common["architecture"] = "resnet10t"
    for name, task, own in (
        ("probe", "classify", {"mode": "frozen"}),
        ("a", "classify", short),
        ("b", "classify", {**short, "seed": 1}),
        ("anomaly", "anomaly", short),
    ):
        finetune(task, {**common, **own, "out": str(folder / name)}, quiet=True)
    return folder


def test_leakage_of_a_run(runs, phantom_store):
    from carina.models.predictor import load_predictor

    what = load_predictor(runs / "probe")
    test = audited(phantom_store, select(str(phantom_store)).split("test"), what, run=str(runs / "probe"))
    entry = leakage.audit(test)
    assert entry["sentence"].startswith("Training and test share no patient and no picture")
    near = entry["rows"][-1]
    manifest = pd.read_parquet(runs / "probe" / "manifest.parquet")
    assert near["training_images"] == manifest["image_id"].nunique() and near["not_in_this_store"] == 0
    train = audited(phantom_store, select(str(phantom_store)).split("train"), what, run=str(runs / "probe"))
    said = leakage.audit(train)["sentence"]
    patients = train.selection.table["patient_id"].nunique()
    assert re.match(rf"Training and test share {patients} patients, {len(train.selection)} identical", said)
    unknown = leakage.audit(audited(phantom_store, test.selection, what))
    assert "can be neither found nor excluded" in unknown["sentence"]


# -- convergence ----------------------------------------------------------------------------------------------------------


def test_updates_to_a_target():
    def points(*values):
        return [{"updates": 10 * n, "auroc": {"value": v, "low": None, "high": None}} for n, v in enumerate(values)]

    assert convergence.reached(points(0.5, 0.7, 0.69, 0.8), 0.7) == 10
    assert convergence.reached(points(0.5, None, 0.6), 0.7) is None
    rows = [
        {"start": start, "updates": updates, "last_updates": 90}
        for start, done in (("pretrained", (10, 30)), ("scratch", (40, 80)))
        for updates in done
    ]
    said = convergence.sentence(rows, 0.8, True)
    assert "after 20 updates (10 to 30 over 2 runs)" in said and said.endswith("3.0 times as many from scratch.")
    rows[-1]["updates"] = None
    assert "1 of 2 runs from scratch do not reach it in 90 updates" in convergence.sentence(rows, 0.8, True)


@pytest.mark.parametrize("pair", [("a", "b"), ("anomaly", "anomaly")])
def test_convergence_of_runs(runs, phantom_store, pair):
    from carina.models.predictor import load_predictor

    what, rows = load_predictor(runs / pair[0]), select(str(phantom_store)).split("test")
    chosen = {"pretrained": [str(runs / pair[0])], "scratch": [str(runs / pair[1])]}
    entry = convergence.audit(audited(phantom_store, rows, what, **chosen))
    first, second = entry["rows"]
    assert first["last_updates"] == second["last_updates"] == 4
    last = audited(phantom_store, rows, load_predictor(runs / pair[1])).as_it_is
    target = rows.table["label.abnormal"]
    assert second["last_auroc"]["value"] == pytest.approx(roc_auc_score(target, last[:, 0]), abs=1e-9)
    assert second["updates"] is not None and entry["curve"]["target"] == second["last_auroc"]["value"]
    assert [one["x"] for one in entry["curve"]["series"]] == [[2, 4], [2, 4]]


def test_runs_that_cannot_be_followed(runs, phantom_store, pretrained):
    look = audited(phantom_store, select(str(phantom_store)).split("test"))
    with pytest.raises(CarinaError, match="kept 0 points of its curve"):
        convergence.followed(str(runs / "probe"), look)
    with pytest.raises(CarinaError, match=r"watch\.store"):
        convergence.followed(str(pretrained), look)
    with pytest.raises(CarinaError, match="two sets of runs"):
        convergence.audit(look)


def test_watched_pretraining(tmp_path, phantom_store):
    lines = [{"step": step, "watch.probe_auroc": value} for step, value in ((9, 0.6), (19, 0.7))]
    write_json(tmp_path / "environment.json", {"stage": "pretrain"})
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 0}, *lines]))
    points = convergence.followed(str(tmp_path), SimpleNamespace())
    assert [(p["updates"], p["auroc"]["value"]) for p in points] == [(10, 0.6), (20, 0.7)]


# -- the whole ------------------------------------------------------------------------------------------------------------


def test_entries_are_json_without_identifiers(runs, phantom_store, tmp_path):
    from carina.models.predictor import load_predictor

    rows, run = select(str(phantom_store)), str(runs / "probe")
    given = AuditSettings(resamples=100, run=run, images=20)
    found = audits.run(["leakage", "shortcut", "leakage"], load_predictor(run), rows, str(phantom_store), given)
    assert [entry["name"] for entry in found] == ["leakage", "shortcut", "markers", "acquisition"]
    assert all(
        set(entry) == {"name", "sentence", "rows", "curve"} and entry["sentence"].endswith(".") for entry in found
    )
    write_json(tmp_path / "audits.json", found)
    text = (tmp_path / "audits.json").read_text()
    for column in ("image_id", "patient_id", "study_id", "content_hash"):
        assert not any(value in text for value in rows.table[column])
    assert str(runs) not in text and str(phantom_store) not in text
    with pytest.raises(CarinaError, match="did you mean 'leakage'"):
        audits.run(["leakages"], load_predictor(run), rows, str(phantom_store), given)


def test_few_images_are_those_of_whole_patients(phantom_store):
    look = audited(phantom_store, select(str(phantom_store)), images=30)
    whole = look.whole.table.groupby("patient_id").size()
    some = look.selection.table.groupby("patient_id").size()
    assert 0 < len(look.selection) < len(look.whole) and (some == whole[some.index]).all()
