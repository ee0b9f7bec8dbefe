"""Mixed images: labels follow the pixels, what is unknown stays unknown, and a blank frame says nothing."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from carina.data.store import Selection
from carina.draws import Draws, sample_codes
from carina.errors import CarinaError
from carina.finetune.mixing import CutRemain, cutmix, draw_box, mix, mixup, remain, size_notes
from carina.finetune.recipe import MixingSettings


def settings(name: str, **changes) -> MixingSettings:
    return MixingSettings(**{"name": name, "alpha": 1.0, "share": 1.0, "blank_negatives": True, **changes})


def test_the_label_s_share_is_the_area_s():
    """10,000 boxes at 224 x 320: ones are pasted into zeros, so an image's mean is the area that was pasted."""
    rng = np.random.default_rng(0)
    images, partners = torch.stack([torch.zeros(1, 224, 320), torch.ones(1, 224, 320)]), torch.tensor([1, 0])
    targets = torch.tensor([[0.0], [1.0]])
    errors, areas = [], []
    for _ in range(10_000):
        share = rng.beta(1, 1)
        x0, y0, x1, y1 = draw_box(224, 320, share, rng)
        assert 0 <= x0 <= x1 <= 320 and 0 <= y0 <= y1 <= 224
        areas.append((x1 - x0) * (y1 - y0) / (224 * 320))
        if len(errors) < 200:  # pixels are counted for some; the others follow from the box
            mixed, labels = cutmix(images, targets, partners, (x0, y0, x1, y1))
            errors.append(abs(mixed[0].double().mean().item() - labels[0, 0].item()))
            assert mixed[1].double().mean().item() == pytest.approx(labels[1, 0].item(), abs=1e-6)
    assert max(errors) < 1e-6
    # boxes around uniform centers lose a part over the edges: by quadrature over the share and both centers
    grid = np.linspace(0.0005, 0.9995, 1000)
    kept = [np.minimum(grid + side / 2, 1) - np.maximum(grid - side / 2, 0) for side in np.sqrt(grid)]
    assert np.mean(areas) == pytest.approx(np.mean([part.mean() ** 2 for part in kept]), abs=0.01)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32))
def test_mixing_keeps_range_and_the_unknown(height, width, share, seed):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.random((4, 1, height, width), dtype=np.float32))
    targets = torch.from_numpy(rng.choice(np.array([0, 1, np.nan], dtype=np.float32), (4, 3)))
    partners = torch.from_numpy(rng.permutation(4))
    box = draw_box(height, width, share, rng)
    for mixed, labels in (mixup(images, targets, partners, share), cutmix(images, targets, partners, box)):
        assert mixed.min() >= 0 and mixed.max() <= 1 + 1e-6 and mixed.shape == images.shape
        assert torch.equal(labels.isnan(), targets.isnan() | targets[partners].isnan())
        known = labels[~labels.isnan()]
        assert ((known >= 0) & (known <= 1)).all()


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_batch_s_mixing_follows_from_its_key(name):
    images, targets = torch.rand(6, 1, 16, 24), torch.eye(6)
    first, again = (mix(images, targets, settings(name), (0, 5, 0)) for _ in range(2))
    other = mix(images, targets, settings(name), (0, 6, 0))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and not torch.equal(first[0], other[0])
    torch.testing.assert_close(first[1].sum(dim=1), torch.ones(6))
    changed = [mix(images, targets, settings(name, share=0.3), (0, key, 0))[0] is not images for key in range(400)]
    assert 0.22 < np.mean(changed) < 0.38


# -- Cut&Remain -----------------------------------------------------------------------------------------------------------

COUNT = 300
LABELS = ["Nodule", "Effusion", "abnormal"]


def selection() -> tuple[Selection, np.ndarray]:
    """A third has a boxed nodule (every second of them an effusion without a box), a third an effusion without a box, a
    third nothing."""
    kind = np.arange(COUNT) % 3
    targets = np.zeros((COUNT, 3), dtype=np.float32)
    targets[:, 0], targets[:, 2] = kind == 0, kind < 2
    targets[:, 1] = (kind == 1) | ((kind == 0) & (np.arange(COUNT) % 2 == 0))
    boxes = [
        [{"label": "Nodule", "x0": 0.1 + 0.001 * row, "y0": 0.25, "x1": 0.5, "y1": 0.5}] if kind[row] == 0 else None
        for row in range(COUNT)
    ]
    table = pd.DataFrame({"image_id": [f"{row + 1:016x}" * 2 for row in range(COUNT)], "boxes": boxes})
    return Selection([], table), targets


def cut(**changes) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """(images, targets, targets as they were) of one pass over all rows."""
    rows, targets = selection()
    work = CutRemain(rows, targets, LABELS, settings("cut_remain", **changes))
    draws = Draws(0, 0, sample_codes(rows.table["image_id"].tolist()))
    return *work(torch.ones(COUNT, 1, 20, 20), torch.from_numpy(targets), draws), targets


def test_the_box_stays_and_so_do_the_labels_it_shows():
    images, after, before = cut()
    for row in range(0, COUNT, 3):
        x0 = round((0.1 + 0.001 * row) * 20)
        expected = torch.zeros(20, 20)
        expected[5:10, x0:10] = 1
        assert torch.equal(images[row, 0], expected)
        assert after[row, 0] == 1 and after[row, 2] == 1
        assert bool(after[row, 1].isnan()) == (before[row, 1] == 1), "an effusion that nothing shows is unknown"
    assert (images[1::3] == 1).all(), "a finding without a box stays whole"
    np.testing.assert_array_equal(after[1::3], before[1::3])
    np.testing.assert_array_equal(after[2::3], before[2::3])


def test_normal_images_are_blanked_as_often_and_by_the_same_boxes():
    rates = []
    for share in (0.4, 1.0):
        images, _, before = cut(share=share)
        blanked = (images == 0).any(dim=3).any(dim=2)[:, 0].numpy()
        abnormal = before[:, 2] == 1
        rates.append((blanked[abnormal].mean(), blanked[~abnormal].mean()))
        assert rates[-1][0] == pytest.approx(rates[-1][1], abs=0.1)
    assert rates[1][1] == pytest.approx(0.5, abs=0.1), "half of the images with findings have boxes"
    masks = {row.numpy().tobytes() for row in images[0::3]}
    assert all(row.numpy().tobytes() in masks for row in images[2::3] if (row == 0).any())
    images, _, _ = cut(blank_negatives=False)
    assert (images[2::3] == 1).all()


def test_a_box_keeps_its_place_in_the_lungs():
    """The lungs of the normal image are half as large and lie elsewhere: by hand."""

    class Two(Selection):
        def masks(self, rows, scale, name="lungs"):
            both = np.zeros((2, 40, 40), dtype=bool)
            both[0, 4:36, 8:32] = both[1, 20:36, 12:24] = True
            return both[rows]

    box = {"label": "Nodule", "x0": 14 / 40, "y0": 12 / 40, "x1": 20 / 40, "y1": 20 / 40}
    table = pd.DataFrame({"image_id": ["0a" * 16, "0b" * 16], "boxes": [[box], None], "lungs_source": "mask"})
    targets = np.array([[1.0], [0.0]], dtype=np.float32)
    rows = Two([SimpleNamespace(scales=[40])], table)
    work = CutRemain(rows, targets, ["Nodule"], settings("cut_remain"))
    codes = sample_codes(table["image_id"].tolist())
    images, _ = work(torch.ones(2, 1, 40, 40), torch.from_numpy(targets), Draws(0, 0, codes))
    own, other = torch.zeros(40, 40), torch.zeros(40, 40)
    own[12:20, 14:20] = 1  # a quarter of the lungs' frame from their left, a quarter from their top
    other[24:28, 15:18] = 1
    assert torch.equal(images[0, 0], own) and torch.equal(images[1, 0], other)


def test_what_is_cut_depends_on_the_sample_alone():
    rows, targets = selection()
    work = CutRemain(rows, targets, LABELS, settings("cut_remain", share=0.5))
    codes = sample_codes(rows.table["image_id"].tolist())
    order = np.random.default_rng(0).permutation(COUNT)[:50]
    images, wanted = torch.ones(COUNT, 1, 20, 20), torch.from_numpy(targets)
    every = work(images, wanted, Draws(0, 3, codes))[0]
    some = work(images[order], wanted[order], Draws(0, 3, codes[order]))[0]
    assert torch.equal(every[order], some)


def test_boxes_of_other_findings_do_not_count():
    rows, targets = selection()
    with pytest.raises(CarinaError, match="no training row has a box"):
        CutRemain(rows, targets[:, 1:2], ["Effusion"], settings("cut_remain"))


def test_a_box_beyond_the_frame_keeps_what_is_inside():
    kept = remain(
        torch.ones(3, 1, 10, 10), [np.array([[-0.2, 0.57, 0.31, 1.4]]), None, np.array([[0.5, 0.5, 0.51, 0.51]])]
    )
    assert kept[0].sum() == 3 * 4 and kept[0, 0, 6:, :3].sum() == 12 and kept[1].sum() == 100
    assert kept[2].sum() == 1, "a box smaller than a pixel is one"


def test_sizes_are_warned_of():
    assert "Cardiomegaly" in size_notes(["Mass", "Cardiomegaly"], settings("cutmix"))[0]
    assert not size_notes(["Mass"], settings("mixup")) and not size_notes(["Cardiomegaly"], settings("cut_remain"))
