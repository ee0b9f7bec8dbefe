"""Splits, folds and subsets: drawn by patient, from hashes, so that they stay when data is added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from carina.draws import hash64, permutation
from carina.errors import CarinaError

SPLITS = ("train", "val", "test")
# The split of patients that have copies in a more protected split of an official list: no stage asks for it.
LEFT_OUT = "left_out"
_PRIORITY = {name: i for i, name in enumerate((LEFT_OUT, *SPLITS))}  # of linked patients the highest has its way


def _unit(*parts: object) -> float:
    return hash64(*parts) / 2.0**64


def split_of(patient_id: str, val: float = 0.15, test: float = 0.15) -> str:
    """train, val or test by the hash of the patient alone; adding patients never moves one."""
    position = _unit("split", patient_id)
    if position < test:
        return "test"
    return "val" if position < test + val else "train"


def linked_patients(table: pd.DataFrame) -> np.ndarray:
    """(N,) texts: patient_id, or for patients joined by copies of one picture the least patient_id among them.

    table: patient_id and, where duplicates were looked for, `duplicates` (the group, "" alone). Two patients with one
    picture are one person under two numbers, or an error of the archive; either way they must not be set apart.
    """
    patients = table["patient_id"].to_numpy(dtype=object)
    if "duplicates" not in table.columns:
        return patients
    names, codes = np.unique(patients.astype(str), return_inverse=True)
    groups = table["duplicates"].fillna("").to_numpy(dtype=object)
    copied = np.flatnonzero(groups != "")
    if not len(copied):
        return patients
    group_names, group_codes = np.unique(groups[copied].astype(str), return_inverse=True)
    size = len(names) + len(group_names)
    links = (np.ones(len(copied)), (codes[copied], len(names) + group_codes))
    _, component = connected_components(coo_matrix(links, shape=(size, size)), directed=False)
    least = np.full(component.max() + 1, len(names))
    np.minimum.at(least, component[: len(names)], np.arange(len(names)))
    return names[least[component[codes]]].astype(object)


def split_linked(table: pd.DataFrame) -> tuple[np.ndarray, dict[str, Any]]:
    """Splits (N,) in which no picture stands on two sides, and counts for the data sheet.

    table: patient_id, split, duplicates, and split_given (bool): the split came from a table or an official list. Without
    that column every split counts as dealt when all are what `split_of` says, and as given otherwise.

    Of patients linked by copies, those dealt a split take the most protected one among them (test, then val, then
    train); a given split is never changed into another: its patients in a less protected one become ``left_out``.
    So data that is added moves only patients that it links.

    The counts: groups, images (in groups), patients (that share a picture with another patient_id), crossing (groups
    on several sides before), moved and moved_patients, left_out and left_out_patients (images and patients).
    """
    patients, before = table["patient_id"].to_numpy(dtype=object), table["split"].to_numpy(dtype=object)
    unknown = sorted(set(before) - set(_PRIORITY))
    if unknown:
        raise CarinaError(f"split '{unknown[0]}' is none of {', '.join(SPLITS)}; correct the column of splits")
    if "split_given" in table.columns:
        fixed = table["split_given"].to_numpy(dtype=bool)
    else:
        dealt = {patient: split_of(patient) for patient in set(patients)}
        fixed = np.full(len(table), any(dealt[patient] != split for patient, split in zip(patients, before)))
    linked = linked_patients(table)
    people, codes = np.unique(linked.astype(str), return_inverse=True)
    priority = np.array([_PRIORITY[split] for split in before], dtype=np.int64)
    # A given split outranks every dealt one: it is the one that cannot yield.
    highest, given = np.zeros(len(people), dtype=np.int64), np.zeros(len(people), dtype=np.int64)
    np.maximum.at(highest, codes, priority)
    np.maximum.at(given, codes, np.where(fixed, priority, 0))
    target = np.where(given > 0, given, highest)[codes]
    names = np.array(list(_PRIORITY), dtype=object)
    splits = np.where(priority == target, before, np.where(fixed, LEFT_OUT, names[target]))

    groups = table["duplicates"].fillna("").to_numpy(dtype=object)
    copied = groups != ""
    sides = pd.Series(before[copied]).groupby(groups[copied]).nunique()
    numbers = pd.Series(patients).groupby(linked).nunique()
    left_out = (splits == LEFT_OUT) & (before != LEFT_OUT)
    moved = (splits != before) & ~left_out
    return splits, {
        "groups": len(sides),
        "images": int(copied.sum()),
        "patients": int(numbers[numbers > 1].sum()),
        "crossing": int((sides > 1).sum()),
        "moved": int(moved.sum()),
        "moved_patients": len(set(patients[moved])),
        "left_out": int(left_out.sum()),
        "left_out_patients": len(set(patients[left_out])),
    }


def _ordered(patients: Sequence[str], *key: object) -> list[str]:
    return sorted(set(patients), key=lambda patient: (hash64(*key, patient), patient))


def _check_folds(count: int, folds: int) -> None:
    if count < folds:
        raise CarinaError(f"{count} patients cannot be dealt into {folds} folds; give fewer folds or more patients")


def stable_folds(patients: Sequence[str], folds: int, seed: int = 0) -> np.ndarray:
    """(N,) fold number of every row, by the hash of its patient alone: adding patients never moves one.

    For held-out folds, which outlive the table that they were dealt over; give `linked_patients` so that copies share
    one. Folds so dealt hold nearly, not exactly, equal numbers of patients.
    """
    place = {patient: hash64("stable fold", seed, patient) * folds >> 64 for patient in set(patients)}
    _check_folds(len(place), folds)
    empty = sorted(set(range(folds)) - set(place.values()))
    if empty:
        raise CarinaError(
            f"of {len(place)} patients none falls into fold {empty[0]} of {folds}; give fewer folds or more patients"
        )
    return np.array([place[patient] for patient in patients], dtype=np.int64)


def patient_folds(patients: Sequence[str], folds: int, seed: int = 0) -> np.ndarray:
    """(N,) fold number of every row; a patient's rows share one, folds hold equal numbers of patients, to one.

    For cross-fitting inside one set of rows, where patients may be few and the folds are forgotten afterwards: adding
    a patient moves others (see `stable_folds`, whose folds these cut evenly).
    """
    order = _ordered(patients, "fold", seed)
    _check_folds(len(order), folds)
    place = {patient: i % folds for i, patient in enumerate(order)}
    return np.array([place[patient] for patient in patients], dtype=np.int64)


def patient_subset(patients: Sequence[str], count: int, draw: int = 0, seed: int = 0) -> np.ndarray:
    """(N,) bool: the rows of `count` patients. Subsets of one draw are nested: fewer are the first of more.

    Patients that are added may take a place, but those who stay out stay out and the order of the others is kept.
    """
    order = _ordered(patients, "subset", seed, draw)
    if len(order) < count:
        raise CarinaError(
            f"there are {len(order)} patients, {count} were asked for; give patients= at most {len(order)}"
        )
    chosen = set(order[:count])
    return np.array([patient in chosen for patient in patients])


def permute_patients(patients: Sequence[str], seed: int = 0) -> np.ndarray:
    """(N,) the row whose labels each row takes, so that labels are dealt out anew among patients at random.

    A patient takes the labels of one other patient (or keeps its own) for all of its rows, in turn where that patient has
    fewer, so that what images of one person share is kept and only the tie between image and label is cut.
    """
    rows: dict[str, list[int]] = {}
    for number, patient in enumerate(patients):
        rows.setdefault(patient, []).append(number)
    people = sorted(rows)
    result = np.empty(len(patients), dtype=np.int64)
    for patient, place in zip(people, permutation(len(people), "labels dealt anew", seed)):
        giver = rows[people[place]]
        for number, row in enumerate(rows[patient]):
            result[row] = giver[number % len(giver)]
    return result
