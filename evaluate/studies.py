"""Images pooled to studies or patients: one score and one target for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd

Level = Literal["image", "study", "patient"]
Pool = Literal["max", "mean"]
UNITS = {"image": "images", "study": "studies", "patient": "patients"}
AGES = {"0-17": 18, "18-39": 40, "40-59": 60, "60-79": 80, "80+": np.inf}  # bands and the first age beyond each


def age_bands(ages: np.ndarray) -> np.ndarray:
    """(n,) place among `AGES` of ages in years; len(AGES) where none is known."""
    return np.where(np.isnan(ages), len(AGES), np.searchsorted(list(AGES.values()), ages, side="right"))


class Pooling:
    """Rows of a table as units of `level`, in the order in which they first appear; `image` leaves every row alone.

    pool: of scores. `mean` over the views of a study is their late fusion; `max` says what the worst image says.
    """

    def __init__(self, table: pd.DataFrame, level: Level, pool: Pool):
        self.level, self.pool = level, pool
        keys = table["image_id" if level == "image" else f"{level}_id"].to_numpy(dtype=object)
        self.codes, self.names = pd.factorize(keys)
        self.first = np.unique(self.codes, return_index=True)[1]

    def __len__(self) -> int:
        return len(self.names)

    def scores(self, values: np.ndarray) -> np.ndarray:
        """(N, L) -> (G, L): the greatest or the mean score of each unit."""
        if self.level == "image":
            return values
        if self.pool == "max":
            result = np.full((len(self), values.shape[1]), -np.inf)
            np.maximum.at(result, self.codes, values)
            return result
        total = np.zeros((len(self), values.shape[1]))
        np.add.at(total, self.codes, values)
        return total / np.bincount(self.codes, minlength=len(self))[:, None]

    def targets(self, values: np.ndarray) -> np.ndarray:
        """(N, L) of 0, 1 or NaN -> (G, L): 1 where any image is positive, 0 where all are known to be negative, else NaN."""
        if self.level == "image":
            return values
        positive, unknown = (np.zeros((len(self), values.shape[1]), dtype=bool) for _ in range(2))
        np.logical_or.at(positive, self.codes, values == 1)
        np.logical_or.at(unknown, self.codes, np.isnan(values))
        return np.where(positive, 1.0, np.where(unknown, np.nan, 0.0))

    def table(self, table: pd.DataFrame, facts: Sequence[str]) -> pd.DataFrame:
        """A row a unit: image_id is the unit's own identifier. Views of its images are joined; other facts are those
        that are recorded of its images, left empty where these do not agree (ages: are not of one band)."""
        if self.level == "image":
            return table[list(facts)].copy()
        result = table.iloc[self.first][list(facts)].copy()
        for fact in set(facts) - {"image_id", "study_id", "patient_id", "view", "age"}:
            values = pd.Series(table[fact].to_numpy(dtype=object))
            recorded = values.where(values.notna() & (values != ""), None).groupby(self.codes)
            result[fact] = recorded.first().where(recorded.nunique() == 1, "").to_numpy()
        if "age" in facts:
            ages = pd.Series(table["age"].to_numpy(dtype=np.float64))
            bands = pd.Series(age_bands(ages.to_numpy())).where(ages.notna()).groupby(self.codes)
            result["age"] = ages.groupby(self.codes).first().where(bands.nunique() == 1).to_numpy()
        result["image_id"] = self.names
        if self.level == "patient":
            result["study_id"] = ""
        views = pd.Series(table["view"].to_numpy(dtype=object)).groupby(self.codes)
        result["view"] = views.agg(
            lambda found: "+".join(sorted({view for view in found if isinstance(view, str) and view}))
        ).to_numpy()
        return result
