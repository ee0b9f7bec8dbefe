"""Labels: 1 present, 0 absent, NaN unknown, -1 uncertain; policies turn them into targets when training starts."""

from __future__ import annotations

from typing import Literal

import numpy as np

Uncertain = Literal["ignore", "ones", "zeros"]
ABNORMAL = "abnormal"
NO_FINDING = "No_Finding"


def to_targets(raw: np.ndarray, uncertain: Uncertain = "ignore") -> np.ndarray:
    """Stored labels as targets (float32, same shape): -1 becomes NaN, 1 or 0 as `uncertain` says.

    The names follow Irvin et al., CheXpert (AAAI 2019): U-Ignore, U-Ones, U-Zeros.
    """
    value = {"ignore": np.nan, "ones": 1.0, "zeros": 0.0}[uncertain]
    return np.where(raw == -1, np.float32(value), raw).astype(np.float32)


def abnormal_from(labels: dict[str, np.ndarray]) -> np.ndarray | None:
    """`abnormal` from No_Finding and the findings: No_Finding 1 -> 0, any finding 1 -> 1, else NaN; None without it."""
    if NO_FINDING not in labels:
        return None
    normal = labels[NO_FINDING] == 1
    findings = [value == 1 for name, value in labels.items() if name not in (NO_FINDING, ABNORMAL)]
    result = np.full(len(normal), np.nan, dtype=np.float32)
    result[normal] = 0
    if findings:
        result[np.any(findings, axis=0) & ~normal] = 1
    else:
        result[labels[NO_FINDING] == 0] = 1
    return result
