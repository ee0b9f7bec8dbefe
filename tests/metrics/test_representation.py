"""Figures of representations against scikit-learn, scipy and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from scipy.stats import entropy
from sklearn.neighbors import KNeighborsClassifier

from carina.errors import CarinaError
from carina.metrics.representation import alignment, dimension_deviation, knn_scores, rankme, uniformity

RNG = np.random.default_rng(5)
FEATURES = RNG.normal(size=(80, 12)) @ RNG.normal(size=(12, 12)) + 0.5
UNIT = FEATURES / np.linalg.norm(FEATURES, axis=1, keepdims=True)


def test_rankme_is_the_exponential_of_the_entropy_of_singular_values():
    values = np.sqrt(np.linalg.eigvalsh(FEATURES.T @ FEATURES))
    assert rankme(FEATURES) == pytest.approx(np.exp(entropy(values)), abs=1e-9)
    assert rankme(7 * FEATURES) == pytest.approx(rankme(FEATURES), abs=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_rankme_counts_equal_directions(rank):
    axes = np.linalg.qr(RNG.normal(size=(40, 40)))[0][:, :rank]
    assert rankme(axes @ np.linalg.qr(RNG.normal(size=(12, 12)))[0][:rank]) == pytest.approx(rank, abs=1e-9)


def test_deviation_is_one_on_the_sphere_and_zero_in_a_point():
    assert dimension_deviation(FEATURES) == pytest.approx(np.sqrt(UNIT.var(0)).mean() * np.sqrt(12), abs=1e-12)
    assert dimension_deviation(RNG.normal(size=(4000, 64))) == pytest.approx(1, abs=0.01)
    point = np.outer(RNG.uniform(1, 2, size=30), FEATURES[0])
    assert dimension_deviation(point) == pytest.approx(0, abs=1e-7)
    assert rankme(point) == pytest.approx(1, abs=1e-6) and uniformity(point) == pytest.approx(0, abs=1e-9)


def test_alignment_and_uniformity_equal_their_definitions():
    other = FEATURES + RNG.normal(size=FEATURES.shape)
    there = other / np.linalg.norm(other, axis=1, keepdims=True)
    assert alignment(FEATURES, other) == pytest.approx(np.mean(np.linalg.norm(UNIT - there, axis=1) ** 2), abs=1e-12)
    assert alignment(FEATURES, 3 * FEATURES) == pytest.approx(0, abs=1e-12)
    expected = np.log(np.exp(-2 * pdist(UNIT, "sqeuclidean")).mean())
    assert uniformity(FEATURES) == pytest.approx(expected, abs=1e-9)


def test_neighbors_equal_scikit_learn_when_every_image_is_its_own_patient():
    targets = (RNG.random((80, 1)) < 0.4).astype(float)
    scores = knn_scores(FEATURES, targets, np.arange(80), 7)
    for i in range(80):
        rest = np.arange(80) != i
        # cosine distance: |x - y|^2 / 2 of unit vectors, so the vote is exp((1 - distance) / 0.07)
        oracle = KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
        oracle.fit(FEATURES[rest], targets[rest, 0])
        assert scores[i, 0] == pytest.approx(oracle.predict_proba(FEATURES[i : i + 1])[0, 1], abs=1e-5)


def test_neighbors_are_never_of_the_same_patient_and_unknown_labels_do_not_vote(monkeypatch):
    monkeypatch.setattr("carina.metrics.representation._CHUNK", 32)
    patients = RNG.integers(0, 25, size=80)
    targets = RNG.integers(0, 2, size=(80, 3)).astype(float)
    targets[RNG.random(80) < 0.5, 1] = np.nan
    scores = knn_scores(FEATURES, targets, patients, 9)
    for i in range(80):
        for column in range(3):
            may = np.flatnonzero((patients != patients[i]) & ~np.isnan(targets[:, column]))
            nearest = may[np.argsort(-UNIT[may] @ UNIT[i])[:9]]
            vote = np.exp(UNIT[nearest] @ UNIT[i] / 0.07)
            assert scores[i, column] == pytest.approx((vote @ targets[nearest, column]) / vote.sum(), abs=1e-5)


def test_without_other_patients_there_is_no_score():
    targets = np.ones((4, 1))
    assert np.isnan(knn_scores(FEATURES[:4], targets, ["a"] * 4, 3)).all()
    alone = knn_scores(FEATURES[:4], targets, ["a", "a", "a", "b"], 3)
    assert (alone == 1).all(), "fewer neighbors than asked for: all of the other patients' vote"
    with pytest.raises(CarinaError, match="as many rows of targets"):
        knn_scores(FEATURES, targets, np.arange(80), 3)
    with pytest.raises(CarinaError, match="one shape"):
        alignment(FEATURES, FEATURES[:3])
