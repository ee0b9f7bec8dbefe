"""Side markers: found where they are, nothing else touched, the pixels around them never changed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carina.imaging.markers import Marker, clip, find_markers, inpaint
from carina.imaging.phantom import phantom


@pytest.fixture(scope="module")
def bench():
    """The script that stamps markers as lead letters look, with fonts of its own."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    spec = importlib.util.spec_from_file_location("markers_script", folder / "markers.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # The script imports its neighbor, as it does when it is run.
        patch.syspath_prepend(folder)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def chest(number: int, marker: bool = False, side: int = 512):
    return phantom(21, number, size=side, view="PA", marker=marker)


CORNERS = ((0.08, 0.09), (0.93, 0.1), (0.06, 0.5))


@pytest.mark.parametrize("kind", ["plain", "badge", "ring"])
@pytest.mark.parametrize("letter", ["L", "R"])
def test_a_stamped_letter_is_found_in_its_box_and_read(bench, kind, letter):
    picture = chest(ord(letter))
    found = 0
    for number, (x, y) in enumerate(CORNERS):
        stamp = bench.stamp(picture.image, letter, kind, (512 * x, 512 * y), 0.06, (kind, letter, number))
        overlap, marker = bench.best_of(find_markers(stamp.image, picture.lungs), stamp.box)
        if overlap >= 0.5:
            found += 1
            assert marker.label == letter and 0.5 <= marker.confidence <= 1
    assert found >= 2


def test_nothing_is_found_where_nothing_was_drawn():
    alarms = [find_markers(p.image, p.lungs) for p in (chest(number) for number in range(10))]
    assert sum(map(len, alarms)) <= 1


@pytest.mark.parametrize(
    "picture", [np.zeros((256, 256)), np.full((200, 300), 0.5), np.zeros((20, 20)), np.ones((128, 128))]
)
def test_an_empty_picture_bears_no_marker(picture):
    assert find_markers(picture.astype(np.float32)) == []


def test_neither_padding_nor_resolution_hides_a_marker(bench):
    picture = chest(3)
    image = bench.stamp(picture.image, "R", "plain", (50, 50), 0.06, 1).image
    plain = bench.box_of(find_markers(image)[0])
    padded = bench.box_of(find_markers(np.pad(image, ((0, 0), (100, 60))))[0])
    assert bench.overlap(plain, (padded[0] - 100, padded[1], padded[2] - 100, padded[3])) > 0.7
    for side in (256, 1024):
        method = cv2.INTER_AREA if side < 512 else cv2.INTER_LINEAR
        markers = find_markers(cv2.resize(image, (side, side), interpolation=method))
        assert [m.label for m in markers] == ["R"]
        assert bench.overlap(plain, tuple(v * 512 / side for v in bench.box_of(markers[0]))) > 0.7


def test_a_zero_frame_is_no_marker():
    picture = chest(4).image
    framed = np.zeros((512, 512), np.float32)
    framed[120:400, :] = cv2.resize(picture, (512, 280), interpolation=cv2.INTER_AREA)
    assert find_markers(framed) == []


def test_what_touches_the_lungs_is_not_reported(bench):
    picture = chest(5)
    stamp = bench.stamp(picture.image, "L", "plain", (460, 50), 0.06, 2)
    x0, _, _, y1 = bench.box_of(find_markers(stamp.image)[0])
    lungs = np.zeros((512, 512), bool)
    assert find_markers(stamp.image, lungs)
    lungs[y1 - 1, x0] = True
    assert find_markers(stamp.image, lungs) == []
    lungs[:] = False
    lungs[y1, x0] = True
    assert find_markers(stamp.image, lungs)


def test_inpainting_comes_closer_to_the_truth(bench):
    gains = []
    for number in range(4):
        picture = chest(30 + number)
        stamp = bench.stamp(picture.image, "R", "plain", (45, 60), 0.06, number)
        filled = inpaint(stamp.image, [Marker("R", *stamp.box, 1.0)], picture.lungs)
        gains.append(bench.psnr(filled, picture.image, stamp.box) - bench.psnr(stamp.image, picture.image, stamp.box))
    assert np.median(gains) >= 6


def test_a_plane_is_continued_exactly():
    rows, columns = np.mgrid[:64, :80].astype(np.float32)
    plane = 0.1 + 0.004 * rows + 0.005 * columns
    marked = plane.copy()
    marked[20:32, 30:45] = 1.0
    assert np.abs(inpaint(marked, [Marker("L", 30, 20, 45, 32, 1.0)]) - plane).max() < 1e-4


def test_padding_does_not_darken_what_is_filled_in():
    image = np.pad(np.full((60, 60), 0.6, np.float32), ((0, 0), (20, 20)))
    marked = image.copy()
    marked[5:15, 20:30] = 1.0
    assert np.abs(inpaint(marked, [Marker("L", 15, 5, 30, 15, 1.0)]) - image).max() < 1e-4


boxes = st.tuples(st.integers(-4, 60), st.integers(-4, 60), st.integers(1, 24), st.integers(1, 24))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.lists(boxes, max_size=3), st.booleans())
def test_only_pixels_in_boxes_and_outside_lungs_change(seed, places, with_lungs):
    rng = np.random.default_rng(seed)
    image = cv2.GaussianBlur(rng.random((48, 64), dtype=np.float32), (0, 0), 1 + 3 * rng.random())
    image[:, : rng.integers(0, 8)] = 0
    lungs = rng.random((48, 64)) < 0.3 if with_lungs else None
    markers = [Marker("text", x, y, x + w, y + h, 1.0) for x, y, w, h in places]
    before = image.copy()
    filled = inpaint(image, markers, lungs)
    allowed = np.zeros(image.shape, bool)
    for m in markers:
        allowed[max(m.y0, 0) : max(m.y1, 0), max(m.x0, 0) : max(m.x1, 0)] = True
    if lungs is not None:
        allowed &= ~lungs
    assert np.array_equal(image, before)
    assert np.array_equal(filled[~allowed], image[~allowed])
    assert filled.dtype == np.float32 and filled.shape == image.shape
    assert np.isfinite(filled).all() and filled.min() >= 0 and filled.max() <= 1


def test_the_clipped_picture_keeps_the_range_of_the_inpainted_one(bench):
    image = 0.7 * chest(6).image
    stamp = bench.stamp(image, "L", "badge", (460, 55), 0.07, 5)
    filled = inpaint(stamp.image, find_markers(stamp.image))
    clipped = clip(stamp.image, filled)
    assert stamp.image.max() > filled.max() == clipped.max() and clipped.min() == filled.min()
    inside = (stamp.image >= filled.min()) & (stamp.image <= filled.max())
    assert np.array_equal(clipped[inside], stamp.image[inside])


@pytest.mark.real
def test_stamps_on_real_radiographs(bench, real_data):
    sites = [bench.site(picture) for picture in bench.pictures(real_data, "report", 24, 512)]
    result = bench.stamped([s for s in sites if s and Path(s.picture.name).stem not in bench.NOT_FREE])
    assert result["recall"]["of"] >= 18
    assert result["recall"]["value"] >= 0.8, result
    assert result["decibels_found_box"]["50"] >= 6
    assert result["pixels_changed_outside"] == 0
    assert result["false_alarms_in_free_places"]["alarms"] <= 1
