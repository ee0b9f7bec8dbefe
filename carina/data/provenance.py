"""Where the rows of a selection come from and whom they show, in counts, for cards and reports."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from carina.data.store import LABEL, Selection

FEW = 20  # patients of a source below which its ages are not told: a range of few ages is that of persons


def corpus_facts(selection: Selection) -> dict[str, Any]:
    """Counts by source, view and sex, the ages, what the owner of each source allows, and the same by source."""
    table = selection.table
    sources = table.groupby("source", sort=True)
    return {
        **_people(table),
        "source": _counts(table, "source"),
        "origins": {**{str(name): {} for name in sources.groups}, **selection.origins},
        "by_source": {str(name): _people(rows) for name, rows in sources},
    }


def label_facts(selection: Selection, labels: list[str]) -> dict[str, dict[str, int]]:
    """Images by label: positive, negative, uncertain, unknown."""
    result = {}
    for label in labels:
        values = selection.table[LABEL + label].to_numpy(np.float32)
        kinds = {
            "positive": values == 1,
            "negative": values == 0,
            "uncertain": values == -1,
            "unknown": values != values,
        }
        result[label] = {kind: int(rows.sum()) for kind, rows in kinds.items()}
    return result


def _counts(table: pd.DataFrame, column: str) -> dict[str, int]:
    return {str(k) or "unknown": int(v) for k, v in table[column].value_counts().sort_index().items()}


def _people(table: pd.DataFrame) -> dict[str, Any]:
    ages, patients = table["age"].dropna(), int(table["patient_id"].nunique())
    told = len(ages) > 0 and patients >= FEW
    return {
        "images": len(table),
        "patients": patients,
        "view": _counts(table, "view"),
        "sex": _counts(table, "sex"),
        "age_median": float(ages.median()) if told else None,
        "age_range": [float(ages.min()), float(ages.max())] if told else None,
    }
