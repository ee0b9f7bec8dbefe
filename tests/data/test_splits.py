import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carina.data.labels import abnormal_from, to_targets
from carina.data.splits import (
    LEFT_OUT,
    linked_patients,
    patient_folds,
    patient_subset,
    split_linked,
    split_of,
    stable_folds,
)
from carina.errors import CarinaError

PATIENTS = [f"p{i // 3}" for i in range(600)]


def test_splits_are_stable_and_near_their_shares():
    splits = [split_of(f"patient {i}") for i in range(5000)]
    shares = {name: splits.count(name) / 5000 for name in ("train", "val", "test")}
    assert abs(shares["train"] - 0.7) < 0.03 and abs(shares["test"] - 0.15) < 0.02
    assert splits[:100] == [split_of(f"patient {i}") for i in range(100)]


def test_stable_folds_keep_patients_whole_and_stay_when_patients_are_added():
    folds = dict(zip(PATIENTS, stable_folds(PATIENTS, 5, seed=1)))
    more = PATIENTS + [f"new {i}" for i in range(300)]
    later = stable_folds(more, 5, seed=1)
    assert later.max() == 4 and all(folds[p] == fold for p, fold in zip(more, later) if p in folds)
    assert dict(zip(more, later)) == dict(zip(reversed(more), stable_folds(more[::-1], 5, seed=1)))
    counts = np.bincount(list(folds.values()))
    assert counts.sum() == 200 and (abs(counts - 40) < 4 * np.sqrt(32)).all()  # four standard deviations
    assert folds != dict(zip(PATIENTS, stable_folds(PATIENTS, 5, seed=2)))
    with pytest.raises(CarinaError, match="3 patients cannot be dealt into 5 folds"):
        stable_folds(["a", "b", "c"], 5)
    # Inside a held-out fold's training set the folds of a cross-fit are others than the held-out ones.
    rest = [p for p in PATIENTS if folds[p] != 0]
    inner = patient_folds(rest, 5, seed=1)
    table = pd.crosstab(inner, [folds[p] for p in rest])
    assert table.shape == (5, 4) and (table > 0).all(axis=None)
    with pytest.raises(CarinaError, match="none falls into fold"):
        stable_folds([f"p{i}" for i in range(20)], 20)


def test_folds_for_cross_fitting_are_even():
    by_patient = {}
    for patient, fold in zip(PATIENTS, patient_folds(PATIENTS, 5, seed=1)):
        assert by_patient.setdefault(patient, fold) == fold
    assert np.bincount(list(by_patient.values())).tolist() == [40] * 5
    with pytest.raises(CarinaError, match="3 patients cannot be dealt into 5 folds"):
        patient_folds(["a", "b", "c"], 5)


@settings(deadline=None)
@given(st.integers(1, 199), st.integers(1, 199), st.integers(0, 5))
def test_subsets_are_nested_and_of_whole_patients(a, b, draw):
    few, many = sorted((a, b))
    small, large = patient_subset(PATIENTS, few, draw), patient_subset(PATIENTS, many, draw)
    assert (small <= large).all()
    assert len({p for p, keep in zip(PATIENTS, small) if keep}) == few and small.sum() == 3 * few


def test_a_subset_changes_only_by_what_is_added():
    before, more = set(np.array(PATIENTS)[patient_subset(PATIENTS, 50)]), [*PATIENTS, *(f"new {i}" for i in range(100))]
    after = set(np.array(more)[patient_subset(more, 50)])
    assert 0 < len(after - set(PATIENTS)) < 50 and after & set(PATIENTS) < before


def table(**rows: tuple[str, str, str]) -> pd.DataFrame:
    """One row an image: name=(patient, split, group)."""
    columns = ["patient_id", "split", "duplicates"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("image_id").reset_index()


def dealt_table(patients: list[str], groups: list[str]) -> pd.DataFrame:
    splits = [split_of(patient) for patient in patients]
    return pd.DataFrame({"patient_id": patients, "split": splits, "duplicates": groups})


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 25), st.integers(0, 12)), min_size=1, max_size=40), st.booleans(), st.data())
def test_no_picture_stands_on_two_sides(rows, given_list, data):
    """Groups above 8 are "": an image alone."""
    patients = [f"p{patient}" for patient, _ in rows]
    frame = dealt_table(patients, [f"g{group}" if group < 9 else "" for _, group in rows])
    if given_list:
        chosen = {p: data.draw(st.sampled_from(["train", "val", "test"])) for p in sorted(set(patients))}
        frame["split"] = frame["patient_id"].map(chosen)
    frame["split_given"] = given_list
    splits, report = split_linked(frame)
    after = frame.assign(split=splits)
    used = after[after["split"] != LEFT_OUT]
    copied = used[used["duplicates"] != ""]
    assert (copied.groupby("duplicates")["split"].nunique() <= 1).all()
    assert (after.groupby("patient_id")["split"].nunique() == 1).all()
    assert used.assign(who=linked_patients(used)).groupby("who")["split"].nunique().max() == 1
    changed = (after["split"] != frame["split"]).to_numpy()
    assert report["left_out"] + report["moved"] == changed.sum()
    # Nothing ever goes to a less protected split, nothing is left out that was dealt, nothing given moves.
    if given_list:
        assert (after["split"][changed] == LEFT_OUT).all()
    else:
        order = {"train": 0, "val": 1, "test": 2}
        assert (after["split"].map(order) >= frame["split"].map(order)).all()
    # Those whom no copy links stay, and doing it again changes nothing.
    alone = pd.Series(patients).groupby(linked_patients(frame)).transform("nunique").to_numpy() == 1
    assert not changed[alone].any()
    assert split_linked(after)[0].tolist() == splits.tolist()


def test_given_splits_stay_and_dealt_ones_follow():
    rows = table(
        a=("anna", "train", "g"), b=("anna", "train", ""), c=("carl", "test", "g"), d=("dora", "val", ""),
        e=("emil", "val", "h"), f=("fay", "train", "h"), g=("gus", "train", "k"), h=("gus", "train", "k"),
    )  # fmt: skip
    splits, report = split_linked(rows)
    assert splits.tolist() == [LEFT_OUT, LEFT_OUT, "test", "val", "val", LEFT_OUT, "train", "train"]
    assert report == {
        "groups": 3,
        "images": 6,
        "patients": 4,
        "crossing": 2,
        "moved": 0,
        "moved_patients": 0,
        "left_out": 3,
        "left_out_patients": 2,
    }
    mixed, _ = split_linked(rows.assign(split_given=~rows["patient_id"].isin(["anna", "fay"])))
    assert mixed.tolist() == ["test", "test", "test", "val", "val", "val", "train", "train"]
    with pytest.raises(CarinaError, match="split 'training' is none of"):
        split_linked(rows.assign(split="training"))


def test_dealt_splits_are_recognized_and_old_ones_stay_when_data_is_added():
    patients = [f"p{i}" for i in range(60)]
    first = dealt_table(patients, [""] * 60)
    assert split_linked(first)[0].tolist() == first["split"].tolist()
    sides = {name: [p for p in patients if split_of(p) == name] for name in ("train", "test")}
    linking = dealt_table([sides["train"][0], sides["test"][0]], ["g", "g"])
    splits, report = split_linked(pd.concat([first, linking], ignore_index=True))
    moved = {p for p, old, new in zip(patients, first["split"], splits) if old != new}
    assert moved == {sides["train"][0]} and report["moved_patients"] == 1 and report["moved"] == 2
    assert set(splits[-2:]) == {"test"}


def test_linked_patients_are_one_and_tables_without_groups_are_taken_as_they_are():
    rows = table(a=("b1", "train", "g"), b=("a1", "train", "g"), c=("a1", "train", "h"), d=("c1", "train", "h"))
    rows.loc[4] = ["e", "d1", "train", None]
    assert linked_patients(rows).tolist() == ["a1", "a1", "a1", "a1", "d1"]
    assert linked_patients(rows.drop(columns="duplicates")).tolist() == rows["patient_id"].tolist()


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
