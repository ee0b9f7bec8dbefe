"""The protocol of anomaly detection: whatever its result rests on, named beforehand, run cell by cell to one table.

A cell is one scorer on one region of the images as one backbone reads them: scores of the test images, of the training
normals by scorers that were not fitted on them, and of held-out normals. It lies in OUT/cells as a Parquet file, is
written whole, and is never computed again; a backbone that is trained is a run of carina finetune in OUT/runs. So a
protocol that was stopped goes on where it was by the same command.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from carina.data.batches import control_chunks, intensity
from carina.data.store import Selection, select
from carina.errors import CarinaError
from carina.files import read_json, write_json, write_text
from carina.finetune import anomaly
from carina.finetune.protocol_anomaly_plan import Cell, Fit, Plan, Unit, known, run_folder
from carina.finetune.protocol_anomaly_tables import Tables, control_name
from carina.finetune.protocol_base import FREE, cell_done, identity, past, union, write_cell
from carina.finetune.recipe import FinetuneRecipe
from carina.finetune.run import finetune, scale_and_size
from carina.models.backbones import load_backbone
from carina.models.checkpoints import load_tensors
from carina.models.controls import Control, control_rows, control_scale, controls, describe
from carina.models.pasting import PastingTask
from carina.models.predictor import Member, load_predictor
from carina.models.scorers import SCORERS, Read, ScorerSettings
from carina.progress import clock
from carina.recipes import differences, to_yaml
from carina.runs import Run, environment
from carina.training.engine import best_precision, pick_device

MANY = 5000  # images above which the control rows are described one after the other, so that their features fit


class Bench:
    """Computes the cells of a plan below the folder `out`."""

    def __init__(self, plan: Plan, out: Path, quiet: bool):
        self.plan, self.out, self.quiet = plan, out, quiet
        self.device = pick_device()

    def run(self) -> dict[str, Any]:
        """Compute every cell that is not there yet, and write the tables again whenever an arm is done."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise CarinaError("a protocol runs in one process; start it without a launcher")
        write_text(self.out / "protocol.yaml", to_yaml(self.plan.recipe))
        write_json(self.out / "environment.json", environment(stage="protocol", device=self.device.type))
        log = Run(self.out, quiet=self.quiet)
        scales = {name: self._control_scale(name) for name in self.plan.stores}
        rows = {name: controls(scale, self.seed) for name, scale in scales.items()}
        for name, scale in scales.items():
            self._controls(name, scale, rows[name], log)
        tables = Tables(self.plan, self.out, rows)
        count = len(self.plan.units)
        for number, unit in enumerate(self.plan.units, 1):
            pending = [cell for cell in unit.cells if not self.done(cell.place, self._asked(cell, unit))]
            if pending:
                log.log(f"[{number}/{count}] {unit.words}: {len(pending)} of {len(unit.cells)} cells to do")
                self._compute(unit, pending)
                tables.write()
        return tables.write()

    @property
    def seed(self) -> int:
        return self.plan.recipe.seed

    # -- what is there ----------------------------------------------------------------------------------------------

    def done(self, place: str, asked: dict[str, Any]) -> bool:
        return cell_done(self.out / place, asked)

    def _asked(self, cell: Cell, unit: Unit) -> dict[str, Any]:
        recipe, rows = unit.recipes[0], self.plan.recipe.sets[cell.set]
        return {
            **self._resolved(recipe).model_dump(mode="json", exclude={*FREE, "fold", "scorer"}),
            "backbone": identity(recipe.backbone),
            "region": cell.region,
            "scorer": unit.scorers[cell.scorer].model_dump(),
            "test": rows.test,
            "pool": rows.pool,
            **self.hashes[cell.set],
        }

    @cached_property
    def hashes(self) -> dict[str, dict[str, list[str]]]:
        opened = {name: select(store) for name, store in self.plan.stores.items()}
        return {name: {"store_hashes": s.hashes, "labels_hashes": s.labels_hashes} for name, s in opened.items()}

    def _resolved(self, recipe: FinetuneRecipe) -> FinetuneRecipe:
        return recipe.model_copy(update={"precision": best_precision(self.device, recipe.precision)})

    # -- one unit ---------------------------------------------------------------------------------------------------

    def _compute(self, unit: Unit, pending: list[Cell]) -> None:
        fits = list(enumerate(self.plan.fit_rows(unit.set, recipe) for recipe in unit.recipes))
        frames: dict[Cell, list[pd.DataFrame]] = {cell: [] for cell in pending}
        # weights from elsewhere are the same for every fold, so that one pass over the images serves all of them
        together = not unit.full and not unit.recipes[0].backbone.startswith("random")
        for group in [fits] if together else [[fit] for fit in fits]:
            number, fit = group[0]
            recipe = unit.recipes[number]
            folder = self.train(unit, recipe) if unit.full else None
            for checkpoint, member, facts in self._members(recipe, fit, folder, union([fit.test for _, fit in fits])):
                mine = [cell for cell in pending if cell.checkpoint == checkpoint]
                for cell, parts in self._score(unit, mine, group, member, folder, facts["step"]):
                    frames[cell] += parts
                    if len(frames[cell]) == len(fits):
                        facts |= {"asked": self._asked(cell, unit), "mode": recipe.mode}
                        write_cell(self.out / cell.place, pd.concat(frames.pop(cell), ignore_index=True), facts)

    def train(self, unit: Unit, recipe: FinetuneRecipe) -> Path:
        """The run of a full arm: begun, gone on with, or left alone where it is finished."""
        folder = run_folder(self.out, unit, recipe)
        if not finished(folder):
            begun = (folder / "recipe.yaml").is_file()
            given = recipe.model_dump(mode="json") | {"out": str(folder)}
            finetune("anomaly", given, resume=begun, quiet=self.quiet)
        changed = differences(Run(folder).recipe(), self._resolved(recipe).model_dump(mode="json"))
        changed = [key for key in changed if key.split(".")[0] not in FREE]
        if changed:
            raise CarinaError(f"{folder} was trained with other settings ({', '.join(changed)}); choose another out=")
        return folder

    def _members(
        self, recipe: FinetuneRecipe, fit: Fit, folder: Path | None, tests: Selection
    ) -> Iterator[tuple[str, Member, dict[str, Any]]]:
        """(checkpoint, backbone and scale, facts) of every checkpoint that is scored."""
        facts = self._facts(recipe, fit, tests)
        if folder is None:
            scale, size = scale_and_size(recipe, fit.train)
            mean, std = intensity(fit.train, scale)
            reference = f"random:{recipe.architecture}" if recipe.backbone == "random" else recipe.backbone
            options = {"architecture": recipe.architecture, "seed": recipe.seed, "mean": mean, "std": std}
            yield "frozen", Member(load_backbone(reference, size=size, **options), scale, None, None), facts
            return
        chosen = read_json(folder / "selection.json") if recipe.select != "last" else None
        last = load_predictor(folder / ("predictor-last" if chosen else "predictor"))
        facts |= {"training": last.info["training"], "step": last.info["training"]["steps"]}
        yield "last", last.members[0], facts
        if chosen:
            facts = facts | {"step": chosen["step"], "informative": chosen["informative"]}
            if recipe.select == "validation":
                facts["labels_used"] += " and validation labels, which chose the checkpoint"
            yield recipe.select, load_predictor(folder / "predictor").members[0], facts

    def _facts(self, recipe: FinetuneRecipe, fit: Fit, tests: Selection) -> dict[str, Any]:
        """What a row says of the past of its backbone and of the labels that it took."""
        told = past(recipe.backbone, tests)
        labels = "the normal flag" + (f", wrong for {recipe.contamination:.0%}" if recipe.contamination else "")
        earlier, seen = told.pop("pretext_labels"), told["seen_patients"]
        told["pretext_saw"] += f", {seen} patients of the test among them" if seen else ""
        return {
            **told,
            "finetune_saw": anomaly.saw(recipe) if recipe.mode == "full" else "",
            "labels_used": labels + (f"; pretext: {earlier}" if earlier != "none" else ""),
            "images": len(fit.train),
            "step": 0,
        }

    def _score(
        self,
        unit: Unit,
        cells: list[Cell],
        group: list[tuple[int, Fit]],
        member: Member,
        folder: Path | None,
        step: int,
    ) -> Iterator[tuple[Cell, list[pd.DataFrame]]]:
        """Every cell with a frame for each fit of the group. What several scorers read is read once for all of them."""
        rows = union([part for _, fit in group for part in (fit.train, fit.test, fit.held_out) if part is not None])
        place = {image: number for number, image in enumerate(rows.table["image_id"])}
        readings: dict[tuple, list[Cell]] = {}
        for cell in cells:
            settings = unit.scorers[cell.scorer]
            if settings.name == "head":
                head = self._head(unit.recipes[group[0][0]], member, folder, step, settings, cell.region)
                yield cell, [self._head_frame(head, number, fit) for number, fit in group]
                continue
            kind = SCORERS[settings.name]
            reading = (cell.region, kind.read.__func__, kind.positions, str(settings.layers), str(settings.sizes))
            reading += (settings.places,)
            readings.setdefault(reading, []).append(cell)
        for (region, *_), mine in readings.items():
            settings = unit.scorers[mine[0].scorer]
            read = anomaly.collect(member.backbone, rows, member.scale, settings, region, self.device, self.quiet)
            for cell in mine:
                settings = unit.scorers[cell.scorer]
                yield cell, [_frame(unit.recipes[n], settings, read, place, n, fit) for n, fit in group]

    def _head(
        self, recipe: FinetuneRecipe, member: Member, folder: Path, step: int, settings: ScorerSettings, region: str
    ) -> Member:
        """The head that pasting trained, at the checkpoint of the member's backbone, as its scorer."""
        tensors = load_tensors(folder / "checkpoints" / f"step-{step:08d}" / "task.safetensors")
        task = PastingTask(member.backbone, recipe.pasting, recipe.seed)
        own = {key.removeprefix("task."): value for key, value in tensors.items() if key.startswith("task.")}
        task.load_state_dict(own)
        return Member(member.backbone, member.scale, None, SCORERS["head"].of(task.head.eval(), settings), region)

    def _head_frame(self, member: Member, number: int, fit: Fit) -> pd.DataFrame:
        """The head was trained on all training normals, which therefore stay unscored."""
        parts = [rows_frame(number, "test", fit.test, anomaly.member_distances(member, fit.test, self.device))]
        if fit.held_out is not None and len(fit.held_out):
            scores = anomaly.member_distances(member, fit.held_out, self.device)
            parts.append(rows_frame(number, "held out", fit.held_out, scores))
        return pd.concat(parts, ignore_index=True)

    # -- control rows -----------------------------------------------------------------------------------------------

    def _control_scale(self, name: str) -> int:
        return control_scale(set.intersection(*(set(s.scales) for s in select(self.plan.stores[name]).stores)))

    def _controls(self, name: str, scale: int, every: list[Control], log: Run) -> None:
        """Write the control rows of a set that are not there yet."""
        rows = self.plan.recipe.sets[name].model_dump(mode="json", exclude={"store", "counts", "prevalence"})
        asked = {"scale": scale, "seed": self.seed, "rows": rows, **self.hashes[name]}
        missing = [
            control
            for control in every
            if not all(self.done(control_name(name, control.name, str(m)), asked) for m in control.methods)
        ]
        if not missing:
            return
        log.log(f"{name}: {len(missing)} controls at scale {scale}")
        folds = range(self.plan.recipe.sets[name].folds or 1)
        fits = [self.plan.fit_rows(name, self.plan.set_recipe(name, fold=fold)) for fold in folds]
        few = len(fits[0].train) + len(fits[0].test) <= MANY
        for some in [missing] if few else [[control] for control in missing]:
            self._write_controls(name, scale, some, fits, asked)

    def _write_controls(
        self, name: str, scale: int, some: list[Control], fits: list[Fit], asked: dict[str, Any]
    ) -> None:
        frames: dict[str, list[pd.DataFrame]] = {}
        facts: dict[str, dict[str, Any]] = {}
        for number, fit in enumerate(fits):
            normals, scored = (describe(control_chunks(rows, scale), some) for rows in (fit.train, fit.test))
            for row in control_rows(some, normals, scored):
                place = control_name(name, row.control, row.method)
                scores = np.full(len(fit.test), np.nan) if row.scores is None else row.scores
                frames.setdefault(place, []).append(rows_frame(number, "test", fit.test, scores))
                told = facts.setdefault(place, {"asked": asked, "dimension": row.dimension, "missing": ""})
                told["missing"] = told["missing"] or row.missing
        for place, parts in frames.items():
            write_cell(self.out / place, pd.concat(parts, ignore_index=True), facts[place])

    # -- what it would take -----------------------------------------------------------------------------------------

    def forecast(self) -> dict[str, Any]:
        """Cells that are done and to do, and what training takes by a few measured steps of every full arm."""
        cells = [(cell, unit) for unit in self.plan.units for cell in unit.cells]
        to_do = sum(not self.done(cell.place, self._asked(cell, unit)) for cell, unit in cells)
        seconds: dict[str, float] = {}
        steps, hours, runs = 0, 0.0, 0
        for unit in self.plan.units:
            for recipe in unit.recipes if unit.full else ():
                if finished(run_folder(self.out, unit, recipe)):
                    continue
                if unit.arm not in seconds:
                    told = finetune("anomaly", recipe.model_dump(mode="json"), dry_run=True, quiet=True)
                    seconds[unit.arm] = told["seconds_per_step"]
                count = recipe.total_steps(self.plan.counts[unit.set]["train_normal"])
                steps, hours, runs = steps + count, hours + count * seconds[unit.arm] / 3600, runs + 1
        return {
            "title": self.plan.recipe.title,
            "sets": self.plan.counts,
            "arms": {name: f"{arm.mode}, {Path(arm.backbone).name}" for name, arm in self.plan.arms.items()},
            "left_out": self.plan.left_out,
            "remarks": self.plan.remarks,
            "cells": len(cells),
            "cells_to_do": to_do,
            "runs_to_train": runs,
            "steps": steps,
            "seconds_per_step": seconds,
            "hours": round(hours, 3),
            "time": clock(hours * 3600),
        }


def finished(folder: Path) -> bool:
    return (folder / "manifest.parquet").is_file()  # the last thing that a run writes


def rows_frame(fold: int, role: str, rows: Selection, scores: np.ndarray) -> pd.DataFrame:
    """image_id, patient_id, fold, role, target and score. role: test, reference (training normals) or held out (normals)."""
    frame = rows.table[["image_id", "patient_id"]].reset_index(drop=True)
    return frame.assign(fold=fold, role=role, target=known(rows), score=np.asarray(scores, dtype=np.float64))


def _frame(
    recipe: FinetuneRecipe, settings: ScorerSettings, read: Read, place: dict[str, int], fold: int, fit: Fit
) -> pd.DataFrame:
    """Scores of the test images, of held-out normals, and of the training normals by scorers not fitted on them."""

    def of(rows: Selection) -> Read:
        return anomaly.rows_of(read, np.array([place[image] for image in rows.table["image_id"]], dtype=np.int64))

    normals, patients = of(fit.train), fit.train.table["patient_id"].tolist()
    scorer = anomaly.fit_scorer(normals, settings)
    parts = [rows_frame(fold, "test", fit.test, anomaly.distances(scorer, of(fit.test)))]
    if fit.held_out is not None and len(fit.held_out):
        parts.append(rows_frame(fold, "held out", fit.held_out, anomaly.distances(scorer, of(fit.held_out))))
    own = anomaly.cross_fitted_distances(normals, patients, settings, recipe.seed, recipe.cross_folds)
    return pd.concat([*parts, rows_frame(fold, "reference", fit.train, own)], ignore_index=True)
