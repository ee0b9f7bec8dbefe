"""Audits: what a predictor may be reading instead of disease, what it withstands, how fast it learned, what leaked.

Every audit gives entries of JSON values: name, sentence (what it found, in words), rows, and curve (what may be drawn;
None where there is nothing). No entry holds an identifier or a pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from carina.data.store import Selection
from carina.errors import CarinaError, nearest
from carina.evaluate.audits import convergence, leakage, markers, robustness, shortcut
from carina.evaluate.audits.common import Audited, AuditSettings
from carina.models.predictor import Predictor

AUDITS: dict[str, list[Callable[[Audited], dict[str, Any]]]] = {
    "shortcut": [shortcut.regions, markers.audit, shortcut.acquisition],
    "robustness": [robustness.audit],
    "convergence": [convergence.audit],
    "leakage": [leakage.audit],
}


def run(
    names: Sequence[str],
    predictor: Predictor,
    selection: Selection,
    store: str | Sequence[str],
    settings: AuditSettings,
    quiet: bool = True,
) -> list[dict[str, Any]]:
    """The entries of the audits that are named, in their order.

    selection: the rows that were evaluated. store: what they were selected from (training rows are looked up there).
    Raises CarinaError for a name that is none and for settings that an audit needs and lacks.
    """
    for name in names:
        if name not in AUDITS:
            raise CarinaError(
                f"there is no audit '{name}'{nearest(name, AUDITS)}; give some of audits=[{','.join(AUDITS)}]"
            )
    audited = Audited(predictor, selection, store, settings, quiet)
    return [look(audited) for name in dict.fromkeys(names) for look in AUDITS[name]]
