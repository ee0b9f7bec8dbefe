"""Ranking metrics against scikit-learn, which measures them by another route."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics as oracle

from carina.errors import CarinaError
from carina.metrics import ranking


@st.composite
def cases(draw):
    """Targets with both classes, scores with many ties, whole and fractional weights."""
    count = draw(st.integers(2, 40))
    target = draw(arrays(float, count, elements=st.sampled_from([0.0, 1.0])))
    target[:2] = 0, 1
    score = draw(arrays(float, count, elements=st.one_of(st.integers(-2, 2).map(float), st.floats(-1e3, 1e3))))
    weight = draw(arrays(float, count, elements=st.sampled_from([0.0, 0.5, 1.0, 3.0])))
    weight[:2] = 1
    return target, score, weight


@given(cases())
def test_equals_scikit_learn(case):
    target, score, weight = case
    for ours, theirs in (
        (ranking.auroc, oracle.roc_auc_score),
        (ranking.average_precision, oracle.average_precision_score),
    ):
        assert ours(target, score) == pytest.approx(theirs(target, score), abs=1e-12)
        assert ours(target, score, weight) == pytest.approx(theirs(target, score, sample_weight=weight), abs=1e-12)
    for ours, theirs in (
        (ranking.roc_curve(target, score), oracle.roc_curve(target, score, drop_intermediate=False)),
        (ranking.precision_recall_curve(target, score), oracle.precision_recall_curve(target, score)),
    ):
        for x, y in zip(ours, theirs):
            np.testing.assert_allclose(x, y, atol=1e-12)


@given(cases())
def test_a_weight_is_a_repetition_and_unknown_is_absence(case):
    target, score, weight = case
    times = np.stack([weight * 2, np.ones_like(weight)])
    repeated = np.repeat(np.arange(len(target)), times[0].astype(int))
    unknown = np.append(target, [np.nan, np.nan])
    for single, weighted in (
        (ranking.auroc, ranking.weighted_auroc),
        (ranking.average_precision, ranking.weighted_average_precision),
    ):
        expected = [single(target[repeated], score[repeated]), single(target, score)]
        np.testing.assert_allclose(weighted(target, score, times), expected, atol=1e-12)
        assert single(unknown, np.append(score, [1e6, np.nan])) == single(target, score)


@given(cases())
def test_youden_is_the_best_observed_threshold(case):
    target, score, _ = case

    def gain(threshold):
        return np.mean(score[target == 1] >= threshold) - np.mean(score[target == 0] >= threshold)

    best = max(gain(t) for t in score)
    assert gain(ranking.youden(target, score)) == pytest.approx(best, abs=1e-12)
    assert all(gain(t) < best - 1e-12 for t in score if t > ranking.youden(target, score))


def test_one_class_is_nan_and_has_no_curve():
    for target in (np.ones(5), np.zeros(5), np.full(5, np.nan), np.array([])):
        score = np.arange(len(target), dtype=float)
        assert np.isnan(ranking.auroc(target, score))
        assert np.isnan(ranking.average_precision(target, score))
        assert np.isnan(ranking.youden(target, score))
        with pytest.raises(CarinaError, match="both classes"):
            ranking.roc_curve(target, score)


@pytest.mark.parametrize(
    ("target", "score", "weight", "said"),
    [
        ([0, 1, -1], [1, 2, 3], None, "1 of 3 targets"),
        ([0, 1, 1], [1, np.nan, 3], None, "1 of 3 images"),
        ([0, 1, 1], [1, 2], None, "one length"),
        ([0, 1], [1, 2], [1, -1], "at least 0"),
        ([0, 1], [1, 2], [1, 1, 1], "2 images"),
    ],
)
def test_refuses_in_a_sentence(target, score, weight, said):
    with pytest.raises(CarinaError, match=said):
        ranking.auroc(np.array(target, float), np.array(score, float), None if weight is None else np.array(weight))
