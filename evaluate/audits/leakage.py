"""Leakage: patients, pictures and near copies that the audited rows share with what was seen in training; counts only."""

from __future__ import annotations

from typing import Any

import numpy as np

from carina.data.manifest import find_manifest, overlap
from carina.data.splits import linked_patients
from carina.data.store import Selection, select
from carina.draws import permutation
from carina.errors import CarinaError
from carina.evaluate.audits.common import Audited, entry, pooled, unchanged

QUANTILE = 0.999  # of the nearest other patient among training images: what look-alikes reach without being copies
MOST = 50_000  # training images that are compared by their features
CHUNK = 4096


def _unit(features: np.ndarray) -> np.ndarray:
    """Centered on the training images by the caller; rows of length 1, float32 and contiguous as faiss wants them."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return np.ascontiguousarray(features / np.maximum(length, 1e-12), dtype=np.float32)


def nearest_others(index: Any, queries: np.ndarray, people: np.ndarray, own: np.ndarray) -> np.ndarray:
    """(N,) cosine of the nearest indexed vector that belongs to another person; -1 where there is none.

    queries: (N, D) unit vectors of the persons `own` (N,). people: (M,) of the indexed ones.
    """
    best, missing, count = np.full(len(queries), -1.0), np.arange(len(queries)), 8
    while len(missing):
        count = min(count, len(people))
        cosine, place = index.search(queries[missing], count)
        other = people[place] != own[missing, None]
        has = other.any(axis=1)
        best[missing[has]] = cosine[has, other[has].argmax(axis=1)]
        missing = missing[~has] if count < len(people) else missing[:0]
        count *= 8
    return best


def near_copies(
    train: np.ndarray, train_people: np.ndarray, test: np.ndarray, test_people: np.ndarray
) -> dict[str, Any]:
    """How many test images lie nearer to a training image of another person than training images of different persons lie
    to one another (99.9 % of them), by the cosine of centered features (N, D) and (M, D).

    Returns the limit, how many are above, how many would be by chance, and whether that is more than chance would
    bring in 99 of 100 cases.
    """
    import faiss
    from scipy.stats import binom

    center = train.mean(axis=0, dtype=np.float64)
    known, asked = _unit(train - center), _unit(test - center)
    index = faiss.IndexFlatIP(known.shape[1])
    index.add(known)
    usual = nearest_others(index, known, train_people, train_people)
    limit = float(np.quantile(usual, QUANTILE))
    found = nearest_others(index, asked, train_people, test_people)
    above, expected = int((found > limit).sum()), (1 - QUANTILE) * len(test)
    return {
        "limit": limit,
        "above": above,
        "expected": expected,
        "more_than_chance": bool(above > binom.ppf(0.99, len(test), 1 - QUANTILE)),
        "highest": float(found.max(initial=-1.0)),
    }


def training_rows(audited: Audited) -> tuple[Selection, int] | str:
    """Rows of the store that were seen, with how many seen images the store does not hold; or why there are none."""
    manifest = find_manifest(audited.settings.run) if audited.settings.run else None
    if manifest is None:
        return "what was trained on is unknown"
    whole = select(audited.store)
    seen, tested = set(manifest["image_id"]) - {""}, set(audited.whole.table["image_id"])
    here = whole.table["image_id"]
    rows = whole.where((here.isin(seen) & ~here.isin(tested)).to_numpy())
    absent = len(seen - set(here))
    if not len(rows):
        return "none of the images that were trained on lie in this store"
    if len(rows) > MOST:
        rows = rows.where(np.sort(permutation(len(rows), "leakage", audited.settings.seed)[:MOST]))
    return rows, absent


def audit(audited: Audited) -> dict[str, Any]:
    """A row a stage of training: patients and pictures shared; and a row of near copies by features."""
    found = overlap(find_manifest(audited.settings.run) if audited.settings.run else None, audited.whole)
    rows = [{"what": "manifest", "stage": stage, **counts} for stage, counts in found["stages"].items()]
    near = _near(audited)
    return entry("leakage", sentence(found, near), [*rows, {"what": "features", **near}])


def _near(audited: Audited) -> dict[str, Any]:
    try:
        import faiss  # noqa: F401
    except ImportError:
        raise CarinaError(
            "the leakage audit finds near copies with faiss, which is not installed; pip install faiss-cpu (or faiss-gpu)"
        ) from None
    seen = training_rows(audited)
    if isinstance(seen, str):
        return {"missing": seen}
    train, absent = seen
    test = audited.selection
    member = audited.leading
    features = [
        pooled(member.backbone, part, member.scale, {"": unchanged}, quiet=audited.quiet)[""] for part in (train, test)
    ]
    linked = dict(zip(*(select(audited.store).table["image_id"], linked_patients(select(audited.store).table))))
    people = [np.array([linked[image] for image in part.table["image_id"]]) for part in (train, test)]
    facts = {"missing": "", "training_images": len(train), "not_in_this_store": absent, "test_images": len(test)}
    return {**facts, **near_copies(features[0], people[0], features[1], people[1])}


def sentence(found: dict[str, Any], near: dict[str, Any]) -> str:
    if not found["known"]:
        return "What the predictor was trained on is unknown, so leakage can be neither found nor excluded."
    worst = {name: max((s[name] for s in found["stages"].values()), default=0) for name in (
        "patients", "identical_images", "near_identical_images"
    )}  # fmt: skip
    if any(worst.values()):
        said = (
            f"Training and test share {worst['patients']} patients, {worst['identical_images']} identical and "
            f"{worst['near_identical_images']} nearly identical images, so these figures are too high"
        )
    else:
        said = f"Training and test share no patient and no picture ({found['patients']} test patients)"
    if near["missing"]:
        said += f"; features were not compared, because {near['missing']}"
    elif near["more_than_chance"]:
        said += (
            f"; {near['above']} of {near['test_images']} test images are more alike to a training image than other "
            f"patients' images are to one another, where chance brings {near['expected']:.1f}: look for copies"
        )
    else:
        said += (
            f"; {near['above']} of {near['test_images']} test images are unusually alike to a training image, which is "
            f"no more than chance brings ({near['expected']:.1f})"
        )
    return said + "".join(f"; but {doubt}" for doubt in found["doubts"]) + "."
