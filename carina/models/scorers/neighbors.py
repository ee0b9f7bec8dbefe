"""k nearest neighbors among the features of normal images, found by faiss."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from carina.errors import CarinaError


def import_faiss():
    try:
        import faiss
    except ImportError:
        raise CarinaError(
            "nearest neighbors need faiss, which is not installed; pip install 'carina-cxr[cpu]' or, on a GPU machine, "
            "'carina-cxr[gpu]'"
        ) from None
    return faiss


class Neighbors(nn.Module):
    """memory_bank (N, D); the score is the mean distance to the `neighbors` nearest. Holds patients' features."""

    memory = True

    def __init__(self, count: int, dimension: int, neighbors: int, normalize: bool, **_: object):
        super().__init__()
        self.neighbors, self.normalize = neighbors, normalize
        self.register_buffer("memory_bank", torch.zeros(count, dimension))
        self._index = None

    @classmethod
    def fit(cls, features: np.ndarray, *, neighbors: int = 5, normalize: bool = True, **_: object) -> Neighbors:
        """features: (N, D) of normal images only."""
        if len(features) < neighbors:
            raise CarinaError(
                f"scorer.neighbors={neighbors} is more than the {len(features)} normal images; give fewer"
            )
        scorer = cls(*features.shape, neighbors, normalize)
        scorer.memory_bank.copy_(scorer._scaled(torch.from_numpy(features.astype(np.float32))))
        return scorer

    def _scaled(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(features, dim=1, eps=1e-12) if self.normalize else features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self._scaled(features)
        if self._index is None:
            self._index = import_faiss().IndexFlatL2(self.memory_bank.shape[1])
            self._index.add(np.ascontiguousarray(self.memory_bank.cpu().numpy()))
        _, found = self._index.search(np.ascontiguousarray(features.detach().cpu().numpy()), self.neighbors)
        nearest = self.memory_bank[torch.from_numpy(found).to(features.device)]
        return (features[:, None, :] - nearest).norm(dim=2).mean(dim=1)
