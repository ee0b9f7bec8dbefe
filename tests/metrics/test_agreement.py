"""Kappa and the tests of paired calls, against hand counts and the definitions."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, chi2
from sklearn.metrics import cohen_kappa_score

from carina.errors import CarinaError
from carina.metrics.agreement import cohen_kappa, fleiss_kappa, mcnemar_test, stuart_maxwell


def test_cohen_and_fleiss():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 3, 200)
    b = np.where(rng.random(200) < 0.6, a, rng.integers(0, 3, 200))
    found = cohen_kappa(a, b)
    assert (
        found["kappa"] == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)
        and found["low"] < found["kappa"] < found["high"]
    )
    readings = np.stack([a, b, np.where(rng.random(200) < 0.5, a, 0)], axis=1)
    counts = np.stack([(readings == k).sum(axis=1) for k in range(3)], axis=1)
    agreement = ((counts**2).sum(axis=1) - 3) / 6
    chance = ((counts.sum(axis=0) / 600) ** 2).sum()
    assert fleiss_kappa(readings) == pytest.approx((agreement.mean() - chance) / (1 - chance), abs=1e-12)
    assert np.isnan(fleiss_kappa(np.zeros((5, 3)))) and np.isnan(cohen_kappa(np.zeros(5), np.zeros(5))["kappa"])
    with pytest.raises(CarinaError, match="a reading is missing"):
        fleiss_kappa(np.array([[1.0, np.nan]]))


@pytest.mark.parametrize("n", [20, 400])
def test_mcnemar(n):
    rng = np.random.default_rng(n)
    target = rng.integers(0, 2, n)
    a, b = (np.where(rng.random(n) < right, target, 1 - target) for right in (0.9, 0.7))
    found = mcnemar_test(target, a, b)
    x, y = found["only_a_right"], found["only_b_right"]
    assert x == sum((a == target) & (b != target)) and y == sum((a != target) & (b == target))
    exact = x + y < 25
    expected = binomtest(x, x + y).pvalue if exact else chi2.sf((x - y) ** 2 / (x + y), 1)
    assert found["p_value"] == pytest.approx(expected, abs=1e-9) and found["exact"] == exact
    assert mcnemar_test(target, a, a)["p_value"] == 1


def test_stuart_maxwell():
    rng = np.random.default_rng(1)
    a = rng.integers(0, 3, 300)
    b = np.where(rng.random(300) < 0.6, a, 2)
    table = np.array([[((a == i) & (b == j)).sum() for j in range(3)] for i in range(3)])
    gaps = (table.sum(axis=1) - table.sum(axis=0))[:2]
    covariance = -(table + table.T)[:2, :2].astype(float)
    covariance[[0, 1], [0, 1]] = (table.sum(axis=1) + table.sum(axis=0) - 2 * np.diag(table))[:2]
    statistic = gaps @ np.linalg.solve(covariance, gaps)
    found = stuart_maxwell(a, b)
    assert (found["statistic"], found["p_value"]) == pytest.approx((statistic, chi2.sf(statistic, 2)), abs=1e-9)
    # a category on which both always agree cannot make the covariance singular
    assert stuart_maxwell(np.append(a, [9] * 5), np.append(b, [9] * 5)) == pytest.approx(found)
    assert stuart_maxwell(a, a)["p_value"] == 1


def test_the_three_readers_of_vindr():
    """The table of 15,000 images in torchxrayvision's wheel; kappa per finding as its rows give it."""
    path = Path(pytest.importorskip("torchxrayvision").__file__).parent / "data" / "vinbigdata-train.csv.gz"
    rows = pd.read_csv(path)
    readers = rows[["image_id", "rad_id"]].drop_duplicates().sort_values(["image_id", "rad_id"])
    readers["place"] = readers.groupby("image_id").cumcount()
    images = readers["image_id"].unique()
    expected = {
        "Cardiomegaly": 0.789,
        "Aortic enlargement": 0.780,
        "Pneumothorax": 0.743,
        "Pleural effusion": 0.704,
        "Nodule/Mass": 0.528,
    }
    assert len(images) == 15_000 and readers["place"].max() == 2
    for finding, kappa in expected.items():
        calls = rows.loc[rows["class_name"] == finding, ["image_id", "rad_id"]].drop_duplicates().merge(readers)
        said = np.zeros((len(images), 3), dtype=int)
        said[np.searchsorted(images, calls["image_id"]), calls["place"]] = 1
        assert fleiss_kappa(said) == pytest.approx(kappa, abs=6e-4)
