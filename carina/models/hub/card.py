"""Model cards: what a stranger must know before using the weights, filled from what the runs recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carina import __version__
from carina.models.backbones import Backbone
from carina.models.hub.clauses import origins_of
from carina.models.hub.sections import (
    NOT_A_DEVICE,
    NOTHING_MORE,
    Told,
    effort,
    front_matter,
    label_table,
    license_section,
    limits,
    normalized,
    numbers,
    other_uses,
    prepare_command,
    pretraining,
    purpose,
    repeat,
    results,
    settings,
    source_table,
    stack_lines,
    terms_line,
    warnings_of,
    watched,
    which_weights,
)


def backbone_card(backbone: Backbone, record: Mapping[str, Any], told: Told = NOTHING_MORE) -> str:
    """The model card of a backbone as Markdown, from `record` (carina.json)."""
    spec, data, training = backbone.spec, record["data"], record["training"]
    recipe = training["recipe"]
    synthetic = " **synthetic**" if record["synthetic"] else ""
    pretexts = ", ".join(f"{name} (weight {weight:g})" for name, weight in record["pretexts"].items())
    size = spec.size
    lines = [
        *front_matter("timm", ["timm", "self-supervised", "image-feature-extraction"], told.license),
        f"# {spec.name} pretrained on{synthetic} chest radiographs",
        "",
        f"A {spec.name} with {spec.channels} input channel(s), {spec.origin}, made with carina {__version__}.",
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
        f"Images: one channel in [0, 1], dense tissue bright, {size} x {size}; then (x - mean) / std with mean "
        f"{numbers(spec.mean)} and std {numbers(spec.std)}. Prepared with {settings(record['photometry'])}; "
        f"{settings(record['geometry'])}; scales {numbers(record['scales'])} px.",
        "",
        *purpose("features for research on chest radiographs, fine-tuning and anomaly detection"),
        "## Data",
        "",
        f"{data['images']:,} images of {data['patients']:,} patients{synthetic}; the pretext saw {record['pretext_saw']}; "
        f"labels used: {record['labels_used']}.",
        "",
        *source_table(data),
        "",
        "What the owners allow, as carina knows it; their own text decides:",
        "",
        *(terms_line(name, origin, told.confirmed) for name, origin in origins_of(record).items()),
        "",
        f"Store: {', '.join(record['store_hashes'])}.",
        "",
        "## Training",
        "",
        f"* Pretexts: {pretexts}; began with: {record['init']}",
        f"* {training['steps']:,} steps of {recipe['batch_size']} images ({training.get('images_seen', 0):,} images seen), "
        f"scales {record['scales']}, seed {recipe['seed']}, precision {recipe['precision']}",
        f"* Optimizer {recipe['optim']['name']}, learning rate {recipe['optim']['lr']} ({recipe['optim']['lr_rule']}), "
        f"warm-up {recipe['optim'].get('warmup', 0):.0%}, final rate {recipe['optim'].get('final_lr', 0):g}, weight decay "
        f"{recipe['optim'].get('weight_decay', 0):g}",
        f"* {effort(training, told)}",
        f"* The weights are those of the {which_weights(record.get('weights', 'last'))}; no label chose them.",
        *watched(training.get("watch")),
        "",
        *results(told),
        *limits(record),
        "## Rebuild",
        "",
        "`recipe.yaml` holds every value of this run but its folders:",
        "",
        "```bash",
        f"pip install carina-cxr=={told.environment.get('carina', __version__)}",
        prepare_command(record),
        "carina pretrain recipe.yaml store=STORE out=RUN",
        "```",
        "",
        "`carina inspect STORE` shows the store's hash; it is the one above when images and settings are the same.",
        "",
        *license_section(told.license, spec.license),
    ]
    return "\n".join(lines)


def predictor_card(info: Mapping[str, Any], told: Told = NOTHING_MORE) -> str:
    """The card of a predictor as Markdown, from `info` (predictor.json)."""
    member, data = info["members"][0], info["data"]
    memories = [m["scorer"]["name"] for m in info["members"] if m.get("scorer", {}).get("memory")]
    task = ["image-classification"] if info["kind"] == "classify" else ["anomaly-detection"]
    training, earlier = info.get("training", {}), info.get("pretraining")
    lines = [
        *front_matter("carina", [info["kind"], *task], told.license),
        f"# Chest radiograph predictor: {info['kind']} of {', '.join(info['labels'])}",
        "",
        NOT_A_DEVICE,
        "",
        *warnings_of(info),
        *(["> **Memory**: the scorer holds features of training patients.", ""] if memories else []),
        f"* Backbone: {member['backbone']['name']}, {member['backbone']['origin']}; mode {info['mode']}; its pretext saw "
        f"{info['pretext_saw']}" + ("; **transductive**" if info["transductive"] else ""),
        f"* Trained on {data['images']:,} images of {data['patients']:,} patients; labels used: {info['labels_used']}",
        f"* Scores are {info['score']}; thresholds come from {info['thresholds_from']}",
        f"* Made with carina {__version__}",
        *stack_lines(info),
        "",
        "## Use",
        "",
        "```bash",
        f"carina predict hub:{told.repo} images/*.png",
        "```",
        "",
        *other_uses(told, f"carina embed hub:{told.repo} STORE out=features.parquet"),
        f"Images: one channel in [0, 1], dense tissue bright, at {numbers(sorted({m['scale'] for m in info['members']}))} "
        f"px. Prepared with {settings(info['photometry'])}; {settings(info['geometry'])}.",
        "",
        "| label | threshold |",
        "| --- | ---: |",
        *(f"| {label} | {value:.4g} |" for label, value in info.get("thresholds", {}).items()),
        "",
        *purpose(f"research on {', '.join(info['labels'])} in chest radiographs like those below"),
        "## Data",
        "",
        *source_table(data),
        "",
        *label_table(data.get("labels")),
        *(pretraining(earlier) if earlier else []),
        "What the owners allow, as carina knows it; their own text decides:",
        "",
        *(
            [terms_line(name, origin, told.confirmed) for name, origin in origins_of(info).items()]
            or ["* Not recorded."]
        ),
        "",
        f"Store: {', '.join(info.get('store_hashes', [])) or 'not recorded'}.",
        "",
        "## Training",
        "",
        f"* Mode {info['mode']}, seed {info.get('seed', 'unknown')}, {training.get('steps', 0):,} steps of gradient descent",
        f"* {effort(training, told)}",
        "",
        *results(told),
        *limits(info),
        "## Rebuild",
        "",
        "`recipe.yaml` holds every value of this run but its folders and its backbone:",
        "",
        "```bash",
        f"pip install carina-cxr=={told.environment.get('carina', __version__)}",
        prepare_command(info),
        f"carina finetune recipe.yaml backbone={told.backbone} store=STORE out=RUN",
        "```",
        "",
        *license_section(told.license, member["backbone"].get("license", "")),
    ]
    return "\n".join(lines)
