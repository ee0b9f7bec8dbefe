"""Model cards and the folder that is published: filled from what the runs recorded, private things left out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from carina import __version__
from carina.errors import CarinaError
from carina.files import atomic_folder, read_json, sha256, write_text
from carina.models.backbones import Backbone

NOT_A_DEVICE = (
    "This is research software output, **not a medical device**. It has not been cleared by any authority and must not "
    "be used to diagnose, triage or treat."
)


SUMS = "SHA256SUMS"


def _counts(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in values.items()) or "unknown"


def _terms(name: str, origin: Mapping[str, Any]) -> str:
    """What the owners of a source allow, a line of a list."""
    terms = origin.get("terms") or {}
    if not terms.get("license"):
        return f"  * {name}: upstream terms are not known to carina; the publisher must check them."
    weights = {"yes": "may be published", "no": "may not be published", "ask": "only with the owners' consent"}
    parents = f"; drawn from {', '.join(origin['lineage'])}" if origin.get("lineage") else ""
    return (
        f"  * {name}: {origin['title']}{parents}; license: {terms['license']}; derived weights: "
        f"{weights[terms['derived_weights']]}. {terms['clause']}"
    )


def backbone_card(backbone: Backbone, record: Mapping[str, Any], license: str | None = None) -> str:
    """The model card of a backbone as Markdown, from `record` (carina.json)."""
    spec, data, training = backbone.spec, record["data"], record["training"]
    recipe = training["recipe"]
    synthetic = " **synthetic**" if record["synthetic"] else ""
    head = {
        "library_name": "timm",
        "tags": ["timm", "chest-x-ray", "self-supervised", "image-feature-extraction", "carina"],
        "pipeline_tag": "image-feature-extraction",
        **({"license": license} if license else {}),
    }
    pretexts = ", ".join(f"{name} (weight {weight:g})" for name, weight in record["pretexts"].items())
    mean, std = spec.mean[0], spec.std[0]
    if len(set(spec.mean)) > 1 or len(set(spec.std)) > 1:
        mean, std = (f"torch.tensor({list(v)}).view(-1, 1, 1)" for v in (spec.mean, spec.std))
    repeat = f".repeat(1, {spec.channels}, 1, 1)" if spec.channels > 1 else ""
    age = "unknown"
    if data["age_median"] is not None:
        age = f"median {data['age_median']:.0f}, {data['age_range'][0]:.0f} to {data['age_range'][1]:.0f} years"
    warnings = []
    if record["synthetic"]:
        warnings.append("The corpus is **synthetic**: phantoms drawn from a seed. It says nothing about patients.")
    if record["transductive"]:
        warnings.append(
            "**Transductive**: rows outside the training split were read, so later tests are not independent."
        )
    if record["labels_used"] != "none":
        warnings.append(f"Labels were used {record['labels_used']}.")
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).strip(),
            "---",
            f"# {spec.name} pretrained on{synthetic} chest radiographs",
            "",
            f"A {spec.name} with {spec.channels} input channel(s), {spec.origin}, made with carina {__version__}.",
            "",
            NOT_A_DEVICE,
            "",
            *(f"> {line}" for line in warnings),
            "",
            "## Use",
            "",
            "```python",
            "import timm, torch",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()   # or hf-hub:ORG/NAME',
            f"x = torch.rand(1, 1, {spec.size}, {spec.size}){repeat}   # a radiograph in [0, 1], bright = dense",
            f"features = model((x - {mean}) / {std})   # (1, {backbone.dimension})",
            "```",
            "",
            f"Images: one channel in [0, 1], dense tissue bright, {spec.size} x {spec.size}; then (x - {mean}) / {std}. "
            f"Prepared with window={record['photometry'].get('window')}, fit={record['geometry'].get('fit')}.",
            "",
            "Intended: features for research on chest radiographs, fine-tuning and anomaly detection. Out of scope: "
            "clinical use, other body parts, lateral views unless the corpus below holds them, re-identification of "
            "persons.",
            "",
            "## Data",
            "",
            f"* {data['images']:,} images of {data['patients']:,} patients{synthetic}; the pretext saw "
            f"{record['pretext_saw']}; labels used: {record['labels_used']}.",
            f"* Sources: {_counts(data['source'])}",
            *(_terms(name, origin) for name, origin in data["origins"].items()),
            f"* Views: {_counts(data['view'])}",
            f"* Sex: {_counts(data['sex'])}; age: {age}",
            f"* Store: {', '.join(record['store_hashes'])}",
            "",
            "## Training",
            "",
            f"* Pretexts: {pretexts}; began with: {record['init']}",
            f"* {training['steps']:,} steps of {recipe['batch_size']} images, scales {record['scales']}, seed "
            f"{recipe['seed']}, {training['hours']:.2f} hours on {training['world_size']} process(es), precision "
            f"{recipe['precision']}",
            f"* Optimizer: {recipe['optim']['name']}, learning rate {recipe['optim']['lr']} ({recipe['optim']['lr_rule']})",
            "* The weights are those of the last step; no label chose them.",
            "",
            "The whole recipe is in `carina.json`; rebuild with `carina pretrain RECIPE.yaml store=STORE out=RUN`.",
            "",
            "## Limits",
            "",
            "* Networks trained on patients' images can memorize parts of them. Queues, prototypes, decoders and every "
            "memory of features stay with the owner.",
            "* Performance differs between hospitals, machines, views and groups of patients; measure it on your own.",
            "",
            "## License",
            "",
            license or "Not chosen yet: the owner of the data and weights must choose one before anything is uploaded.",
            "",
        ]
    )


def predictor_card(info: Mapping[str, Any], tables: list[str], license: str | None) -> str:
    """The card of a predictor; `tables` are Markdown tables of evaluations."""
    head = {
        "library_name": "carina",
        "tags": ["chest-x-ray", info["kind"], "carina"],
        **({"license": license} if license else {}),
    }
    member = info["members"][0]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        f"# Chest radiograph predictor: {info['kind']} of {', '.join(info['labels'])}",
        "",
        NOT_A_DEVICE,
        "",
        *(["> Trained on **synthetic** radiographs: it says nothing about patients.", ""] if info["synthetic"] else []),
        f"* Backbone: {member['backbone']['name']}, {member['backbone']['origin']}; mode {info['mode']}; its pretext saw "
        f"{info['pretext_saw']}" + ("; **transductive**" if info["transductive"] else ""),
        f"* Trained on {info['data']['images']:,} images of {info['data']['patients']:,} patients; labels used: "
        f"{info['labels_used']}",
        f"* Scores are {info['score']}; thresholds come from {info['thresholds_from']}",
        "",
        "```",
        "carina predict FOLDER images/*.png",
        "```",
        "",
        "## Results",
        "",
        *(tables or ["Not evaluated yet."]),
        "",
        "## License",
        "",
        license or "Not chosen yet: the owner of the data and weights must choose one before anything is uploaded.",
        "",
    ]
    return "\n".join(lines)


def _evaluation_tables(run: Path) -> list[str]:
    tables = []
    for path in sorted(run.glob("evaluations/*/metrics.json")):
        metrics = read_json(path)
        rows = [
            "| label | AUROC (95 % interval) | average precision | positives | note |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in metrics["table"]:
            if row["auroc"]["value"] is None:
                rows.append(f"| {row['label']} | - | - | {row['positives']} | {row['note']} |")
                continue
            rows.append(
                f"| {row['label']} | {row['auroc']['value']:.3f} ({row['auroc']['low']:.3f}-{row['auroc']['high']:.3f}) "
                f"| {row['ap']['value']:.3f} | {row['positives']} of {row['n']} | {row['note']} |"
            )
        title = f"Split `{metrics['split']}`" + (" (*synthetic*)" if metrics["synthetic"] else "")
        tables.append(f"{title}, {metrics['patients']} patients:\n\n" + "\n".join(rows))
    return tables


def assemble(run: Path, out: Path, license: str | None, allow_memory: bool) -> dict[str, Any]:
    """Write the folder that would be uploaded: the backbone or predictor, its card, checksums. Nothing else leaves.

    Raises CarinaError for a run without an artefact, and for a scorer that remembers patients' features unless allowed.
    """
    from carina.models.backbones import load_backbone

    backbone, predictor = run / "backbone", run / "predictor"
    if (predictor / "predictor.json").is_file():
        info = read_json(predictor / "predictor.json")
        memories = [m["scorer"]["name"] for m in info["members"] if m.get("scorer", {}).get("memory")]
        if memories and not allow_memory:
            raise CarinaError(
                f"this predictor's scorer ({memories[0]}) holds features of patients and stays with the owner; publish a "
                "gaussian one, or give allow_memory=true if you may share them"
            )
        source, kind = predictor, info["kind"]
        card = predictor_card(info, _evaluation_tables(run), license)
        if memories:
            card = card.replace(
                "## Results", "> **Memory**: the scorer holds features of training patients.\n\n## Results"
            )
    elif (backbone / "config.json").is_file():
        source, kind = backbone, "backbone"
        card = backbone_card(load_backbone(str(backbone)), read_json(backbone / "carina.json"), license)
    else:
        raise CarinaError(f"{run} holds neither a backbone nor a predictor; publish a finished run")
    if out.exists() and any(out.iterdir()):
        if not (out / SUMS).is_file():
            raise CarinaError(f"{out} is not empty; choose another out=")
        verify(out)  # an earlier dry run or a failed upload: made anew, unless somebody changed it
    with atomic_folder(out) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        write_text(temporary / "README.md", card)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        write_text(
            temporary / SUMS,
            "".join(f"{sha256(p)}  {p.relative_to(temporary).as_posix()}\n" for p in files),
        )
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    return {"kind": kind, "files": names, "bytes": sum((out / name).stat().st_size for name in names)}


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload the folder through huggingface_hub with the user's token; returns the address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:  # exist_ok keeps a public repository public
            raise CarinaError(f"{repo} exists and is public; make it private on the hub, or give private=false")
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"carina {__version__}")
    except CarinaError:
        raise
    except LocalTokenNotFoundError:
        raise CarinaError("no token for the hub is set; log in with `hf auth login`, or use --dry-run") from None
    except Exception as error:  # the hub client and its transport raise many kinds; none is carina's
        raise CarinaError(
            f"the hub could not be reached or refused {repo} ({type(error).__name__}); the folder {folder} is ready: "
            "check the name and token, and give the command again"
        ) from None
    return str(url)


def verify(folder: Path) -> None:
    """Check SHA256SUMS of a published folder."""
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise CarinaError(f"{name} in {folder} is not what was published; get it again, or choose another folder")
