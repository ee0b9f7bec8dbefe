import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carina.data.labels import abnormal_from, to_targets
from carina.data.splits import patient_folds, patient_subset, split_of
from carina.errors import CarinaError

PATIENTS = [f"p{i // 3}" for i in range(600)]


def test_splits_are_stable_and_near_their_shares():
    splits = [split_of(f"patient {i}") for i in range(5000)]
    shares = {name: splits.count(name) / 5000 for name in ("train", "val", "test")}
    assert abs(shares["train"] - 0.7) < 0.03 and abs(shares["test"] - 0.15) < 0.02
    assert splits[:100] == [split_of(f"patient {i}") for i in range(100)]


def test_folds_keep_patients_whole_and_even():
    folds = patient_folds(PATIENTS, 5, seed=1)
    by_patient = {}
    for patient, fold in zip(PATIENTS, folds):
        assert by_patient.setdefault(patient, fold) == fold
    assert np.bincount(list(by_patient.values())).tolist() == [40] * 5
    with pytest.raises(CarinaError, match="3 patients cannot be dealt into 5 folds"):
        patient_folds(["a", "b", "c"], 5)


@given(st.integers(1, 199), st.integers(1, 199), st.integers(0, 5))
def test_subsets_are_nested_and_of_whole_patients(a, b, draw):
    few, many = sorted((a, b))
    small, large = patient_subset(PATIENTS, few, draw), patient_subset(PATIENTS, many, draw)
    assert (small <= large).all()
    assert len({p for p, keep in zip(PATIENTS, small) if keep}) == few and small.sum() == 3 * few


def test_uncertain_labels_become_what_the_policy_says():
    raw = np.array([1, 0, -1, np.nan], dtype=np.float32)
    np.testing.assert_array_equal(to_targets(raw, "ignore"), [1, 0, np.nan, np.nan])
    np.testing.assert_array_equal(to_targets(raw, "ones"), [1, 0, 1, np.nan])
    np.testing.assert_array_equal(to_targets(raw, "zeros"), [1, 0, 0, np.nan])


def test_abnormal_follows_the_findings():
    labels = {
        "No_Finding": np.array([1, 0, 0, np.nan]),
        "Mass": np.array([0, 1, 0, np.nan]),
        "Edema": np.array([0, np.nan, 0, np.nan]),
    }
    np.testing.assert_array_equal(abnormal_from(labels), [0, 1, np.nan, np.nan])
    assert abnormal_from({"Mass": np.array([1])}) is None
