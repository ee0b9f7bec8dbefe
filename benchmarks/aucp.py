"""Does AUCp, which needs no label, choose as labels would? Over the checkpoints of finished anomaly runs.

    python benchmarks/aucp.py runs=[RUN,RUN,RUN] store=STORE [pool=val] [test=test] [scorer=gaussian] [out=FILE.json]

RUNS of `carina finetune anomaly mode=full select=aucp pool_rows=val keep_every=N`. For every kept checkpoint: AUCp, the
AUROC of normals kept from training against the pool, whose labels only tell its prevalence; and the true AUROC of
the test rows under the scorer fitted on all training normals. Pool, test and training patients are disjoint.

Shown are Pearson's correlation, by run and over all checkpoints, and what the choice costs against the best checkpoint
and gains against the last. Where the true AUROC of a run's checkpoints spans less than 0.05, its correlation is
not informative: there is nothing to choose. `out=FILE.json` also draws FILE.png.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from common import console, script
from matplotlib.figure import Figure
from pydantic import Field
from rich.table import Table

from carina.data.labels import ABNORMAL, to_targets
from carina.data.splits import linked_patients
from carina.data.store import Selection, select
from carina.errors import CarinaError
from carina.files import write_json
from carina.finetune.anomaly import (
    SMALL_PREVALENCE,
    aucp,
    checkpoint_steps,
    collect,
    contaminated,
    distances,
    fit_scorer,
    kept_from_training,
    rows_of,
)
from carina.finetune.recipe import FinetuneRecipe
from carina.metrics.intervals import paired_difference, patient_bootstrap
from carina.models.backbones import Backbone
from carina.models.checkpoints import load_tensors
from carina.models.predictor import load_predictor
from carina.models.scorers import SCORERS, ScorerSettings
from carina.progress import Progress
from carina.recipes import Section, validate
from carina.runs import Run
from carina.training.engine import pick_device

SPAN = 0.05  # of the true AUROC over a run's checkpoints: below it a correlation says nothing


class Arguments(Section):
    runs: Annotated[list[str], Field(min_length=1)]
    store: Annotated[str | list[str], Field(min_length=1)]
    pool: str
    test: str
    scorer: str | None
    every: Annotated[int, Field(ge=1)]
    resamples: Annotated[int, Field(ge=100)]
    threads: Annotated[int, Field(ge=1)]
    out: str | None


DEFAULTS = {
    "pool": "val",
    "test": "test",
    "scorer": None,  # null: the run's own; gaussian where that is the pasting head, which is not fitted
    "every": 1,  # of the kept checkpoints, to try the script out; the last one always
    "resamples": 2000,
    "threads": 1,
    "out": None,
}


class Rows:
    """Training normals as the run had them, pool and test of other patients, all with known labels."""

    def __init__(self, recipe: FinetuneRecipe, given: Arguments):
        everything = select(given.store, where=recipe.where)
        target = to_targets(everything.targets([ABNORMAL]), recipe.uncertain)[:, 0]
        split = everything.table["split"]
        train = np.zeros(len(everything), dtype=bool)
        own = split.isin(recipe.rows.split("+")).to_numpy()
        mixed = everything.where(own)
        train[own] = contaminated(mixed, target[own] == 0, target[own] == 1, recipe.contamination, recipe.seed)
        known = ~np.isnan(target)
        pool, test = (split.isin(name.split("+")).to_numpy() & known for name in (given.pool, given.test))
        patients = linked_patients(everything.table)
        for name, rows in (("rows", train), ("pool", pool), ("test", test)):
            if not rows.any():
                raise CarinaError(f"{name}= names no row with a known label; give splits that {given.store} has")
        for (one, rows), (two, others) in combinations({"rows": train, "pool": pool, "test": test}.items(), 2):
            if shared := set(patients[rows]) & set(patients[others]):
                raise CarinaError(
                    f"{len(shared)} patients stand in both {one}= and {two}=; give splits that share none"
                )
        self.train: Selection = everything.where(train)
        self.pool, self.test = everything.where(pool), everything.where(test)
        self.prevalence = float((target[pool] == 1).mean())
        self.target, self.patients = target[test], self.test.table["patient_id"].to_numpy()


def put(backbone: Backbone, checkpoint: Path) -> None:
    """The backbone as it was at a checkpoint of the task that trained it."""
    tensors, prefix = load_tensors(checkpoint / "task.safetensors"), "backbone."
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if own.keys() != backbone.state_dict().keys():
        raise CarinaError(f"{checkpoint} holds another network than the run's predictor; give the run as it was made")
    backbone.load_state_dict(own)


def measure(folder: str, given: Arguments) -> dict[str, Any]:
    """AUCp and the true AUROC of every checkpoint of a run, and what the choice is worth."""
    run = Run.open(folder)
    recipe = validate(FinetuneRecipe, run.recipe(), folder)
    if recipe.task != "anomaly" or recipe.mode != "full":
        raise CarinaError(
            f"{folder} is no run of carina finetune anomaly mode=full, so it made no checkpoints; give one"
        )
    steps = checkpoint_steps(run)
    steps = [pair for number, pair in enumerate(steps) if (len(steps) - 1 - number) % given.every == 0]
    if len(steps) < 3:
        raise CarinaError(f"{folder} kept {len(steps)} checkpoints, too few to correlate; run it with keep_every=N")
    rows, (member,) = Rows(recipe, given), load_predictor(run.folder).members
    settings: ScorerSettings = recipe.scorer
    name = given.scorer or ("gaussian" if settings.name == "head" else settings.name)
    if name not in SCORERS or name == "head":
        raise CarinaError(f"scorer={name} is none that is fitted on features; give gaussian or knn")
    settings = settings.model_copy(update={"name": name})
    if recipe.select != "aucp":
        raise CarinaError(
            f"{folder} was trained on all its normals, which leaves none for AUCp; run it with select=aucp"
        )
    device, apart = pick_device(), kept_from_training(rows.train.table["patient_id"].tolist(), recipe.seed)
    table, scores = [], []
    with Progress(f"aucp {run.folder.name}", len(steps), unit="checkpoints") as progress:
        for step, checkpoint in steps:
            put(member.backbone, checkpoint)
            normals, pool, test = (
                collect(member.backbone, part, member.scale, settings, recipe.region, device)
                for part in (rows.train, rows.pool, rows.test)
            )
            trained, kept = (rows_of(normals, which) for which in (~apart, apart))
            scores.append(distances(fit_scorer(normals, settings), test))
            found = patient_bootstrap(rows.target, scores[-1], rows.patients, resamples=given.resamples)
            selector = aucp(trained, kept, pool, settings)
            table.append({"step": step, "aucp": selector, "auroc": found.to_dict()})
            progress.advance(note=f"step {step}: AUCp {selector:.3f}, AUROC {found.value:.3f}")
    chosen, best = (max(range(len(table)), key=lambda i: (value(table[i]), i)) for value in (by_aucp, by_auroc))
    true = np.array([by_auroc(row) for row in table])

    def against(other: int) -> dict[str, Any]:
        pair = (scores[chosen][None], scores[other][None])
        return paired_difference(rows.target, *pair, rows.patients, resamples=given.resamples).to_dict()

    return {
        "run": run.folder.name,
        "scorer": name,
        "method": recipe.pasting.method,
        "contamination": recipe.contamination,
        "pool": {"images": len(rows.pool), "prevalence": rows.prevalence, "small": rows.prevalence < SMALL_PREVALENCE},
        "test": {
            "images": len(rows.test),
            "patients": len(set(rows.patients)),
            "positives": int((rows.target == 1).sum()),
        },
        "synthetic": rows.test.synthetic,
        "checkpoints": table,
        "correlation": pearson(table),
        "span": float(np.ptp(true)),
        "informative": bool(np.ptp(true) >= SPAN),
        "chosen": table[chosen]["step"],
        "best": table[best]["step"],
        "chosen_minus_best": float(true[chosen] - true[best]),
        "chosen_minus_last": against(len(table) - 1),
    }


def by_aucp(row: dict[str, Any]) -> float:
    return row["aucp"]


def by_auroc(row: dict[str, Any]) -> float:
    return row["auroc"]["value"]


def pearson(table: list[dict[str, Any]]) -> float | None:
    """Between AUCp and the true AUROC; None where one of them never changes."""
    values = np.array([[by_aucp(row), by_auroc(row)] for row in table])
    return float(np.corrcoef(values.T)[0, 1]) if np.ptp(values, axis=0).all() else None


def run(given: Arguments) -> dict[str, Any]:
    """All runs, each measured and then together, as JSON values."""
    torch.set_num_threads(given.threads)
    names = [Path(folder).resolve() for folder in given.runs]
    if len(set(names)) < len(names):
        raise CarinaError("runs= names one run twice; give different runs")
    found = [measure(folder, given) for folder in given.runs]
    every = [row for part in found for row in part["checkpoints"]]
    informative = [part for part in found if part["informative"]]
    return {
        "benchmark": "aucp",
        "arguments": given.model_dump(exclude={"out", "store", "runs"}),
        "stores": [Path(store).name for store in ([given.store] if isinstance(given.store, str) else given.store)],
        "synthetic": any(part["synthetic"] for part in found),
        "runs": found,
        "pooled_correlation": pearson(every),
        "pooled_span": float(np.ptp([by_auroc(row) for row in every])),
        "informative_runs": len(informative),
        "mean_chosen_minus_best": float(np.mean([part["chosen_minus_best"] for part in found])),
        "mean_chosen_minus_last": float(np.mean([part["chosen_minus_last"]["value"] for part in found])),
    }


def draw(path: Path, result: dict[str, Any]) -> None:
    """AUROC and AUCp against updates, a panel a run."""
    found = result["runs"]
    figure = Figure(figsize=(4.2 * len(found), 3.6), layout="constrained")
    for axes, part in zip(np.atleast_1d(figure.subplots(1, len(found), sharey=True)), found):
        table = part["checkpoints"]
        steps = [row["step"] for row in table]
        low, high = ([row["auroc"][end] for row in table] for end in ("low", "high"))
        axes.fill_between(steps, low, high, alpha=0.15, linewidth=0)
        axes.plot(steps, [by_auroc(row) for row in table], marker="o", markersize=3, label="AUROC (test, labelled)")
        axes.plot(steps, [by_aucp(row) for row in table], marker="s", markersize=3, label="AUCp (pool, no label)")
        axes.axvline(part["chosen"], linestyle=":", color="gray", label="chosen by AUCp")
        correlation = "none" if part["correlation"] is None else f"{part['correlation']:.2f}"
        doubt = "" if part["informative"] else ", not informative"
        axes.set(xlabel="updates")
        axes.set_title(f"{part['run']}\nr = {correlation}{doubt}", fontsize=8)
    axes.legend(fontsize=8)
    figure.suptitle(("synthetic: " if result["synthetic"] else "") + f"{'+'.join(result['stores'])}, 95 % by patient")
    figure.savefig(path, dpi=120)


def shown(result: dict[str, Any]) -> Table:
    """A line a run, and one for all checkpoints together."""
    pool, test = result["runs"][0]["pool"], result["runs"][0]["test"]
    given = result["arguments"]
    title = f"AUCp on {'+'.join(result['stores'])}: pool {given['pool']}, test {given['test']}"
    table = Table(
        title=("synthetic: " if result["synthetic"] else "") + title,
        caption=f"pool: {pool['images']} images, {pool['prevalence']:.1%} abnormal; test: {test['images']} images of "
        f"{test['patients']} patients, {test['positives']} abnormal; 95 % intervals, patients drawn",
        title_justify="left",
        caption_justify="left",
    )
    for head in (
        "run",
        "scorer",
        "checkpoints",
        "span",
        "r",
        "best",
        "chosen",
        "last",
        "chosen - best",
        "chosen - last",
    ):
        table.add_column(head)
    for part in result["runs"]:
        rows = {row["step"]: by_auroc(row) for row in part["checkpoints"]}
        last, gain = max(rows), part["chosen_minus_last"]
        correlation = "none" if part["correlation"] is None else f"{part['correlation']:.2f}"
        table.add_row(
            part["run"],
            part["scorer"],
            str(len(rows)),
            f"{part['span']:.3f}",
            correlation if part["informative"] else f"not informative ({correlation})",
            *(f"{rows[step]:.3f} ({step})" for step in (part["best"], part["chosen"], last)),
            f"{part['chosen_minus_best']:.3f}",
            f"{gain['value']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]",
        )
    pooled = result["pooled_correlation"]
    table.add_row(
        "all",
        "",
        str(sum(len(part["checkpoints"]) for part in result["runs"])),
        f"{result['pooled_span']:.3f}",
        "none" if pooled is None else f"{pooled:.2f}",
        *("", "", ""),
        f"{result['mean_chosen_minus_best']:.3f}",
        f"{result['mean_chosen_minus_last']:.3f}",
    )
    return table


def work(given: Arguments) -> None:
    result = run(given)
    if given.out:
        write_json(given.out, result)
        draw(Path(given.out).with_suffix(".png"), result)
    out = console(170)
    out.print(shown(result))
    if any(part["pool"]["small"] for part in result["runs"]):
        out.print(f"Below {SMALL_PREVALENCE:.0%} abnormal images in the pool AUCp follows the true AUROC loosely.")


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "aucp", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
