"""The verb inspect: what lies at a path, and the facts of it that a user wants. Reads, never writes.

Nothing is shown that names a patient: identifiers appear only as counts, folders and files only as the path given.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from carina.errors import CarinaError
from carina.files import folder_size, read_json
from carina.runs import RECIPE, Run

MIB = 2**20
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
STAGES = ("prepare", "pretrain", "finetune", "evaluate")
# What is not repeated of carina.json, predictor.json and metrics.json: shown in other words, or too long to read
BACKBONE_REST = {"kind", "data", "training", "origin", "size"}
PREDICTOR_REST = {"kind", "data", "training", "stack", "scorer", "probe", "members"}
EVALUATION_REST = {"synthetic", "labels", "overlap", "resamples", "table"}


def inspect(path: str | Path) -> dict[str, Any]:
    """What `path` is, under ``what``, and its facts; nested dicts and lists of plain values, fit for JSON.

    Knows stores (unfinished too), runs, backbones, predictors, evaluations, comparisons, published folders, Parquet
    files of carina, recipes, and backbones from elsewhere (``rad-dino:FILE``). Raises CarinaError where nothing of that
    kind lies.
    """
    place = Path(path)
    if not place.exists():
        from carina.models.external import adapter_of

        if adapter_of(str(path)) is not None:
            return _external(str(path))
        raise CarinaError(f"{path} is not there; check the path")
    if place.is_file():
        show = FILES.get(place.suffix.lower())
        if show is not None:
            return show(place)
    for names, show in FOLDERS:
        if place.is_dir() and all((place / name).is_file() for name in names):
            return show(place)
    raise CarinaError(
        f"{path} is nothing that carina knows; give a store, run, backbone, predictor, evaluation or published folder, "
        "a Parquet file of features or predictions, or a recipe"
    )


# -- stores ----------------------------------------------------------------------------------------------


def _store(folder: Path) -> dict[str, Any]:
    info = read_json(folder / "store.json")
    counts = info["counts"]
    values = {
        name: {kind: counts[kind][name] for kind in ("positive", "negative", "uncertain")} for name in info["labels"]
    }
    return {
        "what": "store" + (" (synthetic)" if info["synthetic"] else ""),
        "images": counts["images"],
        "patients": counts["patients"],
        "patients_unknown": counts["patients_unknown"],
        "rejected": counts["rejected"],
        "reasons": counts["reasons"],
        "scales": info["scales"],
        "split": counts["split"],
        "patients_by_split": counts["patients_by_split"],
        "labels": values,
        "view": counts["view"],
        "sex": counts["sex"],
        "lungs": counts["lungs_source"],
        "lungs_implausible": counts["lungs_implausible"],
        "lesions": info["lesions"],
        "duplicates": counts["duplicates"],
        "encoding": {scale: f"{form['format']}, {form['bits']} bits" for scale, form in info["encoding"].items()},
        "sources": info["sources"],
        "photometry": info["photometry"],
        "geometry": info["geometry"],
        "store_hash": info["store_hash"],
        "key_check": info["key_check"],
        "mib": round(info["bytes"] / MIB, 1),
        "carina": info["carina"],
    }


def _unfinished_store(folder: Path) -> dict[str, Any]:
    from carina.data.store import SHARD_SIZE

    plan = read_json(folder / "plan.json")
    shards = -(-plan["files"] // SHARD_SIZE)
    return {
        "what": "unfinished store",
        "state": "give the same prepare command again, it goes on where it stopped",
        "files": plan["files"],
        "shards_done": len(list((folder / "parts").glob("rows-*.parquet"))),
        "shards": shards,
        "scales": plan["recipe"]["scales"],
        "mib": round(folder_size(folder) / MIB, 1),
    }


# -- runs ------------------------------------------------------------------------------------------------


def _run(folder: Path) -> dict[str, Any]:
    run = Run.open(folder)
    recipe, environment, metrics = run.recipe(), run.environment(), run.metrics()
    artefact = folder / {"pretrain": "backbone", "finetune": "predictor"}.get(run.stage, run.stage)
    facts: dict[str, Any] = {"what": f"{run.stage} run"}
    trainings = sorted(path.parent for path in folder.glob("scale-*/recipe.yaml"))
    if trainings and not artefact.is_dir():
        facts["state"] = f"unfinished, {len(trainings)} of {len(recipe['scales'])} scales begun; --resume goes on"
    elif recipe.get("mode") == "frozen" or trainings:
        facts["state"] = "finished" if artefact.is_dir() else "unfinished; give the command again with --resume"
    else:
        facts |= _progress(run, recipe, metrics, finished=artefact.is_dir())
    keys = ["task", "mode", "labels", "scales", "scale", "seed"]
    if recipe.get("init", recipe.get("backbone")) == "random":
        keys.append("architecture")  # otherwise the network is that of the weights it began with
    facts |= {key: recipe[key] for key in keys if recipe.get(key) is not None}
    if "pretexts" in recipe:
        facts["pretexts"] = {k: v["weight"] for k, v in recipe["pretexts"].items() if v["weight"] > 0}
    known = ("device", "gpu", "precision", "world_size", "hours", "carina")
    facts |= {key: environment[key] for key in known if environment.get(key) is not None}
    if artefact.is_dir():
        facts[artefact.name] = _backbone(artefact) if artefact.name == "backbone" else _predictor(artefact)
        facts[artefact.name].pop("what")
    evaluations = sorted(folder.glob("evaluations/*/metrics.json"))
    if evaluations:
        facts["evaluations"] = {path.parent.name: _scores(read_json(path)) for path in evaluations}
    facts["mib"] = round(folder_size(folder) / MIB, 1)
    return facts


def _progress(run: Run, recipe: dict[str, Any], metrics: list[dict[str, Any]], finished: bool) -> dict[str, Any]:
    total = run.environment().get("steps_planned")
    done = metrics[-1]["step"] + 1 if metrics else 0
    states = sorted((run.folder / "checkpoints").glob("step-*/state.json"))
    kept = read_json(states[-1])["step"] if states else 0
    if finished:
        state = "finished"
    elif kept:
        state = f"unfinished; --resume goes on from step {kept}"
    else:
        state = "unfinished, without a checkpoint; --resume begins anew"
    facts: dict[str, Any] = {"state": state, "steps_done": done, "steps": total}
    if metrics:
        last = {key: value for key, value in metrics[-1].items() if key != "step" and not key.startswith("data_")}
        facts["last"] = last
        # every step is noisy: the mean of the last tenth is what a curve would show
        tail = [row["loss"] for row in metrics[-max(1, len(metrics) // 10) :] if row.get("loss") is not None]
        facts["mean_loss_of_last_tenth"] = round(sum(tail) / len(tail), 4) if tail else None
    return facts


# -- models ----------------------------------------------------------------------------------------------


def _parameters(file: Path) -> int:
    """Trained values in a safetensors file, from its header alone; running statistics of batch norm do not count."""
    with safe_open(file, framework="numpy") as tensors:
        names = [name for name in tensors.keys() if not name.endswith(BUFFERS)]  # noqa: SIM118 (no mapping)
        return sum(prod(tensors.get_slice(name).get_shape()) for name in names)


def _without(facts: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The facts that are known and not among `names`."""
    return {key: value for key, value in facts.items() if key not in names and value is not None}


def _backbone(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    record = read_json(folder / "carina.json") if (folder / "carina.json").is_file() else {}
    shape = config.get("pretrained_cfg", {})
    data, training = record.get("data", {}), record.get("training", {})
    facts = {
        "what": "backbone" + ("" if record else " in timm's format, not made by carina"),
        "architecture": config["architecture"],
        "origin": record.get("origin"),
        "input": shape.get("input_size"),
        "mean": shape.get("mean"),
        "std": shape.get("std"),
        "features": config.get("num_features"),
        "parameters": _parameters(folder / "model.safetensors"),
        "images": data.get("images"),
        "patients": data.get("patients"),
        "steps": training.get("steps"),
        "hours": training.get("hours"),
        "license": shape.get("license"),
    }
    facts |= _without(record, BACKBONE_REST)
    return _without(facts, set())


def _external(reference: str) -> dict[str, Any]:
    from carina.models.external import adapter_of, read_external

    spec = read_external(reference).spec
    facts = {
        "what": "backbone from elsewhere",
        "architecture": spec.name,
        "origin": spec.origin,
        "pretext_saw": adapter_of(reference)[0].saw,
        "input": [spec.channels, spec.size, spec.size],
        "mean": list(spec.mean),
        "std": list(spec.std),
        "pooling": spec.args.get("global_pool"),
        "license": spec.license or "not stated",
        "checksum": spec.checksum,
    }
    return _without(facts, set())


def _predictor(folder: Path) -> dict[str, Any]:
    info = read_json(folder / "predictor.json")
    members = [
        {
            "backbone": member["backbone"]["name"],
            "origin": member["backbone"]["origin"],
            **({"checksum": member["backbone"]["checksum"]} if member["backbone"].get("checksum") else {}),
            "scale": member["scale"],
            "size": member["backbone"]["size"],
            "head": "linear" if "head" in member else member["scorer"]["name"],
            "remembers_patients": bool(member.get("scorer", {}).get("memory", False)),
        }
        for member in info["members"]
    ]
    facts = {
        "what": f"predictor ({info['kind']})",
        **_without(info, PREDICTOR_REST),
        "images": info["data"]["images"],
        "patients": info["data"]["patients"],
    }
    return facts | (members[0] if len(members) == 1 else {"members": {f"member {n}": m for n, m in enumerate(members)}})


def _published(folder: Path) -> dict[str, Any]:
    from carina.models.hub import verify

    inner = _predictor(folder) if (folder / "predictor.json").is_file() else _backbone(folder)
    try:
        verify(folder)
        intact = "yes, every file has its checksum"
    except CarinaError as error:
        intact = f"no: {error}"
    card = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else ""
    header = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
    license_ = header.get("license", "not chosen yet")
    return {**inner, "what": f"published {inner['what']}", "intact": intact, "license": license_}


# -- results ---------------------------------------------------------------------------------------------


def _scores(metrics: dict[str, Any]) -> dict[str, Any]:
    """AUROC with its interval in words, by label."""

    def say(row: dict[str, Any]) -> str:
        auroc = row["auroc"]
        if auroc["value"] is None:
            return f"not estimable: {row['note']}"
        span = "" if auroc["low"] is None else f" ({auroc['low']:.3f} to {auroc['high']:.3f})"
        count = "" if row["positives"] is None else f", {row['positives']} of {row['n']} positive"
        return f"AUROC {auroc['value']:.3f}{span}{count}"

    return {row["label"]: say(row) for row in metrics["table"]}


def _evaluation(folder: Path) -> dict[str, Any]:
    metrics = read_json(folder / "metrics.json")
    return {
        "what": "evaluation" + (" (synthetic)" if metrics["synthetic"] else ""),
        **_without(metrics, EVALUATION_REST),
        "results": _scores(metrics),
    }


def _comparison(folder: Path) -> dict[str, Any]:
    result = read_json(folder / "comparison.json")
    return {
        "what": "comparison" + (" (synthetic)" if result["synthetic"] else ""),
        **{key: result[key] for key in ("primary", "images", "patients", "resamples")},
        "results": {f"{row['metric']} {row['label']}": row["sentence"] for row in result["rows"]},
    }


def _parquet(file: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        schema, rows = pq.read_schema(file), pq.read_metadata(file).num_rows
    except (pa.ArrowException, OSError) as error:
        raise CarinaError(f"{file} cannot be read as Parquet ({error}); it may be damaged: write it again") from None
    names = set(schema.names)
    for what, columns in TABLES.items():
        if columns <= names:
            facts: dict[str, Any] = {"what": what, "rows": rows}
            break
    else:
        raise CarinaError(f"{file} is a Parquet file, but none that carina writes; give features or predictions")
    if what == "features":
        facts["dimension"] = schema.field("features").type.list_size
        facts["of"] = "files" if "path" in names else "rows of a store"
    for column, word in (("image_id", "images"), ("patient_id", "patients")):
        if column in names:
            facts[word] = pc.count_distinct(pq.read_table(file, columns=[column])[column]).as_py()
    for column in sorted(names & {"split", "label", "stage", "reason"}):
        counted = pq.read_table(file, columns=[column])[column].value_counts().to_pylist()
        facts[column] = {str(entry["values"]): entry["counts"] for entry in counted}
    return facts


# The first whose columns a file has; `image_id to path` is private and lies beside the key
TABLES = {
    "predictions": {"image_id", "patient_id", "label", "target", "score"},
    "features": {"features"},
    "manifest of what was seen (private)": {"patient_id", "image_id", "content_hash", "stage"},
    "table of a store": {"image_id", "patient_id", "content_hash", "shard", "row"},
    "rejected files": {"image_id", "reason"},
    "image_id to path (private, never publish it)": {"image_id", "path"},
}


# -- recipes ---------------------------------------------------------------------------------------------


def recipe_model(stage: str) -> type[Any]:
    """The model that validates the recipes of a stage."""
    if stage == "prepare":
        from carina.intake.recipe import PrepareRecipe as Model
    elif stage == "pretrain":
        from carina.pretrain.recipe import PretrainRecipe as Model
    elif stage == "finetune":
        from carina.finetune.recipe import FinetuneRecipe as Model
    else:
        from carina.evaluate.score import EvaluateRecipe as Model
    return Model


def _recipe(file: Path) -> dict[str, Any]:
    """A recipe names keys of one stage; which one is told by the most keys that the stage knows."""
    from carina.recipes import build, differences, read_recipe

    values = _read_keys(file)
    known = {stage: len(set(values) & set(recipe_model(stage).model_fields)) for stage in STAGES}
    best = max(known.values())
    if best == 0:
        raise CarinaError(f"{file} is no recipe: no stage knows any of its keys ({', '.join(list(values)[:3])})")
    stages = [stage for stage in STAGES if known[stage] == best]
    facts: dict[str, Any] = {"what": f"recipe of {' or '.join(stages)}"}
    try:
        recipe = build(stages[0], recipe_model(stages[0]), str(file), [])
    except CarinaError as error:
        return {**facts, "valid": f"no: {error}"}
    resolved = recipe.model_dump(mode="json")
    changed = differences(read_recipe(stages[0], "default"), resolved)
    return {**facts, "valid": "yes", "differs_from_default": {key: _at(resolved, key) for key in changed}}


def _read_keys(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise CarinaError(f"{file} is not valid YAML; mend it, or give another file") from None
    if not isinstance(values, dict) or not values:
        raise CarinaError(f"{file} holds no keys and values, so it is no recipe; give another file")
    return values


def _at(tree: dict[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree[part]
    return tree


FILES: dict[str, Callable[[Path], dict[str, Any]]] = {".parquet": _parquet, ".yaml": _recipe, ".yml": _recipe}

# The first whose files are all there: a published folder is also a backbone or predictor, a run holds one
FOLDERS: tuple[tuple[tuple[str, ...], Callable[[Path], dict[str, Any]]], ...] = (
    (("store.json",), _store),
    (("plan.json",), _unfinished_store),
    ((RECIPE, "environment.json"), _run),
    (("SHA256SUMS", "README.md"), _published),
    (("predictor.json",), _predictor),
    (("config.json", "model.safetensors"), _backbone),
    (("metrics.json", "predictions.parquet"), _evaluation),
    (("comparison.json",), _comparison),
)
