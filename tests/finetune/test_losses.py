"""Objectives: against numpy by the papers' formulas, gradients against finite differences, unknown labels without any."""

import numpy as np
import pytest
import torch

from carina.finetune.losses import make_loss, masked_bce
from carina.finetune.recipe import FinetuneRecipe, LossSettings
from carina.recipes import read_recipe, validate

RNG = np.random.default_rng(1)
ROWS, LABELS, STEPS = 40, 3, 100
LOGITS = RNG.normal(size=(ROWS, LABELS)) * 3
TARGETS = (RNG.random((ROWS, LABELS)) < [0.5, 0.2, 0.05]).astype(np.float64)
TARGETS[0, 2] = 1
TARGETS[3:9, 1] = TARGETS[17] = np.nan
SOFT = np.where(TARGETS == 1, 0.7, TARGETS)
NAMES = ("bce", "weighted_bce", "focal", "asymmetric", "ldam_drw")


def settings(name: str, **changes) -> LossSettings:
    return validate(LossSettings, {**read_recipe("finetune", "classify")["loss"], "name": name, **changes}, "loss")


def oracle(s: LossSettings, logits: np.ndarray, targets: np.ndarray, step: int) -> float:
    """Entry by entry, by the formulas of the papers."""
    p = 1 / (1 + np.exp(-logits))
    total, known = 0.0, 0
    for column in range(logits.shape[1]):
        own = targets[:, column]
        off, on = np.nansum(1 - own), np.nansum(own)
        every = [(np.nansum(1 - t), np.nansum(t)) for t in targets.T]
        rarest = min(min(pair) for pair in every)
        for row in range(len(logits)):
            t, q, z = own[row], p[row, column], logits[row, column]
            if np.isnan(t):
                continue
            if s.name == "bce":
                yes, no = -np.log(q), -np.log(1 - q)
            elif s.name == "weighted_bce":
                yes, no = -np.log(q) * off / on, -np.log(1 - q)
            elif s.name == "focal":
                a = 1.0 if s.alpha is None else s.alpha
                b = 1.0 if s.alpha is None else 1 - s.alpha
                yes, no = -a * (1 - q) ** s.gamma * np.log(q), -b * q**s.gamma * np.log(1 - q)
            elif s.name == "asymmetric":
                shifted = max(q - s.clip, 0)
                yes = -((1 - q) ** s.gamma_positive) * np.log(q)
                no = -(shifted**s.gamma_negative) * np.log(1 - shifted)
            else:
                yes_margin, no_margin = (s.margin * (n / rarest) ** -0.25 for n in (on, off))
                yes = np.log1p(np.exp(-s.sharpness * (z - yes_margin)))
                no = np.log1p(np.exp(s.sharpness * (z + no_margin)))
                if step >= s.reweight_from * STEPS:
                    effective = [(1 - s.beta**n) / (1 - s.beta) for n in (on, off)]
                    w = [1 / e for e in effective]
                    yes, no = yes * 2 * w[0] / sum(w), no * 2 * w[1] / sum(w)
            total += t * yes + (1 - t) * no
            known += 1
    return total / known


@pytest.mark.parametrize("targets", [TARGETS, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bce", {}),
        ("weighted_bce", {}),
        ("focal", {}),
        ("focal", {"alpha": 0.25, "gamma": 0.5}),
        ("asymmetric", {}),
        ("asymmetric", {"gamma_positive": 1.0, "gamma_negative": 0.5, "clip": 0.2}),
        ("asymmetric", {"clip": 0.0}),
        ("ldam_drw", {"sharpness": 3.0}),
        ("ldam_drw", {"beta": 0.9, "margin": 1.0}),
    ],
)
def test_every_loss_equals_its_formula_and_its_gradient(name, changes, targets):
    s = settings(name, **changes)
    loss = make_loss(s, targets, STEPS)
    for step in (0, STEPS - 1):
        logits = torch.tensor(LOGITS, requires_grad=True)
        value = loss(logits, torch.from_numpy(targets), step)
        assert value.item() == pytest.approx(oracle(s, LOGITS, targets, step), abs=1e-6)
        value.backward()
        unknown = torch.from_numpy(np.isnan(targets))
        assert (logits.grad[unknown] == 0).all()
        few = torch.tensor(LOGITS[:8], requires_grad=True)
        assert torch.autograd.gradcheck(lambda z, step=step: loss(z, torch.from_numpy(targets[:8]), step), (few,))


def test_asymmetric_without_its_powers_is_cross_entropy():
    plain = settings("asymmetric", gamma_positive=0.0, gamma_negative=0.0, clip=0.0)
    logits, targets = torch.tensor(LOGITS), torch.from_numpy(TARGETS)
    assert make_loss(plain, TARGETS, STEPS)(logits, targets, 0).item() == pytest.approx(
        masked_bce(logits, targets).item(), abs=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_and_batches_without_a_known_label_stay_finite(name):
    loss = make_loss(settings(name), TARGETS, STEPS)
    for value in (-200.0, 200.0):
        logits = torch.full((2, LABELS), value, requires_grad=True)
        loss(logits, torch.tensor([[0.0] * LABELS, [1.0] * LABELS]), STEPS).backward()
        assert torch.isfinite(logits.grad).all()
    logits = torch.zeros(2, LABELS, requires_grad=True)
    empty = loss(logits, torch.full((2, LABELS), torch.nan), 0)
    empty.backward()
    assert empty.item() == 0 and (logits.grad == 0).all()


def test_a_label_of_one_class_does_not_weigh_infinitely():
    targets = np.stack([np.zeros(10), np.arange(10) % 2], axis=1)
    for name in ("weighted_bce", "ldam_drw"):
        value = make_loss(settings(name), targets, 1)(torch.zeros(10, 2), torch.from_numpy(targets), 1)
        assert torch.isfinite(value)


def test_the_recipe_knows_every_loss():
    assert set(NAMES) == set(FinetuneRecipe.model_fields["loss"].annotation.model_fields["name"].annotation.__args__)
