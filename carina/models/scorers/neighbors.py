"""k nearest neighbors among the features of normal images, found by faiss: exact, or in a compressed memory."""

from __future__ import annotations

import math

import numpy as np
import torch

from carina.draws import permutation
from carina.errors import CarinaError
from carina.models.scorers.base import Read, Scorer, ScorerSettings, check_read, pieces, scaled_rows

SAMPLES_A_LIST = 64  # features that the compressed memory is trained on, for each of its lists
PROBES = 16  # lists that are searched


def import_faiss():
    try:
        import faiss
    except ImportError:
        raise CarinaError(
            "nearest neighbors need faiss, which is not installed; pip install 'carina-cxr[cpu]' or, on a GPU machine, "
            "'carina-cxr[gpu]'"
        ) from None
    return faiss


class Neighbors(Scorer):
    """The score is the mean distance to the `neighbors` nearest normal images. Holds patients' features.

    State: memory_bank (N, D); or with `compress` codes (N, C) uint8 and index, the bytes of the trained and empty faiss
    index that reads them: an inverted file whose residuals are scalar-quantized to 8 bits a value. A compressed memory
    is built from anything that has a shape (N, D) and gives slices of rows, a memory map say, and never holds it whole.
    """

    memory = True

    @classmethod
    def fit(cls, read: Read, settings: ScorerSettings) -> Neighbors:
        """read: [(N, D)] of normal images only."""
        count = check_read(read, settings, least=1)
        if count < settings.neighbors:
            raise CarinaError(
                f"scorer.neighbors={settings.neighbors} is more than the {count} normal images; give fewer"
            )
        if settings.compress:
            return cls(settings, **_compressed(read[0], settings))
        return cls(settings, memory_bank=torch.from_numpy(scaled_rows(read[0], settings).astype(np.float32)))

    def forward(self, read: list[torch.Tensor]) -> torch.Tensor:
        dimension = self.opened.d if self.settings.compress else self.memory_bank.shape[1]
        (features,) = self.expect(read, [(dimension,)])
        features = self.scaled(features)
        queries = np.ascontiguousarray(features.detach().cpu().numpy(), dtype=np.float32)
        if self.settings.compress:
            _, found, nearest = self.opened.search_and_reconstruct(queries, self.settings.neighbors)
            if (found < 0).any():  # the lists that were searched hold fewer
                everywhere = import_faiss().SearchParametersIVF(nprobe=self.opened.nlist)
                nearest = self.opened.search_and_reconstruct(queries, self.settings.neighbors, params=everywhere)[2]
            nearest = torch.from_numpy(nearest)
        else:
            bank = self.memory_bank.cpu()
            nearest = bank[torch.from_numpy(import_faiss().knn(queries, bank.numpy(), self.settings.neighbors)[1])]
        return (features[:, None, :] - nearest.to(features.device)).norm(dim=2).mean(dim=1)

    @property
    def opened(self):
        """The faiss index with all codes in it, made on first use."""
        if "_opened" not in self.__dict__:
            index = import_faiss().deserialize_index(self.index.cpu().numpy())
            codes = self.codes.cpu().numpy()
            for rows in pieces(codes):
                index.add_sa_codes(codes[rows], np.arange(rows.start, rows.stop))
            index.nprobe = PROBES
            self.__dict__["_opened"] = index
        return self.__dict__["_opened"]


def _compressed(features: np.ndarray, settings: ScorerSettings) -> dict[str, torch.Tensor]:
    faiss = import_faiss()
    count, dimension = features.shape
    lists = max(1, min(round(math.sqrt(count)), count // SAMPLES_A_LIST))
    metric, codec = faiss.METRIC_L2, faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatL2(dimension), dimension, lists, codec, metric, True)
    index.cp.seed = settings.seed
    share = min(1.0, lists * SAMPLES_A_LIST / count)
    chosen = []
    for rows in pieces(features):
        few = permutation(rows.stop - rows.start, "compressed neighbors", settings.seed, rows.start)
        few = np.sort(few[: math.ceil(share * len(few))])
        chosen.append(scaled_rows(features[rows][few], settings).astype(np.float32))
    index.train(np.concatenate(chosen))
    del chosen
    codes = np.empty((count, index.sa_code_size()), dtype=np.uint8)
    for rows in pieces(features):
        codes[rows] = index.sa_encode(scaled_rows(features[rows], settings).astype(np.float32))
    return {"codes": torch.from_numpy(codes), "index": torch.from_numpy(faiss.serialize_index(index))}
