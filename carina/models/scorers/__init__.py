"""Anomaly scorers on pooled features, behind one interface: fit on normals, higher is worse.

A scorer is a module whose buffers are its whole state. ``fit(features (N, D))`` returns one; ``forward(features (B, D))``
gives distances (B,) and can be differentiated, so that heat maps work. ``memory`` says that it holds patients' features.
"""

from __future__ import annotations

from torch import nn

from carina.models.scorers.gaussian import Gaussian
from carina.models.scorers.neighbors import Neighbors

SCORERS: dict[str, type[nn.Module]] = {"gaussian": Gaussian, "knn": Neighbors}
