"""What a store holds, in numbers and in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from carina.data.store import LABEL


def counts(table: pd.DataFrame, rejected: pd.DataFrame, labels: Sequence[str]) -> dict[str, Any]:
    """The counts of store.json, from the table of the rows and that of the files left out."""

    def by(column: str) -> dict[str, int]:
        return {
            str(k) or "unknown": int(v) for k, v in sorted(Counter(table[column]).items(), key=lambda kv: str(kv[0]))
        }

    return {
        "images": len(table),
        "patients": int(table["patient_id"].nunique()),
        "patients_unknown": int(table["patient_id"].str.startswith("file-").sum()),
        "largest_patient": int(table["patient_id"].value_counts().iloc[0]),
        "split": by("split"),
        "patients_by_split": {k: int(v) for k, v in table.groupby("split")["patient_id"].nunique().items()},
        "source": by("source"),
        "view": by("view"),
        "view_source": by("view_source"),
        "sex": by("sex"),
        "rejected": len(rejected),
        "reasons": {str(k): int(v) for k, v in Counter(rejected["reason"]).most_common()},
        "lungs_source": by("lungs_source"),
        "lungs_implausible": int((~table["lungs_plausible"] & (table["lungs_source"] != "none")).sum()),
        "polarity_suspicious": int((table["polarity"] != "ok").sum()),
        "markers": int(sum(len(found) for found in table["markers"] if found is not None)),
        "duplicates": int((table["duplicates"] != "").sum()),
        **label_counts(table, labels),
    }


def label_counts(table: pd.DataFrame, labels: Sequence[str]) -> dict[str, dict[str, int]]:
    values = {"positive": 1, "negative": 0, "uncertain": -1}
    return {
        word: {name: int((table[LABEL + name] == value).sum()) for name in labels} for word, value in values.items()
    }


def summary(info: dict[str, Any]) -> list[str]:
    """What a user wants to know of a store, a sentence a line."""
    found = info["counts"]
    splits = ", ".join(f"{name} {number}" for name, number in found["split"].items())
    lines = [
        f"{found['images']} images of {found['patients']} patients at scale "
        f"{', '.join(map(str, info['scales']))} ({splits}); {found['rejected']} files rejected."
    ]
    lines += [f"  rejected {number}: {reason}" for reason, number in list(found["reasons"].items())[:8]]
    if found["patients_unknown"]:
        lines.append(
            f"Warning: for {found['patients_unknown']} images no patient is known, so each counts as a patient of its "
            "own; name a column with patient= or a pattern with patient_regex=, or splits may leak."
        )
    if found["images"] >= 100 and found["largest_patient"] > 0.2 * found["images"]:
        lines.append(
            f"Warning: one patient has {found['largest_patient']} of the images; if the header's PatientID was replaced by "
            "one word for all, name a column with patient=."
        )
    numbered = [name for name, origin in info["origins"].items() if origin.get("patients") == "picture"]
    if numbered:
        lines.append(
            f"Warning: the patients of {', '.join(numbered)} are not published, each picture counts as one of its own, so "
            "splits may leak."
        )
    if found["duplicates"]:
        moved, left = info["duplicates"]["moved"], info["duplicates"]["left_out"]
        lines.append(
            f"{found['duplicates']} images have an exact or near copy (column duplicates)"
            + (
                f"; so that no copy stands in another split, {moved} rows joined the split of their copy and {left} were "
                "left out of every split."
                if moved or left
                else ", none of them in another split."
            )
        )
    if found["lungs_implausible"]:
        lines.append(
            f"{found['lungs_implausible']} lung masks are implausible and marked so (column lungs_plausible): look at "
            "the contact sheet."
        )
    if found["polarity_suspicious"]:
        lines.append(f"{found['polarity_suspicious']} images may be inverted (column polarity): look at them.")
    if found["view"].get("LATERAL"):
        lines.append(
            f"{found['view']['LATERAL']} lateral views are kept; nothing in carina has been validated on laterals."
        )
    return lines
