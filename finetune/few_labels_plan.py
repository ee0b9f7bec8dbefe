"""What a protocol of few labels asks for: sets of rows with their labels, arms and modes, counts of labelled patients and
draws, and from them the cells, in units that share what is costly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field

from carina.data.labels import ABNORMAL, NO_FINDING, to_targets
from carina.data.splits import linked_patients, stable_folds
from carina.data.store import LABEL, Selection, select
from carina.errors import CarinaError
from carina.finetune import classify
from carina.finetune.protocol_base import BasePlan, BaseRecipe, Names
from carina.finetune.recipe import FinetuneRecipe, Mode
from carina.finetune.run import shared_patients, training_rows
from carina.recipes import Section, build, merge

# keys of the recipe classify that stand elsewhere in a protocol
DECIDED = {
    "task", "labels", "store", "out", "where", "rows", "threshold_rows", "folds", "fold", "patients", "draw", "backbone",
    "mode", "seed",
}  # fmt: skip
HOG = "hog"  # the arm without a network: histograms of oriented gradients under the same probe

Count = Annotated[int, Field(ge=1)] | Literal["all"] | Annotated[str, Field(pattern=r"^\d+(\.\d+)?%$")]
Draws = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]


class LabelSet(Section):
    """The rows of one table: splits, several joined by + as in `val+test`, or patient folds over all rows.

    store: the name under which its folder is given. labels: what is learned; min_positives: and every other finding with at
    least so many positive images. patients: counts of labelled patients, shares as `10%`, or all. draws: how many subsets of
    each count, by mode. within: columns inside whose values figures are given too.
    """

    store: str = "store"
    where: str | None = None
    train: str = "train"
    test: str = "test"
    folds: Annotated[int, Field(ge=2)] | None = None
    labels: Names
    min_positives: Annotated[int, Field(ge=1)] | None = None
    patients: Annotated[list[Count], Field(min_length=1)]
    draws: dict[Mode, Draws]
    within: list[str] = Field(default_factory=list)


class LabelArm(Section):
    """A backbone in one mode or several. recipe: what it changes of the protocol's; draws: of the set's, by mode."""

    backbone: str
    modes: Annotated[list[Mode], Field(min_length=1)]
    recipe: dict[str, Any] | None = None
    draws: dict[Mode, Draws] = Field(default_factory=dict)


class LabelRow(Section):
    arm: str
    mode: Mode


class LabelPrimary(LabelRow):
    set: str
    label: str
    patients: Count
    reference: LabelRow


class LabelsRecipe(BaseRecipe):
    """Values and their meaning stand in configs/protocol/default.yaml."""

    task: Literal["classify"]
    sets: Annotated[dict[str, LabelSet], Field(min_length=1)]
    arms: Annotated[dict[str, LabelArm], Field(min_length=1)]
    primary: LabelPrimary | None
    references: dict[Mode, list[str]]
    parallel: Annotated[int, Field(ge=1)]
    watts: Annotated[float, Field(gt=0)] | None


@dataclass(frozen=True)
class Cell:
    """One subset of labelled patients under one arm and mode, and the scores of the test images (of one fold)."""

    set: str
    arm: str
    mode: Mode
    patients: str
    draw: int
    fold: int | None

    @property
    def place(self) -> str:
        """Its file below the protocol's folder."""
        fold = "" if self.fold is None else f"-fold{self.fold}"
        return f"cells/{self.set}/{self.arm}/{self.mode}/{self.patients}/draw-{self.draw:02d}{fold}.parquet"

    @property
    def words(self) -> str:
        fold = "" if self.fold is None else f", fold {self.fold}"
        return f"{self.set}: {self.arm} {self.mode}, {self.patients} patients, draw {self.draw}{fold}"


@dataclass(frozen=True)
class Unit:
    """Cells that share the features of one frozen backbone, or a single cell that is trained."""

    cells: tuple[Cell, ...]

    @property
    def frozen(self) -> bool:
        return self.cells[0].mode == "frozen"


class LabelsPlan(BasePlan[LabelsRecipe]):
    """A protocol on the stores that were given.

    labels: by set. counts: what a reader must know of a set. units: in the order in which they run: what is quick first,
    then the smaller counts. Raises CarinaError for whatever can be refused before anything is computed.
    """

    def __init__(self, recipe: LabelsRecipe):
        super().__init__(recipe)
        self._check_names()
        self.stores = self.given_stores()
        self.arms = self.given_arms()
        self.labels = {name: self._labels(name) for name in self.stores}
        self.base = {
            (name, arm, mode): self._recipe(name, arm, mode)
            for name in self.stores for arm, entry in self.arms.items() for mode in entry.modes
        }  # fmt: skip
        self.counts = {name: self._count(name) for name in self.stores}
        self.units = sorted(self._units(), key=self._rank)

    def _check_names(self) -> None:
        r = self.recipe
        self.known("only", r.only or [], r.arms)
        rows = [r.primary, r.primary.reference] if r.primary else []
        self.known("primary.set", [r.primary.set] if r.primary else [], r.sets)
        if r.primary and r.primary.patients not in r.sets[r.primary.set].patients:
            raise CarinaError(
                f"protocol: primary.patients={r.primary.patients} is not among those of the set; add it there"
            )
        for what, asked in (
            ("primary", [(row.arm, row.mode) for row in rows]),
            ("references", [(arm, mode) for mode, arms in r.references.items() for arm in arms]),
        ):
            self.known(what, [arm for arm, _ in asked], r.arms)
            for arm, mode in asked:
                if mode not in r.arms[arm].modes:
                    raise CarinaError(
                        f"protocol: {what} names {arm} in mode {mode}, which arms.{arm}.modes has not; add it"
                    )
        for name, rows in r.sets.items():
            if len(set(map(str, rows.patients))) < len(rows.patients):
                raise CarinaError(f"set {name}: a count of patients stands twice; leave one out")
            for arm_name, arm in r.arms.items():
                for mode in arm.modes:
                    draws = arm.draws.get(mode) or rows.draws.get(mode)
                    if draws is None or len(draws) != len(rows.patients):
                        raise CarinaError(
                            f"set {name}, arm {arm_name}: draws.{mode} needs a number for each of the "
                            f"{len(rows.patients)} counts of patients; give as many"
                        )

    # -- rows -------------------------------------------------------------------------------------------------------

    def rows(self, name: str) -> Selection:
        return rows_of(_plain(self.stores[name]), self.recipe.sets[name].where)

    def _labels(self, name: str) -> list[str]:
        rows, table = self.recipe.sets[name], self.rows(name).table
        self.rows(name).targets(rows.labels)  # names what is missing
        more = []
        if rows.min_positives:
            there = [column.removeprefix(LABEL) for column in table.columns if column.startswith(LABEL)]
            # No_Finding is what `abnormal` says already
            there = [label for label in there if label not in (*rows.labels, ABNORMAL, NO_FINDING)]
            more = [label for label in there if (table[LABEL + label] == 1).sum() >= rows.min_positives]
        return [*rows.labels, *more]

    def _recipe(self, name: str, arm_name: str, mode: Mode) -> FinetuneRecipe:
        rows, arm = self.recipe.sets[name], self.recipe.arms[arm_name]
        given = merge(self.recipe.recipe, arm.recipe or {})
        if taken := sorted(set(given) & DECIDED):
            raise CarinaError(f"arm {arm_name}: recipe.{taken[0]} is decided by the protocol; leave it out of recipe=")
        head = given.get("head", {})
        if mode == "frozen" and (head.get("name", "linear") != "linear" or head.get("noisy_or")):
            raise CarinaError(f"arm {arm_name}: a frozen arm has the linear probe; give head= in another mode")
        decided = {
            "store": self.stores[name], "where": rows.where, "rows": rows.train, "threshold_rows": None,
            "folds": rows.folds, "labels": self.labels[name], "mode": mode,
            "backbone": self.arms[arm_name].backbone,
        }  # fmt: skip
        try:
            recipe = build("finetune", FinetuneRecipe, "classify", given | decided)
            classify.check(recipe)
        except CarinaError as error:
            raise CarinaError(f"arm {arm_name}: {error}") from None
        return recipe

    def cell_recipe(self, cell: Cell) -> FinetuneRecipe:
        """The recipe of carina finetune that the cell is."""
        base = self.base[cell.set, cell.arm, cell.mode]
        changes: dict[str, Any] = {"draw": cell.draw, "seed": cell.draw, "fold": cell.fold or 0}
        changes["patients"] = self.patients(cell)
        return base.model_copy(update=changes)

    def patients(self, cell: Cell) -> int | None:
        if cell.patients == "all":
            return None
        if cell.patients.endswith("%"):
            return max(1, round(float(cell.patients[:-1]) / 100 * self.counts[cell.set]["train_patients"]))
        return int(cell.patients)

    def fit_rows(self, cell: Cell) -> tuple[Selection, Selection]:
        """The labelled rows of a cell, as carina finetune takes them, and its test rows."""
        recipe, everything = self.cell_recipe(cell), self.rows(cell.set)
        return training_rows(recipe, everything)[0], self.test_rows(cell.set, recipe)

    def test_rows(self, name: str, recipe: FinetuneRecipe) -> Selection:
        everything, rows = self.rows(name), self.recipe.sets[name]
        if rows.folds:
            folds = stable_folds(linked_patients(everything.table).tolist(), rows.folds, recipe.draw)
            return everything.where(folds == recipe.fold)
        return everything.split(*rows.test.split("+"))

    def tested(self, name: str) -> Selection:
        """All rows that are tested in one fold or another."""
        rows = self.recipe.sets[name]
        return self.rows(name) if rows.folds else self.rows(name).split(*rows.test.split("+"))

    def _count(self, name: str) -> dict[str, Any]:
        rows, everything = self.recipe.sets[name], self.rows(name)
        tested = self.tested(name)
        if not len(tested):
            raise CarinaError(f"set {name}: no row has split={rows.test}; give test= a split that the store has")
        train = everything.split(*rows.train.split("+"))
        if not rows.folds and (shared := shared_patients(everything, train, tested)):
            raise CarinaError(
                f"set {name}: {shared} patients are tested and stand in train={rows.train}; give other splits"
            )
        trained = self._labelled(name)
        for count in rows.patients:
            if isinstance(count, int) and count > trained:
                raise CarinaError(
                    f"set {name}: there are {trained} patients to label, {count} are asked for; give fewer, or all"
                )
        targets = to_targets(tested.targets(self.labels[name]))
        for column in rows.within:
            if column not in everything.table.columns:
                raise CarinaError(
                    f"set {name}: within names the column '{column}', which the store has not; leave it out"
                )
        return {
            "train_patients": int(trained),
            "test_images": len(tested),
            "test_patients": int(tested.table["patient_id"].nunique()),
            "folds": rows.folds,
            "labels": {
                label: {"positive": int((column == 1).sum()), "negative": int((column == 0).sum())}
                for label, column in zip(self.labels[name], targets.T)
            },
            "synthetic": everything.synthetic,
        }

    def _labelled(self, name: str) -> int:
        """Patients that can be labelled; of several folds and draws in the one that has fewest."""
        base = next(recipe for (own, _, _), recipe in self.base.items() if own == name)
        draws = max(number for own, arm, mode in self.base if own == name for number in self.draws(name, arm, mode))
        found = [
            training_rows(base.model_copy(update={"draw": draw, "fold": fold}), self.rows(name))[0]
            for draw in range(draws if base.folds else 1)
            for fold in range(base.folds or 1)
        ]
        return min(train.table["patient_id"].nunique() for train in found)

    # -- units ------------------------------------------------------------------------------------------------------

    def draws(self, name: str, arm: str, mode: Mode) -> list[int]:
        return self.arms[arm].draws.get(mode) or self.recipe.sets[name].draws[mode]

    def cells(self, name: str, arm: str, mode: Mode) -> Iterator[Cell]:
        rows = self.recipe.sets[name]
        for count, number in zip(rows.patients, self.draws(name, arm, mode)):
            for draw in range(number):
                for fold in range(rows.folds) if rows.folds else [None]:
                    yield Cell(name, arm, mode, str(count), draw, fold)

    def _units(self) -> Iterator[Unit]:
        for name in self.stores:
            for arm_name, arm in self.arms.items():
                for mode in arm.modes:
                    groups: dict[Any, list[Cell]] = {}
                    for cell in self.cells(name, arm_name, mode):
                        # random weights are drawn anew with every draw and fitted to the intensities of its fold
                        own = (cell.draw, cell.fold) if arm.backbone.startswith("random") else ()
                        groups.setdefault(own if mode == "frozen" else cell, []).append(cell)
                    yield from (Unit(tuple(cells)) for cells in groups.values())

    def _rank(self, unit: Unit) -> tuple[int, ...]:
        """Frozen units first; then the first draw of every arm at every count, so that a stop leaves whole curves."""
        first = unit.cells[0]
        if unit.frozen:
            return (0,)
        rows = self.recipe.sets[first.set]
        return 1, first.draw, list(map(str, rows.patients)).index(first.patients), list(self.stores).index(first.set)

    def permuted(self, arm: str) -> bool:
        return bool(merge(self.recipe.recipe, self.recipe.arms[arm].recipe or {}).get("permute_labels", False))


def _plain(store: str | list[str]) -> str | tuple[str, ...]:
    return store if isinstance(store, str) else tuple(store)


@cache
def rows_of(store: str | tuple[str, ...], where: str | None) -> Selection:
    return select(store if isinstance(store, str) else list(store), where=where)
