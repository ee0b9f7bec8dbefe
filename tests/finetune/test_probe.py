import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from carina.data.splits import patient_folds
from carina.errors import CarinaError
from carina.finetune import probe as module
from carina.finetune.probe import fit_many, probe
from carina.finetune.recipe import ProbeSettings

RNG = np.random.default_rng(1)
X = RNG.normal(size=(400, 30)).astype(np.float32) * RNG.uniform(0.1, 5, 30).astype(np.float32) + 2
SIGNAL = (X - 2) @ RNG.normal(size=(30, 2))
Y = (SIGNAL + RNG.normal(size=SIGNAL.shape) * SIGNAL.std() > 0).astype(np.float32)
PATIENTS = [f"p{i // 2}" for i in range(400)]


def gradient(x, target, weight, bias, strength):
    """Of ||w||^2 / 2 + C * log-loss with respect to (w, b) on standardized features, and of the same at w = 0."""
    known = ~np.isnan(target)
    scale = x.std(axis=0)
    scale[scale < 1e-9] = 1
    standard = ((x - x.mean(axis=0)) / scale)[known]
    own = weight * scale
    parts = []
    for w, residual in ((own, expit(x[known] @ weight + bias) - target[known]), (0 * own, 0.5 - target[known])):
        parts.append(np.append(w + strength * standard.T @ residual, strength * residual.sum()))
    return [np.linalg.norm(part) for part in parts]


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    n, d = draw(st.integers(6, 60)), draw(st.integers(1, 90))
    x = rng.normal(size=(n, d)) * rng.uniform(0.01, 10, d) + rng.normal(size=d)
    x[:, rng.random(d) < draw(st.sampled_from([0, 0.3]))] = 0.7  # constant
    if draw(st.booleans()):
        x[n // 2 :] = x[: n - n // 2]  # copies
    labels = draw(st.integers(1, 3))
    if draw(st.booleans()):  # often separable
        t = (x @ rng.normal(size=(d, labels)) > 0).astype(float)
    else:
        t = rng.integers(0, 2, (n, labels)).astype(float)
    t[0], t[1] = 0, 1
    if draw(st.booleans()):  # one image of one class
        t[1:] = 1
    if draw(st.booleans()):  # soft targets
        t[2:] = np.where(rng.random((n - 2, labels)) < 0.5, rng.uniform(0, 1, (n - 2, labels)), t[2:])
    if draw(st.booleans()):
        t[2:][rng.random((n - 2, labels)) < 0.3] = np.nan
    strengths = draw(st.lists(st.sampled_from([1e-4, 1e-2, 0.1, 1.0, 10.0, 1e3]), min_size=1, max_size=4, unique=True))
    return x, t, strengths


@settings(max_examples=60, deadline=None)
@given(problems())
def test_every_fit_is_at_its_minimum(problem):
    x, t, strengths = problem
    seen = []
    for strength, weight, bias in fit_many(x, t, strengths, tolerance=1e-14):
        seen.append(strength)
        for column in range(t.shape[1]):
            left, whole = gradient(x, t[:, column], weight[column], bias[column], strength)
            assert left < 1e-5 * whole + 1e-9
        assert (weight[:, x.std(axis=0) < 1e-9] == 0).all()
    assert seen == sorted(strengths)


@pytest.mark.parametrize("kind", ["double", "single"])
def test_scores_are_right_to_a_hundredth_at_every_strength_as_the_sweep_leaves_them(kind, monkeypatch):
    if kind == "single":
        monkeypatch.setattr(module, "PRECISE", 0)
    strengths = np.logspace(-7, 4, 23).tolist()
    for x, t in ((X, Y), (X[:25], Y[:25])):
        x = x.astype(np.float64)
        with monkeypatch.context() as patch:
            patch.setattr(module, "PRECISE", 10**9)
            exact = {strength: x @ weight.T for strength, weight, _ in fit_many(x, t, strengths, tolerance=1e-12)}
        for strength, weight, _ in fit_many(x, t, strengths):
            left, right = (value - value.mean(axis=0) for value in (x @ weight.T, exact[strength]))
            assert (np.abs(left - right).max(axis=0) < 0.01 * np.abs(right).max(axis=0)).all(), strength


@pytest.mark.parametrize("rows", [400, 25])
@pytest.mark.parametrize("kind", ["double", "single"])
def test_the_coefficients_are_those_of_scikit_learn(rows, kind, monkeypatch):
    if kind == "single":
        monkeypatch.setattr(module, "PRECISE", 0)
    x, t = X[:rows], Y[:rows]
    standard = StandardScaler().fit_transform(x.astype(np.float64))
    for strength, weight, bias in fit_many(x, t, [1e-3, 0.1, 10.0], tolerance=1e-12 if kind == "double" else 1e-8):
        for column in range(2):
            model = LogisticRegression(C=strength, tol=1e-10, max_iter=10000).fit(standard, t[:, column])
            theirs = model.decision_function(standard)
            atol = np.abs(theirs).max() * (1e-5 if kind == "double" else 1e-3)
            np.testing.assert_allclose(x.astype(np.float64) @ weight[column] + bias[column], theirs, atol=atol)


def test_the_probe_equals_scikit_learn_loop_and_its_choice():
    targets = Y.copy()
    targets[:50, 1] = np.nan
    strengths = [1e-3, 0.1, 10.0]
    weight, bias, chosen, crossed = probe(
        X, targets, PATIENTS, ["a", "b"], ProbeSettings(strengths=strengths, folds=3), 5
    )
    standard = StandardScaler().fit_transform(X.astype(np.float64))
    for column, label in enumerate(["a", "b"]):
        known = np.flatnonzero(~np.isnan(targets[:, column]))
        y = targets[known, column]
        folds = patient_folds([PATIENTS[i] for i in known], 3, 5)
        trials = []
        for strength in strengths:
            scores = np.zeros(len(known))
            for fold in range(3):
                model = LogisticRegression(C=strength, tol=1e-8, max_iter=5000)
                model.fit(standard[known][folds != fold], y[folds != fold])
                scores[folds == fold] = model.decision_function(standard[known][folds == fold])
            trials.append((roc_auc_score(y, scores), strength, scores))
        best = max(trials, key=lambda trial: (round(trial[0], 4), -trial[1]))
        assert chosen[label]["strength"] == best[1]
        assert chosen[label]["cross_fitted_auroc"] == pytest.approx(best[0], abs=1e-3)
        np.testing.assert_allclose(crossed[known, column], best[2], atol=5e-3 * np.abs(best[2]).max())
        whole = LogisticRegression(C=best[1], tol=1e-8, max_iter=5000).fit(standard[known], y)
        ours = X @ weight[column] + bias[column]
        assert abs(roc_auc_score(y, ours[known]) - roc_auc_score(y, whole.decision_function(standard[known]))) < 1e-3
    assert np.isnan(crossed[:50, 1]).all() and not np.isnan(crossed[:, 0]).any()


def test_the_strength_is_chosen_without_the_scored_rows():
    settings = ProbeSettings(strengths=[1e-4, 1.0, 100.0], folds=3)
    few = RNG.normal(size=(60, 200)).astype(np.float32)
    target = (few[:, :1] + RNG.normal(size=(60, 1)) * 0.3 > 0).astype(np.float32)
    _, _, chosen, crossed = probe(few, target, [str(i) for i in range(60)], ["a"], settings, 0)
    honest = roc_auc_score(target[:, 0], crossed[:, 0])
    assert chosen["a"]["cross_fitted_auroc"] == pytest.approx(honest, abs=1e-4) and honest < 0.95
    noise = np.tile([0.0, 1.0], 30)[:, None]
    _, _, chosen, _ = probe(np.zeros((60, 4)), noise, [str(i) for i in range(60)], ["a"], settings, 0)
    assert chosen["a"]["strength"] == 1e-4  # of equal ones the strongest regularization


def test_soft_targets_are_fitted_but_do_not_judge():
    soft = Y.copy()
    soft[::4] = np.where(soft[::4] == 1, 0.7, 0.2)
    given = ProbeSettings(strengths=[0.1], folds=3)
    weight, bias, chosen, crossed = probe(X, soft, PATIENTS, ["a", "b"], given, 0)
    certain = np.isin(soft[:, 0], (0, 1))
    assert chosen["a"]["cross_fitted_auroc"] == pytest.approx(
        roc_auc_score(soft[certain, 0], crossed[certain, 0]), abs=1e-4
    )
    assert not np.isnan(crossed).any()
    # scikit-learn has no soft targets; each row twice, with weights t and 1 - t, is the same objective
    standard = StandardScaler().fit_transform(X.astype(np.float64))
    model = LogisticRegression(C=0.1, tol=1e-10, max_iter=5000).fit(
        np.concatenate([standard, standard]), np.repeat([1, 0], 400), np.concatenate([soft[:, 0], 1 - soft[:, 0]])
    )
    np.testing.assert_allclose(X @ weight[0] + bias[0], model.decision_function(standard), atol=5e-3)


def test_few_patients_take_the_middle_strength_and_nothing_is_crossed():
    given = ProbeSettings(strengths=[1e-3, 0.1, 10.0], folds=3)
    weight, _, chosen, crossed = probe(X[:4], np.array([[0.0], [1], [1], [0]]), ["p", "p", "q", "q"], ["a"], given, 0)
    assert chosen["a"] == {"strength": 0.1, "cross_fitted_auroc": None} and np.isnan(crossed).all()
    ((_, expected, _),) = fit_many(X[:4], np.array([[0.0], [1], [1], [0]]), [0.1])
    np.testing.assert_allclose(weight, expected, atol=1e-3 * np.abs(expected).max())
    one = np.array([[0.0]] * 5 + [[1.0]])  # the fold with the only positive cannot be fitted without it
    _, _, chosen, crossed = probe(X[:6], one, list("abcdef"), ["a"], given, 0)
    assert chosen["a"]["strength"] == 0.1 and np.isnan(crossed).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_class_is_said(value):
    targets = np.full((400, 1), value)
    targets[:9] = np.nan
    with pytest.raises(CarinaError, match="one class only of 'a'"):
        probe(X, targets, PATIENTS, ["a"], ProbeSettings(strengths=[1.0], folds=3), 0)


def test_features_that_are_no_numbers_are_said():
    broken = X.copy()
    broken[3, 2], broken[7] = np.nan, np.inf
    with pytest.raises(CarinaError, match="2 of 400 rows"):
        probe(broken, Y, PATIENTS, ["a", "b"], ProbeSettings(strengths=[1.0], folds=3), 0)
