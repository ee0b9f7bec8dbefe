"""Thresholds against scikit-learn, predictive values by Bayes, decision curves by their definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, f1_score, precision_score, recall_score

from carina.errors import CarinaError
from carina.metrics.decisions import net_benefit, operating_point, predictive_values


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1, 1))
def test_equals_scikit_learn(seed, threshold):
    rng = np.random.default_rng(seed)
    target, score = rng.integers(0, 2, 50).astype(float), np.round(rng.normal(size=50), 1)
    target[:2] = [0, 1]
    found = operating_point(np.append(target, np.nan), np.append(score, 9.0), threshold)
    called = score >= threshold
    tn, fp, fn, tp = confusion_matrix(target, called).ravel()
    assert [found[k] for k in ("tn", "fp", "fn", "tp")] == [tn, fp, fn, tp]
    assert found["sensitivity"] == pytest.approx(recall_score(target, called))
    assert found["specificity"] == pytest.approx(recall_score(1 - target, ~called))
    assert found["f1"] == pytest.approx(f1_score(target, called))
    if called.any():
        assert found["ppv"] == pytest.approx(precision_score(target, called))
    assert (
        found["sensitivity_low"] <= found["sensitivity"] <= found["sensitivity_high"] and not found["prevalence_stated"]
    )


def test_predictive_values_follow_the_prevalence_that_is_stated():
    positive, negative = predictive_values(0.9, 0.8, 0.01)
    assert positive == pytest.approx(0.009 / (0.009 + 0.198)) and negative == pytest.approx(0.792 / (0.792 + 0.001))
    stated = operating_point(np.array([0, 1.0]), np.array([0.1, 0.9]), 0.5, prevalence=0.02)
    assert stated["prevalence"] == 0.02 and stated["prevalence_stated"] and stated["ppv"] == 1
    assert operating_point(np.ones(3), np.ones(3), 0.5)["specificity"] is None
    with pytest.raises(CarinaError, match="state the one of your population"):
        predictive_values(0.9, 0.9, 1.0)


def test_net_benefit():
    rng = np.random.default_rng(0)
    target = (rng.random(500) < 0.2).astype(float)
    probability = np.clip(0.2 + 0.3 * (target - 0.2) + 0.1 * rng.normal(size=500), 0, 1)
    curve = net_benefit(target, probability, np.array([0.1, 0.3]))
    for k, t in enumerate((0.1, 0.3)):
        called = probability >= t
        assert curve["model"][k] == pytest.approx(
            (sum(called * target) - t / (1 - t) * sum(called * (1 - target))) / 500
        )
        assert curve["all"][k] == pytest.approx(target.mean() - t / (1 - t) * (1 - target.mean()))
    assert (curve["none"] == 0).all()
    with pytest.raises(CarinaError, match="probabilities"):
        net_benefit(target, probability * 5, np.array([0.1]))
