"""DINO and DINOv2: losses against oracles in numpy, centers, masks, and a teacher that nothing but averaging moves."""

import math

import numpy as np
import pytest
import torch

from carina.data.batches import Batch
from carina.draws import Draws
from carina.errors import CarinaError
from carina.models.backbones import random_backbone
from carina.pretrain.pretexts import Corpus, method
from carina.pretrain.pretexts.dinov2 import block_masks, koleo, masked_patches, view_masks
from carina.pretrain.recipe import PretrainRecipe
from carina.recipes import build

RECIPE = build("pretrain", PretrainRecipe, "default", [])
STEPS, COUNT = 40, 6


def batch(epoch=0, scale=64, patients=range(COUNT)):
    codes = torch.arange(COUNT) + 100 * epoch
    images = torch.rand(COUNT, 1, scale, scale, generator=torch.Generator().manual_seed(epoch))
    groups = {"image": codes, "study": codes, "patient": torch.tensor(list(patients))}
    return Batch(images, None, groups, None, Draws(0, epoch, codes.numpy().astype(np.uint64)), scale, (0, epoch, 0))


def build_pretext(name="dino", architecture="test_vit", scales=(64, 96), **changes):
    small = {"prototypes": 12, "hidden": 16, "bottleneck": 8, "warmup": 0.5, **changes}
    crops = RECIPE.pretexts.dino.crops.model_copy(update={"locals": 3, "local_size": small.pop("local_size", 0.5)})
    settings = getattr(RECIPE.pretexts, name).model_copy(update={**small, "crops": crops})
    corpus = Corpus(
        count=64, batch_size=COUNT, micro_batch=COUNT, scales=scales, size=None, views=RECIPE.views, seed=0,
        steps=STEPS,
    )  # fmt: skip
    backbone = random_backbone(architecture, 64, 0)
    return backbone, method(name)(backbone, settings, corpus)


def scramble(*modules):
    """Make student and teacher differ, so that an oracle that mixes them up is found out."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def cosines(head, features):
    with torch.no_grad():
        points, prototypes = head.layers(features).double().numpy(), head.prototypes.double().numpy()
    points, prototypes = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (points, prototypes))
    return points @ prototypes.T


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def assigned(pretext, head, features, center, temperature):
    return softmax((cosines(pretext.teacher_heads[head], features) - center.numpy()) / temperature)


def image_loss(pretext, student, teacher, temperature, count=COUNT):
    """DINO's loss, pair by pair: student a list of features per view, teacher of the first two."""
    center = pretext.center_image_64
    targets = [assigned(pretext, "image", features, center, temperature) for features in teacher]
    logs = [np.log(softmax(cosines(pretext.heads["image"], features) / 0.1)) for features in student]
    pairs = [(t, v) for t in range(2) for v in range(len(logs)) if v != t]
    return sum(-(targets[t] * logs[v]).sum() / count for t, v in pairs) / len(pairs)


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet"])
def test_dinos_loss_equals_the_pairwise_cross_entropy_and_leaves_the_teacher_alone(architecture):
    backbone, dino = build_pretext(architecture=architecture)
    scramble(backbone, dino.heads)
    backbone.eval(), dino.eval()
    dino.center_image_64.copy_(torch.linspace(-0.3, 0.3, 12))
    dino.step.fill_(5)  # a quarter of the warm-up from 0.04 to 0.07
    views = dino.views(batch())
    assert [tuple(view.shape) for view in views] == [(COUNT, 1, s, s) for s in (64, 64, 32, 32, 32)]
    loss = dino.loss(backbone, views, batch())["loss"]
    with torch.no_grad():
        student = [backbone(view) for view in views]
        teacher = [dino.teacher(view) for view in views[:2]]
    assert abs(loss.item() - image_loss(dino, student, teacher, 0.04 + 0.03 / 4)) < 1e-5
    loss.backward()
    assert all(p.grad is None for module in (dino.teacher, dino.teacher_heads) for p in module.parameters())
    assert all(p.grad is not None for module in (backbone, dino.heads) for p in module.parameters())


def test_centers_are_the_running_means_of_the_teachers_cosines_by_scale():
    backbone, dino = build_pretext()
    scramble(dino.heads)

    def mean(*pieces):
        with torch.no_grad():
            return np.mean([cosines(dino.teacher_heads["image"], dino.teacher(view)) for p in pieces
                            for view in dino.views(p)[:2]], axis=(0, 1))  # fmt: skip

    pieces = [batch(0), batch(1)]  # two micro-batches of one step
    expected = mean(*pieces)
    for piece in pieces:
        dino.loss(backbone, dino.views(piece), piece)
        assert not dino.center_image_64.any(), "the center moves only after the step"
    dino.after_step(backbone, 0)
    np.testing.assert_allclose(dino.center_image_64, expected, atol=1e-6)
    assert not dino.center_image_96.any()
    piece = batch(2)
    expected = 0.9 * expected + 0.1 * mean(piece)
    dino.loss(backbone, dino.views(piece), piece)
    dino.after_step(backbone, 1)
    np.testing.assert_allclose(dino.center_image_64, expected, atol=1e-6)
    sick = batch(3)
    sick.images.fill_(float("nan"))
    dino.loss(backbone, [torch.full_like(view, float("nan")) for view in dino.views(sick)], sick)
    dino.after_step(backbone, 2)
    np.testing.assert_allclose(dino.center_image_64, expected, atol=1e-6)


def test_the_teacher_follows_by_a_momentum_that_rises_to_one():
    backbone, dino = build_pretext(momentum=0.9)
    scramble(backbone, dino.heads)
    for step in (0, STEPS // 4, STEPS):
        momentum = 1 - 0.1 * (math.cos(math.pi * step / STEPS) + 1) / 2
        pairs = [(dino.teacher, backbone), (dino.teacher_heads, dino.heads)]
        old = [[p.clone() for p in teacher.parameters()] for teacher, _ in pairs]
        dino.after_step(backbone, step)
        for before, (teacher, student) in zip(old, pairs):
            for a, b, c in zip(before, teacher.parameters(), student.parameters()):
                torch.testing.assert_close(b, momentum * a + (1 - momentum) * c)
                assert not b.requires_grad


def test_prototypes_stay_for_their_share_of_the_steps():
    backbone, dino = build_pretext(freeze=0.1)
    for step, frozen in ((0, True), (3, True), (4, False)):
        dino.step.fill_(step)
        dino.zero_grad()
        dino.loss(backbone, dino.views(batch()), batch())["loss"].backward()
        gradient = dino.heads["image"].prototypes.grad
        assert gradient is not None and (gradient.abs().max() == 0) == frozen
        assert dino.heads["image"].layers[0].weight.grad.abs().max() > 0


def test_dinov2s_parts_equal_their_oracles():
    backbone, pretext = build_pretext("dinov2", ibot=0.7, koleo=0.2)
    scramble(backbone, pretext.heads)
    pretext.center_image_64.copy_(torch.linspace(-0.3, 0.3, 12))
    pretext.center_patch_64.copy_(torch.linspace(0.2, -0.2, 12))
    pretext.step.fill_(20)
    piece = batch(patients=[0, 0, 1, 2, 3, 3])
    views = pretext.views(piece)
    values = pretext.loss(backbone, views, piece)
    masks = view_masks(piece.draws.part("dinov2 masks"), 4, (0.1, 0.5))
    pooled, patches, teacher_pooled, teacher_patches = [], [], [], []
    with torch.no_grad():
        for view, mask in zip(views[:2], masks):  # the mask token put in by hand, token by token
            network = backbone.network
            x = network.patch_embed(backbone.normalize(view))
            for b, place in np.argwhere(mask):
                x[b, place // 4, place % 4] = pretext.mask_token
            tokens = network.norm(network.blocks(network._pos_embed(x)))
            pooled.append(tokens[:, 0])
            patches.append(tokens[:, 1:])
            tokens = pretext.teacher.network.forward_features(backbone.normalize(view))
            teacher_pooled.append(tokens[:, 0])
            teacher_patches.append(tokens[:, 1:])
        student = pooled + [backbone(view) for view in views[2:]]
    dino = image_loss(pretext, student, teacher_pooled, 0.07)
    ibot, means = [], []
    for v in range(2):
        target = assigned(pretext, "patch", teacher_patches[v], pretext.center_patch_64, 0.07)
        log = np.log(softmax(cosines(pretext.heads["patch"], patches[v]) / 0.1))
        plain = cosines(pretext.teacher_heads["patch"], teacher_patches[v])
        for b in np.flatnonzero(masks[v].any(axis=1)):
            ibot.append(-(target[b] * log[b]).sum(axis=-1)[masks[v, b]].mean())
            means.append(plain[b][masks[v, b]].mean(axis=0))
    assert len(ibot) == COUNT
    spread = 0.0
    for features in pooled:
        x = features.double().numpy()
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        distance = np.linalg.norm(x[:, None] - x[None], axis=2)
        distance[[0, 0, 1, 1, 4, 4, 5, 5], [0, 1, 0, 1, 4, 5, 4, 5]] = np.inf  # the same patient
        distance[range(COUNT), range(COUNT)] = np.inf
        spread -= np.log(distance.min(axis=1)).mean()
    expected = {"dino": dino, "ibot": np.mean(ibot), "koleo": spread, "loss": dino + 0.7 * np.mean(ibot) + 0.2 * spread}
    for name, value in expected.items():
        assert abs(values[name].item() - value) < 1e-5 * max(1, abs(value)), name
    values["loss"].backward()
    assert pretext.mask_token.grad.abs().max() > 0
    assert all(p.grad is None for module in (pretext.teacher, pretext.teacher_heads) for p in module.parameters())
    before = pretext.center_patch_64.clone()
    pretext.after_step(backbone, 20)
    np.testing.assert_allclose(pretext.center_patch_64, 0.9 * before.numpy() + 0.1 * np.mean(means, 0), atol=1e-6)


def test_koleos_gradient_is_that_of_the_distance_to_the_nearest_other_patient():
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.1]], dtype=torch.float64, requires_grad=True)
    value = koleo(x, torch.tensor([0, 0, 1, 2]))
    unit = x / x.norm(dim=1, keepdim=True)
    oracle = -sum((unit[i] - unit[j]).norm().log() for i, j in ((0, 2), (1, 2), (2, 1), (3, 2))) / 4
    assert abs(value.item() - oracle.item()) < 1e-6
    ours, theirs = (torch.autograd.grad(v, x)[0] for v in (value, oracle))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert koleo(torch.ones(3, 2), torch.zeros(3)).item() == 0, "nobody else, nothing to keep away from"


def test_one_view_of_every_image_is_masked_by_its_share_in_blocks():
    draws = Draws(0, 0, np.arange(64, dtype=np.uint64))
    masks = view_masks(draws, 14, (0.1, 0.5))
    share = draws.uniform("share", 0.1, 0.5)
    np.testing.assert_array_equal(masks.sum(axis=(0, 2)), np.rint(share * 196))
    assert (masks.any(axis=2).sum(axis=0) == 1).all() and 16 < masks[0].any(axis=1).sum() < 48
    np.testing.assert_array_equal(view_masks(draws.select(np.arange(5, 9)), 14, (0.1, 0.5)), masks[:, 5:9])
    grid = block_masks(draws, 14, (0.3, 0.3)).reshape(-1, 14, 14)
    alike = (grid[:, 1:] == grid[:, :-1]).mean()
    assert alike > 0.85, "neighbors share their fate; at random it would be 0.58 of them"
    assert (block_masks(draws, 2, (0.0, 0.01)).sum(axis=1) == 1).all(), "never none"


def test_the_mask_token_replaces_patches_only_within_its_context():
    backbone = random_backbone("test_vit", 32, 0)
    images, mask = torch.rand(2, 1, 32, 32), torch.tensor([[True, False, False, False], [False] * 4])
    changed = images.clone()
    changed[0, :, :16, :16] = 0.9  # the masked patch: what stands there must not matter
    with torch.no_grad():
        plain = backbone(images)
        with masked_patches(backbone, torch.zeros(64), mask):
            first, second = backbone(images), backbone(changed)
        assert torch.equal(backbone(images), plain)
    assert torch.equal(first, second) and not torch.equal(first[0], plain[0]) and torch.equal(first[1], plain[1])


def test_architectures_that_do_not_fit_are_refused_with_the_mend():
    with pytest.raises(CarinaError, match="plain vision transformer, which test_resnet is not") as told:
        build_pretext("dinov2", "test_resnet")
    assert "vit_small_patch16_224, or the pretext dino" in str(told.value)
    with pytest.raises(CarinaError, match="local views do not fit") as told:
        build_pretext("dino", "mixer_s32_224", scales=(64,))
    assert "pretexts.dino.crops.local_size=1, or pretexts.dino.crops.locals=0" in str(told.value)
    build_pretext("dino", "mixer_s32_224", scales=(64,), local_size=1.0)
