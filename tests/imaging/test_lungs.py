"""Lung masks against drawn lungs, against masks of real radiographs, and where there are no lungs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from carina.imaging.lungs import lung_mask
from carina.imaging.phantom import phantom


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def ellipses(height: int, width: int, centers=((0.3, 0.45), (0.7, 0.45)), radii=(0.15, 0.33)) -> np.ndarray:
    y, x = (np.mgrid[:height, :width] + 0.5) / np.array([height, width])[:, None, None]
    return np.logical_or(*[((x - cx) / radii[0]) ** 2 + ((y - cy) / radii[1]) ** 2 < 1 for cx, cy in centers])


def body(lungs: np.ndarray) -> np.ndarray:
    picture = np.where(lungs, 0.3, 0.7) + 0.05 * np.random.default_rng(0).standard_normal(lungs.shape)
    return np.clip(cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 2), 0, 1)


@pytest.mark.parametrize("shape", [(256, 256), (300, 220), (200, 333)])
def test_drawn_lungs_are_found_wherever_they_lie(shape):
    for shift in (-0.05, 0.0, 0.06):
        lungs = ellipses(*shape, centers=((0.3 + shift, 0.5 + shift), (0.7 + shift, 0.48 + shift)))
        found = lung_mask(body(lungs))
        assert found.mask.shape == shape and found.mask.dtype == bool
        assert found.plausible is True and found.source == "threshold"
        assert overlap(found.mask, lungs) > 0.75 and found.share == pytest.approx(found.mask.mean())


def test_lungs_that_touch_the_frame_are_kept():
    lungs = ellipses(256, 256, centers=((0.2, 0.48), (0.8, 0.48)), radii=(0.24, 0.42))
    assert lungs[:, 0].any() and lungs[:, -1].any()
    found = lung_mask(body(lungs))
    assert found.plausible and overlap(found.mask, lungs) > 0.6


def test_black_margins_change_nothing_but_the_place():
    picture = body(ellipses(240, 240))
    framed = np.pad(picture, ((0, 0), (40, 56)))
    assert overlap(lung_mask(framed).mask[:, 40:-56], lung_mask(picture).mask) > 0.9
    assert not lung_mask(framed).mask[:, :38].any()


def test_the_mask_does_not_depend_on_the_resolution():
    masks = [lung_mask(cv2.resize(body(ellipses(512, 512)), (side, side), interpolation=cv2.INTER_AREA)).mask
             for side in (128, 512)]  # fmt: skip
    large = cv2.resize(masks[0].astype(np.uint8), (512, 512), interpolation=cv2.INTER_NEAREST) > 0
    assert overlap(large, masks[1]) > 0.9


def test_without_lungs_the_prior_stands_and_says_so():
    noise = np.random.default_rng(0).random((256, 256), dtype=np.float32)
    one_sided = body(ellipses(256, 256, centers=((0.3, 0.45), (0.3, 0.45))))
    for picture in (noise, np.full((100, 80), 0.5, np.float32), np.zeros((64, 64), np.float32), 1 - one_sided):
        found = lung_mask(picture)
        assert found.plausible is False and found.source == "prior" and 0.1 < found.share < 0.65
        assert found.mask.shape == picture.shape


def test_most_of_the_true_lungs_of_synthetic_radiographs_is_found():
    """Whole frames, and frames that cut the apices off: the shape of a chest, not that of the frame, is what is sought."""
    covered = []
    for patient in range(16):
        drawn = phantom(9, patient, size=192, view=("PA", "AP")[patient % 2], findings=())
        top = int(np.flatnonzero(drawn.lungs.any(axis=1))[0])
        for start in (0, top + 20):
            found = lung_mask(np.ascontiguousarray(drawn.image[start:]))
            covered.append((found.mask & drawn.lungs[start:]).sum() / drawn.lungs[start:].sum())
            assert found.plausible and found.mask.sum() < 2 * drawn.lungs[start:].sum()
    assert np.mean(covered) > 0.72, np.mean(covered)


def test_lungs_reach_behind_the_heart():
    lungs = ellipses(256, 256)
    heart = np.zeros_like(lungs)
    heart[120:190, 140:200] = True
    found = lung_mask(body(lungs & ~heart))
    assert found.plausible and found.mask[130:160, 150:190].mean() > 0.9
    assert not found.mask[:, 126:130].any(), "the spine is no lung"


def test_a_segmenter_replaces_the_threshold_but_not_the_check():
    lungs = ellipses(256, 256)
    picture, seen = np.pad(body(lungs), ((0, 0), (30, 30))), []

    def drawn(image: np.ndarray) -> np.ndarray:
        seen.append(image.shape)
        left = (image.shape[1] - 256) // 2
        return np.pad(lungs, ((0, 0), (left, image.shape[1] - 256 - left))) * 0.9

    found = lung_mask(picture, segmenter=drawn)
    assert found.plausible and found.source == "segmenter" and overlap(found.mask[:, 30:-30], lungs) > 0.99
    assert seen[0][0] == 256 and 256 <= seen[0][1] < 316, "flat margins are no business of a segmenter"
    for wrong in (np.zeros_like, np.ones_like, lambda image: 0.9 * (np.indices(image.shape)[1] < image.shape[1] / 2)):
        refused = lung_mask(picture, segmenter=wrong)
        assert not refused.plausible and refused.source == "prior" and refused.mask.shape == picture.shape
        assert refused.mask[:, : picture.shape[1] // 2].any() and refused.mask[:, picture.shape[1] // 2 :].any()
    with pytest.raises(AssertionError, match="segmenter gave"):
        lung_mask(picture, segmenter=lambda image: image[:10])


@pytest.mark.real
def test_real_masks_are_met_better_than_by_two_ellipses(real_data):
    folder = real_data / "kermany"
    table = pd.read_csv(folder / "labels.csv", dtype=str)
    table = table[table.lung_mask.notna()].iloc[::10]
    ours, fixed = [], []
    for path, mask_path in zip(table.path, table.lung_mask):
        image = cv2.imread(str(folder / path), cv2.IMREAD_GRAYSCALE).astype(np.float32) / 255
        truth = cv2.imread(str(folder / mask_path), cv2.IMREAD_GRAYSCALE) > 0
        ours.append(overlap(lung_mask(image).mask, truth))
        fixed.append(overlap(ellipses(*truth.shape), truth))
    assert len(ours) >= 80
    assert np.mean(ours) >= 0.715, np.mean(ours)
    assert np.mean(ours) > np.mean(fixed) + 0.05


def test_the_benchmark_measures_what_it_says(tmp_path, monkeypatch):
    """Drawn lungs as truth: overlaps, the mean mask of others, broken masks and the sheet."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    spec = importlib.util.spec_from_file_location("lungs_script", folder / "lungs.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(folder)  # the script imports its neighbor, as it does when it is run
    monkeypatch.setitem(sys.modules, spec.name, script)  # dataclasses look their module up
    spec.loader.exec_module(script)
    rows = []
    for i in range(4):
        lungs = ellipses(128, 128 + 32 * (i // 2))
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.round(body(lungs) * 255).astype(np.uint8))
        cv2.imwrite(str(tmp_path / f"{i}_mask.png"), lungs.astype(np.uint8) * 255)
        rows.append({"path": f"{i}.png", "patient_id": f"{i // 2}", "lung_mask": f"{i}_mask.png"})
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    words = [f"tables=[{tmp_path / 't.csv'}]", f"out={tmp_path / 'r.json'}", "resamples=100", "side=64"]
    assert script.main([*words, f"sheet={tmp_path / 's.png'}", "every=1", "columns=2"]) == 0
    assert cv2.imread(str(tmp_path / "s.png")).shape == (128, 128, 3)
    (figures,) = json.loads((tmp_path / "r.json").read_text())["sets"].values()
    assert (figures["images"], figures["patients"], figures["implausible"]) == (4, 2, 0)
    ious = {name: row["iou"]["value"] for name, row in figures["methods"].items() if "iou" in row}
    assert ious["two fixed ellipses"] > 0.9 and ious["mean drawn mask"] > 0.9 and ious["carina"] > 0.75
    # Of other patients only: a patient whose mask is unlike all others is met by none of them.
    cv2.imwrite(str(tmp_path / "0_mask.png"), 255 * np.eye(128, dtype=np.uint8))
    cv2.imwrite(str(tmp_path / "1_mask.png"), 255 * np.eye(128, dtype=np.uint8))
    assert script.main(words) == 0
    (figures,) = json.loads((tmp_path / "r.json").read_text())["sets"].values()
    assert figures["methods"]["mean drawn mask"]["iou"]["value"] < 0.05
    cv2.imwrite(str(tmp_path / "3_mask.png"), np.zeros((9, 9), np.uint8))
    assert script.main(words) == 2
