"""The verb pretrain: store -> backbone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from carina.data.batches import Batch, intensity
from carina.data.manifest import seen_rows, write_manifest
from carina.data.store import LABEL, Selection, select
from carina.errors import CarinaError
from carina.models.backbones import EXTERNAL, Backbone, backbone_record, load_backbone
from carina.models.checkpoints import write_backbone
from carina.models.hub import backbone_card
from carina.pretrain.pretexts import Corpus, Pretext, method
from carina.pretrain.recipe import PretrainRecipe
from carina.recipes import build
from carina.runs import Run
from carina.training.engine import Engine, Task, resolved


class Pretraining(Task):
    """Weighted pretexts on one backbone."""

    def __init__(self, backbone: Backbone, weights: dict[str, float], pretexts: dict[str, Pretext]):
        super().__init__()
        self.backbone = backbone
        self.weights = weights
        self.pretexts = nn.ModuleDict(pretexts)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        total, named = 0.0, {}
        for name, pretext in self.pretexts.items():
            values = pretext.loss(self.backbone, pretext.views(batch), batch)
            total = total + self.weights[name] * values["loss"]
            named |= {f"{name}.{key}": value for key, value in values.items()}
        return {"loss": total, **named}

    def after_step(self, step: int) -> None:
        for pretext in self.pretexts.values():
            pretext.after_step(self.backbone, step)


def build_task(recipe: PretrainRecipe, selection: Selection, world: int) -> Pretraining:
    weights = recipe.pretexts.weights()
    if not weights:
        raise CarinaError("every pretext has weight 0; give one a weight, as in pretexts.moco.weight=1")
    size = recipe.size or recipe.scales[0]
    mean, std = intensity(selection, recipe.scales[0])
    reference = recipe.init if recipe.init != "random" else f"random:{recipe.architecture}"
    backbone = load_backbone(
        reference, size=size, architecture=recipe.architecture, seed=recipe.seed, mean=mean, std=std
    )
    corpus = Corpus(
        count=len(selection),
        batch_size=recipe.batch_size,
        micro_batch=recipe.batch_size // (recipe.accumulate * world),
        scales=tuple(recipe.scales),
        size=recipe.size,
        views=recipe.views,
        seed=recipe.seed,
        steps=recipe.total_steps(len(selection)),
    )
    pretexts = {name: method(name)(backbone, getattr(recipe.pretexts, name), corpus) for name in weights}
    return Pretraining(backbone, weights, pretexts)


def what_was_seen(selection: Selection) -> str:
    """normals only, a mixture with x % abnormal, or an unlabelled mixture: the column "pretext saw" of later tables."""
    column = LABEL + "abnormal"
    if column not in selection.table:
        return "unlabelled images"
    known = selection.table[column].dropna()
    if not len(known):
        return "unlabelled images"
    if len(known) == len(selection) and (known == 0).all():
        return "normals only"
    return f"a mixture with {float((known == 1).mean()):.0%} abnormal"


def pretrain(
    name: str, overrides: Any = (), *, resume: bool = False, dry_run: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Run the recipe `name` with overrides; returns facts of the run (with ``dry_run`` what it would take)."""
    recipe = build("pretrain", PretrainRecipe, name, overrides)
    if not recipe.store:
        raise CarinaError("pretrain needs a store; give store=FOLDER")
    if not recipe.out and not dry_run:
        raise CarinaError("pretrain needs a place for the run; give out=FOLDER")
    recipe = resolved(recipe, recipe.out, resume)
    torch.set_num_threads(recipe.threads)
    selection = select(recipe.store, rows=recipe.rows, where=recipe.where, scales=recipe.scales)
    task = build_task(recipe, selection, int(os.environ.get("WORLD_SIZE", 1)))
    masks = any(pretext.needs_masks for pretext in task.pretexts.values())
    if masks:
        selection.check_lungs()
    engine = Engine(task, selection, recipe, scales=recipe.scales, masks=masks, name="pretrain", quiet=quiet)
    if dry_run:
        return engine.dry_run()
    main = engine.rank == 0
    run = Run.start(recipe.out, "pretrain", recipe, resume=resume, quiet=quiet) if main else Run(recipe.out, quiet=True)
    engine.accelerator.wait_for_everyone()
    if main and not resume:
        for method in task.pretexts.values():
            run.log(f"A healthy curve: {method.healthy}.")
    facts = engine.fit(run, resume=resume)
    if main:
        _export(run, recipe, selection, task, facts)
        run.log(f"The backbone is in {run.folder / 'backbone'}")
    engine.accelerator.wait_for_everyone()
    return {"run": str(run.folder), "backbone": str(run.folder / "backbone"), **facts}


def _export(run: Run, recipe: PretrainRecipe, selection: Selection, task: Pretraining, facts: dict[str, Any]) -> None:
    weights = recipe.pretexts.weights()
    record = {
        "kind": "backbone",
        "scales": recipe.scales,
        "pretexts": weights,
        "init": _began_with(recipe.init),
        "photometry": selection.photometry,
        "geometry": selection.geometry,
        "store_hashes": selection.hashes,
        "synthetic": selection.synthetic,
        "transductive": recipe.rows != "train" or bool(backbone_record(recipe.init).get("transductive", False)),
        "pretext_saw": what_was_seen(selection),
        "labels_used": "for the choice of rows (where)" if recipe.where and "label_" in recipe.where else "none",
        "data": corpus_facts(selection),
        "training": {**facts, "recipe": published_recipe(recipe)},
    }
    method = " + ".join(f"{name} ({weight:g})" for name, weight in weights.items())
    spec = task.backbone.spec
    origin = f"{method} on {len(selection)} chest radiographs" + (" (synthetic)" if selection.synthetic else "")
    task.backbone.spec = dataclasses.replace(spec, origin=origin)
    write_manifest(
        run.folder, seen_rows(selection, "pretrain"), began_with=recipe.init, natural_images=recipe.init in EXTERNAL
    )
    write_backbone(run.folder / "backbone", task.backbone, record, backbone_card(task.backbone, record))


def _began_with(reference: str) -> str:
    """The name of public weights; folders and files are the owner's own."""
    public = reference == "random" or reference in EXTERNAL or reference.startswith(("timm:", "hub:"))
    return reference if public else "an earlier backbone"


def corpus_facts(selection: Selection) -> dict[str, Any]:
    """Counts by source, view and sex, and the age range, for the card."""
    table = selection.table

    def by(column: str) -> dict[str, int]:
        return {str(k) or "unknown": int(v) for k, v in table[column].value_counts().sort_index().items()}

    ages = table["age"].dropna()
    return {
        "images": len(table),
        "patients": int(table["patient_id"].nunique()),
        "source": by("source"),
        "origins": {**{name: {} for name in by("source")}, **selection.origins},
        "view": by("view"),
        "sex": by("sex"),
        "age_median": float(ages.median()) if len(ages) else None,
        "age_range": [float(ages.min()), float(ages.max())] if len(ages) else None,
    }


def published_recipe(recipe: PretrainRecipe) -> dict[str, Any]:
    """The recipe without folders, which are the owner's own."""
    values = recipe.model_dump(mode="json")
    for key in ("store", "out", "init"):
        values.pop(key)
    return values


def listing() -> list[dict[str, Sequence[str] | str]]:
    """Shipped recipes with their first comment."""
    from importlib import resources

    from carina.recipes import shipped

    root = resources.files("carina.configs") / "pretrain"
    rows = []
    for name in shipped("pretrain"):
        first = root.joinpath(*f"{name}.yaml".split("/")).read_text(encoding="utf-8").splitlines()[0]
        rows.append({"name": name, "about": first.lstrip("# ")})
    return rows
