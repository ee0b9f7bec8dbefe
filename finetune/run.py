"""The verb finetune: backbone + store -> predictor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from carina.data.batches import intensity
from carina.data.labels import ABNORMAL, to_targets
from carina.data.manifest import write_manifest
from carina.data.provenance import corpus_facts, label_facts
from carina.data.splits import linked_patients, patient_subset, permute_patients, stable_folds
from carina.data.store import Selection, select
from carina.draws import hash64
from carina.errors import CarinaError
from carina.finetune import anomaly, classify
from carina.finetune.classifier import Classifier, Rows
from carina.finetune.detector import Detector
from carina.finetune.recipe import FinetuneRecipe
from carina.metrics.calibration import operating_threshold
from carina.models.backbones import backbone_record, load_backbone, pretext_saw, saw_natural_images
from carina.models.hub import predictor_card, pretraining_facts
from carina.models.predictor import Member, Predictor, save_predictor
from carina.recipes import build
from carina.runs import Run
from carina.training.engine import resolved


def recipe_model(name: str) -> type[FinetuneRecipe]:
    return FinetuneRecipe


def finetune(
    name: str, overrides: Any = (), *, resume: bool = False, dry_run: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Run the recipe `name` (classify, anomaly or a YAML file) with overrides; returns facts of the run."""
    recipe = build("finetune", FinetuneRecipe, name, overrides)
    _check(recipe, dry_run)
    recipe = resolved(recipe, recipe.out, resume)
    torch.set_num_threads(recipe.threads)
    everything = select(recipe.store, where=recipe.where)
    train, held_out = training_rows(recipe, everything)
    work = (_detector if recipe.task == "anomaly" else _classifier)(recipe, everything, train, held_out, quiet)
    if dry_run:
        return work.dry_run()
    run = Run(recipe.out, quiet=True)
    if work.main:
        run = Run.start(recipe.out, "finetune", recipe, resume=resume, quiet=quiet)
    work.barrier()
    facts = work.fit(run, resume)
    if not work.main:
        return facts
    for name, members, extra in work.predictors(run):
        info = {**_info(recipe, train, facts), **work.facts, **extra}
        _save(run.folder / name, members, info)
    natural = saw_natural_images(recipe.backbone)
    write_manifest(run.folder, pd.concat(work.seen()), began_with=recipe.backbone, natural_images=natural)
    run.log(f"The predictor is in {run.folder / 'predictor'}")
    return {
        "run": str(run.folder),
        "predictor": str(run.folder / "predictor"),
        **facts,
        "thresholds": info["thresholds"],
    }


def _detector(
    recipe: FinetuneRecipe, everything: Selection, train: Selection, held_out: Selection | None, quiet: bool
) -> Detector:
    scale, size = scale_and_size(recipe, everything)
    check_scales(everything, [scale])
    mean, std = intensity(train, scale)
    reference = f"random:{recipe.architecture}" if recipe.backbone == "random" else recipe.backbone
    given = {"architecture": recipe.architecture, "seed": recipe.seed, "mean": mean, "std": std}
    backbone = load_backbone(reference, size=size, **given)
    return Detector(recipe, train, held_out, _judged(recipe, everything, train), backbone, scale, quiet)


def _classifier(
    recipe: FinetuneRecipe, everything: Selection, train: Selection, held_out: Selection | None, quiet: bool
) -> Classifier:
    scales, size = recipe.scales, None
    if scales is None:
        scale, size = scale_and_size(recipe, everything)
        scales = [scale]
    check_scales(everything, scales)
    return Classifier(recipe, _rows(recipe, train), held_out and _rows(recipe, held_out), scales, size, quiet)


def _info(recipe: FinetuneRecipe, train: Selection, facts: dict[str, Any]) -> dict[str, Any]:
    """What predictor.json says of every predictor."""
    return {
        "kind": recipe.task,
        "mode": recipe.mode,
        "labels": recipe.labels,
        "stack": {label: [1.0] for label in recipe.labels},
        "photometry": train.photometry,
        "geometry": train.geometry,
        "encoding": train.stores[0].info["encoding"],
        "synthetic": train.synthetic,
        "pretext_saw": pretext_saw(recipe.backbone),
        "transductive": bool(backbone_record(recipe.backbone).get("transductive", False)),
        "data": {**corpus_facts(train), "labels": label_facts(train, recipe.labels)},
        "pretraining": pretraining_facts(backbone_record(recipe.backbone)),
        "store_hashes": train.hashes,
        "labels_hashes": train.labels_hashes,
        "seed": recipe.seed,
        "draw": recipe.draw,
        "folds": recipe.folds,
        "fold": recipe.fold if recipe.folds is not None else None,
        "where": recipe.where,
        "rows": recipe.rows,
        "training": facts,
    }


def _save(folder: Path, members: list[Member], info: dict[str, Any]) -> None:
    members = [member.cpu().eval() for member in members]
    entries = [{"backbone": member.backbone.spec.to_dict(), "scale": member.scale} for member in members]
    save_predictor(folder, Predictor(info, members), predictor_card({**info, "members": entries}))


def _check(recipe: FinetuneRecipe, dry_run: bool) -> None:
    if not recipe.store:
        raise CarinaError("finetune needs a store; give store=FOLDER")
    if not recipe.out and not dry_run:
        raise CarinaError("finetune needs a place for the run; give out=FOLDER")
    if not recipe.labels:
        raise CarinaError("finetune classify needs the findings to learn; give labels=[NAME,...]")
    if recipe.task == "anomaly":
        anomaly.check(recipe)
    else:
        classify.check(recipe)
    if recipe.task == "anomaly" and recipe.mode not in ("frozen", "full"):
        raise CarinaError(f"mode={recipe.mode} is for classify; anomaly detection takes mode=frozen or full")
    _check_scales(recipe)
    if recipe.task == "classify":
        operating_threshold(recipe.threshold_rule, np.empty(0), np.empty(0))  # refuses what is no rule
    if recipe.folds is not None and recipe.fold >= recipe.folds:
        raise CarinaError(f"fold={recipe.fold} is not one of the {recipe.folds} folds; give 0 to {recipe.folds - 1}")


def _check_scales(recipe: FinetuneRecipe) -> None:
    if not recipe.scales:
        if recipe.shared:
            raise CarinaError("shared=true trains one network at several scales; give scales=[A,B]")
        return
    if recipe.shared and recipe.mode == "frozen":
        raise CarinaError("shared=true trains one network at several scales, and mode=frozen trains none; leave it out")
    if recipe.task == "anomaly":
        raise CarinaError("scales= stacks classifiers; for anomaly detection give scale=, or scorer.sizes=[A,B]")
    if recipe.scale is not None or recipe.size is not None:
        given = "scale" if recipe.scale is not None else "size"
        raise CarinaError(f"{given}= is for one scale and scales= names several; leave one of them out")
    if len(set(recipe.scales)) < len(recipe.scales):
        raise CarinaError(f"scales={recipe.scales} names a scale twice; give each once")


def training_rows(recipe: FinetuneRecipe, everything: Selection) -> tuple[Selection, Selection | None]:
    """Training rows, and the rows apart from them that set thresholds (None: cross-fitted scores do)."""
    if recipe.folds is not None:
        folds = stable_folds(linked_patients(everything.table).tolist(), recipe.folds, recipe.draw)
        train, held_out = everything.where(folds != recipe.fold), None
    else:
        train = everything.split(*recipe.rows.split("+"))
        held_out = everything.split(*recipe.threshold_rows.split("+")) if recipe.threshold_rows else None
        if not len(train):
            have = ", ".join(sorted(set(everything.table["split"])))
            raise CarinaError(f"no row has split={recipe.rows} (the store has {have}); give rows= to match")
    targets = _targets(recipe, train, train.targets(recipe.labels))
    if recipe.task == "anomaly":
        normal = targets[:, 0] == 0
        if not normal.any():
            raise CarinaError(
                "no training row is known to be normal (abnormal = 0); anomaly detection learns from normals"
            )
        train = train.where(anomaly.contaminated(train, normal, targets[:, 0] == 1, recipe.contamination, recipe.seed))
        if held_out is not None:
            held_out = held_out.where(held_out.targets(recipe.labels)[:, 0] == 0)
    else:
        train = train.where(~np.isnan(targets).all(axis=1))
        if recipe.patients is not None:
            keep = patient_subset(linked_patients(train.table).tolist(), recipe.patients, recipe.draw)
            train = train.where(keep)
            # validation patients are labels too: with a count of labelled patients only these are used
            held_out = None
        if not len(train):
            raise CarinaError(f"no training row has a known value of {', '.join(recipe.labels)}; check labels=")
    if held_out is not None and (shared := shared_patients(everything, train, held_out)):
        raise CarinaError(
            f"{shared} patients of threshold_rows={recipe.threshold_rows} are trained on, so thresholds would come from "
            "what was fitted; give threshold_rows=null, which cross-fits, or rows of other patients"
        )
    held_out = held_out if held_out is not None and len(held_out) else None
    if recipe.task == "anomaly" and recipe.scorer.name == "head" and held_out is None:
        raise CarinaError(
            "scorer.name=head is trained on the training normals, so its threshold needs other ones; give "
            "threshold_rows=SPLIT with normal images"
        )
    return train, held_out


def training_targets(recipe: FinetuneRecipe, selection: Selection) -> np.ndarray:
    """(N, L) float32 that classify is fitted to: uncertain labels by the recipe's policy, and with permute_labels those of
    other patients. The one place where labels become targets."""
    return _targets(recipe, selection, _labels(recipe, selection))


def _targets(recipe: FinetuneRecipe, selection: Selection, raw: np.ndarray) -> np.ndarray:
    images = selection.table["image_id"].tolist()
    return to_targets(raw, recipe.uncertain, labels=recipe.labels, images=images, seed=recipe.seed)


def truth(recipe: FinetuneRecipe, selection: Selection) -> np.ndarray:
    """(N, L) of 0, 1 or NaN that scores are judged by in fine-tuning: uncertain is unknown. Permuted alike, or thresholds
    and weights would know what the training must not."""
    return to_targets(_labels(recipe, selection))


def _labels(recipe: FinetuneRecipe, selection: Selection) -> np.ndarray:
    raw = selection.targets(recipe.labels)
    if not recipe.permute_labels:
        return raw
    seed = hash64("permuted labels", recipe.seed, recipe.draw)
    return raw[permute_patients(linked_patients(selection.table).tolist(), seed)]


def _rows(recipe: FinetuneRecipe, selection: Selection) -> Rows:
    return Rows(selection, training_targets(recipe, selection), truth(recipe, selection))


def shared_patients(everything: Selection, a: Selection, b: Selection) -> int:
    """How many patients, copies under other names linked, two parts of a selection share."""
    linked = dict(zip(everything.table["image_id"], linked_patients(everything.table)))
    patients = [{linked[image] for image in part.table["image_id"]} for part in (a, b)]
    return len(patients[0] & patients[1])


def _judged(recipe: FinetuneRecipe, everything: Selection, train: Selection) -> Selection | None:
    """The rows on which checkpoints are compared; None where the last one is kept."""
    if recipe.task != "anomaly" or recipe.select == "last":
        return None
    name = recipe.pool_rows if recipe.select == "aucp" else recipe.threshold_rows
    rows = everything.split(*name.split("+"))
    if not len(rows):
        raise CarinaError(
            f"no row has split={name}, which select={recipe.select} compares checkpoints on; name another"
        )
    if shared := shared_patients(everything, train, rows):
        raise CarinaError(
            f"{shared} patients of split={name} are trained on, so select={recipe.select} would judge what it has "
            "seen; name rows of other patients"
        )
    if recipe.select == "validation" and set(to_targets(rows.targets([ABNORMAL]))[:, 0]) < {0.0, 1.0}:
        raise CarinaError(
            f"select=validation needs normal and abnormal images, and split={name} has not both; name others"
        )
    return rows


def scale_and_size(recipe: FinetuneRecipe, selection: Selection) -> tuple[int, int | None]:
    """The scale that is read, and the size that enters the network (None: the backbone's own)."""
    scales = sorted(set.intersection(*(set(store.scales) for store in selection.stores)))
    if not scales:
        raise CarinaError("the stores share no scale; prepare one of them again")
    if recipe.scale is not None:
        return recipe.scale, recipe.size or (recipe.scale if recipe.backbone.startswith("random") else None)
    if recipe.backbone.startswith("random"):
        scale = recipe.size if recipe.size in scales else scales[-1]
        return scale, recipe.size or scale
    own = recipe.size or load_backbone(recipe.backbone, architecture=recipe.architecture).spec.size
    return next((scale for scale in scales if scale >= own), scales[-1]), recipe.size


def check_scales(selection: Selection, scales: list[int]) -> None:
    for store in selection.stores:
        for scale in scales:
            store.check_scale(scale)
