"""Receptive fields: those that can be counted by hand, and effective ones whose shape is known."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from carina.errors import CarinaError
from carina.evaluate.receptive import energy_of, receptive_fields, side_holding, theoretical_field
from carina.models.backbones import random_backbone


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 5, 11])
def test_stacked_convolutions_see_twice_their_number_and_one(count, padding):
    layers = []
    for number in range(count):
        layers += [nn.Conv2d(1 if number == 0 else 4, 4, 3, padding=padding), nn.BatchNorm2d(4), nn.ReLU6()]
    assert theoretical_field(nn.Sequential(*layers), 1) == (2 * count + 1, 1.0, 0.0 if padding else float(count))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([nn.MaxPool2d(2)], (2, 2.0, 0.5)),
        ([nn.Conv2d(1, 2, 7, 2, 3), nn.MaxPool2d(3, 2, 1)], (11, 4.0, 0.0)),
        ([nn.Conv2d(1, 2, 3, dilation=4, padding=4), nn.Conv2d(2, 2, 3, padding=1)], (11, 1.0, 0.0)),
        ([nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=8)], None),
    ],
)
def test_fields_by_hand(layers, expected):
    assert theoretical_field(nn.Sequential(*layers), 1) == expected


def test_fields_of_timm_networks_are_those_known():
    """ResNet-18: 7, then + 4 (3 - 1) 4 at stride 4 (after the pool: 11), and so on; 435 in the end (Araujo et al., Distill
    2019)."""
    backbone = random_backbone("resnet18", 64, 0)
    before = [value.clone() for value in backbone.state_dict().values()]
    fields = receptive_fields(backbone, [64, 96])
    assert [(f.size, f.layer, f.theoretical, f.stride) for f in fields[:5]] == [
        (64, 1, 7, 2), (64, 2, 43, 4), (64, 3, 99, 8), (64, 4, 211, 16), (64, 5, 435, 32)
    ]  # fmt: skip
    assert [f.theoretical for f in fields[5:]] == [f.theoretical for f in fields[:5]]
    assert all(f.energy.shape == (f.size, f.size) and f.energy.sum() == pytest.approx(1) for f in fields)
    assert fields[0].effective <= 7
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.state_dict().values()))
    tokens = receptive_fields(random_backbone("test_vit", 64, 0), [64])
    assert {f.theoretical for f in tokens} == {None} and tokens[0].stride == 16


def test_effective_field_of_means_is_a_binomial():
    """k stacked means of 3: the gradient is the distribution of a sum of k draws from -1, 0, 1, in rows and in columns."""
    count, side = 8, 41
    network = nn.Sequential(*[nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(count)])
    for layer in network:
        nn.init.constant_(layer.weight, 1 / 9)
    energy = energy_of(network, torch.rand(5, 1, side, side))
    line = np.array([1.0])
    for _ in range(count):
        line = np.convolve(line, np.ones(3) / 3)
    expected = np.zeros(side)
    expected[side // 2 - count : side // 2 + count + 1] = line**2 / (line**2).sum()
    np.testing.assert_allclose(energy, np.outer(expected, expected), atol=1e-6)
    held = {s: expected[side // 2 - s // 2 : side // 2 + s // 2 + 1].sum() ** 2 for s in range(1, 2 * count + 2, 2)}
    assert side_holding(energy, (side // 2, side // 2)) == min(s for s, part in held.items() if part >= 0.95)
    assert theoretical_field(network, 1)[0] == 2 * count + 1 > side_holding(energy, (side // 2, side // 2))


def test_a_layer_that_sees_nothing_is_told():
    dead = nn.Conv2d(1, 2, 3)
    nn.init.zeros_(dead.weight)
    with pytest.raises(CarinaError, match="depends on no pixel"):
        energy_of(dead, torch.rand(2, 1, 16, 16))


def test_inspect_draws_the_fields_of_a_run(pretrained, phantom_store, tmp_path, capsys):
    from PIL import Image

    from carina.cli import main

    out = tmp_path / "fields.png"
    words = [str(pretrained), f"field={out}", f"store={phantom_store}", "scales=[32,64]"]
    assert main(["inspect", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert Image.open(out).size[0] > 400 and 0.3 < told["thorax_of_side"] < 1
    for row in told["fields"]:
        assert row["of_thorax"] == pytest.approx(row["of_side"] / told["thorax_of_side"], rel=1e-2)
    assert {row["scale"] for row in told["fields"]} == {32, 64}
    assert main(["inspect", *words[:2], f"store={phantom_store}", "scales=[48]"]) == 2
    assert main(["inspect", str(pretrained), "nearest=1"]) == 2
