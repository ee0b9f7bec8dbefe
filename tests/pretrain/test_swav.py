"""SwAV: Sinkhorn's marginals, the swapped prediction and the supervised term against oracles in numpy, the queue."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from carina.data.batches import Batch
from carina.draws import Draws
from carina.errors import CarinaError
from carina.models.backbones import random_backbone
from carina.pretrain.pretexts import Corpus, method
from carina.pretrain.pretexts.swav import sinkhorn
from carina.pretrain.recipe import PretrainRecipe
from carina.recipes import build

RECIPE = build("pretrain", PretrainRecipe, "default", [])
COUNT, STEPS = 6, 20


def batch(epoch=0, targets=None):
    codes = torch.arange(COUNT) + 100 * epoch
    images = torch.rand(COUNT, 1, 64, 64, generator=torch.Generator().manual_seed(epoch))
    groups = dict.fromkeys(("image", "study", "patient"), codes)
    draws = Draws(0, epoch, codes.numpy().astype(np.uint64))
    return Batch(images, None, groups, targets, draws, 64, (0, epoch, 0))


def build_swav(**changes):
    crops = RECIPE.pretexts.swav.crops.model_copy(update={"locals": 2, "local_size": 0.5})
    small = {"prototypes": 10, "dimension": 8, "freeze": 0.0, **changes}
    settings = RECIPE.pretexts.swav.model_copy(update={**small, "crops": crops})
    corpus = Corpus(
        count=64, batch_size=COUNT, micro_batch=COUNT, scales=(32, 64), size=None, views=RECIPE.views, seed=0,
        steps=STEPS,
    )  # fmt: skip
    backbone = random_backbone("test_vit", 64, 0)
    return backbone, method("swav")(backbone, settings, corpus)


def balanced(scores, epsilon, iterations):
    """Sinkhorn's iteration as it is written in textbooks, in float64: scale the columns, then the rows."""
    q = np.exp(scores.astype(np.float64) / epsilon)
    for _ in range(iterations):
        q = q / q.sum(axis=0)
        q = q / q.sum(axis=1, keepdims=True)
    return q


def step(backbone, swav, piece, number):
    optimizer = torch.optim.SGD([*backbone.parameters(), *swav.parameters()], lr=0.1)
    values = swav.loss(backbone, swav.views(piece), piece)
    values["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    swav.after_step(backbone, number)
    return values


def test_sinkhorns_marginals():
    points, prototypes = (
        F.normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(n)), dim=1) for n in (96, 24)
    )
    scores = points @ prototypes.T
    codes = sinkhorn(scores, 0.05, 100)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(96), atol=1e-5, rtol=0)
    torch.testing.assert_close(codes.sum(dim=0), torch.full((24,), 4.0), atol=1e-3, rtol=0)
    np.testing.assert_allclose(sinkhorn(scores, 0.05, 3), balanced(scores.numpy(), 0.05, 3), atol=1e-5)
    assert torch.isfinite(sinkhorn(scores, 1e-4, 3)).all(), "exp(10,000) would overflow"


def test_the_loss_equals_swapped_prediction_written_anew():
    backbone, swav = build_swav(queue=13)  # two batches of six
    backbone.eval(), swav.eval()
    for number in range(3):
        with torch.no_grad():
            known = [(F.normalize(swav.head(backbone(v)), dim=1)).numpy() for v in swav.views(batch(number))]
            prototypes = swav.prototypes.numpy().copy()
        earlier = swav.queue_64.numpy().copy()
        loss = swav.loss(backbone, swav.views(batch(number)), batch(number))["loss"]
        total, pairs = 0.0, 0
        for view in range(2):
            entries = known[view] if number < 2 else np.concatenate([known[view], earlier[view]])
            codes = balanced(entries @ prototypes.T, 0.05, 3)[:COUNT]
            for other in (o for o in range(4) if o != view):
                logits = known[other].astype(np.float64) @ prototypes.T / 0.1
                logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
                total, pairs = total - (codes * logs).sum(axis=1).mean(), pairs + 1
        assert pairs == 6 and abs(loss.item() - total / pairs) < 1e-5
        swav.after_step(backbone, number)
    loss.backward()
    assert all(p.grad is not None for p in [*backbone.parameters(), *swav.parameters()])
    with torch.no_grad():  # the third batch has taken the place of the first
        first = F.normalize(swav.head(backbone(swav.views(batch(2))[0])), dim=1)
    torch.testing.assert_close(swav.queue_64[0, :COUNT], first)
    assert swav.queue_64.shape == (2, 12, 8) and not swav.queue_32.any()


def test_prototypes_have_unit_length_and_stay_while_they_are_frozen():
    backbone, swav = build_swav(freeze=0.1)
    start = swav.prototypes.detach().clone()
    for number in range(3):
        torch.testing.assert_close(swav.prototypes.norm(dim=1), torch.ones(10))
        step(backbone, swav, batch(number), number)
        assert torch.allclose(swav.prototypes, start, atol=1e-6) == (number < 2)
    torch.testing.assert_close(swav.prototypes.norm(dim=1), torch.ones(10))


def test_a_stray_nan_does_not_stay_in_the_queue():
    backbone, swav = build_swav(queue=12)
    views = [torch.full_like(view, float("nan")) for view in swav.views(batch())]
    swav.loss(backbone, views, batch())
    swav.after_step(backbone, 0)
    assert not swav.queue_64.any() and not swav.written.any()


def test_a_supervised_weight_of_zero_is_the_plain_method_to_the_bit():
    runs = []
    for changes in ({}, {"supervised": 0.0, "labels": ["Pneumonia"]}):
        backbone, swav = build_swav(**changes)
        assert swav.labels == []
        losses = [step(backbone, swav, batch(n, torch.ones(COUNT, 1)), n)["loss"] for n in range(2)]
        runs.append([*losses, *backbone.state_dict().values(), *swav.state_dict().values()])
    assert len(runs[0]) == len(runs[1]) and all(torch.equal(a, b) for a, b in zip(*runs))


def test_the_supervised_term_is_the_cross_entropy_of_known_labels():
    plain_backbone, plain = build_swav()
    backbone, swav = build_swav(supervised=0.5, labels=["Pneumonia", "abnormal"])
    assert swav.labels == ["Pneumonia", "abnormal"]
    nan = float("nan")
    targets = torch.tensor([[1, 0], [nan, 1], [-1, nan], [0, -1], [nan, nan], [1, 1]])
    values = swav.loss(backbone, swav.views(batch()), batch(targets=targets))
    base = plain.loss(plain_backbone, plain.views(batch()), batch())["loss"].item()
    with torch.no_grad():
        logits = [swav.classifier(backbone(view)).double().numpy() for view in swav.views(batch())[:2]]
    terms = [
        np.log1p(np.exp(-z[b, k] if targets[b, k] == 1 else z[b, k]))
        for z in logits for b in range(COUNT) for k in range(2) if targets[b, k] in (0, 1)
    ]  # fmt: skip
    assert len(terms) == 12 and abs(values["supervised"].item() - np.mean(terms)) < 1e-5
    assert abs(values["loss"].item() - base - 0.5 * np.mean(terms)) < 1e-5
    unknown = torch.full((COUNT, 2), nan)
    assert swav.loss(backbone, swav.views(batch()), batch(targets=unknown))["supervised"].item() == 0
    with pytest.raises(CarinaError, match="supervised needs label columns"):
        build_swav(supervised=1.0)
    with pytest.raises(CarinaError, match="queue=3 is shorter than a batch of 6"):
        build_swav(queue=3)
