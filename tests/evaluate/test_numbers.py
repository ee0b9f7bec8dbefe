"""The figures of an evaluation: table, averages, curves, sentences, and the whole of metrics.json on a real run."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score, roc_auc_score

from carina.errors import CarinaError
from carina.evaluate.numbers import (
    Scored,
    averages,
    calibration_bins,
    decision_curves,
    metric_table,
    sentence_of_fits,
    sentences_of_table,
)
from carina.evaluate.terminal import terminal_table

LABELS = ["Effusion", "Mass", "Hernia", "Edema"]
TRAINED = {"Effusion": 5000, "Mass": 300, "Hernia": 20, "Edema": 99}


def scored(images=900, labels=LABELS, bias=(0.0, -1.0, -4.5, -1.0), strength=1.0, fits=1, seed=0, **given):
    """Two images a patient, a tenth of the targets unknown; probabilities are right where strength is 1."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(images, len(labels))) * 1.5 + np.array(bias[: len(labels)])
    target = (rng.random(logits.shape) < expit(strength * logits)).astype(float)
    target[rng.random(target.shape) < 0.1] = np.nan
    if "Edema" in labels:
        target[target[:, labels.index("Edema")] == 1, labels.index("Edema")] = 0
    score = expit(logits)
    facts = {"view": "PA", "sex": "", "age": np.nan, "manufacturer": "", "source": "a"}
    values = {
        "labels": list(labels), "targets": target, "scores": score, "called": score >= 0.5,
        "thresholds": dict.fromkeys(labels, 0.5), "patients": np.array([f"p{i // 2}" for i in range(images)]),
        "facts": pd.DataFrame(facts, index=range(images)), "fits": np.arange(images) // 2 % fits, "probabilities": True,
        "train_counts": {name: {"positive": TRAINED.get(name, 0), "negative": 100} for name in labels},
        "resamples": 200, "seed": 0,
    }  # fmt: skip
    return Scored(**{**values, **given})


def test_every_row_holds_the_figures_of_scikit_learn_with_their_intervals():
    one = scored()
    rows = metric_table(one, {"Mass": 0.02})
    assert [row["label"] for row in rows] == ["macro", *LABELS]
    for row, target, score in zip(rows[1:3], one.targets.T, one.scores.T):
        known = ~np.isnan(target)
        y, p = target[known], score[known]
        called = p >= 0.5
        expected = {
            "auroc": roc_auc_score(y, p),
            "ap": average_precision_score(y, p),
            "brier": np.mean((p - y) ** 2),
            "sensitivity": recall_score(y, called),
            "specificity": recall_score(1 - y, ~called),
            "ppv": precision_score(y, called),
            "npv": precision_score(1 - y, ~called),
            "f1": f1_score(y, called),
        }
        for name, value in expected.items():
            assert row[name]["value"] == pytest.approx(value, abs=1e-12), name
            assert row[name]["low"] < value < row[name]["high"] and row[name]["estimable"]
        assert row["calibration_slope"]["low"] < 1 < row["calibration_slope"]["high"]  # they were made right
        assert row["calibration_intercept"]["low"] < 0 < row["calibration_intercept"]["high"]
        assert (row["n"], row["positives"], row["unknown"]) == (known.sum(), y.sum(), (~known).sum())
    mass = rows[2]
    sick, alarms = mass["sensitivity"]["value"] * 0.02, (1 - mass["specificity"]["value"]) * 0.98
    assert mass["at_prevalence"]["ppv"]["value"] == pytest.approx(sick / (sick + alarms), abs=1e-12)
    assert mass["at_prevalence"]["prevalence"] == 0.02 and rows[1]["at_prevalence"] is None
    hernia, edema = rows[3], rows[4]
    assert not hernia["auroc"]["estimable"] and "fewer than 20" in hernia["note"] and not hernia["one_class"]
    assert edema["one_class"] and edema["auroc"]["value"] is None and edema["brier"]["value"] is not None
    assert edema["sensitivity"]["value"] is None and edema["calibration_slope"]["value"] is None
    assert json.dumps(rows, allow_nan=False)
    with pytest.raises(CarinaError, match="names Masses, which this predictor does not predict"):
        metric_table(one, {"Masses": 0.1})


def test_distances_have_no_calibration_and_no_decision_curve():
    one = scored(labels=("Mass",), bias=(-1.0,), probabilities=False, called=None, thresholds=None)
    (row,) = metric_table(one, 0.1)
    names = ("brier", "ece", "calibration_slope", "calibration_intercept", "sensitivity", "threshold", "at_prevalence")
    assert [row[name] for name in names] == [None] * len(names)
    assert decision_curves(one) is None and calibration_bins(one) is None and averages(one) == []


def test_averages_name_their_labels_and_bounds():
    one = scored()
    found = {entry["name"]: entry for entry in averages(one)}
    alone = {row["label"]: row["auroc"]["value"] for row in metric_table(one)}
    assert list(found) == ["macro", "estimable", "micro", "head", "medium", "tail"]
    sure = found["estimable"]
    assert sure["labels"] == [row["label"] for row in metric_table(one)[1:] if row["auroc"]["estimable"]] == LABELS[:2]
    assert sure["auroc"]["estimable"] and sure["auroc"]["value"] == pytest.approx(
        np.mean([alone[n] for n in LABELS[:2]])
    )
    assert found["macro"]["labels"] == LABELS[:3] and found["macro"]["left_out"] == ["Edema"]
    assert found["macro"]["auroc"]["value"] == pytest.approx(np.mean([alone[name] for name in LABELS[:3]]))
    known = ~np.isnan(one.targets)
    assert found["micro"]["auroc"]["value"] == pytest.approx(roc_auc_score(one.targets[known], one.scores[known]))
    assert found["micro"]["ap"]["value"] == pytest.approx(
        average_precision_score(one.targets[known], one.scores[known])
    )
    assert found["head"]["labels"] == ["Effusion"] and found["head"]["auroc"]["value"] == alone["Effusion"]
    assert (
        found["medium"]["labels"] == ["Mass"] and "100 to 1,000 positive images in training" in found["medium"]["words"]
    )
    assert found["tail"]["labels"] == ["Hernia"] and found["tail"]["left_out"] == ["Edema"]
    unknown = {entry["name"]: entry["words"] for entry in averages(scored(train_counts=None))}
    assert "this test (those in training are not known)" in unknown["medium"]


def test_curves_are_counted_by_hand():
    one = scored()
    curve, bins = decision_curves(one), calibration_bins(one)
    assert list(curve) == list(bins) == LABELS[:3]
    known = ~np.isnan(one.targets[:, 0])
    y, p = one.targets[known, 0], one.scores[known, 0]
    place = curve["Effusion"]["threshold"].index(0.3)
    hits, alarms = ((p >= 0.3) & (y == 1)).sum(), ((p >= 0.3) & (y == 0)).sum()
    assert curve["Effusion"]["model"][place] == pytest.approx((hits - alarms * 0.3 / 0.7) / len(y))
    assert curve["Effusion"]["all"][place] == pytest.approx(y.mean() - (1 - y.mean()) * 0.3 / 0.7)
    assert sum(row["n"] for row in bins["Effusion"]) == len(y) and len(bins["Effusion"]) == 10
    assert sum(row["n"] * row["observed"] for row in bins["Effusion"]) == pytest.approx(y.sum())


def test_words_for_what_cannot_be_said_and_for_what_is_below_chance():
    low = scored(strength=-1.0)
    words = " ".join(sentences_of_table(metric_table(low)))
    assert "One class only, so nothing can be ranked: Edema." in words
    assert "Effusion ranks below chance, AUROC 0." in words
    assert "Not estimable" in (text := " ".join(sentences_of_table(metric_table(scored())))) and "Hernia" in text
    assert "below chance" not in text


def test_of_many_labels_of_noise_few_studies_have_one_that_ranks_below_chance():
    labels = [f"L{number}" for number in range(14)]
    said = single = 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        target = (rng.random((200, 14)) < 0.3).astype(float)
        noise = {"targets": target, "scores": rng.random(target.shape), "called": None, "probabilities": True}
        one = scored(200, labels, np.zeros(14), patients=np.arange(200), resamples=400, train_counts=None, **noise)
        rows = metric_table(one)
        single += any(row["auroc"]["high"] < 0.5 for row in rows[1:])
        said += any("below chance" in sentence for sentence in sentences_of_table(rows))
    assert single >= 4 > said


def test_the_mean_over_labels_has_no_counts_of_positives_and_decisions_need_thresholds():
    macro = metric_table(scored())[0]
    assert macro["positives"] is None and macro["unknown"] is None and macro["n"] == 900


def test_pooled_fits_say_what_they_are_over_pairs_of_one_fit():
    one = scored(labels=("Effusion",), bias=(0.0,), fits=3)
    shifted = scored(labels=("Effusion",), bias=(0.0,), fits=3, scores=(one.scores + one.fits[:, None]) / 3)
    text = sentence_of_fits(shifted)
    known = ~np.isnan(one.targets[:, 0])
    won = pairs = 0.0
    for fit in range(3):
        own = known & (one.fits == fit)
        y, p = one.targets[own, 0], one.scores[own, 0]
        both = (y == 1).sum() * (y == 0).sum()
        won, pairs = won + both * roc_auc_score(y, p), pairs + both
    assert "Scores of 3 fits are pooled" in text and f"it is {won / pairs:.2f}" in text
    assert metric_table(shifted)[0]["auroc"]["value"] < won / pairs - 0.05


@pytest.mark.parametrize("label", ["Fracture [old]", "Fibrosis [/b]", "[red]Mass\\", "a\x1b[31mb"])
def test_names_reach_the_terminal_as_they_are(label):
    known = {"value": 0.7, "low": 0.6, "high": 0.8, "estimable": True}
    row = {"label": label, "auroc": known, "ap": known, "positives": 1, "n": 2, "note": label}
    scales = [{"label": label, "scale": 64, "weight": 1.0, "auroc": known, "stack_minus": known}]
    result = {
        "kind": "classify", "mode": label, "split": label, "patients": 3, "level": "image", "pool": None,
        "synthetic": False, "overlap_sentence": label, "sentences": [label], "table": [{**row, "positives": None}, row],
        "scales": {"from": label, "best": {}, "rows": scales}, "pretext_saw": "", "labels_used": "",
    }  # fmt: skip
    console = Console(width=300, file=io.StringIO())
    console.print(terminal_table(result))
    text = console.file.getvalue()
    shown = label.replace("\x1b", " ")
    assert text.count(shown) == 10 and "\x1b" not in text and "1 of 2" in text and "None" not in text


@pytest.fixture(scope="module")
def run(phantom_store, tmp_path_factory):
    from carina.finetune.run import finetune

    out = tmp_path_factory.mktemp("numbers") / "run"
    given = {"store": str(phantom_store), "backbone": "random", "architecture": "resnet10t", "scale": 32, "threads": 1}
    finetune("classify", {**given, "labels": ["Effusion", "Cardiomegaly"], "out": str(out), "wandb": "off"}, quiet=True)
    return out


def test_metrics_json_of_a_run(run, phantom_store, tmp_path):
    from carina.evaluate.score import evaluate

    given = {"store": str(phantom_store), "split": "val+test", "resamples": 150, "examples": 0, "prevalence": 0.1}
    result = evaluate(str(run), {**given, "where": "view == 'PA' or sex == 'F'", "out": str(tmp_path)}, quiet=True)
    saved = json.loads((tmp_path / "metrics.json").read_text())
    frame = pd.read_parquet(tmp_path / "predictions.parquet")
    for row in saved["table"][1:]:
        part = frame[(frame["label"] == row["label"]) & frame["target"].notna()]
        called = part["score"] >= row["threshold"]
        assert row["f1"]["value"] == pytest.approx(f1_score(part["target"], called))
        assert row["at_prevalence"]["prevalence"] == 0.1
    steps = [step["step"] for step in saved["flow"]]
    assert steps == ["rows of the store", "where view == 'PA' or sex == 'F'", "split val+test", "known Effusion",
                     "known Cardiomegaly", "scored"]  # fmt: skip
    images = [step["images"] for step in saved["flow"]]
    assert images[0] > images[1] > images[2] == images[-1] == result["images"]
    assert {row["variable"] for row in saved["subgroups"]} >= {"view", "sex", "age"}
    people = frame[frame["target"].notna()].groupby(["sex", "label"])["patient_id"].nunique()
    for row in (row for row in saved["subgroups"] if row["variable"] == "sex"):
        assert row["withheld"] or row["patients"] == people[row["group"], row["label"]] >= 20
    assert saved["external"]["kind"] == "internal" and saved["external"]["recalibration"] == []
    shift = {row["label"]: row for row in saved["external"]["shift"]}
    info = json.loads((run / "predictor" / "predictor.json").read_text())["data"]["labels"]
    for label, counts in info.items():
        assert shift[label]["train_n"] == counts["positive"] + counts["negative"]
    assert any(text.startswith("Not estimable") for text in saved["sentences"])
    with pytest.raises(CarinaError, match="leave it out with level=patient"):
        evaluate(str(run), {**given, "level": "patient"}, quiet=True)
    identifiers = {*frame["patient_id"], *frame["image_id"]}
    assert not identifiers & set(json.dumps(saved).replace('"', " ").split())
