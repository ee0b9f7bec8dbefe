import types

import cv2
import numpy as np
import pandas as pd
import pytest

from carina.data.descriptors import LENGTH, NEAR, any_near, descriptor, vectors
from carina.data.manifest import MANIFEST, find_manifest, overlap, seen_rows, write_manifest
from carina.data.store import Selection
from carina.imaging.phantom import phantom


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [phantom(11, number, size=256).image for number in range(12)]


def selection(images: list[np.ndarray], patients: list[str], start: int = 0, key: str = "key") -> Selection:
    table = pd.DataFrame(
        {
            "patient_id": patients,
            "image_id": [f"{start + i:024x}" for i in range(len(images))],
            "content_hash": [f"{hash(image.tobytes()):x}" for image in images],
            "descriptor": [descriptor(image) for image in images],
        }
    )
    return Selection([types.SimpleNamespace(info={"key_check": key})], table)


def test_a_descriptor_is_the_mean_of_its_blocks_whatever_the_dtype():
    image = np.random.default_rng(0).random((64, 64)).astype(np.float32)
    means = image.reshape(16, 4, 16, 4).mean(axis=(1, 3))
    gray = np.frombuffer(descriptor(image), dtype=np.uint8).reshape(16, 16)
    assert abs(gray - 255 * means).max() <= 0.51
    for dtype in (np.uint8, np.uint16):
        stored = np.round(image * np.iinfo(dtype).max).astype(dtype)
        assert abs(np.frombuffer(descriptor(stored), dtype=np.uint8).reshape(16, 16) - 255 * means).max() <= 0.8


def test_products_are_exact_and_blind_to_brightness_and_contrast(pictures):
    found = vectors([descriptor(picture) for picture in pictures])
    assert (found == np.round(found)).all() and abs(np.linalg.norm(found, axis=1) - LENGTH).max() < 5
    exact = found.astype(np.int64) @ found.astype(np.int64).T
    assert (found @ found.T == exact).all() and (found[:, ::-1] @ found[:, ::-1].T == exact).all()
    assert exact.diagonal().min() > NEAR * LENGTH**2
    duller = vectors([descriptor(0.2 + 0.6 * picture) for picture in pictures])
    assert (np.sum(duller * found, axis=1) > 0.999 * LENGTH**2).all()
    assert not vectors([descriptor(np.full((32, 32), level, np.float32)) for level in (0, 0.5)]).any()


def test_overlap_counts_the_same_pixels_and_pictures_of_another_scale(pictures, tmp_path):
    seen = selection(pictures[:6], [f"p{i}" for i in range(6)])
    write_manifest(tmp_path, seen_rows(seen, "pretrain"), began_with="random")
    smaller = [cv2.resize(picture, (96, 96), interpolation=cv2.INTER_AREA) for picture in pictures[2:5]]
    test = selection([pictures[0], *smaller, *pictures[8:]], ["p0", "p2", *(f"q{i}" for i in range(6))], start=90)
    found = overlap(find_manifest(str(tmp_path)), test)
    assert found["known"] and found["doubts"] == [] and found["images"] == 8
    assert found["stages"] == {
        "pretrain": {"patients": 2, "images_of_those": 2, "identical_images": 1, "near_identical_images": 3}
    }
    assert not any_near([descriptor(p) for p in pictures[6:]], [descriptor(p) for p in pictures[:6]]).any()


def test_manifests_of_earlier_versions_are_read_and_doubted(pictures, tmp_path):
    """Such a manifest has no descriptors; a run that begins with its backbone keeps what it says."""
    seen = selection(pictures[:3], ["a", "b", "c"])
    (tmp_path / "old").mkdir()
    seen_rows(seen, "pretrain").drop(columns="descriptor").to_parquet(tmp_path / "old" / MANIFEST)
    old = overlap(find_manifest(str(tmp_path / "old")), seen)
    assert old["stages"]["pretrain"]["identical_images"] == 3 and "no descriptor" in old["doubts"][0]

    write_manifest(tmp_path / "new", seen_rows(seen, "finetune"), began_with=str(tmp_path / "old"))
    both = find_manifest(str(tmp_path / "new"))
    assert both.groupby("stage")["descriptor"].count().to_dict() == {"finetune": 3, "pretrain": 0}
    smaller = [cv2.resize(picture, (64, 64), interpolation=cv2.INTER_AREA) for picture in pictures[:3]]
    found = overlap(both, selection(smaller, ["x", "y", "z"]))
    assert found["stages"]["finetune"]["near_identical_images"] == 3
    assert found["stages"]["pretrain"]["near_identical_images"] == 0 and len(found["doubts"]) == 1

    write_manifest(tmp_path / "again", seen_rows(seen, "pretrain"), began_with=str(tmp_path / "old"))
    assert find_manifest(str(tmp_path / "again"))["descriptor"].notna().tolist() == [True] * 3
    assert overlap(None, seen)["known"] is False
