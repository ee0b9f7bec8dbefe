"""One small file for each public archive: where its tables are, how a row becomes an item, what its terms allow."""

from __future__ import annotations

from carina.errors import CarinaError, nearest
from carina.intake.catalogs import (
    bmad,
    chexpert,
    cxrlt,
    jsrt,
    kermany,
    medianomaly,
    mimic,
    montgomery,
    nih14,
    openi,
    padchest,
    rsna,
    shenzhen,
    siim,
    squid,
    vindr,
)
from carina.intake.catalogs.base import Catalog

_MODULES = (nih14, chexpert, mimic, padchest, vindr, rsna, siim, kermany, openi, montgomery, shenzhen, jsrt, cxrlt)
# splits of these archives on which anomaly detection is compared, as their authors pass them on
_SPLITS = (squid.CATALOG, medianomaly.RSNA, medianomaly.VINDR, bmad.CATALOG)
CATALOGS: dict[str, Catalog] = {c.name: c for c in (*(module.CATALOG for module in _MODULES), *_SPLITS)}


def find_catalog(name: str) -> Catalog:
    if name not in CATALOGS:
        raise CarinaError(
            f"there is no catalog '{name}'{nearest(name, CATALOGS)}; choose one of {', '.join(CATALOGS)}, or describe "
            "the archive in a CSV with a column path"
        )
    return CATALOGS[name]
