import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from carina.errors import CarinaError
from carina.metrics.calibration import operating_threshold, temperature

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
