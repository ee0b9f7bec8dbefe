"""A small picture of every image, by which copies are told from look-alikes.

The descriptor is 16 x 16 gray values. Radiographs of one view look alike at that size; what tells them apart is the
fine part. Amplitudes in natural images fall as one over the spatial frequency (Field, "Relations between the statistics
of natural images and the response properties of cortical cells", J. Opt. Soc. Am. A 4, 1987), so each cosine
coefficient is weighted by its frequency before two descriptors are compared. The weight of frequency 0 is 0: brightness
does not count; neither does contrast, because vectors have one length.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from scipy.fft import dctn

SIDE = 16
# Vectors hold whole numbers and have this length: every partial sum of an inner product stays below 2^24 and is exact
# in float32, so similarities are the same at any number of threads, in any order and library. At 2048 the numbers are
# exact in float16 too.
LENGTH = 2048
# Cosine above which two descriptors alone are taken for one picture: half way, as an angle, between the most alike
# different radiographs and the least alike copies of one half of the patients at hand.
NEAR = 0.98
_BLOCK = 4096
_FREQUENCY = np.hypot(*np.meshgrid(np.arange(SIDE), np.arange(SIDE)))


def descriptor(image: np.ndarray) -> bytes:
    """256 bytes: (S, S) float in [0, 1] or unsigned integers -> 16 x 16 uint8 by the area filter, row by row."""
    largest = 1.0 if image.dtype.kind == "f" else float(np.iinfo(image.dtype).max)
    small = cv2.resize(image.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return np.clip(np.round(small * (255.0 / largest)), 0, 255).astype(np.uint8).tobytes()


def vectors(descriptors: Sequence[bytes]) -> np.ndarray:
    """(N, 256) float32 of whole numbers and length 2048; all 0 where a picture is flat and so like nothing.

    The cosine of two pictures is ``a @ b / LENGTH**2``.
    """
    gray = np.frombuffer(b"".join(descriptors), dtype=np.uint8).reshape(-1, SIDE, SIDE).astype(np.float64)
    weighted = (dctn(gray, axes=(1, 2), norm="ortho") * _FREQUENCY).reshape(-1, SIDE * SIDE)
    length = np.linalg.norm(weighted, axis=1, keepdims=True)
    flat = gray.std(axis=(1, 2)) < 1  # below one gray level only rounding is left
    length[flat] = np.inf
    return np.round(weighted * (LENGTH / length)).astype(np.float32)


def known(descriptors: Sequence[bytes | None]) -> np.ndarray:
    """(N,) bool: where there is a descriptor."""
    return np.array([isinstance(value, bytes) and len(value) == SIDE * SIDE for value in descriptors], dtype=bool)


def any_near(descriptors: Sequence[bytes | None], seen: Sequence[bytes | None]) -> np.ndarray:
    """(N,) bool: which of `descriptors` are near one of `seen`; False where there is none."""
    found = np.zeros(len(descriptors), dtype=bool)
    rows = np.flatnonzero(known(descriptors))
    others = sorted({value for value, there in zip(seen, known(seen)) if there})
    own = vectors([descriptors[row] for row in rows])
    for start in range(0, len(others), _BLOCK):
        block = vectors(others[start : start + _BLOCK])
        for first in range(0, len(rows), _BLOCK):
            part = slice(first, first + _BLOCK)
            found[rows[part]] |= (own[part] @ block.T >= NEAR * LENGTH**2).any(axis=1)
    return found
