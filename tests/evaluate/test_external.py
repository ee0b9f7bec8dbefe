"""Internal or external, how prevalence moved, recalibration on other patients."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from carina.data.splits import patient_folds
from carina.evaluate.external import kind_of_test, prevalence_shift, recalibrations, shift_sentences
from carina.evaluate.numbers import Scored
from carina.intake.catalogs import CATALOGS
from carina.metrics.reliability import recalibration


class Rows:
    """What `kind_of_test` reads of a selection."""

    def __init__(self, *sources, store="test", **origins):
        self.table = pd.DataFrame({"source": sources})
        self.origins = {name: origin(name) for name in sources} | origins
        self.hashes = [store]


def origin(name):
    return CATALOGS[name].provenance() if name in CATALOGS else {"name": name, "lineage": []}


NOTHING = {"patients": 0, "identical_images": 0, "near_identical_images": 0}
CLEAN = {"known": True, "doubts": [], "stages": {"finetune": NOTHING}}


def trained(*sources, pretrained=(), store="train"):
    data = {"origins": {name: origin(name) for name in sources}}
    earlier = {"data": {"origins": {name: origin(name) for name in pretrained}}, "store_hashes": ["older"]}
    return {"data": data, "store_hashes": [store], "pretraining": earlier if pretrained else None}


@pytest.mark.parametrize(
    ("test", "info", "kind", "said"),
    [
        (Rows("vindr"), trained("nih14"), "external", "vindr shares no source"),
        (Rows("nih14"), trained("nih14"), "internal", "nih14 was trained on"),
        (Rows("rsna"), trained("nih14"), "internal", "of nih14 with nih14"),
        (Rows("rsna"), trained("vindr", pretrained=["nih14"]), "internal", "rsna shares"),
        (Rows("rsna"), trained("siim"), "internal", "rsna shares pictures or patients of nih14 with siim"),
        (Rows("vindr", "rsna"), trained("nih14"), "internal", "rsna shares"),
        (Rows("vindr", store="older"), trained("kermany", pretrained=["padchest"]), "internal", "store"),
    ],
)
def test_a_child_or_sibling_of_what_was_trained_on_is_never_external(test, info, kind, said):
    found, sentence = kind_of_test(test, info, CLEAN)
    assert found == kind and said in sentence


def test_seen_patients_are_internal_and_an_unknown_past_is_not_taken_for_clean():
    seen = {**CLEAN, "stages": {"pretrain": {**NOTHING, "patients": 3}}}
    assert kind_of_test(Rows("vindr"), trained("nih14"), seen)[0] == "internal"
    for doubt in (
        {"known": False, "doubts": ["what the backbone was trained on is unknown"], "stages": {}},
        {**CLEAN, "doubts": ["a part of the backbone's past is unknown"]},
        {**CLEAN, "doubts": [], "stages": {"pretrain": {**NOTHING, "near_identical_images": 2}}},
    ):
        kind, sentence = kind_of_test(Rows("vindr"), trained("nih14"), doubt)
        assert kind == "unknown" and (doubt["doubts"] or ["2 images look the same"])[0] in sentence
    assert kind_of_test(Rows("vindr"), trained(), CLEAN)[0] == "unknown"


def scored(images=1600, slope=0.5, shift=1.0, seed=0, **given):
    """Probabilities whose logits are too extreme by 1 / slope and too low by the shift; the second label is rare."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(images, 2)) + np.array([-1.0, -7.0])
    target = (rng.random(logits.shape) < expit(slope * logits + shift * np.array([1, 0]))).astype(float)
    target[rng.random(images) < 0.1, 0] = np.nan
    values = {
        "labels": ["Effusion", "Hernia"], "targets": target, "scores": expit(logits), "called": None, "thresholds": None,
        "patients": np.arange(images) // 2, "facts": pd.DataFrame(index=range(images)), "fits": np.zeros(images, int),
        "probabilities": True, "train_counts": {"Effusion": {"positive": 100, "negative": 900},
        "Hernia": {"positive": 0, "negative": 1000}}, "resamples": 200, "seed": 3,
    }  # fmt: skip
    return Scored(**{**values, **given})


def test_recalibration_on_half_of_the_patients_mends_the_other_half():
    one = scored(targets=(made := scored()).targets * np.array([1, 0]))
    rows = recalibrations(one, one.patients.astype(str))
    assert [row["label"] for row in rows] == ["Effusion"]  # one class of the other
    (row,) = rows
    half = patient_folds(list(one.patients.astype(str)), 2, one.seed)
    assert not set(one.patients[half == 0]) & set(one.patients[half == 1])
    fits = [recalibration(made.targets[half == side, 0], made.scores[half == side, 0]) for side in (0, 1)]
    assert (row["temperature"], row["intercept"]) == pytest.approx(tuple(np.mean(fits, axis=0)))
    assert row["temperature"] == pytest.approx(2, rel=0.3) and row["intercept"] == pytest.approx(1, abs=0.3)
    before, after = row["before"], row["after"]
    assert before["slope"]["high"] < 1 and before["intercept"]["low"] > 0
    assert (
        after["slope"]["low"] < 1 < after["slope"]["high"]
        and after["intercept"]["low"] < 0 < after["intercept"]["high"]
    )
    assert after["brier"]["value"] < before["brier"]["value"] and after["ece"]["value"] < before["ece"]["value"]
    assert row["patients_fitted"] <= row["patients_left"] / 2 + 1


def test_prevalence_here_stands_beside_that_in_training():
    one = scored()
    given = one.labels, one.targets, one.patients
    rows = prevalence_shift(*given, one.train_counts)
    known = ~np.isnan(one.targets[:, 0])
    assert rows[0]["test_prevalence"] == pytest.approx(one.targets[known, 0].mean())
    assert (rows[0]["train_prevalence"], rows[0]["train_n"], rows[0]["test_n"]) == (0.1, 1000, known.sum())
    assert rows[1]["train_prevalence"] == 0
    (text,) = shift_sentences(rows)
    assert "Effusion 10.0% to" in text and "Hernia" not in text
    same = [{**rows[0], "test_prevalence": 0.12}]
    assert shift_sentences(same) == []
    unknown = prevalence_shift(*given, None)
    assert unknown[0]["train_prevalence"] is None and shift_sentences(unknown) == []
    few = prevalence_shift(
        one.labels, one.targets[:30], one.patients[:30], {"Effusion": {"positive": 1, "negative": 9}}
    )
    assert all(row[key] is None for row in few for key in row if key != "label")
