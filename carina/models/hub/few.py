"""What cards and reports do not tell of few patients: counts and figures of a group of a few are those of persons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FEW = 20
OLDEST = 89  # years; older ones count as this old (safe harbor of HIPAA, 45 CFR 164.514(b)(2)(i)(C))
FEWER = f"fewer than {FEW}"
NOT_SHOWN = f"{FEWER} patients: not shown"
BESIDE = "not shown: a smaller group could be computed from it"
TOLD = ("variable", "group", "label")  # what a row of a group that is not shown keeps


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


def shown_groups(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics.json's `subgroups`, those of few patients without counts and figures.

    An evaluation withholds them itself (`withheld`), an earlier one told them. Where one group of a variable alone is of
    few, the next smallest is kept back too: the whole less the others would tell it.
    """
    rows = [dict(row) for row in rows]
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault((row["variable"], row["label"]), []).append(row)
    for family in families.values():
        if all("withheld" in row for row in family):
            continue
        by_size = sorted(family, key=_patients)
        small = sum(_patients(row) < FEW for row in family)
        for row in by_size[: 2 if small == 1 else small]:
            note = NOT_SHOWN if _patients(row) < FEW else BESIDE
            row.update({**dict.fromkeys(row), **{key: row[key] for key in TOLD}, "note": note})
    return rows


def kept_back(rows: Sequence[Mapping[str, Any]]) -> set[tuple[str, str, str]]:
    """(variable, label, group) of the rows that `shown_groups` emptied."""
    return {(row["variable"], row["label"], str(row["group"])) for row in rows if row["auroc"] is None}


def _patients(row: Mapping[str, Any]) -> int:
    return row.get("patients") or 0
