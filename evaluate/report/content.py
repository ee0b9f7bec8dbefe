"""What the report of one evaluation says, from its figures, its rows and its run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from carina.data.batches import unit_tensor
from carina.data.labels import to_targets
from carina.data.provenance import corpus_facts
from carina.data.store import Selection
from carina.evaluate import anomaly
from carina.evaluate.explain import heat_maps
from carina.models.hub.clauses import origins_of
from carina.models.predictor import Predictor
from carina.runs import Run, environment

ACCOUNTS = ("store", "out", "backbone", "cache", "wandb")  # keys of a recipe that name places or accounts
KINDS = ["missed", "false alarm", "found", "rightly left"]


def report_content(
    result: dict[str, Any], frame: pd.DataFrame, done: list[tuple], folder: str, examples: int, pixels: bool = False
) -> dict[str, Any]:
    """What `build_report` is given for an evaluation.

    done: (predictor, rows, scores, overlap) of every run. folder: of the first. examples: pictures to show, of real
    radiographs only where `pixels` allows them.
    """
    predictor, selection, scores, _ = done[0]
    run = Run(folder)
    has_run = (run.folder / "recipe.yaml").is_file()
    shown = examples if pixels or result["synthetic"] else 0
    tested = Selection(selection.stores, pd.concat([rows.table for _, rows, _, _ in done], ignore_index=True))
    facts, member = corpus_facts(tested), predictor.members[0]
    spec, info = member.backbone.spec, predictor.info
    machine = run.environment() if has_run else environment()
    people = [(name, data) for name, data in (("Training", info.get("data")), ("Test", facts)) if data]
    if earlier := info.get("pretraining"):
        people.insert(0, ("Pretraining", earlier["data"]))
    sizes = ", ".join(f"{m.backbone.spec.size} px from scale {m.scale}" for m in predictor.members)
    head = member.head.facts()["name"] + " head" if member.head is not None else member.scorer.settings.name + " scorer"
    kind = "Anomaly detection" if result["kind"] == "anomaly" else "Classification"
    kept = {str(((store.info.get("plan") or {}).get("recipe") or {}).get("keep")) for store in selection.stores}
    return {
        "title": f"{kind}, {result['mode']}: {spec.name}, split {result['split']}",
        "result": result,
        "predictions": frame,
        "examples": pictures(predictor, selection, scores, shown),
        "switched_off": bool(examples and not shown),
        "people": people,
        "sources": {**origins_of(info), **facts["origins"]},
        "backbone": {"name": spec.name, "origin": spec.origin, "license": spec.license},
        "model": f"{spec.name}, {spec.channels} input channel(s), {sizes}; {head}",
        "input": f"one channel in [0, 1], dense tissue bright, then (x - {_values(spec.mean)}) / {_values(spec.std)}",
        "preparation": {**selection.photometry, **selection.geometry, "keep": " or ".join(sorted(kept - {"None"}))},
        "versions": {"carina": machine.get("carina"), **machine.get("packages", {})},
        "recipe": {key: value for key, value in run.recipe().items() if key not in ACCOUNTS} if has_run else {},
        "environment": machine,
    }


def _values(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in dict.fromkeys(values))


def pictures(predictor: Predictor, selection: Selection, scores: np.ndarray, most: int) -> list[dict[str, Any]]:
    """At most `most` examples, the most certain of right and wrong, dealt over labels and kinds, with heat maps."""
    if not most:
        return []
    targets = to_targets(selection.targets(predictor.labels))
    found = [
        (rank, int(row), column, kind, right)
        for column, label in enumerate(predictor.labels)
        for kind, right, rows in _kinds(targets[:, column], scores[:, column], predictor.info["thresholds"][label])
        for rank, row in enumerate(rows[:most])
    ]
    chosen = _dealt(sorted(found, key=lambda one: one[0]), most)
    span = anomaly.display_span(predictor, selection) if chosen else None
    made = []
    for _, row, column, kind, right in chosen:
        member, label = predictor.leading(column).cpu(), predictor.labels[column].replace("_", " ")
        pixels = unit_tensor(torch.from_numpy(selection.images([row], member.scale)))
        lungs = torch.from_numpy(selection.masks([row], member.scale))[:, None]
        heat, mask = heat_maps(member, pixels, column, lungs, span)[0], lungs[0, 0].numpy()
        threshold = predictor.info["thresholds"][predictor.labels[column]]
        caption = f"{label}: {kind}, score {scores[row, column]:.3g} (threshold {threshold:.3g})"
        if mask.any() and heat.sum() > 0:
            caption += (
                f"; {heat[mask].sum() / heat.sum():.0%} of the heat lies in the lungs, {mask.mean():.0%} of the image"
            )
        image = {"image": pixels[0, 0].numpy(), "heat": heat, "lungs": mask if mask.any() else None}
        made.append({**image, "right": right, "caption": caption + "."})
    return made


def _kinds(target: np.ndarray, score: np.ndarray, threshold: float) -> list[tuple[str, bool, np.ndarray]]:
    """(kind, right, rows from the most certain on) of one label."""
    above, down = score >= threshold, np.argsort(-score, kind="stable")
    return [
        ("missed", False, down[::-1][(~above & (target == 1))[down[::-1]]]),
        ("false alarm", False, down[(above & (target == 0))[down]]),
        ("found", True, down[(above & (target == 1))[down]]),
        ("rightly left", True, down[::-1][(~above & (target == 0))[down[::-1]]]),
    ]


def _dealt(found: list[tuple], most: int) -> list[tuple]:
    """The first `most`, as evenly over the four kinds as there are, in their order."""
    hands = {kind: [one for one in found if one[3] == kind] for kind in KINDS}
    dealt: list[tuple] = []
    while len(dealt) < most and any(hands.values()):
        dealt += [hand.pop(0) for hand in hands.values() if hand][: most - len(dealt)]
    return sorted(dealt, key=lambda one: KINDS.index(one[3]))
