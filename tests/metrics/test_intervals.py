"""Intervals: coverage by simulation, DeLong and statsmodels as oracles, and the rules about patients."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from MLstatkit import Delong_test
from scipy.stats import norm
from sklearn import metrics as oracle
from statsmodels.stats.multitest import multipletests

from carina.errors import CarinaError
from carina.metrics import resampling
from carina.metrics.intervals import Difference, holm, paired_difference, patient_bootstrap
from carina.metrics.ranking import auroc, average_precision
from carina.metrics.resampling import replicate


def binormal(seed, positives, negatives, shift=1.2):
    """Scores whose true AUROC is Phi(shift / sqrt 2)."""
    target = np.repeat([1.0, 0.0], [positives, negatives])
    return target, np.random.default_rng(seed).normal(size=len(target)) + shift * target


def test_covers_the_truth():
    truth, covered = norm.cdf(1.2 / np.sqrt(2)), []
    for seed in range(300):
        target, score = binormal(seed, 40, 60)
        interval = patient_bootstrap(target, score, np.arange(100), resamples=1000, seed=seed)
        covered.append(interval.low <= truth <= interval.high)
    assert 0.92 <= np.mean(covered) <= 0.98


def test_type_one_error_of_the_paired_difference():
    """Two arms that are equally good on average must not differ in more than about 5 % of samples."""
    wrong = []
    for seed in range(300):
        target, common = binormal(seed, 40, 60)
        a, b = common + 0.7 * np.random.default_rng(seed + 1000).normal(size=(2, 100))
        found = paired_difference(target, a[None], b[None], np.arange(100), resamples=500, seed=seed)
        excludes = found.low > 0 or found.high < 0
        assert not (excludes and found.p_value > 0.06) and not (found.p_value < 0.04 and not excludes)
        wrong.append(excludes)
    assert np.mean(wrong) <= 0.09


def test_agrees_with_delong_where_images_are_patients():
    target, a = binormal(3, 700, 900)
    b = a + np.random.default_rng(4).normal(size=len(a))
    _, p, (low, high), _, auc_a, auc_b, _ = Delong_test(target, a, b)
    single = patient_bootstrap(target, a, np.arange(len(a)), resamples=4000)
    assert (single.value, single.low, single.high) == pytest.approx((auc_a, low, high), abs=2e-3)
    weaker = a + 0.25 * np.random.default_rng(8).normal(size=len(a))
    _, p, _, _, auc_a, auc_b, _ = Delong_test(target, a, weaker)
    paired = paired_difference(target, a[None], weaker[None], np.arange(len(a)), resamples=10_000)
    assert paired.value == pytest.approx(auc_a - auc_b)
    assert paired.p_value == pytest.approx(p, abs=0.02)


def test_is_the_image_bootstrap_where_every_image_has_a_patient_of_its_own():
    target, score = binormal(5, 60, 80)
    rng, count = np.random.default_rng(0), len(target)
    drawn = [rng.integers(0, count, count) for _ in range(3000)]
    expected = np.quantile([auroc(target[rows], score[rows]) for rows in drawn], [0.025, 0.975])
    found = patient_bootstrap(target, score, np.arange(count), method="percentile", resamples=3000)
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.008)


@pytest.mark.parametrize("metric", ["auroc", "average_precision"])
def test_repeated_images_of_a_patient_add_no_certainty(metric):
    target, score = binormal(6, 50, 70)
    names = np.array([f"p{i:03d}" for i in range(120)])
    once = patient_bootstrap(target, score, names, metric)
    copies = np.random.default_rng(0).permutation(np.repeat(np.arange(120), 4))
    clustered = patient_bootstrap(target[copies], score[copies], names[copies], metric)
    careless = patient_bootstrap(target[copies], score[copies], np.arange(480), metric)
    assert (clustered.value, clustered.low, clustered.high) == pytest.approx((once.value, once.low, once.high))
    assert careless.high - careless.low < 0.65 * (clustered.high - clustered.low)
    assert (clustered.num_patients, clustered.num_positives) == (120, 200)


def test_macro_is_the_mean_over_labels_and_labels_are_drawn_together():
    target, score = binormal(7, 60, 60)
    table = np.stack([target, target, np.where(np.arange(120) % 3 == 0, np.nan, target), np.zeros(120)], axis=1)
    scores = np.stack([score, score, -score, score], axis=1)
    found = patient_bootstrap(table, scores, np.arange(120), macro=True)
    assert found.value == pytest.approx(np.mean([auroc(table[:, j], scores[:, j]) for j in range(3)]))
    assert not found.estimable and "1 of 4 labels have one class only" in found.reason
    twice = patient_bootstrap(table[:, :2], scores[:, :2], np.arange(120), macro=True)
    once = patient_bootstrap(target, score, np.arange(120))
    # Two identical labels say no more than one: they were resampled together.
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    assert twice.estimable


@pytest.mark.parametrize("metric", ["auroc", "average_precision"])
def test_bca_is_efrons_formula_with_patients_left_out_one_by_one(metric):
    target, score = binormal(12, 60, 90)
    score, patients = np.round(score, 1), np.arange(150) // 2
    target = target[np.arange(150) // 2 * 2]  # patients are of one class
    measure = {"auroc": oracle.roc_auc_score, "average_precision": oracle.average_precision_score}[metric]
    boot = replicate(target[:, None], score[None, :, None], patients, metric, 1500, seed=3).boot[:, 0, 0]
    whole = measure(target, score)
    below = np.mean(boot < whole) + 0.5 * np.mean(boot == whole)
    without = np.array([measure(target[patients != one], score[patients != one]) for one in range(75)])
    away = without.mean() - without
    bias, acceleration = norm.ppf(below), (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    ends = bias + norm.ppf([0.025, 0.975])
    expected = np.quantile(boot, norm.cdf(bias + ends / (1 - acceleration * ends)))
    found = patient_bootstrap(target, score, patients, metric, resamples=1500, seed=3)
    np.testing.assert_allclose([found.value, found.low, found.high], [whole, *expected], atol=1e-9)


def test_says_what_cannot_be_estimated():
    target, score = binormal(8, 12, 90)
    few = patient_bootstrap(target, score, np.arange(102))
    assert np.isfinite([few.value, few.low, few.high]).all() and not few.estimable and "12 patients" in few.reason
    clustered = patient_bootstrap(*binormal(8, 40, 90), np.r_[np.repeat(np.arange(10), 4), 100 + np.arange(90)])
    assert not clustered.estimable and "10 patients" in clustered.reason
    single = patient_bootstrap(np.zeros(50), np.arange(50), np.arange(50))
    assert np.isnan(single.value) and not single.estimable and "one class only" in single.reason
    assert json.dumps(single.to_dict(), allow_nan=False) and single.to_dict()["value"] is None
    perfect = patient_bootstrap(np.repeat([0.0, 1.0], 40), np.arange(80), np.arange(80))
    assert (perfect.low, perfect.high, perfect.estimable) == (1.0, 1.0, False) and "no width" in perfect.reason


def test_runs_are_resampled_and_paired():
    target, base = binormal(9, 150, 150)
    rng = np.random.default_rng(1)
    quality = np.array([0.0, 0.5, 1.0])[:, None] * target  # how good a seed turned out to be
    a = base + quality + 0.2 * rng.normal(size=(3, 300))
    b = base + quality + 0.2 * rng.normal(size=(3, 300))
    patients = np.arange(300)
    together = paired_difference(target, a, b, patients, resamples=2000)
    apart = paired_difference(target, a, b[:2], patients, resamples=2000)
    alone = paired_difference(target, a[:1], b[:1], patients, resamples=2000)
    assert isinstance(together, Difference)
    assert together.value == pytest.approx(np.mean([auroc(target, x) - auroc(target, y) for x, y in zip(a, b)]))
    assert apart.high - apart.low > 3 * (together.high - together.low)
    assert alone.value == pytest.approx(auroc(target, a[0]) - auroc(target, b[0]))


def test_run_weights_have_the_variance_of_a_mean():
    values = np.array([0.7, 0.8, 0.95])
    means = resampling._run_weights(3, 40_000, seed=0) @ values
    assert means.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.03)


def test_extremes_of_the_paired_difference():
    target, score = binormal(10, 60, 60)
    same = paired_difference(target, score[None], score[None], np.arange(120), resamples=999)
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    worlds_apart = paired_difference(target, (target + score * 1e-3)[None], -score[None], np.arange(120), resamples=999)
    assert worlds_apart.p_value == pytest.approx(1 / 1000) and worlds_apart.low > 0
    for method in ("bca", "percentile"):
        forth = paired_difference(target, score[None], target[None] * 0.1, np.arange(120), method=method, resamples=999)
        back = paired_difference(target, target[None] * 0.1, score[None], np.arange(120), method=method, resamples=999)
        assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low), abs=1e-9)
        assert back.p_value == pytest.approx(forth.p_value, abs=1e-9)


def test_draws_depend_on_the_seed_and_not_on_memory(monkeypatch):
    target, score = binormal(11, 40, 50)
    arguments = (target, score, np.repeat(np.arange(45), 2))
    first = patient_bootstrap(*arguments, metric="average_precision")
    assert patient_bootstrap(*arguments, metric="average_precision", seed=1) != first
    monkeypatch.setattr(resampling, "_CHUNK_CELLS", 7 * 90)
    assert patient_bootstrap(*arguments, metric="average_precision") == first
    assert first.value == average_precision(target, score)


@settings(max_examples=20)
@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=12))
def test_holm_equals_statsmodels(p_values):
    p_values = np.array(p_values, dtype=float)
    tested, corrected = ~np.isnan(p_values), holm(p_values)
    assert np.isnan(corrected[~tested]).all()
    if tested.any():
        np.testing.assert_allclose(corrected[tested], multipletests(p_values[tested], method="holm")[1], atol=1e-12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patients": np.array(["a", None, "b", "b"], dtype=object)}, "1 of 4 images have no patient"),
        ({"patients": np.arange(3)}, "do not describe the same"),
        ({"metric": "accuracy"}, "metric 'accuracy'"),
        ({"method": "normal"}, "method 'normal'"),
        ({"resamples": 0}, "resamples=0"),
        ({"level": 95}, "level=95"),
        ({"target": np.eye(4), "score": np.eye(4)}, "macro=True"),
    ],
)
def test_refuses_in_a_sentence(change, said):
    given_arguments = {"target": np.array([0, 1, 0, 1]), "score": np.array([1, 3, 2, 4]), "patients": np.arange(4)}
    with pytest.raises(CarinaError, match=said):
        patient_bootstrap(**{**given_arguments, **change})
