import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from carina.finetune.stack import mixture_weights, stack_weights

RNG = np.random.default_rng(5)
PATIENTS = [str(i) for i in range(400)]


def logistic(x):
    return 1 / (1 + np.exp(-x))


def members(noises, count=400, seed=0):
    """Targets and one calibrated-looking probability a member, the noisier the larger its entry."""
    rng = np.random.default_rng(seed)
    target = (rng.random(count) < 0.4).astype(float)
    return target, [logistic(3 * (target - 0.5) + rng.normal(size=count) * noise) for noise in noises]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(0, 10_000), st.floats(0, 300))
def test_the_weights_are_the_maximum_that_a_general_solver_finds(count, seed, pull):
    rng = np.random.default_rng(seed)
    likelihood, rows = rng.uniform(0.02, 0.98, (120, count)), rng.uniform(0, 2, 120)
    weights = mixture_weights(likelihood, rows, pull)

    def cost(w):
        return -(rows * np.log(likelihood @ w)).sum() - pull / count * np.log(np.maximum(w, 1e-300)).sum() * (pull > 0)

    start = np.full(count, 1 / count)
    bounds = [(1e-9, 1)] * count
    found = minimize(
        cost, start, method="SLSQP", bounds=bounds, constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-12, "maxiter": 500},
    )  # fmt: skip
    assert (weights >= 0).all() and weights.sum() == pytest.approx(1, abs=1e-12)
    assert cost(weights) <= found.fun + 1e-4


def test_better_members_weigh_more_and_equal_ones_alike():
    target, parts = members([0.5, 2.5, 2.5])
    found = stack_weights(target[:, None], [p[:, None] for p in parts], PATIENTS, ["a"])
    assert found.weights[0, 0] > 0.6 and found.notes == {}
    same = stack_weights(target[:, None], [parts[0][:, None]] * 3, PATIENTS, ["a"])
    np.testing.assert_allclose(same.weights, 1 / 3, atol=1e-9)


def test_few_patients_pull_the_weights_to_equal_ones_and_images_of_one_patient_are_one():
    target, parts = members([0.5, 2.5])
    rows = np.concatenate([np.flatnonzero(target == 1)[:5], np.flatnonzero(target == 0)])
    given = target[rows][:, None], [p[rows][:, None] for p in parts]
    full = stack_weights(target[:, None], [p[:, None] for p in parts], PATIENTS, ["a"]).weights[0, 0]
    few = stack_weights(*given, [PATIENTS[r] for r in rows], ["a"])
    one = stack_weights(*given, ["p" if t == 1 else PATIENTS[r] for r, t in zip(rows, target[rows])], ["a"])
    assert 0.5 < one.weights[0, 0] < few.weights[0, 0] < full
    assert few.notes == {"a": "little to go by: 5 patients in the rarer class"} and "1 patient " in one.notes["a"]


def test_unknown_rows_count_nothing_and_one_class_is_said():
    target, parts = members([0.5, 1.5])
    both = np.stack([target, np.zeros(400)], axis=1)
    scores = [np.stack([p, p], axis=1) for p in parts]
    found = stack_weights(both, scores, PATIENTS, ["a", "b"])
    np.testing.assert_array_equal(found.weights[1], 0.5)
    assert list(found.notes) == ["b"] and "equal weights" in found.notes["b"]
    spoiled, holes = both.copy(), [s.copy() for s in scores]
    spoiled[:50] = np.nan
    holes[1][50:90] = np.nan
    rest = stack_weights(both[90:], [s[90:] for s in scores], PATIENTS[90:], ["a", "b"])
    holey = stack_weights(spoiled, holes, PATIENTS, ["a", "b"])
    np.testing.assert_array_equal(holey.weights, rest.weights)


def test_one_member_has_all_the_weight():
    target, parts = members([1.0])
    np.testing.assert_array_equal(stack_weights(target[:, None], [parts[0][:, None]], PATIENTS, ["a"]).weights, [[1.0]])
