"""timm backbones with one channel, at any scale; and backbones from elsewhere with their own channels and intensities."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.models import swin_transformer, vision_transformer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from carina.draws import hash64
from carina.errors import CarinaError, nearest
from carina.files import read_json
from carina.models.external import ADAPTERS as EXTERNAL
from carina.models.external import NATURAL, adapter_of, read_external
from carina.models.external.tensors import read_tensors
from carina.models.fetch import fetched, is_carina
from carina.models.scales import norm_sizes, put_norms, rest_statistics, stored_norms
from carina.models.spec import Spec


class Backbone(nn.Module):
    """A timm network behind the contract of an image: (B, 1, H, W) in [0, 1] -> pooled features (B, D).

    Repeating the channel and normalizing happen here, outside the network, so that ``backbone.network`` is exactly what
    plain timm loads. ``forward`` takes images of any size the network takes; ``features`` resizes to its own first.
    Whoever calls a part of the network itself gives it what ``normalize`` returns.
    """

    def __init__(self, network: nn.Module, spec: Spec):
        super().__init__()
        self.network = network
        self.spec = spec
        self.recomputes = False  # activations, in the backward pass
        for name in ("mean", "std"):  # on the device beforehand, because a copy on each pass would wait for it
            self.register_buffer(name, torch.tensor(getattr(spec, name)).view(1, -1, 1, 1), persistent=False)

    @property
    def dimension(self) -> int:
        return (
            self.network.num_features
            if not hasattr(self.network, "head_hidden_size")
            else self.network.head_hidden_size
        )

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 1, H, W) in [0, 1] as the network wants them: (B, C, H, W), normalized. From here on the network
        uses the batch norms of their size, where it has size-specific ones."""
        self._choose_norms(images.shape[-1], rest=False)
        images = (images - self.mean) / self.std  # one channel becomes as many as there are means
        return images.contiguous(memory_format=torch.channels_last)

    def _choose_norms(self, side: int, rest: bool) -> None:
        if norm_sizes(self.network):
            self.network.size_choice.set(side)
        if self.recomputes:
            rest_statistics(self.network, rest)

    def _run(self, part: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        side = images.shape[-1]
        features = part(self.normalize(images))
        if self.recomputes and features.requires_grad and not torch.compiler.is_compiling():
            # other sizes may have passed since: what is recomputed meets the norms of this pass, and counts only once
            features.register_hook(lambda _: self._choose_norms(side, rest=True))
        return features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._run(self.network, images)

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """Features before pooling (B, D, h, w): a transformer's patch tokens at their places, a CNN's last map."""
        features = self._run(self.network.forward_features, images)
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

    @torch.no_grad()
    def check_sizes(self, sizes: Iterable[int]) -> None:
        """Raise CarinaError unless the network takes images of all these sides."""
        trained = {module: module.training for module in self.modules()}
        try:
            for size in sizes:
                self.eval()(torch.zeros(1, 1, size, size, device=next(self.parameters()).device))
        except (AssertionError, RuntimeError, ValueError) as error:
            mend = f"multiples of {self.patch}" if size % self.patch else "a larger size or another architecture"
            told = _first_line(error).rstrip(".")
            raise CarinaError(f"{self.spec.name} takes no images of {size} px ({told}); give {mend}") from None
        finally:
            for module, mode in trained.items():
                module.training = mode


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


def _entry_module(name: str) -> str:
    return timm.model_entrypoint(name.split(".")[0]).__module__.rsplit(".", 1)[1]


def _any_size(name: str) -> dict[str, Any]:
    """Transformers are built for one image size. ViTs take others by resampling their positions on each pass; Swins
    have positions within windows only, and build their masks anew."""
    module = _entry_module(name)
    if module in ("vision_transformer", "deit", "eva"):
        return {"dynamic_img_size": True}
    return {"strict_img_size": False} if module in ("swin_transformer", "swin_transformer_v2") else {}


def _size_arguments(name: str, size: int) -> dict[str, Any]:
    sized = ("deit", "eva", "swin", "maxxvit", "vision_transformer", "beit", "cait", "mlp_mixer")
    return {"img_size": size, **_any_size(name)} if _entry_module(name).startswith(sized) else {}


def random_backbone(
    architecture: str,
    size: int,
    seed: int,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.25,),
    *,
    largest: int | None = None,
    channels: int = 1,
) -> Backbone:
    """An untrained timm network for (size, size) inputs; tables of positions are made for `largest` (default: size)."""
    name = architecture.split(".")[0]
    if not timm.is_model(name):
        raise CarinaError(f"timm has no model '{architecture}'{nearest(name, timm.list_models())}")
    args = {"in_chans": channels, **_size_arguments(name, max(size, largest or size))}
    with seeded(seed, f"backbone {name}"):
        try:
            network = _create(name, num_classes=0, **args)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise CarinaError(f"timm cannot build {name} for one channel at {size} px: {error}") from None
    return Backbone(network, Spec(name, channels, size, tuple(mean), tuple(std), args, "random weights"))


def _external(reference: str, size: int | None, largest: int | None) -> Backbone:
    """A backbone that another project made, whatever the file holds accounted for."""
    found = read_external(reference)
    spec, told = found.spec, found.tensors.told
    network = _create(spec.name, num_classes=0, **spec.args)
    ours = network.state_dict()
    counters = [name for name in ours if name.endswith("num_batches_tracked")]  # old files of torch lack them
    tensors = {**{name: ours[name] for name in counters}, **found.tensors}
    other = next((name for name, v in tensors.items() if name in ours and v.shape != ours[name].shape), None)
    missing, more = (next((name for name in a if name not in b), None) for a, b in ((ours, tensors), (tensors, ours)))
    if missing or more:
        wrong = (
            f"it lacks tensor {missing}"
            if missing
            else f"tensor {more} has no place there and is not known to be left out"
        )
        raise CarinaError(f"{told}: {wrong} ({spec.name}); give the file that was published, or name the kind it is of")
    if other:
        shapes = f"{tuple(tensors[other].shape)} instead of {tuple(ours[other].shape)}"
        raise CarinaError(f"{told}: tensor {other} has shape {shapes} ({spec.name}); give the file that was published")
    network.load_state_dict(tensors)
    args = spec.args
    if largest and largest > args.get("img_size", largest):  # positions are resampled by timm's rule
        network.set_input_size(img_size=largest)
        args = {**args, "img_size": largest}
    return Backbone(network, dataclasses.replace(spec, size=size or spec.size, args=args))


def _from_timm(
    model: str,
    config: dict[str, Any],
    name: str,
    args: dict[str, Any],
    origin: str,
    size: int | None,
    largest: int | None,
) -> Backbone:
    """Weights that timm finds (`model`), for images of any size. config: of the pretrained weights; args: of the model."""
    own = args.get("img_size") or (config.get("input_size") or (3, 224, 224))[-1]
    changes = _any_size(name)
    if largest and largest > own and "img_size" in _size_arguments(name, own):
        changes["img_size"] = largest  # timm resamples the tables of positions when it loads them
    network = _create(model, pretrained=True, num_classes=0, **changes)
    config = network.pretrained_cfg
    channels, _, side = config.get("input_size") or (3, 224, 224)
    spec = Spec(
        name.split(".")[0],
        channels=channels,
        size=size or side,
        mean=tuple(config.get("mean") or (0.5,)),
        std=tuple(config.get("std") or (0.25,)),
        args={"in_chans": channels, **args, **changes},
        origin=origin,
        license=str(config.get("license") or ""),
    )
    return Backbone(network, spec)


def _downloaded(reference: str, size: int | None, largest: int | None) -> Backbone:
    kind, _, name = reference.partition(":")
    if kind == "hub" and is_carina(folder := Path(fetched(reference))):
        return _folder(folder, size, largest, reference)
    if kind == "timm" and not timm.is_model(name.split(".")[0]):
        raise CarinaError(f"timm has no model '{name}'{nearest(name.split('.')[0], timm.list_models())}")
    try:
        if kind == "timm":
            return _from_timm(name, timm.get_pretrained_cfg(name).to_dict(), name, {}, reference, size, largest)
        config, architecture, args = timm.models.load_model_config_from_hf(name)
        return _from_timm(f"hf-hub:{name}", config, architecture, args or {}, reference, size, largest)
    except Exception as error:  # the hub client raises many kinds; all mean that the weights are not to be had
        raise CarinaError(
            f"the weights of {reference} could not be downloaded ({type(error).__name__}); check the name and the "
            "network, or give a file or folder"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def backbone_record(reference: str) -> dict[str, Any]:
    """carina.json of a run, a backbone folder or ``hub:ORG/NAME``: what its pretraining recorded. Empty for all else."""
    path = Path(fetched(reference))
    for folder in (*(path / inner for inner in INNER), path):
        if (folder / "carina.json").is_file():
            return read_json(folder / "carina.json")
    return {}


def pretext_saw(reference: str) -> str:
    """What the backbone that is named was trained on, in words."""
    if (external := adapter_of(reference)) is not None:
        return external[0].saw
    return backbone_record(reference).get("pretext_saw", "nothing" if reference.startswith("random") else "unknown")


def saw_natural_images(reference: str) -> bool:
    """Whether the backbone that is named comes from elsewhere and is known to have seen no radiographs."""
    external = adapter_of(reference)
    return external is not None and external[0].saw == NATURAL


INNER = ("backbone", "predictor/member-0", "member-0")  # where runs and published predictors keep a backbone


def _artefact(path: Path) -> Path:
    inner = (path / name for name in INNER)
    return next((folder for folder in inner if (folder / "config.json").is_file()), path)


def _folder(path: Path, size: int | None, largest: int | None, named: str = "a timm folder") -> Backbone:
    path = _artefact(path)
    if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
        raise CarinaError(
            f"{path} holds no backbone (config.json and model.safetensors); give a run of carina pretrain"
        )
    config = read_json(path / "config.json")
    if "architecture" not in config:
        raise CarinaError(
            f"{path} is not in timm's format (config.json names no architecture); give a timm or carina folder"
        )
    carina = read_json(path / "carina.json") if (path / "carina.json").is_file() else {}
    pretrained, name, args = config.get("pretrained_cfg") or {}, config["architecture"], config.get("model_args") or {}
    origin = carina.get("origin", named)
    try:
        backbone = _from_timm(f"local-dir:{path}", pretrained, name, args, origin, size or carina.get("size"), largest)
    except (RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise CarinaError(f"{path} cannot be loaded by timm ({_first_line(error)}); it may be damaged") from None
    restore_size_norms(backbone, str(path))
    return backbone


def restore_size_norms(backbone: Backbone, reference: str) -> None:
    """Give each size the batch norms that the folder `reference` holds of it or of the nearest size.

    After `load_backbone` and `add_size_norms` this puts back all of them; a plain network gets those of its own size.
    Nothing happens where the reference holds no size-specific norms.
    """
    norms = stored_norms(_artefact(Path(fetched(reference))))
    if norms:
        put_norms(backbone.network, norms, backbone.spec.size)


def _weights_file(
    path: Path, architecture: str, size: int, mean, std, largest: int | None, one_channel: bool
) -> Backbone:
    weights = read_tensors(path)
    patches, positions = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    if positions is not None and positions.ndim == 3 and patches is not None:  # a ViT keeps its own table of positions
        largest = max(largest or 0, math.isqrt(positions.shape[1]) * patches.shape[-1])
    backbone = random_backbone(architecture, size, 0, mean, std, largest=largest)
    first = f"{_first_convolution(backbone.network)[0]}.weight"
    if first in weights and weights[first].shape[1:2] == (3,):
        if one_channel:  # the file does not say how its images were normalized: as the architecture's usually are
            config = timm.get_pretrained_cfg(backbone.spec.name)
            mean, std = (config.mean, config.std) if config else ((0.5,) * 3, (0.25,) * 3)
            backbone = random_backbone(architecture, size, 0, mean, std, largest=largest, channels=3)
        else:  # as timm does: gray is equal in all three
            weights = {**weights, first: weights[first].sum(dim=1, keepdim=True)}
    ours = backbone.network.state_dict()
    resample = {"vit": vision_transformer, "swin": swin_transformer}.get(backbone.family)
    if resample is not None and (patches is None or patches.shape[2:] == ours["patch_embed.proj.weight"].shape[2:]):
        weights = resample.checkpoint_filter_fn(weights, backbone.network)
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
    backbone.spec = dataclasses.replace(backbone.spec, origin="a weights file")
    return backbone


def _first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d | None]:
    return next(((name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d)), ("", None))


@torch.no_grad()
def _to_one_channel(backbone: Backbone) -> Backbone:
    """The same features from one channel, without repeating it.

    With channels normalized by (m_c, s_c), sum_c W_c (x - m_c) / s_c = W (x - m) / s + b for gray x, where m and s are
    the means of m_c and s_c, W = sum_c W_c s / s_c, and b = sum_c W_c (m - m_c) / s_c summed over the kernel. The constant
    b goes into the convolution's bias, or out of the running mean of the batch norm behind it. This is exact where the
    m_c agree or nothing is padded; else only within half a kernel of the border it is not. Kernels that are
    standardized on each pass keep their direction but not quite their length.
    """
    network, spec = backbone.network, backbone.spec
    if spec.channels == 1:
        return backbone
    _, convolution = _first_convolution(network)
    if convolution is None or convolution.in_channels != spec.channels or convolution.groups > 1:
        raise CarinaError(
            f"{spec.name} begins with no plain convolution of {spec.channels} channels, so it cannot be brought to one "
            "channel; choose another architecture"
        )
    weight, means, stds = (torch.as_tensor(v, dtype=torch.float64) for v in (convolution.weight, spec.mean, spec.std))
    mean, std = means.mean(), stds.mean()
    offset = (weight.sum(dim=(2, 3)) * (mean - means) / stds).sum(dim=1)
    kernel = (weight * (std / stds).view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
    convolution.weight = nn.Parameter(kernel.to(convolution.weight.dtype).contiguous(memory_format=torch.channels_last))
    convolution.in_channels = 1
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm) or not list(m.children())]
    behind = layers[layers.index(convolution) + 1]
    if convolution.bias is not None:
        convolution.bias += offset
    elif isinstance(behind, _BatchNorm) and behind.num_features == convolution.out_channels:
        behind.running_mean -= offset
    one = {"channels": 1, "mean": (mean.item(),), "std": (std.item(),), "args": {**spec.args, "in_chans": 1}}
    return Backbone(network, dataclasses.replace(spec, **one))


def load_backbone(
    reference: str,
    *,
    size: int | None = None,
    architecture: str = "resnet18",
    seed: int = 0,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.25,),
    one_channel: bool = False,
    largest: int | None = None,
) -> Backbone:
    """A backbone by reference.

    reference: ``random`` or ``random:NAME`` (untrained, from `seed`); a run or backbone folder of carina or timm; a file
    of weights for `architecture`; ``timm:NAME`` or ``hub:ORG/NAME`` (downloaded by timm); ``imagenet-lite0``; or
    ``KIND:FILE`` with a kind of `EXTERNAL`, such as ``rad-dino:FILE`` (see `carina.models.external`).
    size: input side in pixels, for those that can choose it; of size-specific batch norms the nearest ones are taken.
    mean, std: used where the reference has none of its own. one_channel: bring a network of three channels to one, with
    the same features. largest: the largest side it will be given; a transformer's tables of positions are made, or
    resampled by timm's rule, for it.
    """
    if reference == "random" or reference.startswith("random:"):
        name = reference.partition(":")[2] or architecture
        return random_backbone(name, size or 224, seed, mean, std, largest=largest)
    if adapter_of(reference) is not None:
        backbone = _external(reference, size, largest)
    elif reference.startswith(("timm:", "hub:")):
        backbone = _downloaded(reference, size, largest)
    elif Path(reference).is_dir():
        backbone = _folder(Path(reference), size, largest)
    elif Path(reference).is_file():
        backbone = _weights_file(Path(reference), architecture, size or 224, mean, std, largest, one_channel)
    else:
        raise CarinaError(
            f"backbone={reference} is neither a folder nor a file here; give a run, random, timm:NAME, hub:ORG/NAME, "
            f"imagenet-lite0, or KIND:FILE with one of {', '.join(kind for kind in EXTERNAL if kind != 'imagenet-lite0')}"
        )
    return _to_one_channel(backbone) if one_channel else backbone


def checkpoint_activations(backbone: Backbone) -> None:
    """Keep only the activations between blocks and compute the rest again in the backward pass: less memory, more time.

    The gradients are the same (Chen et al., arXiv 1604.06174), dropout included; batch norms move
    their running statistics once. Raises CarinaError for networks that timm cannot do it for.
    """
    try:
        backbone.network.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError, TypeError):
        raise CarinaError(
            f"timm cannot recompute the activations of {backbone.spec.name}; leave checkpoint_activations=false and "
            "raise accumulate instead"
        ) from None
    backbone.recomputes = True
