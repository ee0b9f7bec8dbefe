"""Images pooled to studies and patients: on hand-made tables, and through the verb."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from carina.errors import CarinaError
from carina.evaluate.studies import Pooling

NAN = np.nan
TABLE = pd.DataFrame(
    {
        "image_id": ["a", "b", "c", "d", "e", "f"],
        "study_id": ["s2", "s1", "s2", "s3", "s1", "s4"],
        "patient_id": ["p1", "p2", "p1", "p1", "p2", "p3"],
        "view": ["PA", "AP", "LATERAL", "PA", "AP", None],
        "sex": ["F", "M", "F", "F", "M", ""],
    }
)
SCORES = np.array([[0.1], [0.5], [0.9], [0.3], [0.7], [0.2]])
TARGETS = np.array([[0.0], [NAN], [1.0], [NAN], [0.0], [0.0]])


def test_a_hand_made_table():
    study, patient = Pooling(TABLE, "study", "mean"), Pooling(TABLE, "patient", "max")
    assert list(study.names) == ["s2", "s1", "s3", "s4"] and list(patient.names) == ["p1", "p2", "p3"]
    np.testing.assert_allclose(study.scores(SCORES)[:, 0], [0.5, 0.6, 0.3, 0.2])
    np.testing.assert_allclose(patient.scores(SCORES)[:, 0], [0.9, 0.7, 0.2])
    np.testing.assert_array_equal(study.targets(TARGETS)[:, 0], [1, NAN, NAN, 0])
    np.testing.assert_array_equal(patient.targets(TARGETS)[:, 0], [1, NAN, 0])
    facts = study.table(TABLE, list(TABLE.columns))
    assert facts["view"].tolist() == ["LATERAL+PA", "AP", "PA", ""] and facts["image_id"].tolist() == list(study.names)
    assert facts["patient_id"].tolist() == ["p1", "p2", "p1", "p3"]
    assert patient.table(TABLE, list(TABLE.columns))["study_id"].tolist() == ["", "", ""]
    alone = Pooling(TABLE, "image", "max")
    assert alone.scores(SCORES) is SCORES and alone.targets(TARGETS) is TARGETS


def test_facts_are_told_where_the_images_of_a_unit_agree():
    table = TABLE.assign(
        age=[17.0, 61, 61, 17, 65, NAN],
        manufacturer=["X", "Y", "X", "", "Z", "X"],
        source=["a", "b", "a", "a", "b", "c"],
        split="test",
    )
    found = Pooling(table, "patient", "max").table(table, list(table.columns)).set_index("image_id")
    assert found["age"].tolist() == pytest.approx([NAN, 61, NAN], nan_ok=True)
    assert found["manufacturer"].tolist() == ["X", "", "X"] and found["source"].tolist() == ["a", "b", "c"]
    assert found["sex"].tolist() == ["F", "M", ""] and found["split"].tolist() == ["test"] * 3


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["max", "mean"]))
def test_pooling_is_the_plain_loop(seed, pool):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 30))
    studies = rng.integers(0, 8, count)
    table = pd.DataFrame({"study_id": [f"s{n}" for n in studies]})
    scores = rng.normal(size=(count, 2))
    targets = rng.choice([0.0, 1.0, NAN], (count, 2))
    pooling = Pooling(table, "study", pool)
    for place, name in enumerate(pooling.names):
        mine = (table["study_id"] == name).to_numpy()
        expected = scores[mine].max(0) if pool == "max" else scores[mine].mean(0)
        np.testing.assert_allclose(pooling.scores(scores)[place], expected)
        for column in range(2):
            values = targets[mine, column].tolist()
            wanted = 1.0 if 1.0 in values else 0.0 if all(v == 0 for v in values) else NAN
            np.testing.assert_equal(pooling.targets(targets)[place, column], wanted)


def test_levels_through_the_verb(phantom_store, tmp_path):
    from carina.evaluate.score import evaluate
    from carina.finetune.run import finetune

    run = tmp_path / "run"
    given = {"store": str(phantom_store), "backbone": "random", "architecture": "test_resnet", "scale": 32}
    finetune("classify", {**given, "labels": ["Cardiomegaly", "abnormal"], "out": str(run), "threads": 1}, quiet=True)
    how = {"store": str(phantom_store), "split": "all", "resamples": 100, "examples": 2}
    images = evaluate(str(run), how, quiet=True)
    flat = pd.read_parquet(run / "evaluations" / "all" / "predictions.parquet")
    for level in ("study", "patient"):
        found = evaluate(str(run), {**how, "level": level, "pool": "mean"}, quiet=True)
        out = run / "evaluations" / f"all-{level}-mean"
        frame = pd.read_parquet(out / "predictions.parquet")
        assert list(frame.columns) == list(flat.columns)
        key = f"{level}_id"
        assert found["units"] == flat[key].nunique() < images["units"] == images["images"] == found["images"]
        for label in ("Cardiomegaly", "abnormal"):
            grouped = flat[flat["label"] == label].groupby(key)
            part = frame[frame["label"] == label].set_index("image_id")
            mean, worst = grouped["score"].mean(), grouped["target"].max()
            np.testing.assert_allclose(part["score"].loc[mean.index], mean)
            np.testing.assert_array_equal(part["target"].loc[worst.index], worst)
            row = next(row for row in found["table"] if row["label"] == label)
            assert row["auroc"]["value"] == pytest.approx(roc_auc_score(worst, mean)) and row["threshold"] is None
            assert row["auroc"]["num_patients"] == flat["patient_id"].nunique()
        told = json.loads((out / "metrics.json").read_text())
        assert (told["level"], told["pool"]) == (level, "mean")
        word = {"study": "studies", "patient": "patients"}[level]
        assert told["unit"] == word and any("need not mean what they say" in text for text in told["sentences"])
        shift = {row["label"]: row for row in told["external"]["shift"]}
        alone = flat[flat["target"].notna()].groupby("label")["target"]
        for label, share in alone.mean().items():  # of images, as in training
            assert shift[label]["test_prevalence"] == pytest.approx(share)
            assert shift[label]["test_n"] == alone.size()[label]
        assert f"Test {word}" in (out / "report.html").read_text()
    with pytest.raises(CarinaError, match=r"other rows \(level, pool differ\)"):
        evaluate(str(run), {**how, "level": "study", "out": str(run / "evaluations" / "all")}, quiet=True)
