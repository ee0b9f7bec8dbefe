"""Backbones and predictors for those who have no carina: ONNX graphs that take images, and timm networks with a head.

A folder in timm's format is one that `transformers` loads as well (its TimmWrapper reads the same config.json), so a
backbone needs nothing more; a predictor gets a network of its own where one can say the same as it.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from carina.draws import hash64
from carina.errors import CarinaError
from carina.files import write_bytes, write_json
from carina.models.backbones import Backbone
from carina.models.checkpoints import save_tensors, timm_config
from carina.models.features import only
from carina.models.heads import LinearHead
from carina.models.predictor import EDGE, Member, Predictor

ONNX = "model.onnx"
TOLERANCE = 1e-4  # of the graph's output, relative to its largest value where that is above 1
CROPS = {"pad": "border", "stretch": "squash", "crop": "center"}  # geometry's fit -> timm's crop_mode


def resizing(scale: int, size: int) -> torch.Tensor:
    """(size, scale) of A, so that A @ image @ A.T is what `resize_images` makes: bilinear resizing with antialiasing is
    linear and separable, and not every exporter knows it under its own name."""
    rows = torch.eye(scale)[None, None]
    return F.interpolate(rows, (size, scale), mode="bilinear", antialias=True, align_corners=False)[0, 0]


class BackboneGraph(nn.Module):
    """Images (B, 1, S, S) in [0, 1] -> features (B, D); normalization inside. S is the backbone's own size."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        self.inputs, self.output = {"image": backbone.spec.size}, "features"

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.backbone(image)


class PredictorGraph(nn.Module):
    """What `Predictor.scores` gives, as one graph: an image (B, 1, S, S) in [0, 1] for every scale, and the lungs
    (B, 1, S, S) bool where a member needs them -> scores (B, L) float32. Inputs are called image and lungs, with the scale
    behind where there are several."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.members = nn.ModuleList(predictor.members)
        scales = sorted(set(predictor.scales))
        names = {scale: f"_{scale}" if len(scales) > 1 else "" for scale in scales}
        lungs = sorted({member.scale for member in predictor.members if member.needs_lungs})
        self.inputs = {f"image{names[scale]}": scale for scale in scales}
        self.inputs |= {f"lungs{names[scale]}": scale for scale in lungs}
        self.output = "scores"
        self.reads = [
            (f"image{names[member.scale]}", f"lungs{names[member.scale]}" if member.needs_lungs else None)
            for member in predictor.members
        ]
        for number, member in enumerate(predictor.members):
            own = member.head is not None or member.scorer.settings.sizes is None
            if own and member.scale != member.backbone.spec.size:
                self.register_buffer(f"resize_{number}", resizing(member.scale, member.backbone.spec.size))
        weights = np.array([predictor.info["stack"][label] for label in predictor.labels])
        self.register_buffer("weights", torch.tensor(weights.T))
        self.calibrates = predictor.calibrates
        if self.calibrates:
            self.register_buffer("temperatures", torch.tensor(predictor.temperatures))

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        named, total = dict(zip(self.inputs, given)), 0.0
        for number, (member, (image, lungs)) in enumerate(zip(self.members, self.reads)):
            total = total + self._member(number, member, named[image], named.get(lungs)) * self.weights[number]
        if self.calibrates:
            share = total.clamp(EDGE, 1 - EDGE)
            total = _sigmoid((share.log() - (1 - share).log()) / self.temperatures)
        return total.float()

    def _member(self, number: int, member: Member, image: torch.Tensor, lungs: torch.Tensor | None) -> torch.Tensor:
        image = only(image, lungs, member.region)
        if hasattr(self, f"resize_{number}"):
            matrix = getattr(self, f"resize_{number}")
            image = matrix @ image @ matrix.T
        if member.scorer is not None:
            return member.distances(image, lungs)[:, None].double()
        return _sigmoid(member.logits(image).double())


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    """In double precision, for which onnxruntime has exp but no sigmoid."""
    return 1 / (1 + torch.exp(-x))


def example_inputs(graph: BackboneGraph | PredictorGraph, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Noise in [0, 1] as images and random masks as lungs, by name: what a graph and its network are compared on."""
    noise = np.random.default_rng(hash64("export", count, seed))
    result = {}
    for name, side in graph.inputs.items():
        values = noise.random((count, 1, side, side), dtype=np.float32)
        result[name] = values > 0.4 if name.startswith("lungs") else values
    return result


def write_onnx(path: Path, graph: BackboneGraph | PredictorGraph, facts: dict[str, Any]) -> None:
    """Export, compare with onnxruntime on inputs of another batch size, and write; `facts` go into the metadata.

    Raises CarinaError where a package is missing, the graph cannot be made or gives other numbers, and for a memory of
    patients' features, which is never put into a graph.
    """
    try:
        import onnx  # noqa: F401  (told before the work)
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise CarinaError(f"{error.name} is not installed; pip install 'carina-cxr[export]'") from None
    if any(member.scorer is not None and member.scorer.memory for member in getattr(graph, "members", ())):
        raise CarinaError(
            "a scorer that remembers features of patients is not put into a graph; its scores come from carina"
        )
    graph = graph.cpu().eval()
    refused = ""
    for dynamo in (
        False,
        True,
    ):  # the older exporter takes seconds where the newer takes minutes, but knows fewer networks
        try:
            data = _exported(graph, dynamo, facts)
            refused = _difference(graph, data)
        except Exception as error:  # exporters raise many kinds; all mean that this one cannot
            refused = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if not refused:
            write_bytes(path, data)
            return
    raise CarinaError(f"this network cannot be written as ONNX ({refused})")


def _exported(graph: nn.Module, dynamo: bool, facts: dict[str, Any]) -> bytes:
    import onnx

    given = tuple(torch.from_numpy(value) for value in example_inputs(graph, 2).values())
    names = list(graph.inputs)
    options: dict[str, Any] = {"input_names": names, "output_names": [graph.output], "dynamo": dynamo, "verbose": False}
    if dynamo:
        batch = torch.export.Dim("batch")
        options |= {"dynamic_shapes": {"given": tuple({0: batch} for _ in names)}, "external_data": False}
        if isinstance(graph, BackboneGraph):
            options["dynamic_shapes"] = {"image": {0: batch}}
    else:
        options |= {"dynamic_axes": {name: {0: "batch"} for name in (*names, graph.output)}, "opset_version": 18}
    talkative = logging.getLogger("torch.onnx")
    level = talkative.level
    with warnings.catch_warnings(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # about branches that depend on shapes: the comparison says whether they matter
        talkative.setLevel(logging.ERROR)
        try:
            torch.onnx.export(graph, given, f"{folder}/{ONNX}", **options)
        finally:
            talkative.setLevel(level)
        model = onnx.load(f"{folder}/{ONNX}")
    _anonymous(model)
    onnx.helper.set_model_props(model, {key: _text(value) for key, value in facts.items()})
    return model.SerializeToString(deterministic=True)


def _anonymous(model: Any) -> None:
    """Remove what exporters note of the source, where stack traces name folders of this machine; and no name looks like
    a path, so that a search for paths finds none."""
    model.doc_string = ""
    del model.metadata_props[:]
    graphs: list[Any] = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        named = [*getattr(graph, "initializer", ()), *graph.value_info, *graph.node]
        for part in (graph, *named, *([] if graph in model.functions else [*graph.input, *graph.output])):
            part.doc_string = ""
            del part.metadata_props[:]
        for part in named:
            part.name = part.name.replace("/", ".")
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [name.replace("/", ".") for name in names]
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@torch.no_grad()
def _difference(graph: nn.Module, data: bytes) -> str:
    """What is wrong with the outputs on three new images, or nothing."""
    import onnxruntime

    given = example_inputs(graph, 3)
    want = graph(*(torch.from_numpy(value) for value in given.values())).numpy()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    found = session.run([graph.output], given)[0]
    away = distance(found, want)
    return "" if away <= TOLERANCE else f"its outputs differ by {away:.1e}"


def distance(found: np.ndarray, want: np.ndarray) -> float:
    """The largest difference, relative to the largest value where that is above 1; infinite for other shapes or NaN."""
    if found.shape != want.shape:
        return float("inf")
    away = np.abs(found.astype(np.float64) - want).max() / max(1.0, np.abs(want).max())
    return float(away) if np.isfinite(away) else float("inf")


@torch.no_grad()
def classifier_network(predictor: Predictor) -> tuple[nn.Module, str] | None:
    """timm's network with the head as its classifier, giving the logits whose sigmoid are the scores, and the classifier's
    name; None where no timm network can say the same: several members, another head than a linear one, or a scorer."""
    member = predictor.members[0]
    head = member.head
    plain = len(predictor.members) == 1 and isinstance(head, LinearHead) and head.column is None
    if not plain or member.region != "whole":
        return None
    network = copy.deepcopy(member.backbone.network)
    network.reset_classifier(len(predictor.labels))
    classifier = network.get_classifier()
    if not isinstance(classifier, nn.Linear) or classifier.in_features != head.weight.shape[1]:
        return None
    share = torch.tensor(predictor.temperatures if predictor.calibrates else np.ones(len(predictor.labels)))
    classifier.weight.copy_(head.weight / share[:, None].float())
    classifier.bias.copy_(head.bias / share.float())
    size = member.backbone.spec.size
    images = torch.from_numpy(np.random.default_rng(0).random((2, 1, size, size), dtype=np.float32))
    found = network.eval()(member.backbone.normalize(images)).numpy()
    want = (head([member.backbone(images)]) / share.float()).numpy()
    name = next(name for name, part in network.named_modules() if part is classifier)
    return (network, name) if distance(found, want) <= 1e-5 else None


def write_classifier(folder: Path, predictor: Predictor) -> bool:
    """config.json and model.safetensors of `classifier_network` in timm's format; False where there is none."""
    found = classifier_network(predictor)
    if found is None:
        return False
    network, name = found
    config = timm_config(predictor.members[0].backbone)
    own = {"num_classes": len(predictor.labels)}
    config |= {**own, "label_names": predictor.labels, "problem_type": "multi_label_classification"}
    config["pretrained_cfg"] |= {**own, "classifier": name}
    save_tensors(folder / "model.safetensors", network.state_dict())
    write_json(folder / "config.json", config)
    return True


def fit_to_geometry(config: dict[str, Any], geometry: dict[str, Any]) -> dict[str, Any]:
    """timm's config.json, so that timm's and transformers' own preprocessing fits an image as the store did."""
    return {**config, "pretrained_cfg": {**config["pretrained_cfg"], "crop_mode": CROPS[geometry.get("fit", "pad")]}}
