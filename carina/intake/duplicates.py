"""Copies of one radiograph: exact ones by their pixels' hash, near ones by small descriptors, then by a closer look.

A near copy was encoded again, brought to another size and back, made a little brighter or darker, or lost a row or two
at its border. Two exposures of one patient are no copies, however alike. Mirrored, inverted and heavily processed
copies are not looked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from carina.data.descriptors import LENGTH, NEAR, SIDE, descriptor, known, vectors
from carina.data.store import read_images

__all__ = ["descriptor", "find_duplicates", "likeness", "stored_pictures"]

CANDIDATE = 0.96  # cosine of descriptors from which a pair is looked at closely: just above the most alike strangers
SAME = 0.95  # likeness from which two pictures are one; chosen as NEAR was
NEIGHBORS = 8  # pairs looked at per image; larger groups hang together through their nearest members
# Up to here every pair is compared (under a minute of one core); beyond it the cells of an inverted file that lie
# nearest to the image.
EXACT_UP_TO = 150_000
PROBES = 32
_BLOCK = 4096
_CLOSE = 64  # side of the pictures that the closer look compares
_BORDER = 4
_PAIRS = 256

Reader = Callable[[np.ndarray], np.ndarray]


def find_duplicates(
    table: pd.DataFrame,
    read: Reader | None = None,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """(N,) texts: the group that each image belongs to, "" for an image without copies.

    table: image_id, content_hash and descriptor (bytes, None where unknown). read: positions (n,) in `table` -> their
    pictures (n, S, S), any S from 64 up, unsigned or float; without it the descriptors alone decide, with a higher
    bar. progress: called with counts of images that add up to N.

    A group's name is its least image_id. The result does not depend on the order of rows, nor on threads. Flat
    pictures are like nothing: a failed exposure does not make two patients one.
    """
    ids = table["image_id"].astype(str).to_numpy()
    order = np.argsort(ids)
    descriptors = table["descriptor"].tolist()
    there = known(descriptors)
    textured = np.ones(len(table), dtype=bool)
    for start in range(0, len(table), _BLOCK):
        rows = np.flatnonzero(there[start : start + _BLOCK]) + start
        textured[rows] = vectors([descriptors[row] for row in rows]).any(axis=1)

    firsts: dict[str, int] = {}
    pairs = []
    contents = table["content_hash"].to_numpy()
    for row in order[textured[order]]:
        first = firsts.setdefault(contents[row], row)
        if first != row:
            pairs.append((first, row))
    rows = np.array([row for row in firsts.values() if there[row]], dtype=np.int64)
    if progress is not None:
        progress(len(table) - len(rows))
    bar = NEAR if read is None else CANDIDATE
    near = np.array(sorted(set(_near_pairs([descriptors[row] for row in rows], bar, progress))), dtype=np.int64)
    near = near.reshape(-1, 2)
    near = rows[near]
    pairs += [tuple(pair) for pair in (near if read is None else near[_confirmed(near, read)])]

    links = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(len(table), len(table)))
    _, component = connected_components(graph, directed=False)
    sizes = np.bincount(component, minlength=1)
    names: dict[int, str] = {}
    groups = np.full(len(table), "", dtype=object)
    for row in order[sizes[component[order]] > 1]:
        groups[row] = names.setdefault(component[row], ids[row])
    return groups


def stored_pictures(folder: Path, table: pd.DataFrame, scales: Sequence[int]) -> Reader | None:
    """The reader of a store's own pictures for `find_duplicates`; None when every scale is too small for a look."""
    enough = [scale for scale in scales if scale >= _CLOSE]
    return partial(read_images, folder, table, scale=min(enough)) if enough else None


def _near_pairs(
    descriptors: Sequence[bytes], bar: float, progress: Callable[[int], object] | None
) -> Iterator[tuple[int, int]]:
    """Pairs whose cosine is at least `bar`: each picture with its nearest among the earlier ones and its own block."""
    index = _index(descriptors)
    for start in range(0, len(descriptors), _BLOCK):
        block = vectors(descriptors[start : start + _BLOCK])
        index.add(block)
        products, found = index.search(block, NEIGHBORS + 1)  # the nearest of all is the picture itself
        for place, column in zip(*np.nonzero(products >= bar * LENGTH**2)):
            one, other = int(found[place, column]), start + int(place)
            if one != other:
                yield min(one, other), max(one, other)
        if progress is not None:
            progress(len(block))


def _index(descriptors: Sequence[bytes]):
    """An index of inner products: exact for few pictures, else an inverted file over cells around chosen pictures."""
    size = SIDE * SIDE
    try:
        import faiss
    except ImportError:
        return _Plain()
    if len(descriptors) <= EXACT_UP_TO:
        return faiss.IndexFlatIP(size)
    cells = int(4 * np.sqrt(len(descriptors)))
    # Cells around pictures that their bytes pick: the same at any number of threads, unlike trained ones.
    chosen = sorted(set(descriptors), key=lambda value: hashlib.blake2b(value, digest_size=8).digest())[:cells]
    centers = faiss.IndexFlatIP(size)
    centers.add(vectors(chosen))
    index = faiss.IndexIVFScalarQuantizer(
        centers, size, len(chosen), faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.is_trained = True  # the cells are given and float16 needs no training
    index.nprobe = PROBES
    return index


class _Plain:
    """The exact index without faiss: the same pairs, because every product is exact, only slower."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []

    def add(self, block: np.ndarray) -> None:
        self.blocks.append(block)

    def search(self, block: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        products = np.full((len(block), count), -np.inf, dtype=np.float32)
        found = np.full((len(block), count), -1, dtype=np.int64)
        start = 0
        for earlier in self.blocks:
            new = block @ earlier.T
            numbers = np.broadcast_to(np.arange(start, start + len(earlier)), new.shape)
            products, found = np.hstack([products, new]), np.hstack([found, numbers])
            best = np.argsort(-products, axis=1, kind="stable")[:, :count]
            products, found = np.take_along_axis(products, best, 1), np.take_along_axis(found, best, 1)
            start += len(earlier)
        return products, found


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """-1 to 1: the correlation of the fine structure of two pictures (64, 64) float32, laid on each other.

    They are aligned by the enhanced correlation coefficient (Evangelidis and Psarakis, IEEE TPAMI 30, 2008), by no
    more than a lost border can have moved them; then what is left after a Gaussian of 3 pixels is compared.
    """
    identity = np.eye(2, 3, dtype=np.float32)
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 1e-5)
    try:
        _, warp = cv2.findTransformECC(one, other, identity.copy(), cv2.MOTION_AFFINE, criteria, None, 1)
    except cv2.error:  # it does not converge on pictures that have little in common
        warp = identity
    moved = np.abs(warp - identity)
    if moved[:, :2].max() <= 0.05 and moved[:, 2].max() <= _BORDER:
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        other = cv2.warpAffine(other, warp, one.shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
    inner = slice(_BORDER, -_BORDER)
    fine = [(x - cv2.GaussianBlur(x, (0, 0), 3))[inner, inner].ravel().astype(np.float64) for x in (one, other)]
    a, b = (x - x.mean() for x in fine)
    length = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / length) if length > 0 else 0.0


def _confirmed(pairs: np.ndarray, read: Reader) -> np.ndarray:
    """(P,) bool: the pairs of positions whose pictures are one."""
    same = np.zeros(len(pairs), dtype=bool)
    for start in range(0, len(pairs), _PAIRS):
        part = pairs[start : start + _PAIRS]
        rows, places = np.unique(part, return_inverse=True)
        pictures = [
            cv2.resize(picture.astype(np.float32), (_CLOSE, _CLOSE), interpolation=cv2.INTER_AREA)
            for picture in read(rows)
        ]
        for number, (a, b) in enumerate(places.reshape(-1, 2)):
            same[start + number] = likeness(pictures[a], pictures[b]) >= SAME
    return same
