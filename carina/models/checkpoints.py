"""Save, load and verify: backbones in timm's hub format, tensors as safetensors. Nothing is pickled."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from carina.errors import CarinaError
from carina.files import atomic_folder, atomic_path, write_json, write_text
from carina.models.backbones import Backbone
from carina.models.scales import FILE as SCALES
from carina.models.scales import nearest_size, split_norms


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, atomically; only those that share memory or are not contiguous are copied."""
    plain, met = {}, set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        plain[key] = value.clone() if memory in met else value
        met.add(memory)
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(plain, temporary)
        except SafetensorError as error:
            # the number of a full disk stands in its words alone
            if number := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
            raise
        temporary.chmod(mode)  # it leaves a file that only its owner can read


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise CarinaError(f"{path} is not there; the folder may be incomplete")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CarinaError(
            f"{path} is not a whole safetensors file ({error}); it may be damaged: write it again"
        ) from None


def timm_config(backbone: Backbone) -> dict[str, Any]:
    """config.json in timm's hub format, with nothing of the tag, address or licence of weights that timm ships."""
    spec = backbone.spec
    return {
        "architecture": spec.name,
        "num_classes": 0,
        "num_features": backbone.dimension,
        "model_args": spec.args,
        "pretrained_cfg": {
            "tag": "carina",
            "custom_load": False,
            "input_size": [spec.channels, spec.size, spec.size],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": 0,
            "license": spec.license or None,
        },
    }


def write_backbone(folder: str | Path, backbone: Backbone, facts: dict[str, Any], card: str) -> None:
    """config.json, model.safetensors, carina.json (`facts`) and README.md (`card`), as one atomic folder.

    Size-specific batch norms: model.safetensors is the plain network with those of the default size (the nearest to
    `spec.size`), scales.safetensors holds the others as `<size>/<key>`, and `norm_sizes` of carina.json lists the sizes,
    the default one first.
    """
    tensors, norms = split_norms(backbone.network)
    sizes = sorted(norms, key=lambda size: size != nearest_size(norms, backbone.spec.size))
    if norms:
        tensors |= norms.pop(sizes[0])
    with atomic_folder(folder) as temporary:
        save_tensors(temporary / "model.safetensors", tensors)
        if norms:
            others = {f"{other}/{key}": value for other, state in norms.items() for key, value in state.items()}
            save_tensors(temporary / SCALES, others)
        write_json(temporary / "config.json", timm_config(backbone))
        record = {**facts, "origin": backbone.spec.origin, "size": backbone.spec.size, "norm_sizes": sizes}
        write_json(temporary / "carina.json", record)
        write_text(temporary / "README.md", card)
