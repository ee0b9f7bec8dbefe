"""DeLong against MLstatkit and the quadratic form, Obuchowski's clustered variance against its formula and simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from MLstatkit import Delong_test
from scipy.stats import norm

from carina.errors import CarinaError
from carina.metrics.delong import auroc_covariance, auroc_difference, auroc_interval
from carina.metrics.ranking import auroc


def quadratic(target, scores, patients):
    """The definition, pair by pair (Obuchowski 1997, equations 4 to 8)."""
    sick, well = np.flatnonzero(target == 1), np.flatnonzero(target == 0)
    m, n = len(sick), len(well)
    v10, v01, areas = [], [], []
    for score in scores:
        wins = np.array(
            [[1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0 for j in well] for i in sick]
        )
        areas.append(wins.mean())
        v10.append(wins.mean(axis=1))
        v01.append(wins.mean(axis=0))
    names = np.unique(patients[~np.isnan(target)])
    i10 = len(np.unique(patients[sick]))
    i01 = len(np.unique(patients[well]))

    def part(k, name):
        inside, outside = patients[sick] == name, patients[well] == name
        return (v10[k][inside] - areas[k]).sum(), (v01[k][outside] - areas[k]).sum()

    result = np.zeros((len(scores), len(scores)))
    for a in range(len(scores)):
        for b in range(len(scores)):
            parts = [(part(a, name), part(b, name)) for name in names]
            s10 = i10 / ((i10 - 1) * m) * sum(p[0] * q[0] for p, q in parts)
            s01 = i01 / ((i01 - 1) * n) * sum(p[1] * q[1] for p, q in parts)
            s11 = len(names) / (len(names) - 1) * sum(p[0] * q[1] + p[1] * q[0] for p, q in parts)
            result[a, b] = s10 / m + s01 / n + s11 / (m * n)
    return np.array(areas), result


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_the_definition_with_ties_and_clusters(data):
    n = data.draw(st.integers(6, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    target = rng.integers(0, 2, n).astype(float)
    target[:4] = [0, 1, 0, 1]
    scores = np.round(rng.normal(size=(2, n)) + target, data.draw(st.integers(0, 2)))
    patients = np.concatenate([np.arange(4), rng.integers(0, max(4, n // 2), n - 4)])
    if data.draw(st.booleans()):
        target[rng.integers(4, n)] = np.nan
    areas, covariance = auroc_covariance(target, scores, patients)
    expected = quadratic(target, scores, patients)
    np.testing.assert_allclose(areas, expected[0], atol=1e-12)
    np.testing.assert_allclose(covariance, expected[1], atol=1e-12)
    known = ~np.isnan(target)
    assert areas[0] == pytest.approx(auroc(target[known], scores[0][known]))


def test_is_delong_where_every_image_is_a_patient():
    rng = np.random.default_rng(0)
    target = (rng.random(300) < 0.3).astype(float)
    a = np.round(rng.normal(size=300) + target, 1)
    b = np.round(a + rng.normal(size=300), 1)
    _, p, low_high, _, area_a, area_b, _ = Delong_test(target, a, b)
    single, paired = auroc_interval(target, a, np.arange(300), "none"), auroc_difference(target, a, b, np.arange(300))
    assert (single.low, single.high) == pytest.approx(low_high, abs=1e-9) and single.method == "delong"
    assert (paired.value, paired.p_value) == pytest.approx((area_a - area_b, p), abs=1e-9)
    near_one = 2.4 * target + rng.normal(size=300) * 0.5
    bounded, plain = (auroc_interval(target, near_one, np.arange(300), how) for how in ("logit", "none"))
    assert plain.high == 1
    assert 0 < bounded.low < bounded.value < bounded.high < 1


def test_covers_where_patients_have_several_images_and_delong_alone_does_not():
    rng = np.random.default_rng(5)
    truth, covered, careless = norm.cdf(1.0 / np.sqrt(2)), [], []
    for _ in range(400):
        patients = np.repeat(np.arange(80), 4)
        target = np.repeat((np.arange(80) < 40).astype(float), 4)
        score = np.repeat(rng.normal(size=80), 4) * 0.95**0.5 + rng.normal(size=320) * 0.05**0.5 + target
        for found, result in ((patients, covered), (np.arange(320), careless)):
            interval = auroc_interval(target, score, found)
            result.append(interval.low <= truth <= interval.high)
    assert 0.92 <= np.mean(covered) <= 0.98 and np.mean(careless) < 0.75


def test_says_what_cannot_be_estimated():
    single = auroc_interval(np.zeros(30), np.arange(30), np.arange(30))
    assert np.isnan(single.value) and "one class only" in single.reason
    perfect = auroc_interval(np.repeat([0.0, 1.0], 30), np.arange(60), np.arange(60))
    assert perfect.value == 1 and not perfect.estimable and "no variance" in perfect.reason
    same = auroc_difference(np.repeat([0.0, 1.0], 30), *[np.random.default_rng(0).normal(size=60)] * 2, np.arange(60))
    assert same.value == 0 and same.p_value == 1
    with pytest.raises(CarinaError, match="do not describe the same images"):
        auroc_covariance(np.zeros(3), np.zeros((1, 4)), np.arange(3))
