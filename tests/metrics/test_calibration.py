import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, f1_score, precision_score, recall_score
from statsmodels.api import Logit, add_constant

from carina.errors import CarinaError
from carina.metrics.calibration import operating_threshold, temperature
from carina.metrics.intervals import interval
from carina.metrics.reliability import (
    calibration_line,
    recalibrated,
    recalibration,
    reliability,
    replicate_calibration,
)
from carina.metrics.resampling import patient_codes, patient_resamples, replicate
from carina.metrics.strata import by_group, pairs_by_group, within_groups
from carina.metrics.thresholds import replicate_decisions

# scores from few values, so that ties are common
CASES = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0, float("nan")]), st.sampled_from([0.1, 0.2, 0.5, 0.55, 0.9])),
    min_size=2,
    max_size=25,
)


def apart(case):
    target, score = np.array(case).T
    assume((target == 1).any() and (target == 0).any())
    return target, score


def figures(target, score, threshold):
    """Sensitivity, specificity and F1, counted one by one."""
    pairs = [(t, s >= threshold) for t, s in zip(target, score) if not np.isnan(t)]
    tp, fn = sum(t == 1 and c for t, c in pairs), sum(t == 1 and not c for t, c in pairs)
    fp, tn = sum(t == 0 and c for t, c in pairs), sum(t == 0 and not c for t, c in pairs)
    return tp / (tp + fn), tn / (tn + fp), 2 * tp / (2 * tp + fp + fn)


@given(CASES, st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.95, 1.0]))
def test_thresholds_equal_a_search_through_all_of_them(case, share):
    target, score = apart(case)
    every = sorted({s for t, s in zip(target, score) if not np.isnan(t)}, reverse=True)
    by = {t: figures(target, score, t) for t in every}
    best = max(every, key=lambda t: (round(by[t][0] + by[t][1], 9), t))
    assert operating_threshold("youden", target, score) == best
    assert operating_threshold("f1", target, score) == max(every, key=lambda t: (round(by[t][2], 9), t))
    enough = [t for t in every if by[t][0] >= share - 1e-9]
    assert operating_threshold(f"sensitivity:{share}", target, score) == max(enough)
    enough = [t for t in every if by[t][1] >= share - 1e-9]
    found = operating_threshold(f"specificity:{share}", target, score)
    if enough:
        assert found == min(enough)
    else:  # nothing is called
        assert figures(target, score, found)[1] == 1 and found > max(every) and found == pytest.approx(max(every))


@given(CASES)
def test_a_threshold_does_not_mind_the_order_or_unknown_rows(case):
    target, score = apart(case)
    known = np.flatnonzero(~np.isnan(target))[::-1]
    for rule in ("youden", "f1", "sensitivity:0.8", "specificity:0.8"):
        assert operating_threshold(rule, target, score) == operating_threshold(rule, target[known], score[known])


@pytest.mark.parametrize(
    "rule", ["best", "youden:0.5", "f1:1", "sensitivity", "sensitivity:1.5", "specificity:x", "f1 "]
)
def test_a_rule_that_is_none_is_said(rule):
    with pytest.raises(CarinaError, match="is no rule"):
        operating_threshold(rule, np.array([0.0, 1.0]), np.array([0.1, 0.9]))


def test_one_class_has_no_threshold_and_no_temperature():
    for target in ([1.0, 1.0, np.nan], [0.0, np.nan, np.nan], [np.nan] * 3):
        assert np.isnan(operating_threshold("f1", np.array(target), np.array([0.1, 0.5, 0.9])))
        assert temperature(np.array(target), np.array([-3.0, 0.5, 9.0])) == 1.0


@pytest.mark.parametrize("true", [0.3, 1.0, 4.0])
def test_the_temperature_that_spoiled_the_logits_is_found(true):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=20000) * 2
    target = (rng.random(20000) < expit(logits)).astype(float)
    target[:100], logits[200:300] = np.nan, np.nan
    found = temperature(target, logits * true)
    assert found == pytest.approx(true, rel=0.05)
    # a logistic regression on the one logit, without intercept and penalty, is the same problem
    use = ~np.isnan(target) & ~np.isnan(logits)
    model = LogisticRegression(C=1e12, fit_intercept=False, tol=1e-12).fit(logits[use, None] * true, target[use])
    assert found == pytest.approx(1 / model.coef_[0, 0], rel=1e-4)


@given(st.integers(0, 10**6))
def test_no_other_temperature_is_likelier(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 40))
    logits = rng.normal(size=n) * rng.choice([0.01, 1, 30])
    target = rng.choice([0.0, 1.0, 0.3, np.nan], n)
    target[:2] = 0, 1
    known = ~np.isnan(target)

    def loss(t):
        p = np.clip(expit(logits[known] / t), 1e-300, 1)
        q = np.clip(expit(-logits[known] / t), 1e-300, 1)
        return -(target[known] * np.log(p) + (1 - target[known]) * np.log(q)).mean()

    found = temperature(target, logits)
    assert 0.05 - 1e-9 <= found <= 20 + 1e-9
    assert loss(found) <= min(loss(t) for t in np.geomspace(0.05, 20, 300)) * (1 + 1e-5) + 1e-12


def test_lists_of_other_lengths_are_said():
    with pytest.raises(CarinaError, match="one length"):
        temperature(np.zeros(3), np.zeros(4))


# -- how well calibrated ------------------------------------------------------------------------------------------------


def study(n=600, seed=0, labels=2):
    """Targets with unknowns, probabilities that are too extreme, and patients of one to four images."""
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(n), rng.integers(1, 5, n))[:n]
    logits = rng.normal(size=(n, labels)) - 0.5 + 0.5 * rng.normal(size=n)[patients][:, None]
    target = (rng.random((n, labels)) < expit(0.6 * logits + 0.3)).astype(float)
    target[rng.random((n, labels)) < 0.1] = np.nan
    return target, expit(logits), patients


def test_brier_and_calibration_error_equal_sums_one_by_one():
    target, probability, patients = study()
    found = replicate_calibration(target, probability, patients, resamples=50, seed=4, bins=7)
    drawn = np.concatenate(list(patient_resamples(patient_codes(patients), 50, 4)), axis=1)
    for label in range(target.shape[1]):
        known = ~np.isnan(target[:, label])
        y, p, who = target[known, label], probability[known, label], patients[known]
        assert found["brier"].point[0, label] == pytest.approx(brier_score_loss(y, p), abs=1e-12)
        rank = np.argsort(np.argsort(p))
        parts = [np.flatnonzero(np.minimum(7 * rank // (len(p) - 1), 6) == number) for number in range(7)]
        sizes = sorted(map(len, parts))
        assert sizes[-1] - sizes[0] <= 1
        gaps = [abs(y[rows].mean() - p[rows].mean()) * len(rows) for rows in parts]
        assert found["ece"].point[0, label] == pytest.approx(sum(gaps) / len(y), abs=1e-12)
        times = drawn[np.searchsorted(np.unique(patients), who), 3]
        expected = sum(abs((times[rows] * (y - p)[rows]).sum()) for rows in parts) / times.sum()
        assert found["ece"].boot[3, 0, label] == pytest.approx(expected, abs=1e-12)
        brier = brier_score_loss(y, p, sample_weight=times)
        assert found["brier"].boot[3, 0, label] == pytest.approx(brier, abs=1e-12)


def test_equal_probabilities_share_a_bin_whatever_their_order():
    rng = np.random.default_rng(0)
    p = rng.choice([0.1, 0.2, 0.7], 200)
    y = (rng.random(200) < p).astype(float)
    rows = reliability(y, p)
    assert [row["predicted"] for row in rows] == pytest.approx([0.1, 0.2, 0.7])
    assert [row["n"] for row in rows] == [int((p == value).sum()) for value in (0.1, 0.2, 0.7)]
    assert all(row["low"] < row["observed"] < row["high"] for row in rows)
    order = rng.permutation(200)
    assert reliability(y[order], p[order]) == rows


def test_slope_and_intercept_are_those_of_statsmodels_and_scikit_learn():
    target, probability, patients = study(900)
    slope, intercept = calibration_line(target[:, 0], probability[:, 0], patients)
    known = ~np.isnan(target[:, 0])
    y, z, who = target[known, 0], logit(probability[known, 0]), patients[known]
    line = Logit(y, add_constant(z)).fit(disp=False, cov_type="cluster", cov_kwds={"groups": who})
    assert slope.value == pytest.approx(line.params[1], abs=1e-7)
    assert (slope.low, slope.high) == pytest.approx(tuple(line.conf_int()[1]), abs=1e-6)
    model = LogisticRegression(C=1e12, tol=1e-12).fit(z[:, None], y)
    assert slope.value == pytest.approx(model.coef_[0, 0], rel=1e-4)
    # in the large: the intercept that makes mean probability and share of positives equal
    assert expit(z + intercept.value).mean() == pytest.approx(y.mean(), abs=1e-9)
    assert slope.high < 1 and intercept.low > 0 and slope.estimable


def test_patients_with_many_equal_images_widen_the_interval_of_the_slope():
    target, probability, _ = study(400, labels=1)
    y, p = target[:, 0], probability[:, 0]
    once = calibration_line(y, p, np.arange(400))
    copied = calibration_line(np.tile(y, 4), np.tile(p, 4), np.tile(np.arange(400), 4))
    for alone, copies in zip(once, copied):
        assert copies.value == pytest.approx(alone.value) and copies.low == pytest.approx(alone.low, abs=2e-3)


def test_no_slope_without_an_error_and_nothing_with_one_class():
    patients = np.arange(60)
    y = np.repeat([0.0, 1.0], 30)
    slope, intercept = calibration_line(y, np.linspace(0.1, 0.9, 60), patients)
    assert np.isnan(slope.value) and "without an error" in slope.reason and np.isfinite(intercept.value)
    for found in calibration_line(np.ones(60), np.linspace(0.1, 0.9, 60), patients):
        assert np.isnan(found.value) and "one class only" in found.reason
    with pytest.raises(CarinaError, match="distances"):
        calibration_line(y, np.linspace(0, 4, 60), patients)


@pytest.mark.parametrize("name", ["right 9 times of 10", "at random", "two values", "far too extreme"])
def test_saturated_scores_have_a_finite_intercept_that_sets_the_mean_right(name):
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 200).astype(float)
    p = {
        "right 9 times of 10": np.where(rng.random(200) < 0.9, y, 1 - y),
        "at random": rng.integers(0, 2, 200).astype(float),
        "two values": np.where((y == 1) | (rng.random(200) < 0.5), 0.6, 0.4),
        "far too extreme": expit(np.float32(40 * (y - 0.5 + rng.normal(size=200)))).astype(float),
    }[name]
    slope, intercept = calibration_line(y, p, np.arange(200))
    clipped = logit(np.clip(p, 1e-7, 1 - 1e-7))
    assert expit(intercept.value + clipped).mean() == pytest.approx(y.mean(), abs=1e-9)
    for found in (slope, intercept):
        assert found.estimable == bool(np.isfinite([found.value, found.low, found.high]).all())
        assert found.estimable or found.reason
    cooled, shift = recalibration(y, p)
    assert 0.05 <= cooled <= 20 and expit(clipped / cooled + shift).mean() == pytest.approx(y.mean(), abs=1e-6)
    if name == "two values":
        assert np.isnan(slope.value) and "share one score" in slope.reason


def test_equal_scores_have_no_slope_and_are_not_called_perfect():
    y = np.repeat([0.0, 1.0], [30, 70])
    slope, intercept = calibration_line(y, np.full(100, 0.3), np.arange(100))
    assert np.isnan(slope.value) and not slope.estimable and "all scores are equal" in slope.reason
    assert intercept.value == pytest.approx(logit(0.7) - logit(0.3))
    assert recalibration(y, np.full(100, 0.3)) == pytest.approx((1.0, logit(0.7) - logit(0.3)))
    # of equal scores the interval is that of a share, whose logit has the error 1 / sqrt(n q (1 - q))
    assert intercept.high - intercept.value == pytest.approx(1.96 / np.sqrt(99 * 0.7 * 0.3), rel=1e-3)


def test_recalibration_finds_what_spoiled_the_probabilities():
    rng = np.random.default_rng(2)
    z = 1.5 * rng.normal(size=20000)
    y = (rng.random(20000) < expit(z)).astype(float)
    spoiled = expit(2.5 * (z - 0.8))
    found = recalibration(y, spoiled)
    assert found == pytest.approx((2.5, 0.8), rel=0.08)
    slope, intercept = calibration_line(y, recalibrated(spoiled, *found), np.arange(20000))
    assert slope.value == pytest.approx(1, abs=1e-5) and intercept.value == pytest.approx(0, abs=1e-5)
    assert recalibration(1 - y, spoiled)[0] == 20.0  # what ranks the wrong way is flattened, never turned
    assert recalibration(np.ones(20), spoiled[:20]) == (1.0, 0.0)


def test_centered_intervals_hold_a_small_error_that_resampling_would_raise():
    rng = np.random.default_rng(5)
    p = rng.random(300)
    y = (rng.random(300) < p).astype(float)
    found = replicate_calibration(y[:, None], p[:, None], np.arange(300), resamples=400)["ece"]
    plain, centered = interval(found, 0, "percentile"), interval(found, 0, "centered")
    assert found.boot.mean() > found.point[0, 0] + 0.005
    assert plain.high > centered.high > centered.value > centered.low >= 0
    shift = found.boot[:, 0, 0].mean() - found.point[0, 0]
    assert centered.high == pytest.approx(np.quantile(found.boot[:, 0, 0], 0.975) - shift)


# -- at thresholds, and within groups -----------------------------------------------------------------------------------


def test_decisions_equal_scikit_learn_and_bayes_on_the_sample_and_on_a_resample():
    target, probability, patients = study()
    called = probability >= 0.55
    stated = np.array([0.03, np.nan])
    found = replicate_decisions(target, called, patients, stated, resamples=40, seed=1)
    drawn = np.concatenate(list(patient_resamples(patient_codes(patients), 40, 1)), axis=1)
    for times, read in ((None, lambda r: r.point[0]), (drawn[:, 5], lambda r: r.boot[5, 0])):
        for label in range(2):
            known = ~np.isnan(target[:, label])
            y, c, who = target[known, label], called[known, label], patients[known]
            weight = None if times is None else times[np.searchsorted(np.unique(patients), who)]
            given = {"sample_weight": weight, "zero_division": 0}
            expected = {
                "sensitivity": recall_score(y, c, **given),
                "specificity": recall_score(1 - y, ~c, **given),
                "ppv": precision_score(y, c, **given),
                "npv": precision_score(1 - y, ~c, **given),
                "f1": f1_score(y, c, **given),
            }
            for name, value in expected.items():
                assert read(found[name])[label] == pytest.approx(value, abs=1e-12), name
            if label == 0:
                sick, well = expected["sensitivity"] * 0.03, (1 - expected["specificity"]) * 0.97
                assert read(found["ppv_at_prevalence"])[0] == pytest.approx(sick / (sick + well), abs=1e-12)
            else:
                assert np.isnan(read(found["ppv_at_prevalence"])[1])


def test_memory_of_groups_does_not_grow_with_their_number():
    target, probability, patients = study(3000, labels=4)
    most = []
    for count in (2, 30):
        groups = np.arange(len(target)) % count
        tracemalloc.start()
        found = [
            *by_group(target, probability, groups, patients, "auroc", 3),
            *pairs_by_group(target, groups, patients, 3),
        ]
        kept = sum(one.boot.nbytes + one.jackknife.nbytes for one in found)
        most.append(tracemalloc.get_traced_memory()[1] - kept)
        tracemalloc.stop()
    assert most[1] < 1.2 * most[0]


def test_pairs_that_hang_on_few_patients_count_as_few():
    target = np.repeat([1.0, 0, 1, 0], [60, 2, 1, 140])[:, None]
    groups, who = np.repeat([0, 1], [62, 141]), np.arange(203)
    score = np.random.default_rng(0).normal(size=(203, 1))
    whole = replicate(target, score[None], who, "auroc", 20)
    parts = by_group(target, score, groups, who, resamples=20)
    within = within_groups(parts, pairs_by_group(target, groups, who, 20), whole)
    # a positive of the first group is in 2 pairs, that of the second in 140
    weights = np.repeat([2.0, 140.0], [60, 1])
    assert within.counts[0, 3] == int(weights.sum() ** 2 / (weights**2).sum()) == 3
    one = within_groups([whole], pairs_by_group(target, np.zeros(203, int), who, 20), whole)
    assert one.counts.tolist() == whole.counts.tolist() and one.boot == pytest.approx(whole.boot)


def test_pairs_of_one_group_are_counted_one_by_one():
    target, probability, patients = study(220, labels=2)
    groups = np.random.default_rng(3).integers(0, 3, len(target))
    whole = replicate(target, probability[None], patients, "auroc", 30, 2)
    parts = by_group(target, probability, groups, patients, "auroc", 30, 2)
    within = within_groups(parts, pairs_by_group(target, groups, patients, 30, 2), whole)
    drawn = np.concatenate(list(patient_resamples(patient_codes(patients), 30, 2)), axis=1)
    times = drawn[np.searchsorted(np.unique(patients), patients), 7]
    for weight, values, own in (
        (np.ones(len(target)), within.point[0], [part.point[0] for part in parts]),
        (times, within.boot[7, 0], [part.boot[7, 0] for part in parts]),
    ):
        for label in range(2):
            won, pairs = np.zeros(3), np.zeros(3)
            for i in np.flatnonzero(target[:, label] == 1):
                for j in np.flatnonzero((target[:, label] == 0) & (groups == groups[i])):
                    both = weight[i] * weight[j]
                    pairs[groups[i]] += both
                    a, b = probability[i, label], probability[j, label]
                    won[groups[i]] += both * ((a > b) + 0.5 * (a == b))
            assert values[label] == pytest.approx(won.sum() / pairs.sum(), abs=1e-12)
            assert [part[label] for part in own] == pytest.approx(list(won / pairs), abs=1e-12)
