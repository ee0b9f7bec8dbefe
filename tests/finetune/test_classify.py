import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from carina.errors import CarinaError
from carina.finetune.classify import probe
from carina.finetune.losses import masked_bce
from carina.finetune.recipe import ProbeSettings

RNG = np.random.default_rng(1)
X = RNG.normal(size=(400, 30)).astype(np.float32) * RNG.uniform(0.1, 5, 30).astype(np.float32) + 2
SIGNAL = (X - 2) @ RNG.normal(size=(30, 2))
Y = (SIGNAL + RNG.normal(size=SIGNAL.shape) * SIGNAL.std() > 0).astype(np.float32)
PATIENTS = [f"p{i // 2}" for i in range(400)]


def test_masked_bce_equals_numpy_and_unknown_entries_have_no_gradient():
    logits = torch.randn(7, 3, dtype=torch.float64).float().requires_grad_()
    targets = torch.tensor(RNG.integers(0, 2, (7, 3)).astype(np.float32))
    targets[0, 1] = targets[3] = float("nan")
    loss = masked_bce(logits, targets)
    p = 1 / (1 + np.exp(-logits.detach().double().numpy()))
    t = targets.numpy()
    known = ~np.isnan(t)
    oracle = -np.where(t == 1, np.log(p), np.log(1 - p))[known].mean()
    assert abs(loss.item() - oracle) < 1e-6
    loss.backward()
    assert (logits.grad[~torch.from_numpy(known)] == 0).all() and (logits.grad[torch.from_numpy(known)] != 0).all()
    assert masked_bce(logits, torch.full((7, 3), float("nan"))).item() == 0


def test_the_probe_equals_scikit_learn():
    targets = Y.copy()
    targets[:50, 1] = np.nan
    head, chosen, crossed = probe(X, targets, PATIENTS, ["a", "b"], ProbeSettings(strengths=[0.1], folds=3), 0)
    scores = head(torch.from_numpy(X)).detach().numpy()
    for column in range(2):
        known = ~np.isnan(targets[:, column])
        scaler = StandardScaler().fit(X[known])
        oracle = LogisticRegression(C=0.1, max_iter=2000).fit(scaler.transform(X[known]), targets[known, column])
        values = oracle.decision_function(scaler.transform(X))
        np.testing.assert_allclose(scores[:, column], values, atol=2e-3)
        ours, theirs = (roc_auc_score(targets[known, column], s[known]) for s in (scores[:, column], values))
        assert abs(ours - theirs) < 1e-3
    assert chosen["a"]["strength"] == 0.1 and np.isnan(crossed[:50, 1]).all() and not np.isnan(crossed[:, 0]).any()


def test_the_strength_is_chosen_without_the_test_rows_and_noise_gets_a_small_one():
    settings = ProbeSettings(strengths=[1e-4, 1.0, 100.0], folds=3)
    few = RNG.normal(size=(60, 200)).astype(np.float32)
    target = (few[:, :1] + RNG.normal(size=(60, 1)) * 0.3 > 0).astype(np.float32)
    _, chosen, crossed = probe(few, target, [str(i) for i in range(60)], ["a"], settings, 0)
    honest = roc_auc_score(target[:, 0], crossed[:, 0])
    assert chosen["a"]["cross_fitted_auroc"] == pytest.approx(honest, abs=0.02) and honest < 0.95


def test_one_class_is_said():
    with pytest.raises(CarinaError, match="one class only of 'a'"):
        probe(X, np.zeros((400, 1)), PATIENTS, ["a"], ProbeSettings(strengths=[1.0], folds=3), 0)
