"""Where the rows of a selection come from and whom they show, in counts, for cards and reports."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from carina.data.store import LABEL, Selection
from carina.models.hub.few import FEW, OLDEST


def corpus_facts(selection: Selection) -> dict[str, Any]:
    """Counts by source, view and sex, the ages, what the owner of each source allows, and the same by source.

    Ages: median, 5th and 95th percentile. A count of images of fewer than FEW patients is None.
    """
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


def _counts(table: pd.DataFrame, column: str) -> dict[str, int | None]:
    """Images by value; None where they show fewer than FEW patients."""
    patients = table.groupby(column)["patient_id"].nunique()
    counts = table[column].value_counts().sort_index()
    return {str(k) or "unknown": int(v) if patients[k] >= FEW else None for k, v in counts.items()}


def _people(table: pd.DataFrame) -> dict[str, Any]:
    """Ages are one a patient, and told of FEW patients of known age and more: never the youngest or the oldest."""
    ages = table.groupby("patient_id")["age"].median().dropna().clip(upper=OLDEST)
    told = len(ages) >= FEW
    return {
        "images": len(table),
        "patients": int(table["patient_id"].nunique()),
        "view": _counts(table, "view"),
        "sex": _counts(table, "sex"),
        "age_median": float(ages.median()) if told else None,
        "age_percentiles": [float(age) for age in np.percentile(ages, (5, 95))] if told else None,
    }
