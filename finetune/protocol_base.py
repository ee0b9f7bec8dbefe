"""What the protocols of both tasks share: the keys of their recipes, the stores and backbones they are given, and cells.

A cell is a Parquet file below the protocol's folder with its facts in the schema's metadata. It is written whole, and is
never computed again as long as nothing that decides it is asked for otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from carina.data.manifest import find_manifest, overlap
from carina.data.store import Selection
from carina.errors import CarinaError, nearest
from carina.files import sha256, write_table
from carina.models.backbones import backbone_record, pretext_saw, saw_natural_images
from carina.models.external import adapter_of
from carina.recipes import Section, differences

FACTS = b"carina"  # key of a cell's facts in the metadata of its file
# what may differ between what was made and what is asked now, because it cannot change the result
FREE = ("out", "store", "threads", "workers", "wandb", "checkpoint_every", "keep_checkpoints", "cache")

Names = Annotated[list[str], Field(min_length=1)]


class BaseRecipe(Section):
    """Keys of a protocol of any task; values and their meaning stand in configs/protocol/default.yaml."""

    title: Annotated[str, Field(min_length=1)]
    about: str
    store: str | list[str] | dict[str, str | list[str]] | None
    out: str | None
    recipe: dict[str, Any]
    backbones: dict[str, str | None]
    only: Names | None
    resamples: Annotated[int, Field(ge=100)]
    seed: int


Recipe = TypeVar("Recipe", bound=BaseRecipe)


class BasePlan(Generic[Recipe]):
    """stores: by set, those that have one. arms: those whose backbone is given, as `load_backbone` takes it. left_out and
    remarks: what the tables must say."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.left_out: list[str] = []
        self.remarks: list[str] = []

    @staticmethod
    def known(what: str, asked: Iterable[str], there: Iterable[str]) -> None:
        for name in asked:
            if name not in there:
                raise CarinaError(f"protocol: {what} '{name}' is none of {', '.join(there)}{nearest(name, there)}")

    def given_stores(self) -> dict[str, str | list[str]]:
        given, names = self.recipe.store, list(dict.fromkeys(rows.store for rows in self.recipe.sets.values()))
        form = "store=FOLDER" if len(names) == 1 else " ".join(f"store.{name}=FOLDER" for name in names)
        if not given:
            raise CarinaError(f"a protocol needs the stores that its sets name; give {form}")
        if not isinstance(given, dict):
            if len(names) > 1:
                raise CarinaError(f"this protocol reads {len(names)} stores; give {form}, or one of them")
            given = {names[0]: given}
        for name in given:
            if name not in names:
                raise CarinaError(f"this protocol reads no store '{name}'{nearest(name, names)}; give {form}")
        for name, rows in self.recipe.sets.items():
            if rows.store not in given:
                self.left_out.append(f"set {name}: store.{rows.store}= is not given")
        return {name: given[rows.store] for name, rows in self.recipe.sets.items() if rows.store in given}

    def given_arms(self) -> dict[str, Any]:
        asked_for = [arm.backbone for arm in self.recipe.arms.values()]
        for name in self.recipe.backbones:
            if name not in asked_for:
                raise CarinaError(f"no arm asks for backbones.{name}{nearest(name, asked_for)}; leave it out")
        arms = {}
        for name, arm in self.recipe.arms.items():
            reference = self.recipe.backbones.get(arm.backbone, arm.backbone)
            if self.recipe.only and name not in self.recipe.only:
                self.left_out.append(f"arm {name}: not asked for (only=)")
            elif reference is None:
                self.left_out.append(f"arm {name}: backbones.{arm.backbone}= is not given")
            else:
                arms[name] = arm.model_copy(update={"backbone": reference})
        return arms


@cache
def identity(reference: str) -> str:
    """A backbone by its weights, wherever they lie, with the norms of its sizes and what it is fed."""
    adapter = adapter_of(reference)
    path = Path(adapter[1]) if adapter and adapter[1] else Path(reference)
    folders = [path / inner for inner in ("backbone", "predictor/member-0", ".")]
    folder = next((folder for folder in folders if (folder / "model.safetensors").is_file()), None)
    if folder is not None:
        files = [folder / name for name in ("model.safetensors", "scales.safetensors", "config.json")]
        return "sha256 " + " ".join(sha256(file) for file in files if file.is_file())
    return f"sha256 {sha256(path)}" if path.is_file() else reference


def past(reference: str, tested: Selection) -> dict[str, Any]:
    """What a row says of the past of its backbone: its weights, what its pretext saw, which labels that used, and how many
    of the tested patients were seen before (None: unknown)."""
    record = backbone_record(reference)
    clean = reference.startswith("random") or saw_natural_images(reference)  # no radiograph, and none of these labels
    if clean:
        found: dict[str, Any] = {"known": True, "stages": {}}
    else:
        found = overlap(find_manifest(reference) if Path(reference).exists() else None, tested)
    seen = max((stage["patients"] for stage in found["stages"].values()), default=0)
    return {
        "backbone": identity(reference),
        "pretext_saw": pretext_saw(reference),
        "pretext_labels": record.get("labels_used", "none" if clean else "unknown"),
        "seen_patients": seen if found["known"] else None,
        "transductive": bool(record.get("transductive", False)) or seen > 0,
    }


def union(parts: list[Selection]) -> Selection:
    """The rows of several selections of the same stores, each once."""
    return Selection(parts[0].stores, pd.concat([part.table for part in parts]).drop_duplicates("image_id"))


def write_cell(path: Path, frame: pd.DataFrame, facts: dict[str, Any]) -> None:
    """frame: a row a score, in the column `score`."""
    bad = int((~np.isfinite(frame["score"])).sum())
    if bad and not facts.get("missing"):
        raise CarinaError(f"{bad} of {len(frame)} scores of {path} are no finite numbers; check the backbone")
    table = pa.Table.from_pandas(frame, preserve_index=False)
    write_table(path, table.replace_schema_metadata({FACTS: json.dumps(facts).encode()}))


def read_cell(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    table = pq.read_table(path)
    return table.to_pandas(), json.loads(table.schema.metadata[FACTS])


def cell_done(path: Path, asked: dict[str, Any]) -> bool:
    """Whether a cell is there; raises CarinaError when it was made with other settings."""
    if not path.is_file():
        return False
    changed = differences(json.loads(pq.read_schema(path).metadata[FACTS])["asked"], asked)
    if changed:
        raise CarinaError(
            f"{path} was made with other settings ({', '.join(changed)} differ); choose another out=, or remove it"
        )
    return True
