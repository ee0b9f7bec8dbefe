"""What cards and reports do not tell of few patients: counts and figures of a group of a few are those of persons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FEW = 20  # patients
OLDEST = 89  # years; older ones count as this old (safe harbor of HIPAA, 45 CFR 164.514(b)(2)(i)(C))
FEWER = f"fewer than {FEW}"


def counted(number: int | None) -> str:
    """A count of patients or of their images; of few, and where it was kept back, only that they are few."""
    return FEWER if number is None or number < FEW else f"{number:,}"


def told_people(record: Any) -> Any:
    """A record (carina.json, predictor.json) without the ages and counts of few that an earlier carina kept in it."""
    if not isinstance(record, Mapping):
        return record
    told = {key: told_people(value) for key, value in record.items() if key != "age_range"}
    for key in ("view", "sex", "source"):
        if isinstance(told.get(key), Mapping):
            told[key] = {
                name: None if isinstance(number, int) and number < FEW else number for name, number in told[key].items()
            }
    return told
