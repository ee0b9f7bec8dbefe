"""Splits, folds and subsets: drawn by patient, from hashes, so that they stay when data is added."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from carina.draws import hash64
from carina.errors import CarinaError

SPLITS = ("train", "val", "test")


def _unit(*parts: object) -> float:
    return hash64(*parts) / 2.0**64


def split_of(patient_id: str, val: float = 0.15, test: float = 0.15) -> str:
    """train, val or test by the hash of the patient alone; adding patients never moves one."""
    position = _unit("split", patient_id)
    if position < test:
        return "test"
    return "val" if position < test + val else "train"


def _ordered(patients: Sequence[str], *key: object) -> list[str]:
    return sorted(set(patients), key=lambda patient: (hash64(*key, patient), patient))


def patient_folds(patients: Sequence[str], folds: int, seed: int = 0) -> np.ndarray:
    """(N,) fold number of every row; a patient's rows share one, folds hold equal numbers of patients."""
    order = _ordered(patients, "fold", seed)
    if len(order) < folds:
        raise CarinaError(
            f"{len(order)} patients cannot be dealt into {folds} folds; give fewer folds or more patients"
        )
    place = {patient: i % folds for i, patient in enumerate(order)}
    return np.array([place[patient] for patient in patients], dtype=np.int64)


def patient_subset(patients: Sequence[str], count: int, draw: int = 0, seed: int = 0) -> np.ndarray:
    """(N,) bool: the rows of `count` patients. Subsets of one draw are nested: fewer are the first of more."""
    order = _ordered(patients, "subset", seed, draw)
    if len(order) < count:
        raise CarinaError(
            f"there are {len(order)} patients, {count} were asked for; give patients= at most {len(order)}"
        )
    chosen = set(order[:count])
    return np.array([patient in chosen for patient in patients])
