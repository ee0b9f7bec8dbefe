"""Convergence: how many updates runs from pretrained weights take to a target AUROC, and how many from scratch.

Fine-tuning runs are measured on the audited rows at every checkpoint that they kept (keep_every=); pretraining runs tell
what their watch wrote down (watch.store=): the AUROC of a probe, on the rows that it watched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from carina.data.batches import with_lungs
from carina.data.store import Selection
from carina.errors import CarinaError
from carina.evaluate.anomaly import training_normals
from carina.evaluate.audits.common import Audited, entry, unchanged
from carina.metrics.intervals import interval
from carina.models.checkpoints import load_tensors
from carina.models.features import only
from carina.models.predictor import Member, Predictor, load_predictor
from carina.models.scorers import SCORERS
from carina.runs import Run
from carina.training.engine import pick_device
from carina.training.states import checkpoints

WATCHED = "watch.probe_auroc"
FEWEST = 2  # points that a curve needs


def _put(member: Member, checkpoint: Path) -> None:
    """The member's networks as they were at a checkpoint of the task that trained them."""
    tensors = load_tensors(checkpoint / "task.safetensors")
    for name, part in (("backbone.", member.backbone), ("head.", member.head)):
        if part is None:
            continue
        own = {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}
        if own.keys() != part.state_dict().keys():
            raise CarinaError(f"{checkpoint} holds another network than the run's predictor; give a run of mode=full")
        part.load_state_dict(own)


@torch.no_grad()
def _refit(member: Member, normals: Selection) -> None:
    """The member's scorer, fitted anew on the features that its backbone gives now."""
    device, settings = pick_device(), member.scorer.settings
    member.to(device).eval()
    parts = []
    for _, images, lungs in with_lungs(normals, member.scale, device, member.needs_lungs):
        read = member.scorer.read(member.backbone, only(images, lungs, member.region), settings, lungs)
        parts.append([part.cpu().numpy() for part in read])
    member.scorer = SCORERS[settings.name].fit([np.concatenate(part) for part in zip(*parts)], settings)


def _training_normals(predictor: Predictor, audited: Audited, folder: str) -> Selection:
    if predictor.members[0].scorer.settings.name == "head":
        raise CarinaError(
            f"{folder} scores with the head that it trained, which is not fitted anew; score with gaussian"
        )
    normals = training_normals(predictor, audited.store)
    if isinstance(normals, str):
        raise CarinaError(f"{folder} cannot be followed here: {normals[0].lower()}{normals[1:]}")
    return normals


def followed(folder: str, audited: Audited) -> list[dict[str, Any]]:
    """{updates, auroc} at every point of a run that is known, oldest first; auroc is an `Interval.to_dict()`."""
    run = Run.open(folder)
    if run.stage == "pretrain":
        points = [
            {"updates": row["step"] + 1, "auroc": {"value": row[WATCHED], "low": None, "high": None}}
            for row in run.metrics()
            if row.get(WATCHED) is not None
        ]
        mend = "pretrain with watch.store=STORE"
    else:
        points, mend = _measured(run, audited), "finetune with keep_every=N"
    if len(points) < FEWEST:
        raise CarinaError(f"{folder} kept {len(points)} points of its curve, too few to follow; {mend}")
    return points


def _measured(run: Run, audited: Audited) -> list[dict[str, Any]]:
    predictor = load_predictor(run.folder)
    if predictor.labels != audited.labels or len(predictor.members) > 1:
        raise CarinaError(f"{run.folder} predicts other labels or at several scales; give runs of one scale and task")
    (member,) = predictor.members
    normals = None if member.scorer is None else _training_normals(predictor, audited, str(run.folder))
    own = Audited(predictor, audited.selection, audited.store, audited.settings, audited.quiet)
    column, points = 0 if len(audited.labels) == 1 else None, []
    for checkpoint in checkpoints(run):
        _put(member, checkpoint)
        if normals is not None:
            _refit(member, normals)
        found = interval(own.measured(own.scores({"": unchanged})[""]), column)
        points.append({"updates": int(checkpoint.name.removeprefix("step-")), "auroc": found.to_dict()})
    return points


def reached(points: Sequence[dict[str, Any]], target: float) -> int | None:
    """Updates at the first point whose AUROC is at least the target; None where none is."""
    return next(
        (p["updates"] for p in points if p["auroc"]["value"] is not None and p["auroc"]["value"] >= target), None
    )


def audit(audited: Audited) -> dict[str, Any]:
    """A row a run: updates to the target, and where it ended."""
    settings = audited.settings
    if not settings.pretrained or not settings.scratch:
        raise CarinaError(
            "the convergence audit compares two sets of runs; name those from pretrained weights and those from scratch"
        )
    curves = {
        name: [followed(folder, audited) for folder in folders]
        for name, folders in (("pretrained", settings.pretrained), ("scratch", settings.scratch))
    }
    target = settings.target
    if target is None:
        target = float(np.mean([points[-1]["auroc"]["value"] for points in curves["scratch"]]))
    rows = [
        {
            "start": name,
            "run": number,
            "target": target,
            "updates": reached(points, target),
            "last_updates": points[-1]["updates"],
            "last_auroc": points[-1]["auroc"],
        }
        for name, runs in curves.items()
        for number, points in enumerate(runs)
    ]
    series = [
        {
            "name": f"{name} {number}",
            "unit": "updates",
            "x": [point["updates"] for point in points],
            **{end: [point["auroc"][end] for point in points] for end in ("value", "low", "high")},
        }
        for name, runs in curves.items()
        for number, points in enumerate(runs)
    ]
    chosen = settings.target is None
    return entry(
        "convergence",
        sentence(rows, target, chosen),
        rows,
        {"x": "updates", "y": "AUROC", "target": target, "series": series},
    )


def sentence(rows: list[dict[str, Any]], target: float, from_scratch: bool) -> str:
    def part(name: str) -> tuple[str, float | None]:
        own = [row for row in rows if row["start"] == name]
        done = [row["updates"] for row in own if row["updates"] is not None]
        if len(done) < len(own):
            last = max(row["last_updates"] for row in own)
            return f"{len(own) - len(done)} of {len(own)} runs {_from(name)} do not reach it in {last} updates", None
        middle = float(np.median(done))
        spread = f" ({min(done)} to {max(done)} over {len(own)} runs)" if len(own) > 1 else " (one run)"
        return f"runs {_from(name)} reach it after {middle:g} updates{spread}", middle

    (first, fast), (second, slow) = part("pretrained"), part("scratch")
    origin = ", where runs from scratch end," if from_scratch else ""
    text = f"Of an AUROC of {target:.3f}{origin} {first}, {second}"
    return text + (f": {slow / fast:.1f} times as many from scratch." if fast and slow else ".")


def _from(name: str) -> str:
    return "from pretrained weights" if name == "pretrained" else "from scratch"
