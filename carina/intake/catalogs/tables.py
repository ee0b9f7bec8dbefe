"""Published tables: found in a folder, read as text, their columns turned into what an item holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from carina.data.labels import ABNORMAL, abnormal_from
from carina.data.splits import split_of
from carina.errors import CarinaError, nearest
from carina.intake.items import Labels

_AGE = r"^([+-]?\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*([YMWD]?)$"
_YEARS = {"Y": 1.0, "": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}


def find_table(folder: Path, *names: str) -> Path | None:
    """The first of `names` (globs; also compressed) that lies in `folder`."""
    for name in names:
        for ending in ("", ".gz", ".zip"):
            found = sorted(folder.glob(name + ending))
            if found:
                return found[0]
    return None


def need_table(folder: Path, catalog: str, homepage: str, *names: str) -> Path:
    path = find_table(folder, *names)
    if path is None:
        raise CarinaError(
            f"{folder} has no {names[0]}, the table of {catalog}; put it there (it comes with the archive: {homepage})"
        )
    return path


def read_csv(path: Path, columns: Sequence[str] = (), **options: Any) -> pd.DataFrame:
    """A published table as text, blanks kept; a CarinaError when it cannot be read or lacks one of `columns`."""
    options = {"dtype": str, "keep_default_na": False, **options}
    try:
        table = pd.read_csv(path, **options)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, EOFError, OSError) as error:
        raise CarinaError(f"{path} cannot be read as a table ({error}); download it again") from None
    table.columns = [str(name).strip() for name in table.columns]
    for name in columns:
        if name not in table.columns:
            raise CarinaError(
                f"{path} has no column '{name}'{nearest(name, table.columns)}; is it the table that was published?"
            )
    return table


def to_numbers(values: pd.Series) -> pd.Series:
    return pd.to_numeric(values.replace("", None), errors="coerce")


def ages(values: pd.Series) -> pd.Series:
    """Years from 57, 057Y or 006M; NaN for what is no age. `age_of` says which years a human can have."""
    parts = values.str.strip().str.extract(_AGE, flags=re.IGNORECASE, expand=True)
    return pd.to_numeric(parts[0], errors="coerce") * parts[1].str.upper().map(_YEARS)


def sexes(values: pd.Series) -> pd.Series:
    first = values.str.strip().str[:1].str.upper()
    return first.where(first.isin(("F", "M")), "")


def one_hot(lists: Iterable[list[str]], names: Sequence[str]) -> np.ndarray:
    """(N, L) int8 of 1 where a row's list names the column, else 0."""
    index = {name: i for i, name in enumerate(names)}
    lists = list(lists)
    values = np.zeros((len(lists), len(names)), dtype=np.int8)
    for row, found in enumerate(lists):
        values[row, [index[name] for name in found if name in index]] = 1
    return values


def with_abnormal(names: Sequence[str], values: np.ndarray, original: Sequence[str]) -> Labels:
    """The labels and the house's `abnormal` from No_Finding and the findings."""
    labels = Labels(names, values, original)
    abnormal = abnormal_from({name: labels.column(name) for name in labels.names})
    return add_label(labels, ABNORMAL, abnormal)


def add_label(labels: Labels, name: str, values: np.ndarray) -> Labels:
    """One more column; values (N,) of 1, 0, -1, NaN."""
    extra = Labels([name], np.asarray(values, dtype=np.float32))
    codes = np.concatenate([labels.codes, extra.codes], axis=1)
    return Labels([*labels.names, name], codes, [*labels.original, name])


def original_text(values: pd.DataFrame) -> np.ndarray:
    """(N,) texts of the labels of a wide table, ``Edema=-1;Fracture=1``: what is blank is left out."""
    numbers = values.to_numpy(np.float32)
    codes = np.where(np.isnan(numbers), 2, numbers).astype(np.int64) + 1
    # A number a combination: a hundred thousand studies have a few thousand.
    combined = codes @ 4 ** np.arange(codes.shape[1])
    _, first, inverse = np.unique(combined, return_index=True, return_inverse=True)
    names = list(values.columns)
    texts = [";".join(f"{name}={code - 1}" for name, code in zip(names, codes[row]) if code < 3) for row in first]
    return np.array(texts, dtype=object)[inverse]


def positive_words(names: Sequence[str], values: np.ndarray) -> list[str]:
    """(N,) texts of the names of the labels that are 1 in values (N, L), ``Edema;Mass``."""
    result = np.full(len(values), "", dtype=object)
    for i, name in enumerate(names):
        result[values[:, i] == 1] += name + ";"
    seen: dict[str, str] = {}
    return [seen.setdefault(text, text[:-1]) for text in result]


def deal_val(table: pd.DataFrame, share: float = 0.1) -> pd.DataFrame:
    """A tenth of the official training patients (pictures, where no patient is known) become val, by their hash."""
    who = table["relative"]
    if "patient" in table:
        who = table["patient"].where(table["patient"] != "", who)
    dealt = {one: split_of(f"validation/{one}", val=share, test=0.0) for one in set(who)}
    train = table["split"] == "train"
    table.loc[train, "split"] = who[train].map(dealt)
    return table
