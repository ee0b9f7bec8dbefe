"""What a protocol asks for: sets of rows, arms, scorers, and from them the units that share a backbone and their cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from carina.data.labels import ABNORMAL, to_targets
from carina.data.splits import linked_patients, stable_folds
from carina.data.store import Selection, select
from carina.errors import CarinaError
from carina.finetune.protocol_base import BasePlan, BaseRecipe, Names
from carina.finetune.recipe import FinetuneRecipe
from carina.finetune.run import training_rows
from carina.models.features import Region
from carina.models.scorers import ScorerSettings
from carina.recipes import Section, build, merge, read_recipe, validate

# keys of the recipe anomaly that stand elsewhere in a protocol
DECIDED = {
    "task", "labels", "store", "out", "where", "rows", "threshold_rows", "folds", "fold", "patients", "draw", "backbone",
    "mode", "region", "scorer", "contamination", "pool_rows", "pool_prevalence", "seed",
}  # fmt: skip

SEED = "{seed}"


class Counts(Section):
    """Images that a published protocol has."""

    train_normal: int | None = None
    test_normal: int | None = None
    test_abnormal: int | None = None


class RowSet(Section):
    """The rows of one table: splits, several joined by + as in `train+val`, or patient folds over all rows.

    store: the name under which its folder is given. pool: the split whose images, without their labels, may choose a
    checkpoint, and whose normals are held out; prevalence: its share of abnormal images, as far as is known.
    """

    store: str = "store"
    where: str | None = None
    train: str = "train"
    test: str = "test"
    pool: str | None = None
    prevalence: Annotated[float, Field(gt=0, lt=1)] | None = None
    folds: Annotated[int, Field(ge=2)] | None = None
    counts: Counts | None = None


class Arm(Section):
    """A backbone that is scored as it is (frozen) or trained on the normals first (full). A backbone with `{seed}` in its
    name is another one for each seed. recipe: what this changes of the protocol's. scorers, regions, seeds: some of the
    protocol's (null: all)."""

    backbone: str
    mode: Literal["frozen", "full"]
    recipe: dict[str, Any] | None = None
    scorers: Names | None = None
    regions: Annotated[list[Region], Field(min_length=1)] | None = None
    seeds: Annotated[list[int], Field(min_length=1)] | None = None

    @property
    def varies(self) -> bool:
        """Whether another seed gives another row."""
        return self.mode == "full" or self.backbone.startswith("random") or SEED in self.backbone


class Row(Section):
    """A row of the table, at the last epoch."""

    arm: str
    scorer: str
    region: Region


class Primary(Row):
    set: str
    reference: Row


class Contamination(Section):
    levels: Annotated[list[Annotated[float, Field(gt=0, lt=0.5)]], Field(min_length=1)]
    arms: Names
    scorers: Names
    seeds: Annotated[list[int], Field(min_length=1)]


class Published(Section):
    """auroc: in [0, 1]."""

    method: str
    auroc: Annotated[float, Field(ge=0, le=1)]
    source: str


class ProtocolRecipe(BaseRecipe):
    """Values and their meaning stand in configs/protocol/default.yaml."""

    task: Literal["anomaly"]
    check: bool
    sets: Annotated[dict[str, RowSet], Field(min_length=1)]
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    scorers: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    slow: list[str]
    regions: Annotated[list[Region], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1)]
    primary: Primary | None
    contamination: Contamination | None
    published: list[Published]


@dataclass(frozen=True)
class Cell:
    """One scorer on one region. checkpoint: `frozen`, `last`, or what chose it (`aucp`). share: of abnormal images among
    the training normals."""

    set: str
    arm: str
    seed: int
    share: float
    checkpoint: str
    region: Region
    scorer: str

    @property
    def place(self) -> str:
        """Its file below the protocol's folder."""
        mixed = f"-contaminated{self.share * 100:g}" if self.share else ""
        name = f"{self.checkpoint}-{self.region}-{self.scorer}.parquet"
        return f"cells/{self.set}/{self.arm}{mixed}/seed-{self.seed}/{name}"


@dataclass(frozen=True)
class Unit:
    """An arm on a set with a seed: cells that share a backbone, or one backbone a fold.

    recipes: of carina finetune, one, or one a fold. scorers: the settings of each by name.
    """

    set: str
    arm: str
    seed: int
    share: float
    recipes: tuple[FinetuneRecipe, ...]
    scorers: dict[str, ScorerSettings]
    cells: tuple[Cell, ...]

    @property
    def full(self) -> bool:
        return self.recipes[0].mode == "full"

    @property
    def words(self) -> str:
        mixed = f", {self.share:.0%} abnormal among the normals" if self.share else ""
        return f"{self.set}: {self.arm} {self.recipes[0].mode}, seed {self.seed}{mixed}"


@dataclass(frozen=True)
class Fit:
    """The rows of one fit. held_out: normals of the pool, from which nothing was fitted."""

    train: Selection
    test: Selection
    held_out: Selection | None


class Plan(BasePlan[ProtocolRecipe]):
    """A protocol on the stores that were given.

    units: in the order in which they run. counts: images and patients by set. published: what may stand below the tables.
    Raises CarinaError for whatever can be refused before anything is computed.
    """

    def __init__(self, recipe: ProtocolRecipe):
        super().__init__(recipe)
        self._check_names()
        self.stores = self.given_stores()
        self.arms = self.given_arms()
        # what is quick comes first, and every arm has its first seed before any has its second
        self.units = sorted(self._units(), key=lambda unit: (unit.share > 0, unit.full, recipe.seeds.index(unit.seed)))
        self.published = list(recipe.published)
        chosen = {unit.set for unit in self.units if unit.full and unit.recipes[0].select != "last"}
        if any(arm.mode == "full" and self._given(arm).get("select", "last") != "last" for arm in self.arms.values()):
            for name in (name for name in self.stores if name not in chosen):
                self.remarks.append(f"Set {name} has no pool to choose a checkpoint on: last epochs alone.")
        self.counts = {name: self._count(name) for name in self.stores}

    def _check_names(self) -> None:
        r = self.recipe

        rows = [r.primary, r.primary.reference] if r.primary else []
        self.known("primary.set", [r.primary.set] if r.primary else [], r.sets)
        for what, arms, scorers in (
            ("only", r.only or [], []),
            ("slow", [], r.slow),
            ("primary", [row.arm for row in rows], [row.scorer for row in rows]),
            *((f"arms.{name}.scorers", [], arm.scorers or []) for name, arm in r.arms.items()),
            ("contamination", r.contamination.arms, r.contamination.scorers) if r.contamination else ("", [], []),
        ):
            self.known(what, arms, r.arms)
            self.known(what, scorers, r.scorers)
        for name, arm in r.arms.items():
            if not set(arm.seeds or []) <= set(r.seeds):
                raise CarinaError(f"protocol: arms.{name}.seeds must be among seeds={r.seeds}")
        mixed = r.contamination
        for name, scorer in product(mixed.arms, mixed.scorers) if mixed else ():
            clean = self._seeds(r.arms[name])[: 1 if scorer in r.slow else None]
            if r.arms[name].varies and not set(mixed.seeds) <= set(clean):
                raise CarinaError(
                    f"protocol: contamination.seeds must be among {clean}, the seeds of arm {name} and scorer {scorer} "
                    "without contamination, which stand beside"
                )

    def _seeds(self, arm: Arm) -> list[int]:
        """The seeds of an arm; one that does not depend on them has the first."""
        seeds = self.recipe.seeds
        return (arm.seeds or seeds) if arm.varies else seeds[:1]

    def _units(self) -> Iterator[Unit]:
        mixed = self.recipe.contamination
        for name in self.stores:
            for arm_name, arm in self.arms.items():
                plans = [(seed, 0.0) for seed in self._seeds(arm)]
                if mixed and arm_name in mixed.arms:
                    again = mixed.seeds if arm.varies else self._seeds(arm)
                    plans += [(seed, level) for level in mixed.levels for seed in again]
                for seed, share in plans:
                    yield self._unit(name, arm_name, arm, seed, share)

    def _unit(self, name: str, arm_name: str, arm: Arm, seed: int, share: float) -> Unit:
        r = self.recipe
        try:
            base = merge(read_recipe("finetune", "anomaly")["scorer"], self._given(arm).get("scorer", {}))
            scorers = {s: validate(ScorerSettings, merge(base, r.scorers[s]), f"scorer {s}") for s in r.scorers}
            folds = range(r.sets[name].folds or 1)
            recipes = tuple(self._arm_recipe(name, arm, scorers, seed, share, fold) for fold in folds)
        except CarinaError as error:
            raise CarinaError(f"arm {arm_name}: {error}") from None
        asked = r.contamination.scorers if share else arm.scorers or list(scorers)
        asked = [scorer for scorer in asked if arm.mode == "full" or scorers[scorer].name != "head"]
        regions = ["whole"] if share else arm.regions or r.regions
        chosen = [recipes[0].select] if recipes[0].select != "last" else []
        checkpoints = ["frozen"] if arm.mode == "frozen" else ["last", *chosen]
        first = self._seeds(arm)[0]
        cells = tuple(
            Cell(name, arm_name, seed, share, checkpoint, region, scorer)
            for checkpoint in checkpoints
            for region in regions
            for scorer in asked
            if scorer not in r.slow or (seed == first and checkpoint == checkpoints[0])
        )
        return Unit(name, arm_name, seed, share, recipes, scorers, cells)

    def _given(self, arm: Arm | None) -> dict[str, Any]:
        given = merge(self.recipe.recipe, (arm.recipe or {}) if arm else {})
        if taken := sorted(set(given) & DECIDED):
            raise CarinaError(
                f"recipe.{taken[0]} is decided by the protocol's sets, arms, scorers and regions; leave it out of recipe="
            )
        return given

    def set_recipe(self, name: str, arm: Arm | None = None, **changes: Any) -> FinetuneRecipe:
        """The recipe anomaly on the rows of a set, frozen unless the changes say otherwise."""
        rows = self.recipe.sets[name]
        given = self._given(arm) | {"select": "last", "mode": "frozen", "threshold_rows": None}
        given |= {"store": self.stores[name], "where": rows.where, "rows": rows.train, "folds": rows.folds}
        return build("finetune", FinetuneRecipe, "anomaly", merge(given, changes))

    def _arm_recipe(
        self, name: str, arm: Arm, scorers: dict[str, ScorerSettings], seed: int, share: float, fold: int
    ) -> FinetuneRecipe:
        rows, r = self.recipe.sets[name], self.recipe
        judge = scorers[r.primary.scorer] if r.primary else next(iter(scorers.values()))
        backbone = arm.backbone.replace(SEED, str(seed))
        changes: dict[str, Any] = {"backbone": backbone, "mode": arm.mode, "seed": seed, "fold": fold}
        changes["contamination"] = share
        if judge.name != "head":  # the run's own scorer, which AUCp asks
            changes["scorer"] = judge.model_dump()
        choice = self._given(arm).get("select", "last")
        if arm.mode == "full" and rows.pool and not rows.folds and not share and choice != "last":
            judged = {"pool_rows": rows.pool, "pool_prevalence": rows.prevalence}
            changes |= {"select": choice, **(judged if choice == "aucp" else {"threshold_rows": rows.pool})}
        return self.set_recipe(name, arm, **changes)

    # -- rows -------------------------------------------------------------------------------------------------------

    def fit_rows(self, name: str, recipe: FinetuneRecipe) -> Fit:
        """The rows of one fit, the training ones as carina finetune takes them."""
        rows = self.recipe.sets[name]
        everything = select(recipe.store, where=recipe.where)
        train, _ = training_rows(recipe, everything)
        if rows.folds:
            folds = stable_folds(linked_patients(everything.table).tolist(), rows.folds, recipe.draw)
            test, held_out = everything.where(folds == recipe.fold), None
        else:
            test = everything.split(*rows.test.split("+"))
            held_out = everything.split(*rows.pool.split("+")) if rows.pool else None
        both = set(train.table["patient_id"]) & set(test.table["patient_id"])
        if held_out is not None:
            both |= set(held_out.table["patient_id"]) & set(test.table["patient_id"])
            held_out = held_out.where(known(held_out) == 0)
        if both:
            raise CarinaError(
                f"set {name}: {len(both)} patients are tested and stand in train={rows.train} or pool={rows.pool} as well; "
                f"give sets.{name}.test= a split of its own"
            )
        return Fit(train, test.where(~np.isnan(known(test))), held_out)

    def _count(self, name: str) -> dict[str, Any]:
        """Images and patients of a set, which must be those of the protocol where it names them."""
        rows, recipe = self.recipe.sets[name], self.set_recipe(name)
        everything = select(recipe.store, where=recipe.where)
        fit = Fit(everything, everything, None) if rows.folds else self.fit_rows(name, recipe)
        target = known(fit.test)
        found = {
            "train_normal": int((known(fit.train) == 0).sum()),
            "test_normal": int((target == 0).sum()),
            "test_abnormal": int((target == 1).sum()),
        }
        wrong = [
            f"{found[key]} {key.replace('_', ' ')} images instead of {value}"
            for key, value in (rows.counts.model_dump() if rows.counts else {}).items()
            if value is not None and value != found[key]
        ]
        if wrong:
            said = f"set {name} has {', '.join(wrong)}"
            if self.recipe.check:
                mend = (
                    "check the copy and how it was prepared, or give check=false to run without the published figures"
                )
                raise CarinaError(f"{said}, so its rows are not those of the protocol; {mend}")
            self.remarks.append(f"{said[0].upper()}{said[1:]}: these are not the rows of the protocol.")
            self.published = []
        if not found["test_normal"] or not found["test_abnormal"]:
            missing = "normal" if not found["test_normal"] else "abnormal"
            raise CarinaError(
                f"set {name}: no test image is known to be {missing}, so nothing can be ranked; check test= and where="
            )
        patients = int(fit.test.table["patient_id"][~np.isnan(target)].nunique())
        return {**found, "test_patients": patients, "folds": rows.folds, "synthetic": fit.test.synthetic}


def known(rows: Selection) -> np.ndarray:
    """(N,) 1 abnormal, 0 normal, NaN unknown."""
    return to_targets(rows.targets([ABNORMAL]))[:, 0]


def run_folder(out: Path, unit: Unit, recipe: FinetuneRecipe) -> Path:
    """The run of a full arm, of one fold where there are several."""
    mixed = f"-contaminated{unit.share * 100:g}" if unit.share else ""
    fold = f"-fold{recipe.fold}" if recipe.folds else ""
    return out / "runs" / f"{unit.set}-{unit.arm}{mixed}-{unit.seed}{fold}"
