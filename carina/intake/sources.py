"""What prepare is given: files or a CSV of paths and labels -> one list of items."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from carina.data.splits import SPLITS
from carina.errors import CarinaError, nearest
from carina.imaging.dicom import list_files

VIEWS = {"PA": "PA", "AP": "AP", "LL": "LATERAL", "RL": "LATERAL", "L": "LATERAL", "LATERAL": "LATERAL"}


@dataclass
class Item:
    """One file to prepare, with what the CSV and its name say of it. `relative` names it below the source."""

    path: str
    relative: str
    patient: str | None = None
    patient_in_name: str | None = None
    study: str | None = None
    view: str = ""
    sex: str = ""
    age: float | None = None
    split: str = ""
    labels: dict[str, float] = field(default_factory=dict)
    mask: str | None = None
    lesions: dict[str, str] = field(default_factory=dict)


def find_items(source: str, recipe) -> list[Item]:
    """The files of a folder, a glob or a CSV, sorted by their path below the source."""
    if source.lower().endswith(".csv"):
        items = _from_csv(Path(source), recipe)
    else:
        columns = [
            name for name in ("patient", "study", "view", "sex", "age", "split", "mask") if getattr(recipe, name)
        ]
        if columns or recipe.labels or recipe.lesions:
            raise CarinaError(f"{(columns or ['labels'])[0]}= names a column of a CSV, but {source} is not a CSV file")
        files = [Path(file) for file in list_files(source)]
        root = Path(source) if Path(source).is_dir() else _common_root(files)
        items = [Item(str(file), file.relative_to(root).as_posix()) for file in files]
        if not items:
            raise CarinaError(f"{source} holds no files that could be images; check the path")
    if recipe.patient_regex:
        _patients_from_names(items, recipe.patient_regex)
    return sorted(items, key=lambda item: item.relative)


def _common_root(files: list[Path]) -> Path:
    if not files:
        return Path()
    parents = [set(file.parents) for file in files]
    return max(set.intersection(*parents), key=lambda parent: len(parent.parts))


def _patients_from_names(items: list[Item], pattern: str) -> None:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise CarinaError(f"patient_regex='{pattern}' is not a regular expression ({error})") from None
    found = 0
    for item in items:
        match = compiled.search(Path(item.relative).name)
        if match:
            item.patient_in_name = match.group(1) if compiled.groups else match.group(0)
            found += 1
    if not found:
        raise CarinaError(f"patient_regex='{pattern}' matches no file name; try it on one name first")


def _from_csv(path: Path, recipe) -> list[Item]:
    if not path.is_file():
        raise CarinaError(f"{path} is not there; check the path")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise CarinaError(f"{path} cannot be read as CSV ({error})") from None

    def column(key: str, name: str | None) -> pd.Series | None:
        if name is None:
            return None
        if name not in table.columns:
            raise CarinaError(f"{path} has no column '{name}' ({key}={name}){nearest(name, table.columns)}")
        return table[name].str.strip()

    names = column("path", "path")
    if not len(table):
        raise CarinaError(f"{path} has no rows; add one a file")
    if names.duplicated().any():
        raise CarinaError(f"{path} lists {int(names.duplicated().sum())} paths twice; keep one row a file")
    columns = {
        key: column(key, getattr(recipe, key)) for key in ("patient", "study", "view", "sex", "age", "split", "mask")
    }
    wanted = recipe.labels if isinstance(recipe.labels, dict) else {name: name for name in recipe.labels}
    labels = {label: _label_values(column("labels", name), path, name) for label, name in wanted.items()}
    lesions = {label: column("lesions", name) for label, name in recipe.lesions.items()}
    ages = None if columns["age"] is None else _numbers(columns["age"], path, recipe.age)
    if columns["split"] is not None:
        wrong = set(columns["split"]) - {*SPLITS, ""}
        if wrong:
            raise CarinaError(
                f"{path}: column '{recipe.split}' holds '{sorted(wrong)[0]}'; use train, val, test or leave it blank"
            )
    if columns["patient"] is not None and columns["split"] is not None:
        columns["split"] = _split_by_patient(columns["patient"], columns["split"], path)
    folder = path.parent
    items = []
    for i, name in enumerate(names):
        text = {key: ("" if value is None else value.iloc[i]) for key, value in columns.items()}
        items.append(
            Item(
                path=str(folder / name),
                relative=Path(name).as_posix(),
                patient=text["patient"] or None,
                study=text["study"] or None,
                view=VIEWS.get(text["view"].upper(), ""),
                sex=text["sex"][:1].upper() if text["sex"][:1].upper() in ("F", "M") else "",
                age=None if ages is None or pd.isna(ages.iloc[i]) else float(ages.iloc[i]),
                split=text["split"],
                labels={label: float(value.iloc[i]) for label, value in labels.items()},
                mask=str(folder / text["mask"]) if text["mask"] else None,
                lesions={label: str(folder / value.iloc[i]) for label, value in lesions.items() if value.iloc[i]},
            )
        )
    return items


def _split_by_patient(patients: pd.Series, splits: pd.Series, path: Path) -> pd.Series:
    """Every row with the split of its patient's other rows where it has none; a patient in two splits is an error."""
    known = splits[(splits != "") & (patients != "")].groupby(patients)
    several = int((known.nunique() > 1).sum())
    if several:
        raise CarinaError(
            f"{path}: {several} patients have rows in more than one split, so training would see test patients; give "
            "every patient one split, or leave split= out"
        )
    return splits.where(splits != "", patients.map(known.first()).fillna(""))


def _label_values(values: pd.Series, path: Path, name: str) -> pd.Series:
    numbers = _numbers(values, path, name)
    wrong = numbers[numbers.notna() & ~numbers.isin((0, 1, -1))]
    if len(wrong):
        raise CarinaError(f"{path}: column '{name}' holds {wrong.iloc[0]:g}; labels are 1, 0, blank or -1")
    return numbers


def _numbers(values: pd.Series, path: Path, name: str) -> pd.Series:
    numbers = pd.to_numeric(values.replace("", None), errors="coerce")
    wrong = values[(values != "") & (values.str.lower() != "nan") & numbers.isna()]
    if len(wrong):
        raise CarinaError(
            f"{path}: column '{name}' holds '{wrong.iloc[0]}', which is not a number; leave it blank where it is unknown"
        )
    return numbers
