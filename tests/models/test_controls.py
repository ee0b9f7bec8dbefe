"""Control rows: features see what they say, one pass gives the same as one image, and only normals are fitted."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from carina.errors import CarinaError
from carina.models.controls import (
    BACKGROUND_ONLY,
    LUNGS_ONLY,
    Control,
    Method,
    Rows,
    control_rows,
    controls,
    describe,
    hog,
    resized,
    statistics,
)

SIZES = np.array([[128, 128]])


def slow_hog(image):
    """One pixel, one cell, one block at a time."""
    histogram = np.zeros((8, 8, 9))
    for y in range(128):
        for x in range(128):
            down = image[y + 1, x] - image[y - 1, x] if 0 < y < 127 else 0.0
            right = image[y, x + 1] - image[y, x - 1] if 0 < x < 127 else 0.0
            degrees = np.degrees(np.arctan2(down, right)) % 180
            low = int(np.floor(degrees / 20 - 0.5))
            share = degrees / 20 - 0.5 - low
            histogram[y // 16, x // 16, low % 9] += (1 - share) * np.hypot(down, right)
            histogram[y // 16, x // 16, (low + 1) % 9] += share * np.hypot(down, right)
    blocks = np.empty((7, 7, 9, 2, 2))
    for y in range(7):
        for x in range(7):
            block = np.moveaxis(histogram[y : y + 2, x : x + 2], 2, 0)
            block = np.minimum(block / np.sqrt((block**2).sum() + 1e-10), 0.2)
            blocks[y, x] = block / np.sqrt((block**2).sum() + 1e-10)
    return blocks.ravel()


def test_hog_is_the_definition():
    image = cv2.GaussianBlur(np.random.default_rng(1).random((128, 128)), (0, 0), 2)
    image[40:60, 30:90] = 0.5  # flat cells as in masked images
    got = hog(np.stack([image, np.zeros_like(image)]))
    np.testing.assert_allclose(got[0], slow_hog(image), atol=2e-4)
    assert got.shape == (2, 1764)
    assert not got[1].any()


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_features_see_only_what_they_name(seed):
    random = np.random.default_rng(seed)
    lungs = np.zeros((128, 128), dtype=bool)
    lungs[30:100, 20:55] = lungs[30:100, 70:110] = True
    image = random.integers(0, 256, (128, 128)).astype(np.uint8)
    fresh = random.integers(0, 256, (128, 128)).astype(np.uint8)
    middle = np.zeros_like(lungs)
    middle[13:-13, 13:-13] = True
    rows = {control.name: control for control in controls(128, 0) if "ResNet" not in control.name}

    def same(name, changed):
        pictures = image, np.where(changed, fresh, image)
        one, two = (rows[name].describe(Rows(p[None], lungs[None], SIZES)) for p in pictures)
        return np.array_equal(one, two)

    assert same(BACKGROUND_ONLY, lungs) and not same(BACKGROUND_ONLY, ~lungs)
    assert same(LUNGS_ONLY, ~lungs) and not same(LUNGS_ONLY, lungs)
    assert same("HOG, mask silhouette", lungs | ~lungs) and same("file size", lungs | ~lungs)
    assert same("HOG, outer ring", middle) and not same("HOG, outer ring", ~middle)
    assert same("pixels, outer ring", middle) and not same("pixels, outer ring", ~middle)
    assert not same("raw pixels", middle) and not same("nine intensity statistics", middle)


def test_statistics():
    image = np.repeat(np.arange(0, 256, 51, dtype=np.uint8), 6).reshape(1, 6, 6)  # 0, 0.2, ..., 1
    got = statistics(Rows(image, None, SIZES))[0]
    np.testing.assert_allclose(got[[0, 2, 3, 6]], [0.5, 0, 1, 0.5], atol=1e-6)
    assert got[1] == pytest.approx(np.sqrt(np.mean((np.arange(6) / 5 - 0.5) ** 2)))


def test_random_network_with_blocks_opened_uses_its_blocks():
    image = np.random.default_rng(0).integers(0, 256, (2, 64, 64)).astype(np.uint8)
    names = ["random ResNet-18", "random ResNet-18, blocks opened"]
    found = describe([Rows(image, None, SIZES.repeat(2, axis=0))], controls(64, 0, names))
    closed, opened = (found[name] for name in names)
    assert closed.shape == opened.shape == (2, 512)
    assert not np.allclose(closed, opened)


@pytest.mark.parametrize("side", [64, 128, 200])
def test_chunks_and_depth_change_nothing(side):
    """Nineteen images at once, in chunks of three, and with sixteen bits: the same features, at every scale."""
    random = np.random.default_rng(side)
    images = np.stack([cv2.GaussianBlur(random.random((side, side)), (0, 0), 3) for _ in range(19)])
    images = ((images - images.min()) / np.ptp(images) * 255).round().astype(np.uint8)
    lungs, sizes = resized(images, side) > 0.5, random.integers(100, 200, (19, 2))
    rows = controls(side, 0, [control.name for control in controls(side, 0) if "ResNet" not in control.name])
    whole = describe([Rows(images, lungs, sizes)], rows)
    starts = range(0, 19, 3)
    parts = describe((Rows(images[i : i + 3], lungs[i : i + 3], sizes[i : i + 3]) for i in starts), rows)
    deep = describe([Rows(images.astype(np.uint16) * 257, lungs, sizes)], rows)
    assert len(whole) == 9
    for name, values in whole.items():
        assert values.dtype == np.float32 and len(values) == 19
        np.testing.assert_array_equal(values, parts[name])
        np.testing.assert_allclose(values, deep[name], atol=2e-3)
        assert np.ptp(values, axis=0).any(), name


def test_scores_are_those_of_scikit_learn():
    """Ledoit-Wolf as it is and on standardized features whose units differ; neighbors at unit length."""
    random = np.random.default_rng(0)
    units = np.array([1000.0, 1.0, 1e-2])
    normals, scored = random.normal(size=(60, 3)) * units + 5, random.normal(size=(20, 3)) * units * 2 + 5
    control = Control(
        "a", lambda r: r.images, (Method("gaussian"), Method("gaussian", "standard"), Method("knn", "unit"))
    )
    got = control_rows([control], {"a": normals.astype(np.float32)}, {"a": scored.astype(np.float32)})
    assert [row.method for row in got] == ["gaussian", "gaussian, standardized", "knn, unit length"]
    center, spread = normals.mean(axis=0), normals.std(axis=0)
    plain = np.sqrt(LedoitWolf().fit(normals).mahalanobis(scored))
    equal = np.sqrt(LedoitWolf().fit((normals - center) / spread).mahalanobis((scored - center) / spread))
    lengths = [np.linalg.norm(values, axis=1, keepdims=True) for values in (normals, scored)]
    near, _ = NearestNeighbors(n_neighbors=5).fit(normals / lengths[0]).kneighbors(scored / lengths[1])
    np.testing.assert_allclose(got[0].scores, plain, rtol=5e-3)
    np.testing.assert_allclose(got[1].scores, equal, rtol=1e-3)
    np.testing.assert_allclose(got[2].scores, near.mean(axis=1), rtol=2e-2, atol=1e-6)


def test_what_cannot_be_seen_is_said():
    """No lung masks, files of one size, and a row that does not exist."""
    images = np.random.default_rng(0).integers(0, 256, (12, 128, 128)).astype(np.uint8)
    rows = controls(128, 0, [LUNGS_ONLY, "HOG", "file size"])
    assert [row.name for row in rows] == ["HOG", LUNGS_ONLY, "file size"]  # the table's order
    features = describe([Rows(images, None, SIZES.repeat(12, axis=0))], rows)
    found = {row.control: row for row in control_rows(rows, features, features)}
    assert found["HOG"].scores.shape == (12,) and np.isfinite(found["HOG"].scores).all()
    assert found[LUNGS_ONLY].missing == "the store holds no lung masks" and found[LUNGS_ONLY].scores is None
    assert found["file size"].missing == "the same for every image"
    with pytest.raises(CarinaError, match=r"no control row 'HOGG' .*did you mean 'HOG'.*file size"):
        controls(128, 0, ["HOGG"])
