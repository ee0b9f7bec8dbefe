import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from carina.errors import CarinaError
from carina.models.scorers import Gaussian, Neighbors

RNG = np.random.default_rng(0)
NORMALS = (RNG.normal(size=(300, 24)) @ RNG.normal(size=(24, 24))).astype(np.float32)
OTHERS = (RNG.normal(size=(50, 24)) * 3).astype(np.float32)


def unit(values):
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize("normalize", [True, False])
def test_gaussian_equals_scikit_learn(normalize):
    scorer = Gaussian.fit(NORMALS, normalize=normalize)
    x, y = (unit(v) if normalize else v for v in (NORMALS, OTHERS))
    oracle = np.sqrt(LedoitWolf().fit(x.astype(np.float64)).mahalanobis(y.astype(np.float64)))
    np.testing.assert_allclose(scorer(torch.from_numpy(OTHERS)).numpy(), oracle, rtol=2e-3)


def test_components_keep_the_principal_ones():
    scorer = Gaussian.fit(NORMALS, components=5)
    assert scorer.whitening.shape == (24, 5)
    with pytest.raises(CarinaError, match="components=400"):
        Gaussian.fit(NORMALS, components=400)


def test_neighbors_equal_scikit_learn():
    scorer = Neighbors.fit(NORMALS, neighbors=4)
    oracle = NearestNeighbors(n_neighbors=4).fit(unit(NORMALS)).kneighbors(unit(OTHERS))[0].mean(axis=1)
    np.testing.assert_allclose(scorer(torch.from_numpy(OTHERS)).numpy(), oracle, atol=1e-5)


def test_scorers_can_be_differentiated():
    for scorer in (Gaussian.fit(NORMALS), Neighbors.fit(NORMALS)):
        x = torch.from_numpy(OTHERS).requires_grad_()
        scorer(x).sum().backward()
        assert x.grad.abs().sum() > 0


def test_without_faiss_one_sentence(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(CarinaError, match="need faiss, which is not installed"):
        Neighbors.fit(NORMALS)(torch.from_numpy(OTHERS))
