"""The two tuberculosis sets of the National Library of Medicine: a picture, a text with its reading, masks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from carina.data.labels import ABNORMAL
from carina.errors import CarinaError
from carina.intake.catalogs.base import Records
from carina.intake.items import Labels

_SEX = re.compile(r"\b(?:sex\s*:\s*([MF])|(male|female))\b", re.IGNORECASE)
_AGE = re.compile(r"(\d+)\s*-?\s*(y|m|d|w)[a-z]*\b", re.IGNORECASE)
_HEAD = re.compile(r"sex|\bmale\b|\bfemale\b|age\s*:|^\s*\d+\s*y", re.IGNORECASE)
_YEARS = {"y": 1.0, "m": 1 / 12, "w": 7 / 365.25, "d": 1 / 365.25}


def parse_reading(text: str) -> tuple[str, float | None, str]:
    """(sex, age in years, findings) of ``Patient's Sex: F / Patient's Age: 027Y / normal`` or ``male 45yrs / ...``.

    The lines about the patient are left out of the findings.
    """
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    head = " ".join(line for line in lines if _HEAD.search(line))
    sex, age = _SEX.search(head), _AGE.search(head)
    years = float(age[1]) * _YEARS[age[2].lower()] if age else None
    findings = " ".join(line for line in lines if not _HEAD.search(line))
    return (sex[1] or sex[2])[0].upper() if sex else "", years, findings


def read_set(folder: Path, prefix: str, name: str, home: str) -> Records:
    """Pictures named <prefix>_<number>_<0|1>: 1 shows tuberculosis. Masks are the caller's to add."""
    pattern = re.compile(rf"{prefix}_(\d+)_([01])\.(?:png|dcm|jpe?g)", re.IGNORECASE)
    pictures: dict[str, re.Match] = {}
    for path in sorted(folder.rglob(f"{prefix}_*")):
        match = pattern.fullmatch(path.name)
        if match and not any("mask" in part.lower() for part in path.relative_to(folder).parts[:-1]):
            pictures.setdefault(path.stem, match)
    if not pictures:
        raise CarinaError(
            f"{folder} holds no pictures named like {prefix}_0001_0.png; give the folder in which {name} was unpacked "
            f"({home})"
        )
    texts = {path.stem: path for path in folder.rglob(f"{prefix}_*.txt")}
    rows = []
    for stem, match in pictures.items():
        read = texts[stem].read_text(encoding="utf-8", errors="replace") if stem in texts else ""
        sex, age, findings = parse_reading(read)
        # Every picture is another patient.
        rows.append((match[0], match[1], "PA", sex, age, findings))
    table = pd.DataFrame(rows, columns=["relative", "patient", "view", "sex", "age", "original"])
    sick = np.array([match[2] == "1" for match in pictures.values()], dtype=np.float32)
    labels = Labels(("Tuberculosis", ABNORMAL), np.stack([sick, sick], axis=1))
    return Records(table, labels, "its folder")
