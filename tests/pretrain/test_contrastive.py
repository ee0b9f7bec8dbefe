"""SimCLR, MoCo v3, BYOL, Barlow Twins and VICReg: losses against oracles written anew, and what each must not see."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss

from carina.data.batches import Batch
from carina.draws import Draws
from carina.errors import CarinaError
from carina.models.backbones import random_backbone
from carina.pretrain.pretexts import Corpus, method
from carina.pretrain.pretexts.simclr import nt_xent
from carina.pretrain.recipe import PretrainRecipe
from carina.recipes import build

RECIPE = build("pretrain", PretrainRecipe, "default", [])
PAIRS = ["simclr", "mocov3", "byol", "barlow", "vicreg"]
PATIENTS = [1, 1, 2, 3, 4, 5, 5, 5, 6, 7, 8, 9]


def batch(patients=PATIENTS, epoch=0, scale=32):
    codes = np.arange(len(patients), dtype=np.uint64) + 1000 * epoch
    images = torch.rand(len(codes), 1, scale, scale, generator=torch.Generator().manual_seed(epoch))
    own = torch.from_numpy(codes.astype(np.int64))
    groups = {"image": own, "study": own, "patient": torch.tensor(patients)}
    return Batch(images, None, groups, None, Draws(0, epoch, codes), scale, (0, epoch, 0))


def pretext(name, architecture="test_vit", micro_batch=12, steps=10, **changes):
    small = {"dimension": 16, "hidden": 32, **changes}
    settings = getattr(RECIPE.pretexts, name)
    settings = settings.model_copy(update={k: v for k, v in small.items() if k in type(settings).model_fields})
    corpus = Corpus(256, 12, micro_batch, (32,), None, RECIPE.views, 0, steps)
    backbone = random_backbone(architecture, 32, 0)
    return backbone, method(name)(backbone, settings, corpus)


def embeddings(*networks, views):
    """The networks' outputs for both views, in numpy and double precision."""
    values = torch.cat(views)
    with torch.no_grad():
        for network in networks:
            values = network(values)
    return np.split(values.double().numpy(), 2)


def unit(values):
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def moved(network, by=0.05):
    """Move all weights, so that a copy made before differs."""
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))


@pytest.mark.parametrize("exclude", ["patient", "image"])
def test_simclr_is_nt_xent_without_negatives_of_the_same_patient(exclude):
    backbone, simclr = pretext("simclr", exclude=exclude)
    piece = batch()
    views = simclr.views(piece)
    loss = simclr.loss(backbone, views, piece)["loss"].item()
    z = unit(np.concatenate(embeddings(backbone, simclr.head, views=views)))
    owners = np.tile(piece.groups[exclude].numpy(), 2)
    terms = []
    for i in range(24):
        twin = (i + 12) % 24
        others = [z[i] @ z[j] for j in range(24) if owners[j] != owners[i]]
        logits = np.array([z[i] @ z[twin], *others]) / RECIPE.pretexts.simclr.temperature
        terms.append(np.log(np.exp(logits - logits[0]).sum()))
    assert abs(loss - np.mean(terms)) < 1e-5


def test_nt_xent_equals_lightlys_where_every_image_has_its_own_patient_and_is_zero_without_negatives():
    a, b = F.normalize(torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)), dim=2).requires_grad_()
    ours = nt_xent(a, b, torch.arange(8), 0.2)[0]
    theirs = NTXentLoss(temperature=0.2)(a, b)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours > 0.5
    alone, accuracy = nt_xent(a, b, torch.full((8,), 3), 0.2)
    assert alone == 0 and accuracy == 1
    assert all((g == 0).all() for g in torch.autograd.grad(alone, [a, b]))


def test_mocov3_is_infonce_among_the_keys_of_the_other_view_without_the_same_patients():
    backbone, moco = pretext("mocov3")
    moved(backbone), moved(moco.head)
    piece = batch()
    views = moco.views(piece)
    loss = moco.loss(backbone, views, piece)["loss"].item()
    queries = [unit(q) for q in embeddings(backbone, moco.head, moco.predictor, views=views)]
    keys = [unit(k) for k in embeddings(moco.key_backbone, moco.key_head, views=views)]
    temperature, total = RECIPE.pretexts.mocov3.temperature, 0.0
    for q, k in ((queries[0], keys[1]), (queries[1], keys[0])):
        for i in range(12):
            others = [q[i] @ k[j] for j in range(12) if PATIENTS[j] != PATIENTS[i]]
            logits = np.array([q[i] @ k[i], *others]) / temperature
            total += 2 * temperature * np.log(np.exp(logits - logits[0]).sum()) / 12
    assert abs(loss - total) < 1e-5
    one = batch(patients=[4] * 12)
    assert moco.loss(backbone, moco.views(one), one)["loss"] == 0


def test_mocov3_leaves_the_patch_embedding_as_it_was_where_asked():
    piece = batch()
    for freeze in (True, False):
        backbone, moco = pretext("mocov3", freeze_patches=freeze)
        moco.loss(backbone, moco.views(piece), piece)["loss"].backward()
        without = {name for name, p in backbone.network.named_parameters() if p.grad is None}
        assert without == ({"patch_embed.proj.weight", "patch_embed.proj.bias"} if freeze else set())
        assert moco.skips_parameters == freeze
    cnn, moco = pretext("mocov3", "test_resnet", freeze_patches=True)
    moco.loss(cnn, moco.views(piece), piece)["loss"].backward()
    assert all(p.grad is not None for p in cnn.parameters())


def test_byol_is_the_squared_distance_of_predictions_and_targets_of_the_other_view():
    backbone, byol = pretext("byol")
    moved(backbone), moved(byol.head)
    piece = batch()
    views = byol.views(piece)
    loss = byol.loss(backbone, views, piece)["loss"].item()
    predictions = [unit(p) for p in embeddings(backbone, byol.head, byol.predictor, views=views)]
    targets = [unit(t) for t in embeddings(byol.target_backbone, byol.target_head, views=views)]
    each = [((predictions[i] - targets[1 - i]) ** 2).sum(axis=1).mean() for i in (0, 1)]
    assert abs(loss - sum(each)) < 1e-5


@pytest.mark.parametrize("name, copies", [("byol", "target"), ("mocov3", "key")])
def test_the_slow_copy_follows_by_a_momentum_that_rises_to_one_and_gets_no_gradient(name, copies):
    backbone, method = pretext(name, steps=10)
    slow = [getattr(method, f"{copies}_backbone"), getattr(method, f"{copies}_head")]
    assert method.teacher is slow[0]
    moved(backbone), moved(method.head)
    base = getattr(RECIPE.pretexts, name).momentum
    for step in (0, 5, 10):
        before = [p.clone() for network in slow for p in network.parameters()]
        method.after_step(backbone, step)
        m = 1 - (1 - base) * (math.cos(math.pi * step / 10) + 1) / 2
        fast = [p for network in (backbone, method.head) for p in network.parameters()]
        after = [p for network in slow for p in network.parameters()]
        for old, new, source in zip(before, after, fast, strict=True):
            torch.testing.assert_close(new, m * old + (1 - m) * source, rtol=0, atol=1e-6)
    piece = batch()
    method.loss(backbone, method.views(piece), piece)["loss"].backward()
    assert all(p.grad is None for network in slow for p in network.parameters())
    trained = [*method.head.parameters(), *method.predictor.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained if p.ndim > 1)


def test_barlow_twins_correlates_the_dimensions_over_the_batch():
    backbone, barlow = pretext("barlow")
    piece = batch()
    views = barlow.views(piece)
    values = barlow.loss(backbone, views, piece)
    a, b = (
        (z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + 1e-5) for z in embeddings(backbone, barlow.head, views=views)
    )
    c = np.einsum("ni,nj->ij", a, b) / 12
    on = sum((1 - c[i, i]) ** 2 for i in range(16))
    off = sum(c[i, j] ** 2 for i in range(16) for j in range(16) if i != j)
    np.testing.assert_allclose(values["loss"].item(), on + 0.005 * off, rtol=1e-5)
    np.testing.assert_allclose(values["diagonal"].item(), on, rtol=1e-5)


def test_vicreg_weighs_invariance_variance_and_covariance():
    backbone, vicreg = pretext("vicreg")
    with torch.no_grad():  # so that some dimensions reach a deviation of 1 and others do not
        vicreg.head.layers[-1].weight.mul_(torch.linspace(0.5, 8, 16)[:, None])
    piece = batch()
    views = vicreg.views(piece)
    values = vicreg.loss(backbone, views, piece)
    a, b = embeddings(backbone, vicreg.head, views=views)
    deviations = [np.sqrt(z.var(axis=0, ddof=1) + 1e-4) for z in (a, b)]
    assert all((d > 1).any() and (d < 1).any() for d in deviations)
    variance = sum(np.maximum(0, 1 - d).mean() for d in deviations)
    covariances = [np.cov(z.T) for z in (a, b)]
    covariance = sum((c[~np.eye(16, dtype=bool)] ** 2).sum() / 16 for c in covariances)
    expected = 25 * ((a - b) ** 2).mean() + 25 * variance + covariance
    np.testing.assert_allclose(values["loss"].item(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", [*PAIRS, "moco"])
def test_the_second_view_is_of_the_other_image(name):
    _, method = pretext(name)
    piece = batch()
    first, second = method.views(piece)
    assert not torch.equal(first, second)
    piece.others = 1 - piece.images
    again, other = method.views(piece)
    assert torch.equal(first, again) and not torch.equal(second, other)


@pytest.mark.parametrize("name", PAIRS)
def test_one_image_a_micro_batch_is_refused_with_the_mend(name):
    with pytest.raises(CarinaError, match=f"{name}.*at least 2 images.*lower accumulate"):
        pretext(name, micro_batch=1)


def test_without_its_predictor_byol_collapses():
    spreads = {}
    for predictor in (True, False):
        backbone, byol = pretext("byol", steps=15, predictor=predictor, momentum=0.9)
        optimizer = torch.optim.SGD(
            [p for p in [*backbone.parameters(), *byol.parameters()] if p.requires_grad], lr=0.3
        )
        for step in range(15):
            piece = batch(epoch=step % 4)
            values = byol.loss(backbone, byol.views(piece), piece)
            optimizer.zero_grad()
            values["loss"].backward()
            optimizer.step()
            byol.after_step(backbone, step)
        spreads[predictor] = values["spread"].item()
    assert spreads[False] < 0.5 * spreads[True]
