"""The protocol of few labels: arms x modes x labelled patients x draws (x folds), cell by cell to one table and one figure.

A cell is one subset of labelled patients under one arm and mode: scores of the test images. It lies in OUT/cells as a
Parquet file, is written whole, and is never computed again. Frozen cells share the features of their backbone, which are
read once; a cell that is trained is a run of carina finetune in OUT/runs, gone on with after a stop, and removed when its
scores are written. So a protocol that was stopped goes on where it was by the same command.

Subsets of one draw are nested and shared by all arms. Everything that is chosen, the strength of the probe's
regularization, is chosen inside the labelled patients; whatever else there is stands in the recipe beforehand.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from joblib import Parallel, delayed

from carina.data.batches import control_chunks, in_order, intensity
from carina.data.features import read_all
from carina.data.labels import to_targets
from carina.data.splits import linked_patients
from carina.data.store import Selection
from carina.errors import CarinaError
from carina.files import read_json, write_json, write_text
from carina.finetune.few_labels_plan import HOG, Cell, LabelsPlan, LabelsRecipe, Unit
from carina.finetune.few_labels_tables import Tables
from carina.finetune.probe import probe
from carina.finetune.protocol_base import FREE, cell_done, identity, past, write_cell
from carina.finetune.recipe import FinetuneRecipe
from carina.finetune.run import finetune, scale_and_size, training_rows, training_targets
from carina.models.backbones import load_backbone
from carina.models.controls import control_scale, controls, describe
from carina.models.predictor import load_predictor
from carina.progress import clock
from carina.recipes import differences, to_yaml
from carina.runs import Run, environment
from carina.training.engine import best_precision, pick_device
from carina.training.forecast import WATTS_PER_THREAD

TIMED = 64  # images on which features are timed
MEMORY = 1.0  # GiB that a process of frozen cells takes, at most, beside its features
# what decides a frozen cell; the rest of the recipe is about training
FROZEN_KEYS = {
    "where", "rows", "folds", "fold", "patients", "draw", "seed", "labels", "uncertain", "permute_labels", "architecture",
    "scale", "size", "probe",
}  # fmt: skip


class FewLabels:
    """Computes the cells of a plan below the folder `out`."""

    def __init__(self, plan: LabelsPlan, out: Path, quiet: bool):
        self.plan, self.out, self.quiet = plan, out, quiet
        self.device = pick_device()
        self.pasts: dict[tuple[str, str], dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """Compute every cell that is not there yet; the tables are written when the frozen ones are done, and after every
        draw of the others."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise CarinaError("a protocol runs in processes of its own; start it without a launcher, with parallel=N")
        write_text(self.out / "protocol.yaml", to_yaml(self.plan.recipe))
        write_json(self.out / "environment.json", environment(stage="protocol", device=self.device.type))
        log, tables = Run(self.out, quiet=self.quiet), Tables(self.plan, self.out)
        pending = self.pending()
        if pending:
            told = self.forecast()
            write_json(self.out / "plan.json", told)
            log.log(
                f"{told['cells_to_do']} of {told['cells']} cells to do, about {told['time']} in {told['parallel']} processes"
            )
        for unit in self.plan.units:
            for cell in unit.cells:
                if (self.out / cell.place).is_file():
                    shutil.rmtree(self._folder(cell), ignore_errors=True)
        result = None
        for _, units in groupby(pending, key=lambda unit: -1 if unit.frozen else unit.cells[0].draw):
            work = Parallel(n_jobs=told["parallel"], return_as="generator_unordered")
            for done in work(
                delayed(compute)(self.plan.recipe, self.out, unit, told["parallel"] > 1) for unit in units
            ):
                for words in done:
                    log.log(words)
            result = tables.write()
        return result or tables.write()

    # -- what is there ----------------------------------------------------------------------------------------------

    def pending(self) -> list[Unit]:
        """The units with the cells of them that are to do."""
        left = [
            Unit(tuple(c for c in unit.cells if not cell_done(self.out / c.place, self._asked(c))))
            for unit in self.plan.units
        ]
        return [unit for unit in left if unit.cells]

    def _asked(self, cell: Cell) -> dict[str, Any]:
        recipe, rows = self.plan.cell_recipe(cell), self.plan.rows(cell.set)
        if cell.mode == "frozen":
            told = recipe.model_dump(mode="json", include=FROZEN_KEYS)
        else:
            precision = best_precision(self.device, recipe.precision)
            told = recipe.model_dump(mode="json", exclude={*FREE, "scorer", "pasting", "probe"}) | {
                "precision": precision
            }
        return {
            **told,
            "backbone": identity(recipe.backbone),
            "test": self.plan.recipe.sets[cell.set].test,
            "store_hashes": rows.hashes,
            "labels_hashes": rows.labels_hashes,
        }

    # -- one unit ---------------------------------------------------------------------------------------------------

    def compute(self, unit: Unit) -> Iterator[Cell]:
        """Write the cells of a unit and name each when it lies on the disk."""
        features = self.features(unit.cells[0]) if unit.frozen else None
        for cell in unit.cells:
            began = time.perf_counter()
            recipe = self.plan.cell_recipe(cell)
            train, test = self.plan.fit_rows(cell)
            scores, facts = (
                self._probed(recipe, train, test, features) if unit.frozen else self._trained(cell, recipe, test)
            )
            facts |= {"seconds": round(time.perf_counter() - began, 3), **self._facts(cell, recipe, train)}
            write_cell(self.out / cell.place, self._frame(cell, recipe, test, scores), facts)
            shutil.rmtree(self._folder(cell), ignore_errors=True)
            yield cell

    def features(self, cell: Cell, count: int | None = None) -> dict[str, np.ndarray]:
        """image_id -> features (D,) of all rows of the cell's set (or of `count`) as its backbone reads them."""
        recipe, rows = self.plan.cell_recipe(cell), self.plan.rows(cell.set)
        known, _ = training_rows(recipe.model_copy(update={"patients": None}), rows)
        rows = rows if count is None else rows.where(np.arange(min(count, len(rows))))
        if recipe.backbone == HOG:
            scale = recipe.scale or control_scale(set.intersection(*(set(store.scales) for store in rows.stores)))
            found = describe(control_chunks(rows, scale), controls(scale, 0, ["HOG"]))["HOG"]
        else:
            scale, size = scale_and_size(recipe, known)
            mean, std = intensity(known, scale)
            given = {"architecture": recipe.architecture, "seed": recipe.seed, "mean": mean, "std": std}
            network = load_backbone(recipe.backbone, size=size, **given)
            how = {"cache": recipe.cache, "device": self.device}
            (found,) = read_all(network, rows, scale, lambda part, images: [part(images)], "pooled", **how)
        return dict(zip(rows.table["image_id"], found))

    def _probed(
        self, recipe: FinetuneRecipe, train: Selection, test: Selection, features: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Logits (N, L) of the test rows. A label of which the labelled rows hold one class only cannot be learned: its
        scores are all equal, which is chance."""
        targets = training_targets(recipe, train)
        x, new = (np.stack([features[image] for image in rows.table["image_id"]]) for rows in (train, test))
        able = [column for column, target in enumerate(targets.T) if both_classes(target)]
        scores, chosen = np.zeros((len(test), targets.shape[1])), {}
        if able:
            labels, patients = [recipe.labels[column] for column in able], linked_patients(train.table).tolist()
            weight, bias, chosen, _ = probe(x, targets[:, able], patients, labels, recipe.probe, recipe.seed)
            scores[:, able] = new.astype(np.float64) @ weight.T + bias
        return scores, {"chosen": chosen}

    def _folder(self, cell: Cell) -> Path:
        return self.out / "runs" / cell.place.removeprefix("cells/").removesuffix(".parquet").replace("/", "--")

    def _trained(self, cell: Cell, recipe: FinetuneRecipe, test: Selection) -> tuple[np.ndarray, dict[str, Any]]:
        """Probabilities (N, L) of the test rows by a run of carina finetune: begun, or gone on with."""
        folder = self._folder(cell)
        begun = (folder / "recipe.yaml").is_file()
        if begun:
            changed = differences(Run(folder).recipe(), recipe.model_dump(mode="json"))
            begun = not {key.split(".")[0] for key in changed} - {*FREE, "precision"}
        if not begun:  # stopped before it had a name, or of other settings
            shutil.rmtree(folder, ignore_errors=True)
        if not (folder / "manifest.parquet").is_file():  # the last thing that a run writes
            finetune("classify", recipe.model_dump(mode="json") | {"out": str(folder)}, resume=begun, quiet=True)
        predictor = load_predictor(folder / "predictor", self.device)
        batches = zip(*(in_order(test, scale, self.device) for scale in predictor.scales))
        parts = [predictor.scores(dict(zip(predictor.scales, [images for _, images in batch]))) for batch in batches]
        return np.concatenate(parts), {"steps": predictor.info["training"]["steps"]}

    def _frame(self, cell: Cell, recipe: FinetuneRecipe, test: Selection, scores: np.ndarray) -> pd.DataFrame:
        """image_id, patient_id, fold, the columns of `within`, label, target, score: a row an image and label."""
        rows = self.plan.recipe.sets[cell.set]
        targets = to_targets(test.targets(recipe.labels))
        columns = test.table[["image_id", "patient_id", *rows.within]].reset_index(drop=True)
        columns = columns.assign(fold=-1 if cell.fold is None else cell.fold)
        return pd.concat(
            [
                columns.assign(label=label, target=targets[:, number], score=scores[:, number])
                for number, label in enumerate(recipe.labels)
            ],
            ignore_index=True,
        )

    def _facts(self, cell: Cell, recipe: FinetuneRecipe, train: Selection) -> dict[str, Any]:
        if (cell.set, cell.arm) not in self.pasts:
            reference = "random" if recipe.backbone == HOG else recipe.backbone
            self.pasts[cell.set, cell.arm] = past(reference, self.plan.tested(cell.set))
        told, targets = self.pasts[cell.set, cell.arm], training_targets(recipe, train)
        return {
            **told,
            "asked": self._asked(cell),
            "patients": int(train.table["patient_id"].nunique()),
            "images": len(train),
            "one_class": [label for label, target in zip(recipe.labels, targets.T) if not both_classes(target)],
            "labels_used": f"{int(train.table['patient_id'].nunique())} patients"
            + (", dealt out anew" if recipe.permute_labels else "")
            + (f"; pretext: {told['pretext_labels']}" if told["pretext_labels"] != "none" else ""),
        }

    # -- what it would take -----------------------------------------------------------------------------------------

    def forecast(self) -> dict[str, Any]:
        """Cells, hours, disk and energy of what is to do, by a timed step of every arm that is trained, and timed features
        and probes of every frozen one."""
        pending = self.pending()
        stored = read_json(self.out / "plan.json")["rates"] if (self.out / "plan.json").is_file() else {}
        rates: dict[str, dict[str, float]] = {}
        seconds = joules = disk = 0.0
        for unit in pending:
            first = unit.cells[0]
            name = f"{first.set}/{first.arm}/{first.mode}"
            if name not in rates:
                rates[name] = stored.get(name) or (self._frozen_rate if unit.frozen else self._trained_rate)(first)
            rate = rates[name]
            cost = rate["seconds"]
            if unit.frozen:
                cost += sum(rate["probe"] * len(self.plan.fit_rows(cell)[0]) for cell in unit.cells)
            seconds += cost
            joules += cost * (self.plan.recipe.watts or rate["watts"])
            disk = max(disk, rate["disk_mib"])
        jobs = min(self.plan.recipe.parallel, max(1, len(pending)))
        memory = max((rate["memory_gib"] for rate in rates.values()), default=0.0)
        fitting = int(psutil.virtual_memory().available / 2**30 / memory) if memory else jobs
        jobs = max(1, min(jobs, fitting))
        cells = sum(len(unit.cells) for unit in self.plan.units)
        rows = sum(count["test_images"] * len(count["labels"]) for count in self.plan.counts.values())
        basis = (
            "given by watts="
            if self.plan.recipe.watts
            else f"measured on a GPU, or assumed {WATTS_PER_THREAD:g} W a CPU thread"
        )
        return {
            "title": self.plan.recipe.title,
            "sets": self.plan.counts,
            "arms": {
                name: f"{', '.join(arm.modes)}: {Path(arm.backbone).name}" for name, arm in self.plan.arms.items()
            },
            "left_out": self.plan.left_out,
            "cells": cells,
            "cells_to_do": sum(len(unit.cells) for unit in pending),
            "runs_to_train": sum(not unit.frozen for unit in pending),
            "parallel": jobs,
            "memory_gib": round(memory * jobs, 2),
            "hours": round(seconds / 3600 / jobs, 6),
            "time": clock(seconds / jobs),
            "disk_mib": round(disk * jobs + cells * (0.02 + 1e-5 * rows), 1),
            "energy_kwh": round(joules / 3.6e6, 5),
            "energy_basis": f"estimated: {basis}",
            "rates": rates,
        }

    def _frozen_rate(self, cell: Cell) -> dict[str, float]:
        """seconds: features of the set; probe: of an image among those that are labelled."""
        rows = self.plan.rows(cell.set)
        began = time.perf_counter()
        features = self.features(cell, TIMED)
        read = (time.perf_counter() - began) * max(1.0, len(rows) / len(features))
        found = np.stack(list(features.values()))
        recipe, target = self.plan.cell_recipe(cell), np.arange(len(found))[:, None] % 2
        began = time.perf_counter()
        patients = [str(number) for number in range(len(found))]
        probe(found, target.astype(np.float32), patients, ["timed"], recipe.probe, 0)
        each = (time.perf_counter() - began) * len(recipe.labels) / len(found)
        memory = MEMORY + found.nbytes / len(found) * len(rows) * 6 / 2**30  # standardized copies in double precision
        return {"seconds": read, "probe": each, "memory_gib": memory, "disk_mib": 0.0, "watts": WATTS_PER_THREAD}

    def _trained_rate(self, cell: Cell) -> dict[str, float]:
        recipe = self.plan.cell_recipe(cell)
        told = finetune("classify", recipe.model_dump(mode="json"), dry_run=True, quiet=True)
        watts = told["energy_kwh"] * 3.6e6 / max(told["hours"] * 3600, 1e-9)
        seconds = told["seconds_per_step"] * told["steps"]
        memory = max(told["memory_gib"], MEMORY) if self.device.type == "cpu" else MEMORY
        return {"seconds": seconds, "memory_gib": memory, "disk_mib": told["disk_mib"], "watts": watts}


def both_classes(target: np.ndarray) -> bool:
    return bool((target == 1).any() and (target == 0).any())


@cache
def _bench(recipe: str, out: Path) -> FewLabels:
    return FewLabels(LabelsPlan(LabelsRecipe.model_validate_json(recipe)), out, quiet=True)


def compute(recipe: LabelsRecipe, out: Path, unit: Unit, beside_others: bool) -> list[str]:
    """The work of one process: the cells of a unit, each told in words."""
    if beside_others:
        torch.set_num_threads(1)
    began, told = time.perf_counter(), []
    for cell in _bench(recipe.model_dump_json(), out).compute(unit):
        now = time.perf_counter()
        told.append(f"{cell.words}: {now - began:.1f} s")
        began = now
    return told
