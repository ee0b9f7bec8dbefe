"""Groups of images: their figures, a planted confounder, the worst group."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

from carina.evaluate.numbers import Scored
from carina.evaluate.subgroups import MOST_GROUPS, confounders, grouped, groups_of, subgroups, telling, worst


def scored(confounded=0.0, blind=None, images=800, labels=("Effusion",), seed=0, **facts):
    """PA and AP images, two a patient. confounded: how much both target and score follow the view; blind: a sex in which the
    score says nothing."""
    rng = np.random.default_rng(seed)
    patients = np.arange(images) // 2
    view = np.where(rng.random(images) < 0.5, "PA", "AP")
    sex = np.where(rng.random(images // 2) < 0.4, "F", "M")[patients]
    lean = confounded * np.where(view == "PA", 1.0, -1.0)[:, None]
    target = (rng.random((images, len(labels))) < expit(lean)).astype(float)
    seen = np.ones(images) if blind is None else (sex != blind).astype(float)
    score = expit(1.2 * seen[:, None] * (target - 0.5) + rng.normal(size=target.shape) + lean)
    target[rng.random(target.shape) < 0.1] = np.nan
    age = rng.choice([5, 17.9, 18, 39, 40, 66, 80, 95, np.nan], images)
    table = pd.DataFrame({"view": view, "sex": sex, "age": age, "manufacturer": "", "source": "a", **facts})
    return Scored(
        labels=list(labels), targets=target, scores=score, called=score >= 0.5, thresholds=dict.fromkeys(labels, 0.5),
        patients=patients, facts=table, fits=np.zeros(images, int), probabilities=True, train_counts=None, resamples=300,
        seed=0,
    )  # fmt: skip


def test_groups_are_told_in_words_and_many_small_ones_are_one():
    facts = pd.DataFrame(
        {"age": [0, 17.9, 18, 59, 60, 80, 110, np.nan], "sex": ["F", "", None, "M", "M", "M", " ", "F"]}
    )
    bands = ["0-17", "0-17", "18-39", "40-59", "60-79", "80+", "80+", "unknown"]
    assert groups_of(facts, "age").tolist() == bands
    assert groups_of(facts, "sex").tolist() == ["F", "unknown", "unknown", "M", "M", "M", "unknown", "F"]
    makers = pd.DataFrame({"manufacturer": [f"m{i}" for i in range(14) for _ in range(14 - i)]})
    found = pd.Series(groups_of(makers, "manufacturer")).value_counts()
    assert len(found) == MOST_GROUPS and found["m0"] == 14 and found["other"] == sum(range(1, 6))


def test_every_group_has_the_figures_of_its_images():
    one = scored(confounded=0.5)
    variables, missing = grouped(one)
    assert [found.variable for found in variables] == ["view", "sex", "age"] and missing == ["manufacturer"]
    rows = subgroups(one, variables)
    assert len(rows) == 2 + 2 + 6
    for row in rows:
        own = (groups_of(one.facts, row["variable"]) == row["group"]) & ~np.isnan(one.targets[:, 0])
        y, p = one.targets[own, 0], one.scores[own, 0]
        assert (row["n"], row["positives"]) == (len(y), y.sum())
        assert row["patients"] == len(np.unique(one.patients[own]))
        assert row["auroc"]["value"] == pytest.approx(roc_auc_score(y, p))
        assert row["ap"]["value"] == pytest.approx(average_precision_score(y, p))
        assert row["sensitivity"]["value"] == pytest.approx(recall_score(y, p >= 0.5))
        assert row["specificity"]["value"] == pytest.approx(recall_score(1 - y, p < 0.5))
        assert row["auroc"]["low"] < row["auroc"]["value"] < row["auroc"]["high"]


def test_few_patients_in_a_group_are_said():
    rare = np.where(np.arange(800) < 30, "rare", "often")
    rows = subgroups(one := scored(manufacturer=rare), grouped(one)[0])
    row = next(row for row in rows if row["group"] == "rare")
    assert not row["auroc"]["estimable"] and "fewer than 20" in row["note"]
    assert not any(entry["group"] == "rare" for entry in worst(one, grouped(one)[0]))


def test_a_planted_confounder_is_found_and_a_clean_score_is_cleared():
    mixed = scored(confounded=1.5, labels=("Effusion", "Mass"))
    found = {(e["variable"], e["label"]): e for e in confounders(mixed, grouped(mixed)[0])}
    entry = found["view", "Effusion"]
    known = ~np.isnan(mixed.targets[:, 0])
    views, shares, won, pairs = mixed.facts["view"].to_numpy(), {}, 0.0, 0.0
    for view in ("AP", "PA"):
        own = known & (views == view)
        y, p = mixed.targets[own, 0], mixed.scores[own, 0]
        both = y.sum() * (1 - y).sum()
        shares[view], won, pairs = y.mean(), won + both * roc_auc_score(y, p), pairs + both
        assert entry["groups"][view]["value"] == pytest.approx(roc_auc_score(y, p))
    overall = roc_auc_score(mixed.targets[known, 0], mixed.scores[known, 0])
    assert entry["within"]["value"] == pytest.approx(won / pairs)
    assert entry["difference"]["value"] == pytest.approx(overall - won / pairs)
    assert entry["prevalence"] == pytest.approx(shares)
    assert entry["difference"]["low"] > 0.05 and entry["p_corrected"] < 0.05
    assert "knowledge of the view, not of the finding" in entry["sentence"]
    assert f"{shares['PA']:.0%} of PA and {shares['AP']:.0%} of AP images" in entry["sentence"]
    mean = found["view", "macro"]
    parts = [found["view", label]["difference"]["value"] for label in mixed.labels]
    assert mean["difference"]["value"] == pytest.approx(np.mean(parts)) and "the 2 labels" in mean["sentence"]
    assert not found["sex", "Effusion"]["difference"]["low"] > 0
    clean = scored()
    entries = confounders(clean, grouped(clean)[0])
    assert telling(entries, "difference") == []
    assert "does not show that the view adds" in next(e["sentence"] for e in entries if e["variable"] == "view")


def test_the_worst_group_is_found_with_its_gap_to_all_others():
    one = scored(blind="F")
    entries = worst(one, grouped(one)[0])
    entry = next(entry for entry in entries if entry["variable"] == "sex")
    known = ~np.isnan(one.targets[:, 0])
    rates = {}
    for sex in ("F", "M"):
        own = known & (one.facts["sex"] == sex).to_numpy()
        rates[sex] = roc_auc_score(one.targets[own, 0], one.scores[own, 0])
    assert entry["group"] == "F" and entry["auroc"]["value"] == pytest.approx(rates["F"])
    assert entry["gap"]["value"] == pytest.approx(rates["M"] - rates["F"]) and entry["gap"]["low"] > 0
    assert entry["p_corrected"] < 0.05 and telling(entries, "gap") == [entry["sentence"]]
    fair = scored()
    fair = worst(fair, grouped(fair)[0])
    assert fair and telling(fair, "gap") == [] and "can be chance" in fair[0]["sentence"]


def test_a_group_of_one_class_leaves_the_other_to_be_looked_at():
    one = scored()
    one.targets[(one.facts["view"] == "AP").to_numpy()] = 0
    entry = next(e for e in confounders(one, grouped(one)[0]) if e["variable"] == "view")
    assert entry["groups"]["AP"]["value"] is None
    assert entry["within"]["value"] == pytest.approx(entry["groups"]["PA"]["value"])
