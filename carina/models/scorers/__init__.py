"""Anomaly scorers behind one interface: fit on normal images, higher is worse.

A scorer is a module whose buffers are its whole state (`Scorer.from_tensors` makes it again). It says itself what it reads
of an image through a backbone; `fit` takes what was read of all training normals.
"""

from __future__ import annotations

from carina.models.scorers.base import Read, Scorer, ScorerSettings
from carina.models.scorers.density import Density
from carina.models.scorers.gaussian import Gaussian
from carina.models.scorers.head import Head
from carina.models.scorers.memory import Memory
from carina.models.scorers.neighbors import Neighbors
from carina.models.scorers.padim import Padim
from carina.models.scorers.patchcore import PatchCore

SCORERS: dict[str, type[Scorer]] = {
    "gaussian": Gaussian,
    "density": Density,
    "knn": Neighbors,
    "memory": Memory,
    "patchcore": PatchCore,
    "padim": Padim,
    "head": Head,
}

__all__ = ["SCORERS", "Read", "Scorer", "ScorerSettings"]
