"""CutPaste's classes, foreign patches on several ranks, the contrast of patches: places, and what is a negative of what."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from carina.data.batches import Batch
from carina.draws import Draws
from carina.errors import CarinaError
from carina.imaging.views import ViewSettings, affine_matrices, make_view
from carina.models.backbones import random_backbone
from carina.pretrain.pretexts import Corpus, method
from carina.pretrain.pretexts.patches import CANDIDATES, VIEWS, shared_points
from carina.pretrain.recipe import PretrainRecipe
from carina.recipes import build

SMALL = {"patches": {"dimension": 8, "positions": 4}, "cutpaste": {"hidden": 16}}
RECIPE = build("pretrain", PretrainRecipe, "default", {"pretexts": SMALL})


def batch(size=64, patients=(0, 1, 2, 3)):
    codes = torch.arange(len(patients))
    images = torch.rand(len(patients), 1, size, size, generator=torch.Generator().manual_seed(0))
    groups = {"image": codes, "study": codes, "patient": torch.tensor(patients)}
    return Batch(images, None, groups, None, Draws(0, 0, codes.numpy().astype(np.uint64)), size, (0, 0, 0))


def build_pretext(name, architecture="test_resnet", size=64, settings=None, views=None):
    backbone = random_backbone(architecture, size, 0).eval()
    settings = getattr(RECIPE.pretexts, name).model_copy(update=settings or {})
    views = RECIPE.views.model_copy(update=views or {})
    corpus = Corpus(64, 4, 4, scales=(size,), size=None, views=views, seed=0, steps=10)
    return backbone, method(name)(backbone, settings, corpus).eval()


@pytest.mark.parametrize(("kind", "classes"), [("normal", 2), ("scar", 2), ("union", 2), ("3way", 3)])
def test_cutpaste_tells_its_classes_apart(kind, classes):
    backbone, cutpaste = build_pretext("cutpaste", settings={"kind": kind})
    piece = batch()
    views = cutpaste.views(piece)
    assert [view.shape for view in views["views"]] == [(4, 1, 64, 64)] * classes and list(views) == ["views"]
    with torch.no_grad():
        out = cutpaste.loss(backbone, views, piece)
        logits = torch.stack([cutpaste.task.head(backbone(view)) for view in views["views"]]).double().numpy()
    chances = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    assert abs(out["loss"].item() + np.mean([np.log(chances[k, :, k]) for k in range(classes)])) < 1e-5
    assert abs(out["accuracy"].item() - np.mean([(logits[k].argmax(1) == k).mean() for k in range(classes)])) < 1e-6


@pytest.mark.parametrize("kind", ["nsa", "fpi"])
def test_foreign_patches_come_from_the_same_partners_on_other_ranks(kind):
    """Halves of an even batch, as ranks and micro-batches see it, are pasted as in the whole."""
    whole = batch(patients=range(8))
    whole.masks = torch.zeros_like(whole.images, dtype=torch.bool)
    whole.masks[..., 16:48, 8:56] = True
    _, nsa = build_pretext("nsa", settings={"kind": kind, "target": "map"})
    views = nsa.views(whole)
    assert len(views["views"]) == len(views["maps"]) == 2 and views["maps"][1].amax(dim=(1, 2, 3)).min() > 0.05
    for rows in (slice(0, 4), slice(4, 8)):
        part = Batch(whole.images[rows], whole.masks[rows], {}, None, whole.draws.select(rows), 64, (0, 0, 0))
        for name, found in nsa.views(part).items():
            for ours, theirs in zip(found, views[name]):
                torch.testing.assert_close(ours, theirs[rows], atol=2e-5, rtol=0)


def test_places_lie_where_the_views_show_them():
    """On an image whose intensity is its own x (or y), what a view shows at a place is that place's x (or y)."""
    piece, settings = batch(96, patients=range(6)), RECIPE.views
    settings = ViewSettings(**{**settings.model_dump(), "gamma": (1, 1), "blur": 0})
    thetas = tuple(affine_matrices(piece.draws.part(name), settings, piece.images) for name in VIEWS)
    candidates = torch.from_numpy(piece.draws.uniform("places", -1, 1, shape=(64, 2)))
    points, in_views, shown = shared_points(thetas, candidates, 8)
    assert shown.all() and points.abs().max() <= 1 and max(where.abs().max() for where in in_views) <= 1
    centers = (torch.arange(96) + 0.5) / 96
    for axis, ramp in enumerate((centers[None, :].expand(96, 96), centers[:, None].expand(96, 96))):
        for name, where in zip(VIEWS, in_views):
            view = make_view(ramp.expand(6, 1, 96, 96), piece.draws.part(name), settings, 96)
            read = F.grid_sample(view, where[:, None], align_corners=False, padding_mode="border")[:, 0, 0]
            inner = points.abs().amax(dim=2) < 0.95  # beyond the outermost centers nothing is known
            inner &= where.abs().amax(dim=2) < 0.95
            assert inner.sum() > 24
            torch.testing.assert_close(read[inner], ((points[..., axis] + 1) / 2)[inner], atol=1e-4, rtol=0)


def bilinear(feature_map, point):
    """One point (x, y in [-1, 1]) of a map (D, n, n), borders repeated."""
    n = feature_map.shape[1]
    x, y = (min(max((value + 1) / 2 * n - 0.5, 0), n - 1) for value in point)
    left, top = min(int(x), n - 2), min(int(y), n - 2)
    a, b = x - left, y - top
    rows = [feature_map[:, top + k, left] * (1 - a) + feature_map[:, top + k, left + 1] * a for k in (0, 1)]
    return rows[0] * (1 - b) + rows[1] * b


@pytest.mark.parametrize(("architecture", "cells"), [("test_resnet", 2), ("test_vit", 4)])
def test_patch_contrast_equals_its_definition(architecture, cells):
    patients = (7, 7, 8, 9)
    backbone, patches = build_pretext("patches", architecture, settings={"away": 0.3})
    piece = batch(patients=patients)
    views = patches.views(piece)
    with torch.no_grad():
        out = patches.loss(backbone, views, piece)
        maps = [backbone.maps(view) for view in views]
        if architecture == "test_vit":  # it pools by its class token, which every place shares
            maps = [m + backbone(view)[:, :, None, None] for m, view in zip(maps, views)]
    maps = [m.double().numpy() for m in maps]
    thetas = [affine_matrices(piece.draws.part(name), RECIPE.views, views[0]).double().numpy() for name in VIEWS]
    drawn = piece.draws.part("patches").uniform("places", -1, 1, shape=(CANDIDATES * 4, 2)).astype(np.float64)
    embedded, points = {}, {}
    for i in range(4):
        chosen = []
        for candidate in drawn[i]:
            point = thetas[0][i, :, :2] @ candidate + thetas[0][i, :, 2]
            other = np.linalg.solve(thetas[1][i, :, :2], point - thetas[1][i, :, 2])
            if max(np.abs(point).max(), np.abs(other).max()) <= 1 and len(chosen) < 4:
                chosen.append((point, candidate, other))
        assert len(chosen) == 4
        for n, (point, *where) in enumerate(chosen):
            points[i, n] = point
            for side in (0, 1):
                with torch.no_grad():
                    z = patches.head(torch.from_numpy(bilinear(maps[side][i], where[side])).float()).double().numpy()
                embedded[side, i, n] = z / np.linalg.norm(z)
    away, losses, found = max(0.3, 2**0.5 / cells), [], []
    for side, (i, n) in itertools.product((0, 1), points):
        logits = [embedded[side, i, n] @ embedded[1 - side, i, n] / patches.settings.temperature]
        for j, m in points:
            far = i == j and np.linalg.norm(points[i, n] - points[j, m]) / 2 > away
            if far or patients[i] != patients[j]:
                logits.append(embedded[side, i, n] @ embedded[1 - side, j, m] / patches.settings.temperature)
        losses.append(np.log(np.exp(logits).sum()) - logits[0])
        found.append(np.argmax(logits) == 0)
    assert abs(out["loss"].item() - np.mean(losses)) < 1e-5
    assert abs(out["accuracy"].item() - np.mean(found)) < 1e-6


def test_a_map_of_one_place_and_one_patient_leave_no_negatives():
    backbone, patches = build_pretext("patches", size=32)
    piece = batch(32, patients=(5, 5, 5, 5))
    assert patches.loss(backbone, patches.views(piece), piece)["loss"].item() == 0.0
    piece = batch(32, patients=(5, 5, 5, 6))
    assert patches.loss(backbone, patches.views(piece), piece)["loss"].item() > 0.1


def test_views_that_do_not_overlap_count_for_nothing():
    backbone, patches = build_pretext("patches", views={"area": (0.02, 0.02), "shift": 0.0})
    piece = batch(patients=range(12))
    views = patches.views(piece)
    for view in views:
        view.requires_grad_()
    out = patches.loss(backbone, views, piece)
    out["loss"].backward()
    thetas = [affine_matrices(piece.draws.part(name), patches.corpus.views, views[0]) for name in VIEWS]
    distance = (thetas[0][..., 2] - thetas[1][..., 2]).norm(dim=1)
    disjoint = distance > 2 * 0.15 * 2**0.5  # farther apart than both half diagonals reach
    moved = views[0].grad.abs().amax(dim=(1, 2, 3)) > 0
    assert disjoint.any() and not moved[disjoint].any()
    assert all(torch.isfinite(value) for value in out.values())


def test_both_views_are_of_one_image_and_maps_are_needed():
    _, patches = build_pretext("patches")
    piece = batch()
    views = patches.views(piece)
    piece.others = 1 - piece.images
    assert all(torch.equal(a, b) for a, b in zip(views, patches.views(piece)))
    with pytest.raises(CarinaError, match="patches needs features with places"):
        build_pretext("patches", "mixer_s32_224", size=64)
