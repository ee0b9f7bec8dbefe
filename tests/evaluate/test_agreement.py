"""Agreement of heat maps, against scipy and counting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr

from carina.errors import CarinaError
from carina.evaluate.agreement import agreement, agreement_map, rank_correlation, top_area

MAPS = arrays(np.float64, (3, 12, 10), elements=st.integers(0, 6).map(float))  # many ties


@settings(max_examples=40, deadline=None)
@given(MAPS)
def test_rank_correlation_is_spearmans(maps):
    a, b = maps[:2]
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert rank_correlation(a, b) == 0
    else:
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a.ravel(), b.ravel()).statistic, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(MAPS)
def test_figures_by_counting(maps):
    found, shares = agreement(maps), agreement_map(maps)
    areas = [top_area(heat) for heat in maps]
    sets = [set(np.flatnonzero(area)) for area in areas]
    overlaps = [
        len(a & b) / len(a | b) if a | b else np.nan
        for a, b in ((sets[0], sets[1]), (sets[0], sets[2]), (sets[1], sets[2]))
    ]
    assert found["iou"] == pytest.approx(np.mean(overlaps), nan_ok=True)
    np.testing.assert_allclose(shares * 3, sum(area.astype(int) for area in areas))
    # Fleiss 1971: observed pairs of readers that agree, against those expected from the categories' shares
    votes = np.stack([area.ravel() for area in areas]).sum(axis=0)
    share = votes.sum() / (3 * votes.size)
    observed = np.mean((votes * (votes - 1) + (3 - votes) * (2 - votes)) / 6)
    expected = share**2 + (1 - share) ** 2
    kappa = (observed - expected) / (1 - expected) if 0 < share < 1 else np.nan
    assert found["kappa"] == pytest.approx(kappa, nan_ok=True, abs=1e-9)
    for area, heat in zip(areas, maps):
        assert not area[heat == heat.min()].any()


def test_the_same_map_agrees_and_independent_ones_do_not():
    rng = np.random.default_rng(0)
    heat = rng.random((1, 40, 40))
    assert agreement(np.repeat(heat, 3, axis=0)) == pytest.approx({"spearman": 1, "iou": 1, "kappa": 1})
    assert top_area(heat[0]).mean() == 0.1
    by_chance = agreement(rng.random((5, 200, 200)))
    assert abs(by_chance["spearman"]) < 0.02 and abs(by_chance["kappa"]) < 0.02
    assert by_chance["iou"] == pytest.approx(0.1**2 / (0.2 - 0.1**2), abs=0.01)


def test_one_map_or_numbers_that_are_none_are_refused():
    with pytest.raises(CarinaError, match="two models or more"):
        agreement(np.zeros((1, 4, 4)))
    with pytest.raises(CarinaError, match="no finite numbers"):
        agreement_map(np.full((2, 4, 4), np.nan))
