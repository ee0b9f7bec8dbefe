"""The verb pretrain: store -> backbone."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from carina.data.batches import Batch, Plan, intensity
from carina.data.manifest import seen_rows, write_manifest
from carina.data.provenance import corpus_facts
from carina.data.store import LABEL, Selection, select
from carina.errors import CarinaError
from carina.models.backbones import (
    EXTERNAL,
    Backbone,
    backbone_record,
    checkpoint_activations,
    load_backbone,
    pretext_saw,
    restore_size_norms,
    saw_natural_images,
)
from carina.models.checkpoints import write_backbone
from carina.models.hub import backbone_card, earlier_origins
from carina.models.scales import add_size_norms, norm_sizes
from carina.pretrain.pretexts import Corpus, Pretext, method
from carina.pretrain.recipe import PretrainRecipe
from carina.pretrain.watch import Watch
from carina.recipes import build
from carina.runs import Run
from carina.training.engine import Engine, Task, resolved
from carina.training.forecast import forecast
from carina.training.optim import averaged, follow
from carina.training.states import task_tensors
from carina.training.tracking import public


class Pretraining(Task):
    """Weighted pretexts on one backbone, and its average over the steps where the recipe asks for one."""

    def __init__(
        self, backbone: Backbone, weights: dict[str, float], pretexts: dict[str, Pretext], ema: float | None = None
    ):
        super().__init__()
        self.backbone = backbone
        self.weights, self.ema = weights, ema
        self.pretexts = nn.ModuleDict(pretexts)
        if ema is not None:
            self.average = averaged(backbone)

    @property
    def skips_parameters(self) -> bool:
        return bool(norm_sizes(self.backbone.network)) or any(
            pretext.skips_parameters for pretext in self.pretexts.values()
        )

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        total, named = 0.0, {}
        column = 0
        for name, pretext in self.pretexts.items():
            own = batch
            if pretext.labels:
                own = dataclasses.replace(batch, targets=batch.targets[:, column : column + len(pretext.labels)])
                column += len(pretext.labels)
            values = pretext.loss(self.backbone, pretext.views(own), own)
            total = total + self.weights[name] * values["loss"]
            named |= {f"{name}.{key}": value for key, value in values.items()}
        return {"loss": total, **named}

    def after_step(self, step: int) -> None:
        for pretext in self.pretexts.values():
            pretext.after_step(self.backbone, step)
        if self.ema is not None:
            follow(self.average, self.backbone, self.ema, buffers=True)

    @property
    def labels(self) -> list[str]:
        """Label columns of all pretexts, one after the other."""
        return [label for pretext in self.pretexts.values() for label in pretext.labels]

    def exported(self, which: str) -> Backbone:
        """The backbone that is exported: the last weights, their average, or the teacher of the method that has one."""
        if which == "last":
            return self.backbone
        if which == "ema":
            if self.ema is None:
                raise CarinaError("export=ema needs an average; give its decay, as in ema=0.999")
            return self.average
        teachers = [pretext.teacher for pretext in self.pretexts.values() if pretext.teacher is not None]
        if len(teachers) != 1:
            raise CarinaError(
                f"export=teacher needs one pretext with a teacher, {', '.join(self.pretexts)} has {len(teachers)}; give "
                "export=last or export=ema"
            )
        return teachers[0]


def build_task(recipe: PretrainRecipe, selection: Selection, world: int) -> Pretraining:
    weights = recipe.pretexts.weights()
    if not weights:
        raise CarinaError("every pretext has weight 0; give one a weight, as in pretexts.moco.weight=1")
    if recipe.size and recipe.norms == "per_size":
        raise CarinaError("norms=per_size has no use where size= brings every scale to one size; leave one of them out")
    # first of all what is wrong with the batches themselves, which every method would tell in its own way
    Plan(
        count=len(selection),
        batch_size=recipe.batch_size,
        accumulate=recipe.accumulate,
        world=world,
        rank=0,
        scales=tuple(recipe.scales),
        seed=recipe.seed,
        steps=recipe.total_steps(len(selection)),
        scale_plan=recipe.scale_plan,
    )
    size = recipe.size or recipe.scales[0]
    mean, std = intensity(selection, recipe.scales[0])
    reference = recipe.init if recipe.init != "random" else f"random:{recipe.architecture}"
    backbone = load_backbone(
        reference,
        size=size,
        architecture=recipe.architecture,
        seed=recipe.seed,
        mean=mean,
        std=std,
        one_channel=True,
        largest=recipe.size or max(recipe.scales),
    )
    if recipe.norms == "per_size":
        add_size_norms(backbone, recipe.scales)
        restore_size_norms(backbone, recipe.init)
    backbone.check_sizes([recipe.size] if recipe.size else recipe.scales)
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
    if recipe.checkpoint_activations:
        checkpoint_activations(backbone)
    task = Pretraining(backbone, weights, pretexts, recipe.ema)
    task.exported(recipe.export)  # a wish that cannot be met is told before the run, not after it
    return task


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
    recipe = recipe.model_copy(update={"architecture": task.backbone.spec.name})  # what init= brought, where it did
    exported = _path_of(task.exported(recipe.export), task)
    template = copy.deepcopy(task.exported(recipe.export))  # whole and on the CPU, whatever becomes of the task
    engine = Engine(
        task,
        selection,
        recipe,
        scales=recipe.scales,
        scale_plan=recipe.scale_plan,
        positives=recipe.positives,
        masks=masks,
        targets=selection.targets(task.labels) if task.labels else None,
        name="pretrain",
        quiet=quiet,
    )
    if dry_run:
        return forecast(engine)
    main = engine.rank == 0
    run = Run(recipe.out, quiet=quiet or not main)
    # before the run's folder is made, because what is to be watched may be refused
    watch = Watch(recipe.watch, recipe, selection, engine.task, run, engine.device, engine.plan.steps) if main else None
    if main:
        Run.start(recipe.out, "pretrain", recipe, resume=resume)
    engine.accelerator.wait_for_everyone()
    if main and recipe.accumulate > 1:
        for name, pretext in task.pretexts.items():
            if pretext.mixes_batch:
                run.log(
                    f"{name} compares the images of a micro-batch: with accumulate={recipe.accumulate} it sees "
                    f"{recipe.batch_size // recipe.accumulate} at a time and not {recipe.batch_size}, which is another "
                    "objective"
                )
    if main and not resume:
        watch.start()
    facts = engine.fit(run, resume=resume, observe=watch)
    weights = task_tensors(engine.task)
    if main:
        facts["watch"] = watch.finish()
        template.load_state_dict({k.removeprefix(exported): v for k, v in weights.items() if k.startswith(exported)})
        _export(run, recipe, selection, template, task.labels, facts)
        run.log(f"The backbone is in {run.folder / 'backbone'}")
    engine.accelerator.wait_for_everyone()
    return {"run": str(run.folder), "backbone": str(run.folder / "backbone"), **facts}


def _path_of(module: nn.Module, task: nn.Module) -> str:
    """Where a module stands in the task, as the prefix of its tensors' names."""
    return next(name for name, part in task.named_modules() if part is module) + "."


def _export(
    run: Run,
    recipe: PretrainRecipe,
    selection: Selection,
    backbone: Backbone,
    labels: list[str],
    facts: dict[str, Any],
) -> None:
    weights = recipe.pretexts.weights()
    record = {
        "kind": "backbone",
        "scales": recipe.scales,
        "scale_plan": recipe.scale_plan,
        "norms": recipe.norms,
        "weights": recipe.export,
        "pretexts": weights,
        "init": _began_with(recipe.init),
        "photometry": selection.photometry,
        "geometry": selection.geometry,
        "store_hashes": selection.hashes,
        "synthetic": selection.synthetic,
        "transductive": recipe.rows != "train" or bool(backbone_record(recipe.init).get("transductive", False)),
        "pretext_saw": _with_earlier(what_was_seen(selection), recipe.init, "pretext_saw"),
        "labels_used": _with_earlier(_labels_used(recipe, labels), recipe.init, "labels_used"),
        "data": corpus_facts(selection),
        "earlier_origins": earlier_origins(backbone_record(recipe.init)),
        "training": {**facts, "recipe": published_recipe(recipe)},
    }
    method = " + ".join(f"{name} ({weight:g})" for name, weight in weights.items())
    origin = f"{method} on {len(selection)} chest radiographs" + (" (synthetic)" if selection.synthetic else "")
    backbone.spec = dataclasses.replace(backbone.spec, origin=origin)
    write_manifest(
        run.folder,
        seen_rows(selection, "pretrain"),
        began_with=recipe.init,
        natural_images=saw_natural_images(recipe.init),
    )
    write_backbone(run.folder / "backbone", backbone, record, backbone_card(backbone, record))


def _with_earlier(now: str, reference: str, key: str) -> str:
    """What this run adds to what its initial weights had seen or used already."""
    if reference == "random":
        return now
    if reference in EXTERNAL:
        return f"{now}; before: {EXTERNAL[reference].spec.origin}"
    unknown = pretext_saw(reference) if key == "pretext_saw" else "unknown"
    earlier = backbone_record(reference).get(key, unknown)
    return now if earlier == now else f"{now}; before: {earlier}"


def _labels_used(recipe: PretrainRecipe, labels: list[str]) -> str:
    used = [f"for the loss ({', '.join(labels)})"] if labels else []
    used += ["for the choice of rows (where)"] if recipe.where and "label_" in recipe.where else []
    return " and ".join(used) or "none"


def _began_with(reference: str) -> str:
    """The name of public weights; folders and files are the owner's own."""
    kind = reference.partition(":")[0]
    if kind in EXTERNAL:
        return kind
    return reference if reference == "random" or kind in ("timm", "hub") else "an earlier backbone"


def published_recipe(recipe: PretrainRecipe) -> dict[str, Any]:
    """The recipe without folders and the condition on rows, which are the owner's own."""
    return public(recipe.model_dump(mode="json"))


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
