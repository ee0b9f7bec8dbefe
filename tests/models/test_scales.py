"""Size-specific batch norm: one network, norms for each size, and what is written of them."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from carina.errors import CarinaError
from carina.models.backbones import (
    checkpoint_activations,
    load_backbone,
    random_backbone,
    restore_size_norms,
)
from carina.models.checkpoints import write_backbone
from carina.models.scales import add_size_norms, nearest_size, norm_sizes, split_norms

SIZES = (64, 32, 96)


def trained(name="test_resnet", sizes=SIZES, steps=2):
    """A backbone whose norms of each size differ: a few steps on images of each, brighter with the size."""
    backbone = random_backbone(name, sizes[0], 0)
    add_size_norms(backbone, sizes)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps * len(sizes)):
        size = sizes[step % len(sizes)]
        images = torch.rand(8, 1, size, size, generator=generator) * size / 96
        optimizer.zero_grad(set_to_none=True)
        backbone(images).square().mean().backward()
        optimizer.step()
    return backbone.eval()


def images_of(size, count=3):
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(size))


def features(backbone, size):
    with torch.no_grad():
        return backbone(images_of(size))


@pytest.mark.parametrize("sizes", [(64,), (64, 32)])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_fresh_norms_change_nothing_to_the_bit(name, sizes):
    plain = random_backbone(name, 64, 0)
    other = copy.deepcopy(plain)
    add_size_norms(other, sizes)
    results = []
    for backbone in (plain, other):
        backbone.train()
        output = backbone(images_of(64))
        output.square().sum().backward()
        results.append((output, *(p.grad for p in backbone.parameters() if p.grad is not None)))
    assert len(results[0]) == len(results[1]) == 1 + len(list(plain.parameters()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))
    shared, norms = split_norms(other.network)
    state = plain.network.state_dict()
    assert {**shared, **norms[64]}.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in {**shared, **norms[64]}.items())


def test_densenet_grows_by_its_norms_only():
    def count(sizes):
        backbone = random_backbone("densenet121", 64, 0)
        add_size_norms(backbone, sizes)
        return sum(p.numel() for p in backbone.parameters())

    assert count((64, 128)) - count((64,)) == 83_648 == count((64, 128, 224)) - count((64, 128))


def test_a_norm_meets_only_images_of_its_size():
    """Running means, written anew from what the norm was given at each side."""
    backbone = random_backbone("test_resnet", 64, 0)
    add_size_norms(backbone, (64, 32))
    norm = backbone.network.bn1
    expected = {64: 0.0, 32: 0.0}
    seen = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().double().numpy()))
    for side, own in ((64, 64), (32, 32), (60, 64), (20, 32), (46, 64), (45, 32)):  # 45.25 is the geometric middle
        backbone(images_of(side, 4))
        expected[own] = 0.9 * expected[own] + 0.1 * seen[-1].mean(axis=(0, 2, 3))
    for size, mean in expected.items():
        np.testing.assert_allclose(norm.norms[str(size)].running_mean.numpy(), mean, atol=1e-6)
    assert nearest_size((224, 64), 112) == 64 and nearest_size((224, 64), 128) == 224


def test_copies_choose_for_themselves_and_the_state_goes_round():
    backbone = trained()
    teacher = copy.deepcopy(backbone)
    before = features(backbone, 32)
    features(teacher, 64)  # a pass of the copy at another size in between
    assert teacher.network.size_choice is not backbone.network.size_choice
    assert backbone.network.size_choice.size == 32 and torch.equal(features(teacher, 32), before)
    fresh = random_backbone("test_resnet", 64, 9).eval()
    add_size_norms(fresh, SIZES)
    fresh.load_state_dict(backbone.state_dict())
    for size in SIZES:
        assert torch.equal(features(fresh, size), features(backbone, size))


def test_more_sizes_start_from_the_nearest():
    backbone = trained()
    more = copy.deepcopy(backbone)
    add_size_norms(more, (64, 128))
    for size, like in ((64, "64"), (128, "96")):
        state = more.network.bn1.norms[str(size)].state_dict()
        old = backbone.network.bn1.norms[like].state_dict()
        assert all(torch.equal(state[key], value) for key, value in old.items())
    assert norm_sizes(more.network) == (64, 128)


def test_networks_without_batch_norm_stay_as_they_are():
    backbone = random_backbone("test_vit", 64, 0)
    add_size_norms(backbone, SIZES)
    assert norm_sizes(backbone.network) == ()


def test_the_folder_holds_a_plain_network_and_the_other_norms(tmp_path):
    backbone = trained()
    folder = tmp_path / "backbone"
    write_backbone(folder, backbone, {"scales": list(SIZES)}, "card")
    plain = load_file(folder / "model.safetensors")
    assert plain.keys() == timm.create_model("test_resnet", num_classes=0).state_dict().keys()
    record = json.loads((folder / "carina.json").read_text())
    assert record["norm_sizes"] == list(SIZES) and record["size"] == 64
    others = load_file(folder / "scales.safetensors")
    assert {key.split("/")[0] for key in others} == {"32", "96"}
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs((images_of(64) - 0.5) / 0.25), features(backbone, 64), atol=1e-6, rtol=0)
    for size, at in ((None, 64), (64, 64), (32, 32), (40, 32), (96, 96), (200, 96)):
        loaded = load_backbone(str(folder), size=size).eval()
        assert norm_sizes(loaded.network) == () and loaded.spec.size == (size or 64)
        torch.testing.assert_close(features(loaded, at), features(backbone, at), atol=1e-6, rtol=0)
    onward = load_backbone(str(folder), size=32).eval()
    add_size_norms(onward, (32, 64, 96))
    restore_size_norms(onward, str(folder))
    for size in SIZES:
        torch.testing.assert_close(features(onward, size), features(backbone, size), atol=1e-6, rtol=0)
    (folder / "scales.safetensors").write_bytes(b"cut")
    with pytest.raises(CarinaError, match=r"scales.safetensors is not whole"):
        load_backbone(str(folder))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "densenet121", "test_vit"])
def test_recomputed_activations_change_nothing(name):
    """Two passes of different sizes before one backward pass: same gradients, running statistics counted once."""
    plain = random_backbone(name, 64, 0)
    add_size_norms(plain, (64, 32))
    saving = copy.deepcopy(plain)
    checkpoint_activations(saving)
    for backbone in (plain, saving):
        for _ in range(2):
            loss = backbone(images_of(64)).square().mean() + backbone.maps(images_of(32)).abs().mean()
            loss.backward()
    for (key, ours), theirs in zip(saving.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=key)
    for (key, ours), theirs in zip(saving.named_buffers(), plain.buffers()):
        if not key.endswith("num_batches_tracked"):  # nothing reads it
            torch.testing.assert_close(ours, theirs, msg=key)


def test_networks_that_cannot_recompute_are_told():
    with pytest.raises(CarinaError, match="cannot recompute the activations of dla34"):
        checkpoint_activations(random_backbone("dla34", 64, 0))


@pytest.mark.slow
def test_compiled_networks_choose_too():
    backbone = trained(sizes=(64, 32))
    compiled = torch.compile(backbone, backend="eager")
    for size in (64, 32, 64):
        with torch.no_grad():
            torch.testing.assert_close(compiled(images_of(size)), features(backbone, size), atol=1e-6, rtol=0)


def test_synchronized_norms_stay_per_size():
    backbone = trained()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(backbone))
    assert isinstance(synced.network.bn1.norms["32"], nn.SyncBatchNorm)
