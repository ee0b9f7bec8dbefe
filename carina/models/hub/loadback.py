"""Before an upload: load the folder in a fresh process as a stranger would, and compare with what the run's own gives.

This file is also that process: it is run as a script, and imports carina last.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from carina.models.hub.folder import Artefact

TOLERANCES = {"timm": 1e-5, "transformers": 1e-5, "carina": 1e-5, "onnxruntime": 1e-4}
NETWORK = "network"  # what goes into the timm network alone: normalized images


def load_back(artefact: Artefact, folder: Path, timeout: float = 900) -> dict[str, float]:
    """Largest difference by package, relative to the largest value where that is above 1.

    Raises CarinaError where the folder does not load or gives other numbers. A package that is not installed is left out.
    """
    from carina.errors import CarinaError
    from carina.models.export import distance

    given, want = _expected(artefact, folder)
    with tempfile.TemporaryDirectory() as place:
        np.savez(f"{place}/given.npz", **given)
        words = [sys.executable, __file__, str(folder.resolve()), f"{place}/given.npz", f"{place}/found.npz"]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **offline}
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment, cwd=place)
        except subprocess.TimeoutExpired:
            raise CarinaError(f"{folder} did not load within {timeout:.0f} seconds; give the command again") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise CarinaError(f"{folder} does not load in a fresh process ({last[:300]}); it was not uploaded")
        with np.load(f"{place}/found.npz") as saved:
            found = {name: saved[name] for name in saved.files}
    away = {name: distance(values, want["network" if name in ("timm", "transformers") else "whole"])
            for name, values in found.items()}  # fmt: skip
    for name, difference in away.items():
        if difference > TOLERANCES[name]:
            raise CarinaError(f"{folder} gives other numbers in {name} (by {difference:.1e}); it was not uploaded")
    return away


def _expected(artefact: Artefact, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs by name, and what the run's own artefact makes of them: `network` of timm's part, `whole` of all of it."""
    import torch

    from carina.models.backbones import Backbone
    from carina.models.export import classifier_network, example_inputs

    graph, model = artefact.graph.eval(), artefact.model
    given = example_inputs(graph, 2, seed=1)
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    with torch.no_grad():
        if isinstance(model, Backbone):
            backbone, network = model, model.network
            whole = backbone(tensors["image"]).numpy()
        else:
            backbone = model.members[0].backbone
            network = classifier_network(model)[0] if (folder / "config.json").is_file() else backbone.network
            scales = {side: tensors[name] for name, side in graph.inputs.items() if name.startswith("image")}
            lungs = {side: tensors[name] for name, side in graph.inputs.items() if name.startswith("lungs")}
            whole = model.scores(scales, lungs)
        size = backbone.spec.size
        images = torch.from_numpy(np.random.default_rng(1).random((2, 1, size, size), dtype=np.float32))
        normalized = backbone.normalize(images).contiguous()
        return {**given, NETWORK: normalized.numpy()}, {"network": network.eval()(normalized).numpy(), "whole": whole}


def main(folder: str, inputs: str, outputs: str) -> None:
    import timm
    import torch

    root, given = Path(folder), dict(np.load(inputs))
    inner = root if (root / "config.json").is_file() else root / "member-0"
    images = torch.from_numpy(given.pop(NETWORK))
    found: dict[str, np.ndarray] = {}
    with torch.no_grad():
        found["timm"] = timm.create_model(f"local-dir:{inner}", pretrained=True).eval()(images).numpy()
        if importlib.util.find_spec("transformers") is not None:
            found["transformers"] = _by_transformers(inner, images)
        if (root / "model.onnx").is_file():
            import onnxruntime

            session = onnxruntime.InferenceSession(str(root / "model.onnx"), providers=["CPUExecutionProvider"])
            found["onnxruntime"] = session.run(None, given)[0]
        found["carina"] = _by_carina(root, given)
    np.savez(outputs, **found)


def _by_transformers(folder: Path, images) -> np.ndarray:
    import json

    from transformers import AutoModel, AutoModelForImageClassification

    if json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_classes"]:
        return AutoModelForImageClassification.from_pretrained(folder).eval()(images).logits.numpy()
    return AutoModel.from_pretrained(folder).eval()(images).pooler_output.numpy()


def _by_carina(folder: Path, given: dict[str, np.ndarray]) -> np.ndarray:
    import torch

    from carina.models.backbones import load_backbone
    from carina.models.predictor import load_predictor

    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    if not (folder / "predictor.json").is_file():
        return load_backbone(str(folder)).eval()(tensors["image"]).numpy()
    sides = {name: value.shape[-1] for name, value in tensors.items()}
    images, lungs = (
        {sides[name]: value for name, value in tensors.items() if name.startswith(kind)} for kind in ("image", "lungs")
    )
    return load_predictor(folder).scores(images, lungs)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are no packages of their own
    main(*sys.argv[1:])
