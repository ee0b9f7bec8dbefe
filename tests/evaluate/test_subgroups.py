"""Groups of images: their figures, a planted confounder, the worst group."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

from carina.evaluate.numbers import Scored
from carina.evaluate.subgroups import (
    MOST_GROUPS,
    confounders,
    grouped,
    groups_of,
    subgroups,
    telling,
    too_coarse,
    worst,
)
from carina.models.hub.few import FEW


def scored(confounded=0.0, blind=None, images=800, labels=("Effusion",), seed=0, **facts):
    """PA and AP images, two a patient. confounded: how much both target and score follow the view; blind: a sex in which the
    score says nothing."""
    rng = np.random.default_rng(seed)
    patients = np.arange(images) // 2
    view = np.where(rng.random(images) < 0.5, "PA", "AP")
    sex = np.where(rng.random((images + 1) // 2) < 0.4, "F", "M")[patients]
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


def numbers_in(value):
    """All numbers of a nested value that could count patients or images."""
    if isinstance(value, dict):
        return [n for key, part in value.items() if key != "chosen_from" for n in numbers_in(part)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(0, 1000))
def test_nothing_is_told_of_few_patients_nor_can_it_be_computed_from_the_rest(sizes, seed):
    names = np.repeat([f"m{number}" for number in range(len(sizes))], 2 * np.array(sizes))
    one = scored(images=len(names), seed=seed, manufacturer=names)
    one.targets[np.random.default_rng(seed).random(len(names)) < 0.2] = np.nan
    variables = grouped(one)[0]
    rows = [row for row in subgroups(one, variables) if row["variable"] == "manufacturer"]
    known = ~np.isnan(one.targets[:, 0])
    people = {name: set(one.patients[known & (names == name)]) for name in set(names)}
    hidden = {row["group"] for row in rows if row["withheld"]}
    assert {row["group"] for row in rows} == set(names)
    assert {name for name, found in people.items() if len(found) < FEW} <= hidden
    together = set().union(*(people[name] for name in hidden))
    assert len(together) >= min(FEW, len(set(one.patients[known]))) or not together
    few = {name for name in hidden if len(people[name]) < FEW}
    assert all(numbers_in(row) == [] for row in rows if row["group"] in few)
    for row in (row for row in rows if row["withheld"] and row["group"] not in few):
        figures = row.pop("auroc"), row.pop("ap")
        assert numbers_in(row) == [] and all(found["value"] is not None for found in figures)
        assert not any(value for found in figures for key, value in found.items() if key.startswith("num_"))
    entries = [row for row in worst(one, variables) if row["variable"] == "manufacturer"]
    assert not any(row["group"] in few for row in entries)
    assert all(row["auroc"]["num_patients"] is None for row in entries if row["group"] in hidden)
    for entry in (entry for entry in confounders(one, variables) if entry["variable"] == "manufacturer"):
        assert all(entry["prevalence"][name] is None for name in hidden & set(entry["prevalence"]))
        groups = entry["groups"]
        assert all(groups[name] is None for name in few) and all(
            groups[n]["num_patients"] is None for n in hidden - few
        )
        assert not any(f"of {name}" in entry["sentence"] for name in hidden)
        if (told := entry["among_negatives"]) is not None:
            seen = known & ~np.isin(names, list(few)) & (one.targets[:, 0] == 0)
            assert told["num_positives"] + told["num_negatives"] <= seen.sum()


def test_one_small_group_takes_the_counts_of_the_next_smallest_with_it():
    sizes = {"a": 300, "b": 61, "c": 38, "d": 1}
    one = scored(manufacturer=np.repeat(list(sizes), 2 * np.array(list(sizes.values()))))
    rows = {r["group"]: r for r in subgroups(one, grouped(one)[0]) if r["variable"] == "manufacturer"}
    assert {name: row["withheld"] for name, row in rows.items()} == {"a": False, "b": False, "c": True, "d": True}
    assert "fewer than 20 patients" in rows["d"]["note"] and "cannot be computed" in rows["c"]["note"]
    assert rows["c"]["n"] is None and rows["c"]["auroc"]["value"] is not None and rows["d"]["auroc"] is None


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
    assert "is knowledge of the view" in entry["sentence"] and entry["among_negatives"]["low"] > 0.9
    assert f"{shares['PA']:.0%} of PA and {shares['AP']:.0%} of AP images" in entry["sentence"]
    mean = found["view", "macro"]
    parts = [found["view", label]["difference"]["value"] for label in mixed.labels]
    assert mean["difference"]["value"] == pytest.approx(np.mean(parts)) and "the 2 labels" in mean["sentence"]
    assert not found["sex", "Effusion"]["difference"]["low"] > 0
    well = known & (mixed.targets[:, 0] == 0)
    expected = roc_auc_score(views[well] == "PA", mixed.scores[well, 0])
    assert entry["among_negatives"]["value"] == pytest.approx(expected)
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


def planted(target, score, **facts):
    """One label, an image a patient."""
    base = scored(images=len(target), manufacturer=np.repeat("", len(target)))
    facts = base.facts.assign(view="AP", sex="", age=np.nan, **facts)
    return replace(base, targets=np.reshape(target, (-1, 1)).astype(float), scores=expit(np.reshape(score, (-1, 1))),
                   called=None, thresholds=None, patients=np.arange(len(target)), facts=facts)  # fmt: skip


def test_a_finding_that_shows_more_plainly_in_one_view_is_not_called_knowledge_of_it():
    rng = np.random.default_rng(1)
    source = np.repeat(["PA", "AP"], 200)
    target = np.repeat([1, 0, 1, 0], [160, 40, 40, 160])
    score = rng.normal(size=400) + target * np.where(source == "PA", 2.0, 0.5)
    one = planted(target, score, source=source)
    (entry,) = confounders(one, grouped(one)[0])
    assert entry["difference"]["low"] > 0 and entry["p_corrected"] < 0.05
    assert "is knowledge" not in entry["sentence"] and "how often or how plainly" in entry["sentence"]
    assert entry["among_negatives"]["low"] < 0.5 < entry["among_negatives"]["high"]


def test_a_label_that_the_source_alone_tells_is_said_and_leaves_the_mean():
    rng = np.random.default_rng(0)
    source = np.tile(["A", "B"], 200)
    target = np.stack([source == "A", *(rng.integers(0, 2, 400) for _ in range(2))], axis=1).astype(float)
    score = rng.normal(size=target.shape) + target * [6, 0.3, 0.3]
    base = planted(source == "A", score[:, 0], source=source)
    one = replace(base, labels=["COVID", "X", "Y"], targets=target, scores=expit(score))
    found = {entry["label"]: entry for entry in confounders(one, grouped(one)[0])}
    assert list(found) == ["macro", "COVID", "X", "Y"]
    told = found["COVID"]
    assert told["separated"] and told["within"]["value"] is None and not told["difference"]["estimable"]
    assert "the source alone tells this label" in told["sentence"]
    assert telling(list(found.values()), "difference") == [told["sentence"]]
    for key in ("overall", "within", "difference"):
        assert found["macro"][key]["value"] == pytest.approx(np.mean([found[name][key]["value"] for name in "XY"]))


def test_within_that_hangs_on_one_positive_is_not_estimable():
    source = np.repeat(["PA", "AP"], [62, 141])
    target = np.repeat([1, 0, 1, 0], [60, 2, 1, 140])
    one = planted(target, np.random.default_rng(0).normal(size=203) + target, source=source)
    (entry,) = confounders(one, grouped(one)[0])
    assert not entry["within"]["estimable"] and not entry["difference"]["estimable"] and entry["p_corrected"] is None
    assert "Too little to rely on: pairs of one source rest on fewer than 20" in entry["sentence"]


def test_a_group_is_held_against_pairs_within_the_others():
    rng = np.random.default_rng(4)
    group = rng.integers(0, 3, 1200)
    share = np.array([0.15, 0.45, 0.85])[group]
    target = (rng.random(1200) < share).astype(float)
    one = planted(target, target + 3 * share + rng.normal(size=1200), source=np.array(["a", "b", "c"])[group])
    (entry,) = worst(one, grouped(one)[0])
    by_name = dict(zip("abc", range(3)))
    rates, pairs = [], []
    for number in range(3):
        y = target[group == number]
        rates.append(roc_auc_score(y, one.scores[group == number, 0]))
        pairs.append(y.sum() * (1 - y).sum())
    lowest = by_name[entry["group"]]
    assert rates[lowest] == min(rates) and entry["chosen_from"] == 3
    others = [number for number in range(3) if number != lowest]
    rest = np.average(np.array(rates)[others], weights=np.array(pairs)[others])
    assert entry["gap"]["value"] == pytest.approx(rest - min(rates))
    assert entry["gap"]["low"] < 0.03 and telling([entry], "gap") == []


def test_comparisons_are_counted_with_the_groups_they_were_chosen_from():
    entries = [{"p_corrected": 1.0, "chosen_from": 10}] * 12
    assert "among 120 comparisons" in too_coarse(entries, 2000)[0] and too_coarse(entries, 10_000) == []
    assert too_coarse([{"p_corrected": 1.0}] * 12, 2000) == [] == too_coarse([{"p_corrected": None}] * 200, 2000)


def test_a_group_of_one_class_leaves_the_other_to_be_looked_at():
    one = scored()
    one.targets[(one.facts["view"] == "AP").to_numpy()] = 0
    entry = next(e for e in confounders(one, grouped(one)[0]) if e["variable"] == "view")
    assert entry["groups"]["AP"]["value"] is None
    assert entry["within"]["value"] == pytest.approx(entry["groups"]["PA"]["value"])
