"""Counter-based random draws: Philox4x32-10 (Salmon et al., SC 2011) on (seed, epoch, sample, name).

A draw depends on nothing but those four, so a sample gets the same augmentation at any number of workers or ranks,
in any batch, and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10. `counters` (..., 4) of 32-bit values, `key` two 32-bit words; returns (..., 4) uint32."""
    c0, c1, c2, c3 = (counters[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def hash64(*parts: object) -> int:
    """A 64-bit number from any values with a stable text form."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def sample_codes(ids: Sequence[str]) -> np.ndarray:
    """64-bit codes (N,) of image_ids, for the counters. image_ids are hexadecimal hashes already."""
    return np.array([int(i[:16], 16) for i in ids], dtype=np.uint64)


class Draws:
    """Draws for a batch: every sample has its own stream per name.

    seed: the run's seed. epoch: how often the corpus has been seen. codes: (B,) uint64 from `sample_codes`.
    """

    def __init__(self, seed: int, epoch: int, codes: np.ndarray):
        self.seed, self.epoch = seed, epoch
        self.codes = np.asarray(codes, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self.codes)

    def part(self, name: str) -> Draws:
        """The same samples with streams of their own, for one view or one pretext."""
        child = Draws.__new__(Draws)
        child.seed, child.epoch, child.codes = hash64(self.seed, name), self.epoch, self.codes
        return child

    def select(self, rows: np.ndarray) -> Draws:
        return Draws(self.seed, self.epoch, self.codes[rows])

    def _words(self, name: str, count: int) -> np.ndarray:
        key = hash64("draws", self.seed, name)
        blocks = -(-count // 4)
        counters = np.empty((len(self.codes), blocks, 4), dtype=np.uint64)
        counters[..., 0] = np.arange(blocks, dtype=np.uint64)
        counters[..., 1] = np.uint64(self.epoch & 0xFFFFFFFF)
        counters[..., 2] = (self.codes & _LOW)[:, None]
        counters[..., 3] = (self.codes >> _SHIFT)[:, None]
        words = philox(counters, (key & 0xFFFFFFFF, key >> 32))
        return words.reshape(len(self.codes), blocks * 4)[:, :count]

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0, shape: tuple[int, ...] = ()) -> np.ndarray:
        """(B, *shape) float32, uniform in [low, high)."""
        count = int(np.prod(shape, dtype=int))
        # 24 bits: every value is exact in float32 and below 1.
        unit = (self._words(name, count) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
        values = np.float32(low) + np.float32(high - low) * unit
        return values.reshape(len(self.codes), *shape)

    def normal(self, name: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        """(B, *shape) float32, standard normal (Box-Muller)."""
        u = self.uniform(name, shape=(*shape, 2)).astype(np.float64)
        radius = np.sqrt(-2.0 * np.log1p(-u[..., 0]))
        return (radius * np.cos(2 * np.pi * u[..., 1])).astype(np.float32)

    def coin(self, name: str, probability: float = 0.5) -> np.ndarray:
        """(B,) bool, True with the given probability."""
        return self.uniform(name) < probability

    def integers(self, name: str, low: int, high: int) -> np.ndarray:
        """(B,) int64, uniform in [low, high)."""
        return np.minimum((low + np.floor(self.uniform(name).astype(np.float64) * (high - low))), high - 1).astype(
            np.int64
        )


def permutation(count: int, *key: object) -> np.ndarray:
    """A permutation of range(count) that depends on `key` alone."""
    return np.random.Generator(np.random.Philox(key=hash64("permutation", *key))).permutation(count)
