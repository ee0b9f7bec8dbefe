"""The verb prepare: files -> store, in parallel, resumable, with what was rejected and why."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from carina import __version__
from carina.data.encoding import encodings_for
from carina.data.labels import ABNORMAL, abnormal_from
from carina.data.splits import split_linked, split_of
from carina.data.store import (
    LABEL,
    SCHEMA_VERSION,
    SHARD_SIZE,
    Store,
    check_splits,
    labels_hash,
    store_hash,
    table_schema,
    write_store_table,
)
from carina.errors import CarinaError
from carina.files import disk_errors, folder_size, read_json, write_json, write_table
from carina.imaging.geometry import Geometry
from carina.imaging.photometry import Photometry
from carina.imaging.routing import decide
from carina.intake.backends import Backend
from carina.intake.counts import counts, summary
from carina.intake.duplicates import find_duplicates, stored_pictures
from carina.intake.estimate import WORTH_IT, check_disk, estimate, free_bytes, sentence
from carina.intake.images import Prepared, Settings
from carina.intake.items import Item
from carina.intake.keys import Key, load_key
from carina.intake.looks import contact_sheet
from carina.intake.recipe import PrepareRecipe
from carina.intake.relabel import relabel
from carina.intake.shards import ShardWriter
from carina.intake.sheet import write_sheet
from carina.intake.sources import find_items, find_provenance
from carina.progress import Progress
from carina.recipes import build, differences

PLAN = "plan.json"
# Neither changes what the store holds, or it names a place on this machine.
PRIVATE_KEYS = ("out", "workers", "key", "backend", "cluster", "router", "boxes")
_ROUTED = 32  # images a router looks at together


def prepare(source: str, overrides: Any = (), *, dry_run: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Prepare the store; returns what store.json says, with the folder and the place of the private table.

    source: a folder, a glob, a CSV with a column `path`, CATALOG:FOLDER, hf:DATASET, or a store whose labels change.
    overrides: ``key=value`` words or a mapping. dry_run: try a few files and tell disk and time, nothing written.
    """
    if (Path(source) / "store.json").is_file():
        return relabel(Path(source), overrides, dry_run=dry_run)
    recipe = build("prepare", PrepareRecipe, "default", overrides)
    provenance = find_provenance(source, recipe)
    recipe.source = recipe.source or provenance["name"]
    if not recipe.out:
        raise CarinaError("prepare needs a place for the store; give out=FOLDER")
    out = Path(recipe.out)
    items = find_items(source, recipe)
    key, note = load_key(recipe.key)
    say = _Voice(quiet)
    if note:
        say(note)
    work = _Work(out, recipe, key, items, provenance)
    plan = work.plan
    if dry_run:
        with Backend(recipe.backend, recipe.workers, recipe.cluster) as backend:
            return work.estimate(backend, say)
    if (out / "store.json").exists():
        done = Store(out).info
        if done["plan"] == plan:
            work.clear()  # what a kill after the last write may have left
            say(f"{out} is already prepared from these files; nothing to do.")
            return {**done, "store": str(out), "paths": str(_paths_file(key, done["store_hash"]))}
        raise CarinaError(f"{out} already holds another store; choose another out=")
    continued = _check_out(out, plan)
    work.sweep()
    with Backend(recipe.backend, recipe.workers, recipe.cluster) as backend:
        if continued:
            say(f"Continuing the unfinished store at {out}.")
        else:
            if len(items) >= WORTH_IT:
                check_disk(out, work.estimate(backend, say)["bytes"])
            with disk_errors(out):
                out.mkdir(parents=True, exist_ok=True)
            write_json(out / PLAN, plan)
        work.run(backend, quiet)
    info = work.finish(quiet)
    work.clear()
    for line in summary(info):
        say(line)
    paths = _paths_file(key, info["store_hash"])
    if info["counts"]["rejected"]:
        say(f"Their reasons are in {out / 'rejected.parquet'}; their paths, with everyone's, in the private {paths}")
    say(f"Look at {out / 'sheet.html'} before anything else.")
    return {**info, "store": str(out), "paths": str(paths)}


class _Voice:
    def __init__(self, quiet: bool):
        self.quiet = quiet

    def __call__(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)


def _source_hash(items: list[Item], key: Key) -> str:
    """Keyed, so that the plan on disk tells nothing about file names."""
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        folder = os.path.dirname(item.path)
        masks = [item.mask] if isinstance(item.mask, str) else item.mask or []
        said = {
            **vars(item),
            # Where the archive lies, and how its path was typed, is no part of what it is.
            **{"path": "", "content": item.content and item.content[1]},
            "labels": list(item.labels.items()),
            "mask": [_beside(mask, folder) for mask in masks],
            "lesions": {label: _beside(mask, folder) for label, mask in item.lesions.items()},
        }
        digest.update(json.dumps(said, sort_keys=True, default=float).encode())
    return key.hash("source", digest.hexdigest())


def _beside(reference: str, folder: str) -> str:
    """A mask's path from the picture's folder; run lengths as they are."""
    return reference if reference.startswith("rle:") else os.path.relpath(reference, folder or ".")


def _paths_file(key: Key, hash_: str) -> Path:
    return key.folder / "paths" / f"{hash_}.parquet"


def _check_out(out: Path, plan: dict[str, Any]) -> bool:
    """Whether an unfinished store of this very plan lies there; a CarinaError when something else does."""
    if (out / PLAN).exists():
        changed = differences(read_json(out / PLAN), plan)
        if changed:
            raise CarinaError(
                f"{out} holds an unfinished store of another recipe, key or set of files ({', '.join(changed)} differ); "
                "give the same command as then, or choose another out="
            )
        return True
    if out.exists() and any(not _half_written(entry) for entry in out.iterdir()):
        raise CarinaError(f"{out} is not empty and not a store; choose another out=")
    return False


def _half_written(path: Path) -> bool:
    """Whether this is what a kill left of a file that was being written."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


class _Work:
    """The shards of one store: 1,024 files each in sorted order, every one finished by its part of the table."""

    def __init__(self, out: Path, recipe: PrepareRecipe, key: Key, items: list[Item], provenance: dict[str, Any]):
        self.out, self.recipe, self.key, self.items, self.provenance = out, recipe, key, items, provenance
        self.photometry = Photometry(
            recipe.window, recipe.for_processing, recipe.frames, recipe.equalize, recipe.markers
        )
        self.geometry = Geometry(recipe.fit)
        self.encodings = encodings_for(recipe.scales, recipe.encoding, recipe.bits, recipe.jpeg_quality)
        self.router = None
        if recipe.router:
            from carina.intake.router import Router  # brings torch

            self.router = Router(recipe.router)
            self.router.check(self.photometry)
        self.settings = Settings(
            encodings=self.encodings,
            photometry=self.photometry,
            geometry=self.geometry,
            lungs=recipe.lungs,
            keep=recipe.keep,
            reject_below=recipe.reject_below,
            burned_in=recipe.burned_in,
            router=None if self.router is None else (self.router.scale, self.router.geometry),
        )
        self.labels = list(items[0].labels)
        self.lesions = sorted({label for item in items for label in item.lesions} | set(recipe.lesions))
        self.shards = -(-len(items) // SHARD_SIZE)
        self.plan = {
            "schema_version": SCHEMA_VERSION,
            "recipe": {k: v for k, v in recipe.model_dump(mode="json").items() if k not in PRIVATE_KEYS},
            "router": None if self.router is None else self.router.fingerprint,
            "files": len(items),
            "source_hash": _source_hash(items, key),
            "key_check": key.check,
        }
        # The paths of an unfinished store wait beside the key: they never touch the store's own folder.
        place = json.dumps([self.plan, str(out.resolve())], sort_keys=True)
        digest = hashlib.blake2b(place.encode(), digest_size=16).hexdigest()
        self.private = key.folder / "paths" / f"unfinished-{digest}"

    def estimate(self, backend: Backend, say: _Voice) -> dict[str, Any]:
        found = estimate(self.items, self.settings, self.lesions, backend.workers)
        free = free_bytes(self.out)
        say(sentence(found, free))
        return {**found, "free_bytes": free}

    def clear(self) -> None:
        self.sweep()
        for folder in (self.out / "parts", self.private):
            shutil.rmtree(folder, ignore_errors=True)
        (self.out / PLAN).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what was half written when a run was killed."""
        for folder in (self.out, self.private):
            for file in folder.rglob(".*.tmp"):
                file.unlink()

    def part(self, shard: int, kind: str = "rows") -> Path:
        folder = self.private if kind == "paths" else self.out / "parts"
        return folder / f"{kind}-{shard:05d}.parquet"

    def run(self, backend: Backend, quiet: bool) -> None:
        pending = [s for s in range(self.shards) if not (self.part(s).exists() and self.part(s, "paths").exists())]
        left = sum(len(self._items_of(shard)) for shard in pending)
        with Progress("prepare", len(self.items), unit="files", done=len(self.items) - left, quiet=quiet) as progress:
            for shard in pending:
                self._write_shard(shard, backend, progress)

    def _items_of(self, shard: int) -> list[Item]:
        return self.items[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]

    def _write_shard(self, shard: int, backend: Backend, progress: Progress) -> None:
        rows, paths, rejected = [], [], []
        items = self._items_of(shard)
        with ShardWriter(self.out, shard, self.encodings, self.lesions) as writer:
            for item, result in zip(items, self._routed(backend.results(items, self.settings))):
                image_id = self.key.hash("image", item.source or self.recipe.source, item.relative, "0")
                paths.append({"image_id": image_id, "path": str(Path(item.path).resolve())})
                if result.reason:
                    rejected.append({"image_id": image_id, "reason": result.reason})
                else:
                    rows.append(self._row(image_id, item, result, shard, writer.add(image_id, result)))
                progress.advance()
        write_table(self.part(shard, "paths"), pa.Table.from_pylist(paths, _text_schema("image_id", "path")))
        write_table(self.part(shard, "rejected"), pa.Table.from_pylist(rejected, _text_schema("image_id", "reason")))
        # The part of the table comes last: it is what says that the shard is whole.
        write_table(self.part(shard), pa.Table.from_pylist(rows, self._part_schema()))

    def _part_schema(self) -> pa.Schema:
        return table_schema(self.label_columns).append(pa.field("split_given", pa.bool_()))

    def _routed(self, results: Iterator[Prepared]) -> Iterator[Prepared]:
        """The results, those left out that the router does not take for what the recipe keeps."""
        while group := list(islice(results, _ROUTED if self.router else 1)):
            asked = [result for result in group if result.routing is not None]
            scores = self.router.scores(np.stack([result.routing for result in asked])) if asked else []
            for result, score in zip(asked, scores):
                result.routing = None
                result.route = decide(result.route, score, self.recipe.keep, self.recipe.reject_below)
                if not result.route.keep:
                    result.reason = result.route.reason
            yield from group

    @property
    def label_columns(self) -> list[str]:
        return [*self.labels, *([ABNORMAL] if self._derives_abnormal else [])]

    @property
    def _derives_abnormal(self) -> bool:
        return "No_Finding" in self.labels and ABNORMAL not in self.labels

    def _row(self, image_id: str, item: Item, result: Prepared, shard: int, place: int) -> dict[str, Any]:
        source = item.source or self.recipe.source
        patient = item.patient or result.patient or item.patient_in_name
        whose = item.patients_of or source  # an archive drawn from another shares its patients' numbers
        patient_id = self.key.hash("patient", whose, patient) if patient else f"file-{image_id}"
        study = item.study or result.study
        study_id = self.key.hash("study", whose, patient or image_id, study) if study else f"image-{image_id}"
        labels = {name: float(value) for name, value in item.labels.items()}
        if self._derives_abnormal:
            labels[ABNORMAL] = float(abnormal_from({name: np.array([value]) for name, value in labels.items()})[0])
        route = result.route
        return {
            **result.facts,
            "image_id": image_id,
            "patient_id": patient_id,
            "study_id": study_id,
            "view": route.view,
            "view_source": route.view_source,
            "view_confidence": route.view_confidence,
            "chest": route.chest,
            "route": route.reason,
            "split": item.split or split_of(patient_id),
            "split_given": bool(item.split),
            "source": source,
            "duplicates": "",
            **{LABEL + name: value for name, value in labels.items()},
            "shard": shard,
            "row": place,
        }

    def _parts(self, kind: str) -> pa.Table:
        return pa.concat_tables([pq.read_table(self.part(shard, kind)) for shard in range(self.shards)])

    def finish(self, quiet: bool) -> dict[str, Any]:
        table, rejected, paths = self._parts("rows"), self._parts("rejected"), self._parts("paths")
        if not len(table):
            reasons = Counter(rejected["reason"].to_pylist()).most_common(1)[0]
            raise CarinaError(
                f"none of the {len(self.items)} files could be used; {reasons[1]} times the reason was: {reasons[0]}. "
                "Check the source, or whether codecs are missing with carina doctor"
            )
        check_splits(table.select(["patient_id", "split"]).to_pandas(), "this source")
        table, duplicates = self._without_leaks(table, quiet)
        frame = table.to_pandas()
        write_store_table(self.out, table)
        write_table(self.out / "rejected.parquet", rejected)
        photometry, geometry = self.photometry.to_dict(), self.geometry.to_dict()
        info = {
            "schema_version": SCHEMA_VERSION,
            "carina": __version__,
            "scales": list(self.recipe.scales),
            "encoding": {str(scale): encoding.to_metadata() for scale, encoding in self.encodings.items()},
            "photometry": photometry,
            "geometry": geometry,
            "synthetic": self.recipe.synthetic,
            "sources": sorted(set(frame["source"])),
            "origins": self._origins(sorted(set(frame["source"]))),
            "labels": self.label_columns,
            "abnormal": "derived" if self._derives_abnormal else "given" if ABNORMAL in self.labels else None,
            "lesions": self.lesions,
            "duplicates": duplicates,
            "counts": counts(frame, rejected.to_pandas(), self.label_columns),
            "store_hash": store_hash(frame, photometry, geometry),
            "labels_hash": labels_hash(frame),
            "key_check": self.key.check,
            "plan": self.plan,
        }
        write_table(_paths_file(self.key, info["store_hash"]), paths)
        contact_sheet(self.out, frame, min(self.recipe.scales, key=lambda scale: abs(scale - 160)))
        write_sheet(self.out, info, frame, rejected.to_pandas())
        info["bytes"] = folder_size(self.out / "images") + folder_size(self.out / "masks")
        write_json(self.out / "store.json", info)
        return info

    def _origins(self, sources: list[str]) -> dict[str, Any]:
        """Lineage and terms of this source, and of every other one whose rows it brings along."""
        own = dict(self.provenance)
        others = own.pop("others", {})
        return {**{name: others.get(name, {}) for name in sources}, self.recipe.source: own}

    def _without_leaks(self, table: pa.Table, quiet: bool) -> tuple[pa.Table, dict[str, Any]]:
        """The table with its groups of copies, and with splits that keep copies together."""
        schema = table_schema(self.label_columns)
        report: dict[str, Any] = {
            "searched": self.recipe.duplicates,
            "groups": 0,
            "images": 0,
            "moved": 0,
            "left_out": 0,
        }
        if self.recipe.duplicates:
            columns = ["image_id", "patient_id", "split", "content_hash", "descriptor", "shard", "row", "split_given"]
            frame = table.select(columns).to_pandas()
            read = stored_pictures(self.out, frame, self.recipe.scales)
            quick = len(frame) < 20_000
            with Progress("copies", len(frame), unit="images", quiet=quiet or quick) as progress:
                frame["duplicates"] = find_duplicates(frame, read, progress.advance)
            splits, found = split_linked(frame)
            report |= found
            for name, values in (("duplicates", frame["duplicates"]), ("split", splits)):
                place = table.column_names.index(name)
                table = table.set_column(place, schema.field(name), pa.array(list(values), pa.string()))
        return table.select(schema.names).combine_chunks(), report


def _text_schema(*names: str) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names])
