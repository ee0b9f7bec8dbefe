"""Heads: what they read and give, pooling against formulas, noisy-or in logits, and that what is saved is what is loaded."""

import numpy as np
import pytest
import torch

from carina.errors import CarinaError
from carina.models.backbones import random_backbone
from carina.models.heads import HEADS, HeadSettings, LseHead, head_from_arrays, head_from_facts, make_head, noisy_or

LABELS = ["Effusion", "abnormal", "Mass"]
ARCHITECTURES = ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]


def settings(name: str, **changes) -> HeadSettings:
    given = {"hidden": 16, "dropout": 0.0, "layers": None, "sharpness": 5.0, "noisy_or": False}
    return HeadSettings(name=name, **{**given, **changes})


@pytest.fixture(scope="module")
def backbones():
    return {name: random_backbone(name, 64, 0).eval() for name in ARCHITECTURES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", HEADS)
def test_every_head_on_every_family(name, architecture, backbones):
    backbone = backbones[architecture]
    images = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    for derived in (False, True):
        head = make_head(settings(name, noisy_or=derived), backbone, LABELS, seed=1).eval()
        read = head.read(backbone, images)
        head.standardize(read)
        logits, spread = head(read), head.spread(read)
        assert logits.shape == (3, 3) and logits.requires_grad and torch.isfinite(logits).all()
        if name in ("linear", "mlp"):
            assert spread is None
        else:
            assert spread.shape[:2] == (3, 3) and (spread >= 0).all()
            torch.testing.assert_close(spread.sum(dim=(2, 3)), torch.ones(3, 3))
        if derived:
            p = torch.sigmoid(logits[:, [0, 2]].double())
            torch.testing.assert_close(torch.sigmoid(logits[:, 1].double()), 1 - (1 - p).prod(dim=1), rtol=0, atol=1e-6)
        again = head_from_facts(head.facts(), head.state_dict()).eval()
        torch.testing.assert_close(again(read), logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", HEADS)
def test_gradients_reach_the_backbone_and_every_parameter_of_the_head(name, backbones):
    backbone = backbones["resnet18"]
    head = make_head(settings(name), backbone, LABELS, seed=1)
    backbone.zero_grad()
    head(head.read(backbone, torch.rand(2, 1, 64, 64))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters() if p.ndim > 1)
    assert backbone.network.conv1.weight.grad.abs().sum() > 0


def test_a_seed_makes_a_head_whatever_was_drawn_before(backbones):
    heads = []
    for _ in range(2):
        torch.rand(7)
        heads.append(make_head(settings("multiscale"), backbones["resnet18"], LABELS, seed=5).state_dict())
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])


def test_log_sum_exp_lies_between_mean_and_maximum():
    maps = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    for sharpness in (1e-2, 2.0, 1e4):
        head = LseHead(settings("lse", sharpness=sharpness), [6], 2, None).eval()
        scores = (
            torch.einsum("bchw,kc->bkhw", maps, head.classify.weight[:, :, 0, 0]) + head.classify.bias[:, None, None]
        )
        flat = scores.flatten(2).double().detach().numpy()
        top = flat.max(axis=2)
        oracle = top + np.log(np.exp(sharpness * (flat - top[..., None])).mean(axis=2)) / sharpness
        np.testing.assert_allclose(head([maps]).detach(), oracle, atol=1e-4)
        limit = {1e-2: flat.mean(axis=2), 1e4: top}.get(sharpness)
        if limit is not None:
            np.testing.assert_allclose(head([maps]).detach(), limit, atol=0.02)


def test_the_spread_of_log_sum_exp_is_the_gradient_of_its_score():
    head = LseHead(settings("lse"), [3], 1, None).eval()
    maps = torch.randn(1, 3, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(head([maps])[0, 0], maps)
    weight = head.classify.weight[0, :, 0, 0]
    torch.testing.assert_close(gradient[0], head.spread([maps])[0] * weight[:, None, None])


def test_noisy_or_is_exact_where_probabilities_are_not():
    scores = torch.tensor([[-300.0, -310.0], [-40.0, -41.0], [-1.0, 2.0], [20.0, 30.0], [200.0, 300.0]]).double()
    # log-odds of 1 - prod(1 - p): at both ends by hand, in the middle by the definition
    p = 1 / (1 + np.exp([1.0, -2.0]))
    middle = 1 - np.prod(1 - p)
    oracle = [
        -300 + np.log1p(np.exp(-10)),
        -40 + np.log1p(np.exp(-1)),
        np.log(middle / (1 - middle)),
        50.0,
        500.0,
    ]
    np.testing.assert_allclose(noisy_or(scores), oracle, rtol=1e-8)
    np.testing.assert_allclose(noisy_or(scores.float()), oracle, rtol=1e-5)
    assert torch.autograd.gradcheck(noisy_or, (scores.clone().requires_grad_(),))


def test_noisy_or_needs_something_to_derive_from(backbones):
    for labels in (["Effusion", "Mass"], ["abnormal"]):
        with pytest.raises(CarinaError, match="noisy_or"):
            make_head(settings("linear", noisy_or=True), backbones["resnet18"], labels, 0)


def test_stages_that_are_not_there_are_told(backbones):
    for layers in ([1, 2], [4, 5, 6], [1, 2, 3, 4, 5]):
        with pytest.raises(CarinaError, match="multiscale"):
            make_head(settings("multiscale", layers=layers), backbones["resnet18"], LABELS, 0)


def test_a_solver_s_coefficients_are_a_head():
    rng = np.random.default_rng(0)
    weight, bias, features = rng.normal(size=(3, 5)), rng.normal(size=3), rng.normal(size=(7, 5))
    read = [torch.from_numpy(features.astype(np.float32))]
    head = head_from_arrays(weight, bias)
    assert sorted(head.state_dict()) == ["bias", "weight"]
    np.testing.assert_allclose(head(read).detach(), features @ weight.T + bias, atol=1e-5)
    derived = head_from_arrays(weight, bias, column=1)(read).detach()
    np.testing.assert_allclose(derived[:, [0, 2]], (features @ weight.T + bias)[:, [0, 2]], atol=1e-5)


def test_what_another_carina_saved_is_told():
    with pytest.raises(CarinaError, match="older carina"):
        head_from_facts({"name": "linear"}, {})
    with pytest.raises(CarinaError, match="newer one"):
        head_from_facts({"name": "capsule"}, {})
