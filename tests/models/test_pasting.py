"""The pasting task: its views, its heads on any backbone, its losses against numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from carina.draws import Draws
from carina.errors import CarinaError
from carina.models.backbones import random_backbone, seeded
from carina.models.pasting import (
    DenseHead,
    PastingHead,
    PastingSettings,
    PastingTask,
    contrastive_loss,
    map_loss,
    pasted_views,
)

METHODS = ("anatpaste", "cutpaste", "cutpaste_scar", "cutpaste_union", "cutpaste_3way", "fpi", "nsa")


def batch(count=6, side=64):
    images = torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(1))
    lungs = torch.zeros_like(images, dtype=torch.bool)
    lungs[..., side // 4 : -side // 4, side // 6 : -side // 6] = True
    return images, lungs, Draws(0, 0, np.arange(count, dtype=np.uint64) * 7919)


def task(architecture="test_resnet", size=64, **given):
    settings = {"method": "anatpaste", "target": "class", "contrast": 0.0, "layers": 1, "hidden": 16, **given}
    backbone = random_backbone(architecture, size, 0)
    return backbone, PastingTask(backbone, PastingSettings(**settings), seed=0)


@pytest.mark.parametrize("method", METHODS)
def test_views_begin_with_the_jittered_image_and_maps_with_nothing(method):
    images, lungs, draws = batch()
    views, maps = pasted_views(images, lungs, draws, method)
    assert len(views) == len(maps) == (3 if method == "cutpaste_3way" else 2)
    assert not maps[0].any() and all(view.shape == change.shape == images.shape for view, change in zip(views, maps))
    for view, change in zip(views[1:], maps[1:]):
        assert torch.equal(view[change == 0], views[0][change == 0])
        assert (change.amax(dim=(1, 2, 3)) > 0).all() and (view != views[0]).flatten(1).any(dim=1).all()


def test_the_union_pastes_a_rectangle_or_a_scar_into_each_image():
    images, lungs, draws = batch(40)
    (whole, normal, scar), maps = pasted_views(images, None, draws, "cutpaste_3way")
    (again, union), (_, change) = pasted_views(images, lungs, draws, "cutpaste_union")
    is_normal, is_scar = ((union == pasted).flatten(1).all(dim=1) for pasted in (normal, scar))
    assert torch.equal(whole, again) and (is_normal ^ is_scar).all() and 8 < is_normal.sum() < 32
    assert torch.equal(change, torch.where(is_normal[:, None, None, None], *maps[1:]))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_foreign_patches_come_from_the_neighbor(count):
    images = torch.stack([torch.full((1, 32, 32), 0.1 + 0.1 * place) for place in range(count)])
    draws = Draws(0, 0, np.arange(count, dtype=np.uint64))
    (whole, pasted), (_, share) = pasted_views(images, None, draws, "fpi")
    level, mixed, a = whole.amax(dim=(1, 2, 3)), pasted, share.amax(dim=(1, 2, 3))
    partner = {1: [0], 2: [1, 0], 5: [1, 0, 3, 2, 3]}[count]
    expected = (1 - a) * level + a * level[partner]
    inside = (mixed * (share > 0)).sum(dim=(1, 2, 3)) / (share > 0).sum(dim=(1, 2, 3))
    torch.testing.assert_close(inside, expected, atol=1e-5, rtol=0)


def test_the_head_for_two_classes_is_what_it_was():
    head = PastingHead(6, layers=1, hidden=5, seed=3)
    with seeded(3, "pasting head"):
        parts = [nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 128, bias=False), nn.BatchNorm1d(128)]
        parts.append(nn.Linear(128, 2))
    expected = {f"layers.{at}.{k}": v for at, part in zip((0, 1, 3, 4, 6), parts) for k, v in part.state_dict().items()}
    assert head.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in head.state_dict().items())


@pytest.mark.parametrize("target", ["class", "map"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_target_gives_gradients_to_backbone_and_head(method, target):
    backbone, pasting = task(method=method, target=target, contrast=0.5)
    images, lungs, draws = batch()
    out = pasting(backbone, images, lungs if pasting.needs_masks else None, draws, 64)
    assert set(out) == {"loss", "contrast", "accuracy" if target == "class" else "map_error"}
    assert out["loss"].isfinite() and out["loss"] > 0.5 * out["contrast"] > 0
    out["loss"].backward()
    for part in (backbone, pasting.head, pasting.projector):
        moved = [p.grad.abs().max() > 0 for p in part.parameters() if p.grad is not None]
        assert moved and all(p.grad.isfinite().all() for p in part.parameters() if p.grad is not None)
    again = pasting(backbone, images, lungs if pasting.needs_masks else None, draws, 32)
    assert again["loss"].isfinite(), "at another size"


@pytest.mark.parametrize(
    ("architecture", "size", "cells"),
    [("resnet18", 64, 16), ("test_vit", 64, 16), ("convnext_atto", 64, 16), ("efficientnet_b0", 96, 24)]
    + [pytest.param(name, 224, 56, marks=pytest.mark.slow) for name in ("swin_tiny_patch4_window7_224", "densenet121")],
)
def test_the_dense_head_reads_any_backbone_and_is_rebuilt_from_what_is_kept_of_it(architecture, size, cells):
    backbone, pasting = task(architecture, size, target="map", method="cutpaste")
    assert backbone.training, "probing the stages leaves the mode as it was"
    head, images = pasting.head.eval(), batch(2, size)[0]
    backbone.eval()
    with torch.no_grad():
        logits = head(head.read(backbone, images))
        again = DenseHead.from_tensors(head.state_dict(), head.facts()).eval()
        assert logits.shape == (2, 1, cells, cells) and torch.equal(logits, again(head.read(backbone, images)))
    loss = map_loss(head(head.read(backbone, images)), torch.rand_like(logits))[0]
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())


def test_the_class_head_is_rebuilt_from_what_is_kept_of_it():
    for batch_norm in (True, False):
        head = PastingHead(10, layers=2, hidden=7, seed=1, batch_norm=batch_norm, classes=3).eval()
        features = torch.rand(4, 10)
        assert torch.equal(head(features), PastingHead.from_tensors(head.state_dict(), head.facts()).eval()(features))


def test_a_backbone_without_stages_is_refused_in_words():
    backbone = random_backbone("test_resnet", 64, 0)
    backbone.network.feature_info = None
    with pytest.raises(CarinaError, match="give target=class"):
        DenseHead.of(backbone, 8, 0)


def test_the_map_loss_weighs_what_was_pasted_as_much_as_what_was_not():
    rng = np.random.default_rng(0)
    logits, target = (
        rng.standard_normal((3, 1, 5, 6)),
        rng.uniform(0, 1, (3, 1, 5, 6)) * (rng.random((3, 1, 5, 6)) < 0.3),
    )
    target[2] = 0  # an original
    target[1, 0, 0, 0] = 1
    losses, errors = [], []
    for z, t in zip(logits, target):
        p = 1 / (1 + np.exp(-z))
        negative = (1 - t) / (1 - t).sum()
        weight = 0.5 * t / max(t.sum(), 1) + 0.5 * negative if t.any() else negative
        losses.append((weight * -(t * np.log(p) + (1 - t) * np.log(1 - p))).sum())
        errors.append((weight * np.abs(p - t)).sum())
    loss, error = map_loss(torch.from_numpy(logits), torch.from_numpy(target))
    assert abs(loss.item() - np.mean(losses)) < 1e-9 and abs(error.item() - np.mean(errors)) < 1e-9


def test_the_contrastive_term_equals_its_definition():
    rng = np.random.default_rng(0)
    first, second, pasted = (rng.standard_normal((n, 8)) for n in (4, 4, 8))
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (first, second, pasted)]
    views, losses = np.concatenate(unit[:2]), []
    for i in range(8):
        twin = (i + 4) % 8
        others = [views[j] for j in range(8) if j != i] + list(unit[2])
        logits = np.array([views[i] @ other for other in others]) / 0.2
        losses.append(np.log(np.exp(logits).sum()) - views[i] @ views[twin] / 0.2)
    found = contrastive_loss(*(torch.from_numpy(part) for part in (first, second, pasted)))
    assert abs(found.item() - np.mean(losses)) < 1e-9


def test_the_class_loss_is_the_cross_entropy_of_the_views():
    backbone, pasting = task(method="cutpaste_3way")
    backbone.eval(), pasting.eval()
    images, _, draws = batch()
    views, _ = pasted_views(images, None, draws, "cutpaste_3way")
    with torch.no_grad():
        out = pasting(backbone, images, None, draws, 64)
        logits = torch.stack([pasting.head(backbone(view)) for view in views])
    chosen = F.log_softmax(logits.double(), dim=2)[torch.arange(3), :, torch.arange(3)]
    assert abs(out["loss"].item() + chosen.mean().item()) < 1e-5
