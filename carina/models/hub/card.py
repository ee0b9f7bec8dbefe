"""Model cards: what a stranger must know before using the weights, filled from what the runs recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carina import __version__
from carina.models.backbones import Backbone
from carina.models.hub.clauses import origins_of
from carina.models.hub.rebuild import rebuild, store_words
from carina.models.hub.sections import (
    NOT_A_DEVICE,
    NOTHING_MORE,
    Told,
    citing,
    effort,
    front_matter,
    label_table,
    license_section,
    limits,
    normalized,
    numbers,
    other_uses,
    pretraining,
    purpose,
    remembers,
    repeat,
    results,
    source_table,
    stack_lines,
    stores,
    terms,
    warnings_of,
    watched,
    which_weights,
)
from carina.models.hub.words import methods, prepared


def backbone_card(backbone: Backbone, record: Mapping[str, Any], told: Told = NOTHING_MORE) -> str:
    """The model card of a backbone as Markdown, from `record` (carina.json)."""
    spec, data, training = backbone.spec, record["data"], record["training"]
    recipe, optim = training["recipe"], training["recipe"]["optim"]
    synthetic = " **synthetic**" if record["synthetic"] else ""
    size, channels = spec.size, f"{spec.channels} input channel" + ("s" if spec.channels > 1 else "")
    tags = ["timm", "self-supervised", "image-feature-extraction"]
    lines = [
        *front_matter("timm", tags, told, "image-feature-extraction"),
        f"# {spec.name} pretrained on{synthetic} chest radiographs",
        "",
        f"A {spec.name} with {channels}, pretrained on {data['images']:,}{synthetic} chest radiographs of "
        f"{data['patients']:,} patients by {methods(record['pretexts'])}. It turns a radiograph into {backbone.dimension} "
        f"features; it says nothing about a patient by itself. Trained with carina "
        f"{told.environment.get('carina', __version__)}.",
        "",
        NOT_A_DEVICE,
        "",
        *warnings_of(record),
        "## Use",
        "",
        "```python",
        "import timm, torch",
        f'model = timm.create_model("hf-hub:{told.repo}", pretrained=True).eval()   # or local-dir:FOLDER',
        f"x = torch.rand(1, 1, {size}, {size}){repeat(spec)}   # a radiograph in [0, 1], bright = dense",
        f"features = model({normalized(spec)})   # (1, {backbone.dimension})",
        "```",
        "",
        *other_uses(told, f"carina embed hub:{told.repo} STORE out=features.parquet"),
        prepared(record, [size])
        + f" Then (x - mean) / std with mean {numbers(spec.mean)} and std {numbers(spec.std)}.",
        "",
        *purpose("features for research on chest radiographs, fine-tuning and anomaly detection"),
        "## Data",
        "",
        f"{data['images']:,} images of {data['patients']:,} patients{synthetic}; what the pretext saw, as far as labels "
        f"tell: {record['pretext_saw']}; labels used: {record['labels_used']}.",
        "",
        *source_table(data),
        "",
        *stores(record),
        *terms(origins_of(record), told.confirmed),
        "## Training",
        "",
        f"* Method: {methods(record['pretexts'])}; began with: {record['init']}",
        f"* {training['steps']:,} steps of {recipe['batch_size']} images ({training.get('images_seen', 0):,} images seen), "
        f"scales {numbers(record['scales'])} px, seed {recipe['seed']}, precision {recipe['precision']}",
        f"* Optimizer {optim['name']}, learning rate {optim['lr']} (rule: {optim['lr_rule']}), warm-up over "
        f"{optim.get('warmup', 0):.0%} of the steps, final rate {optim.get('final_lr', 0):g}, weight decay "
        f"{optim.get('weight_decay', 0):g}",
        f"* {effort(training, told)}",
        f"* The weights are those of the {which_weights(record.get('weights', 'last'))}; no label chose them.",
        *watched(training.get("watch")),
        "",
        *results(told, "Of predictors that were fine-tuned from these weights:"),
        *limits(record),
        *rebuild(record, told, f"carina pretrain recipe.yaml store={store_words(record)} out=RUN", "its folders"),
        *citing(record["pretexts"]),
        *license_section(told.license, spec.license),
    ]
    return "\n".join(lines)


def predictor_card(info: Mapping[str, Any], told: Told = NOTHING_MORE) -> str:
    """The card of a predictor as Markdown, from `info` (predictor.json)."""
    member, data, earlier = info["members"][0], info["data"], info.get("pretraining")
    labels, classifies = ", ".join(info["labels"]), info["kind"] == "classify"
    whole = told.formats.get("timm", "").startswith("logits")
    tags = ["image-classification"] if classifies else ["anomaly-detection"]
    command, asks = _finetune_command(info, told)
    lines = [
        *front_matter("timm" if whole else "carina", tags, told, "image-classification" if whole else None),
        f"# Chest radiographs: {f'classifier of {labels}' if classifies else 'anomaly detector'}",
        "",
        f"A research predictor, trained on {data['images']:,} images of {data['patients']:,} patients with carina "
        f"{told.environment.get('carina', __version__)}.",
        "",
        NOT_A_DEVICE,
        "",
        *warnings_of(info),
        *_memory(info),
        f"* Backbone: {member['backbone']['name']}, {member['backbone']['origin']}; its pretext saw {info['pretext_saw']}",
        f"* {_learned(info)}; labels used: {info['labels_used']}",
        f"* Scores are {_scores(info)}; thresholds come from {info['thresholds_from']}",
        *stack_lines(info),
        "",
        "## Use",
        "",
        "```bash",
        f"carina predict hub:{told.repo} images/*.dcm",
        "```",
        "",
        *(_whole_use(told) if whole else []),
        *other_uses(told, f"carina embed hub:{told.repo} STORE out=features.parquet"),
        prepared(info, sorted({m["scale"] for m in info["members"]})),
        "",
        "A score at or above its threshold counts as positive:",
        "",
        "| label | threshold |",
        "| --- | ---: |",
        *(f"| {label} | {value:.4g} |" for label, value in info.get("thresholds", {}).items()),
        "",
        *purpose(f"research on {_subject(info)} in chest radiographs like those below"),
        "## Data",
        "",
        *source_table(data),
        "",
        *stores(info),
        *label_table(data),
        *(pretraining(earlier) if earlier else []),
        *terms(origins_of(info), told.confirmed),
        "## Training",
        "",
        *_training(info, told),
        "",
        *results(told),
        *limits(info),
        *rebuild(info, told, command, "its folders and its backbone"),
        *asks,
        *citing((earlier or {}).get("pretexts", {})),
        *license_section(told.license, member["backbone"].get("license", "")),
    ]
    return "\n".join(lines)


def _subject(info: Mapping[str, Any]) -> str:
    only_abnormal = info["labels"] == ["abnormal"]
    return "telling abnormal from normal" if only_abnormal else ", ".join(info["labels"])


def _memory(info: Mapping[str, Any]) -> list[str]:
    return ["> **Memory**: the scorer holds features of training patients.", ""] if remembers(info) else []


def _learned(info: Mapping[str, Any]) -> str:
    trained = info["training"].get("steps", 0) > 0
    backbone = (
        "the backbone stays as it is" if info["mode"] == "frozen" else f"the backbone learns too ({info['mode']})"
    )
    if info["kind"] == "classify":
        return f"Mode {info['mode']}: {backbone}; " + (
            "a head learns" if trained else "a linear probe reads its features"
        )
    scorer = info["members"][0].get("scorer", {}).get("name", "scorer")
    return f"Mode {info['mode']}: {backbone}; the distance from normal images is that of a {scorer} scorer"


def _scores(info: Mapping[str, Any]) -> str:
    if info["score"] == "probability":
        return "probabilities in [0, 1]" + (", temperature-scaled" if info.get("temperature") else "")
    return "distances, higher is more abnormal and no probability"


def _whole_use(told: Told) -> list[str]:
    return [
        "```python",
        "import timm, torch",
        f'model = timm.create_model("hf-hub:{told.repo}", pretrained=True).eval()   # or local-dir:FOLDER',
        'size, mean, std = (model.pretrained_cfg[key] for key in ("input_size", "mean", "std"))',
        "x = torch.rand(1, *size)   # a radiograph in [0, 1], bright = dense",
        "mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))",
        "scores = model((x - mean) / std).sigmoid()   # (1, labels), in the order of the table below",
        "```",
        "",
    ]


def _training(info: Mapping[str, Any], told: Told) -> list[str]:
    training = info.get("training", {})
    if training.get("steps"):
        how = [f"* {training['steps']:,} steps of gradient descent, seed {info.get('seed', 'unknown')}"]
    else:
        how = [f"* Fitted once, without gradient descent; seed {info.get('seed', 'unknown')}"]
    how += [
        f"* Logistic regression for {label}: strength {probe['strength']:g}, chosen within the training patients, where the "
        f"cross-fitted AUROC is {probe['cross_fitted_auroc']:.3f}"
        for label, probe in (info.get("probe") or {}).items()
        if probe.get("cross_fitted_auroc") is not None
    ]
    return [*how, f"* {effort(training, told)}"]


def _finetune_command(info: Mapping[str, Any], told: Told) -> tuple[str, list[str]]:
    """The command that fits it again, and what BACKBONE in it is."""
    backbone, asks = told.backbone, []
    if backbone == "BACKBONE" and info["mode"] == "frozen" and len(info["members"]) == 1:
        backbone = f"hub:{told.repo}"  # unchanged in member-0
    elif backbone == "BACKBONE":
        asks = ["BACKBONE is the pretrained network described above, which is no part of this folder: it changed while "
                "this was trained.", ""]  # fmt: skip
    return f"carina finetune recipe.yaml backbone={backbone} store={store_words(info)} out=RUN", asks
