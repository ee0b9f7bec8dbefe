"""The verb prepare: files -> store, in parallel, resumable, with what was rejected and why."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from joblib import Parallel, delayed, effective_n_jobs
from joblib.externals.loky.process_executor import TerminatedWorkerError

from carina import __version__
from carina.data.labels import ABNORMAL, abnormal_from
from carina.data.splits import split_of
from carina.data.store import (
    LABEL,
    SCHEMA_VERSION,
    SHARD_SIZE,
    Store,
    check_splits,
    labels_hash,
    store_hash,
    table_schema,
)
from carina.errors import CarinaError
from carina.files import atomic_path, disk_errors, folder_size, read_json, write_json, write_table
from carina.imaging.photometry import Geometry, Photometry
from carina.intake.images import Prepared, Settings, prepare_files, prepare_isolated
from carina.intake.keys import Key, load_key
from carina.intake.looks import contact_sheet
from carina.intake.recipe import PrepareRecipe
from carina.intake.sources import Item, find_items
from carina.progress import Progress
from carina.recipes import build, differences

CHUNK = 16  # files a worker takes at a time: small enough for a smooth bar, large enough to hide the hand-over
PLAN = "plan.json"
PRIVATE_KEYS = ("out", "workers", "key")


def prepare(source: str, overrides: Any = (), *, quiet: bool = False) -> dict[str, Any]:
    """Prepare the store; returns what store.json says, with the folder and the place of the private table.

    source: a folder, a glob, or a CSV with a column `path`. overrides: ``key=value`` words or a mapping.
    """
    recipe = build("prepare", PrepareRecipe, "default", overrides)
    if not recipe.out:
        raise CarinaError("prepare needs a place for the store; give out=FOLDER")
    out = Path(recipe.out)
    items = find_items(source, recipe)
    key, note = load_key(recipe.key)
    say = _Voice(quiet)
    if note:
        say(note)
    plan = {
        "schema_version": SCHEMA_VERSION,
        "recipe": {k: v for k, v in recipe.model_dump(mode="json").items() if k not in PRIVATE_KEYS},
        "files": len(items),
        "source_hash": _source_hash(items, key),
        "key_check": key.check,
    }
    if (out / "store.json").exists():
        done = Store(out).info
        if done["plan"] == plan:
            _clear(out, key, plan)  # what a kill after the last write may have left
            say(f"{out} is already prepared from these files; nothing to do.")
            return {**done, "store": str(out), "paths": str(_paths_file(key, done["store_hash"]))}
        raise CarinaError(f"{out} already holds another store; choose another out=")
    _start_or_continue(out, plan, say)

    work = _Work(out, recipe, key, items, _private_parts(key, plan))
    work.run(quiet)
    info = work.finish(plan)
    _clear(out, key, plan)
    for line in summary(info):
        say(line)
    paths = _paths_file(key, info["store_hash"])
    if info["counts"]["rejected"]:
        say(f"Their reasons are in {out / 'rejected.parquet'}; their paths, with everyone's, in the private {paths}")
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
        digest.update(json.dumps({**asdict(item), "path": ""}, sort_keys=True).encode())
    return key.hash("source", digest.hexdigest())


def _paths_file(key: Key, hash_: str) -> Path:
    return key.folder / "paths" / f"{hash_}.parquet"


def _private_parts(key: Key, plan: dict[str, Any]) -> Path:
    """Where the paths of an unfinished store wait: they never touch the store's own folder."""
    digest = hashlib.blake2b(json.dumps(plan, sort_keys=True).encode(), digest_size=16).hexdigest()
    return key.folder / "paths" / f"unfinished-{digest}"


def _clear(out: Path, key: Key, plan: dict[str, Any]) -> None:
    for folder in (out / "parts", _private_parts(key, plan)):
        shutil.rmtree(folder, ignore_errors=True)
    (out / PLAN).unlink(missing_ok=True)


def _start_or_continue(out: Path, plan: dict[str, Any], say: _Voice) -> None:
    if (out / PLAN).exists():
        changed = differences(read_json(out / PLAN), plan)
        if changed:
            raise CarinaError(
                f"{out} holds an unfinished store of another recipe, key or set of files ({', '.join(changed)} differ); "
                "give the same command as then, or choose another out="
            )
        say(f"Continuing the unfinished store at {out}.")
        return
    if out.exists() and any(out.iterdir()):
        raise CarinaError(f"{out} is not empty and not a store; choose another out=")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_json(out / PLAN, plan)


class _Work:
    """The shards of one store: 1,024 files each in sorted order, every one finished by its part of the table."""

    def __init__(self, out: Path, recipe: PrepareRecipe, key: Key, items: list[Item], private: Path):
        self.out, self.recipe, self.key, self.items, self.private = out, recipe, key, items, private
        self.photometry = Photometry(recipe.window, recipe.for_processing, recipe.frames)
        self.geometry = Geometry(recipe.fit)
        self.settings = Settings(tuple(recipe.scales), self.photometry, self.geometry, recipe.lungs)
        self.labels = list(items[0].labels)
        self.lesions = sorted(recipe.lesions)
        self.shards = -(-len(items) // SHARD_SIZE)

    def part(self, shard: int, kind: str = "rows") -> Path:
        folder = self.private if kind == "paths" else self.out / "parts"
        return folder / f"{kind}-{shard:05d}.parquet"

    def run(self, quiet: bool) -> None:
        pending = [s for s in range(self.shards) if not (self.part(s).exists() and self.part(s, "paths").exists())]
        done = (self.shards - len(pending)) * SHARD_SIZE
        with Progress("prepare", len(self.items), unit="files", done=done, quiet=quiet) as progress:
            for shard in pending:
                items = self.items[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]
                self._write_shard(shard, items, self._prepare(items, progress))

    def _prepare(self, items: list[Item], progress: Progress) -> list[Prepared]:
        chunks = [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]
        results: list[Prepared] = []
        workers = self.recipe.workers or effective_n_jobs(-1)
        if workers > 1 and len(chunks) > 1:
            done = Parallel(n_jobs=workers, return_as="generator")(
                delayed(prepare_files)(chunk, self.settings) for chunk in chunks
            )
            try:
                for chunk in done:
                    results += chunk
                    progress.advance(len(chunk))
            except TerminatedWorkerError:
                pass  # a decoder took its process down; what was finished stands
        # One file at a time in one process that is replaced when it dies: joblib alone would read in this very one.
        for result in prepare_isolated(items[len(results) :], self.settings):
            results.append(result)
            progress.advance()
        return results

    def _write_shard(self, shard: int, items: list[Item], results: list[Prepared]) -> None:
        rows, paths, rejected = [], [], []
        kept: list[Prepared] = []
        for item, result in zip(items, results):
            image_id = self.key.hash("image", self.recipe.source, item.relative, "0")
            paths.append({"image_id": image_id, "path": str(Path(item.path).resolve())})
            if result.reason:
                rejected.append({"image_id": image_id, "reason": result.reason})
                continue
            rows.append(self._row(image_id, item, result, shard, len(kept)))
            kept.append(result)
        ids = [row["image_id"] for row in rows]
        for scale in self.recipe.scales:
            images = pa.array([result.images[scale] for result in kept], type=pa.large_binary())
            self._write_stream(
                "images", scale, shard, pa.table({"image_id": pa.array(ids, pa.string()), "image": images})
            )
            masks = {
                name: pa.array([result.masks[scale].get(name) for result in kept], type=pa.large_binary())
                for name in ("lungs", *(f"lesion.{label}" for label in self.lesions))
            }
            self._write_stream("masks", scale, shard, pa.table({"image_id": pa.array(ids, pa.string()), **masks}))
        write_table(self.part(shard, "paths"), pa.Table.from_pylist(paths, _text_schema("image_id", "path")))
        write_table(self.part(shard, "rejected"), pa.Table.from_pylist(rejected, _text_schema("image_id", "reason")))
        # The part of the table comes last: it is what says that the shard is whole.
        write_table(self.part(shard), pa.Table.from_pylist(rows, table_schema(self.label_columns)))

    @property
    def label_columns(self) -> list[str]:
        derived = "No_Finding" in self.labels and ABNORMAL not in self.labels
        return [*self.labels, *([ABNORMAL] if derived else [])]

    def _row(self, image_id: str, item: Item, result: Prepared, shard: int, place: int) -> dict[str, Any]:
        source = self.recipe.source
        patient = item.patient or result.patient or item.patient_in_name
        patient_id = self.key.hash("patient", source, patient) if patient else f"file-{image_id}"
        study = item.study or result.study
        study_id = self.key.hash("study", source, patient or image_id, study) if study else f"image-{image_id}"
        labels = {name: float(value) for name, value in item.labels.items()}
        if ABNORMAL in self.label_columns and ABNORMAL not in labels:
            labels[ABNORMAL] = float(abnormal_from({name: np.array([value]) for name, value in labels.items()})[0])
        return {
            **result.facts,
            "image_id": image_id,
            "patient_id": patient_id,
            "study_id": study_id,
            "split": item.split or split_of(patient_id),
            "source": source,
            **{LABEL + name: value for name, value in labels.items()},
            "shard": shard,
            "row": place,
        }

    def _write_stream(self, kind: str, scale: int, shard: int, table: pa.Table) -> None:
        with (
            atomic_path(self.out / kind / str(scale) / f"{shard:05d}.arrow") as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)

    def _parts(self, kind: str) -> pa.Table:
        return pa.concat_tables([pq.read_table(self.part(shard, kind)) for shard in range(self.shards)])

    def finish(self, plan: dict[str, Any]) -> dict[str, Any]:
        table, rejected, paths = self._parts("rows"), self._parts("rejected"), self._parts("paths")
        if not len(table):
            reasons = Counter(rejected["reason"].to_pylist()).most_common(1)[0]
            raise CarinaError(
                f"none of the {len(self.items)} files could be used; {reasons[1]} times the reason was: {reasons[0]}. "
                "Check the source, or whether codecs are missing with carina doctor"
            )
        write_table(self.out / "table.parquet", table)
        write_table(self.out / "rejected.parquet", rejected)
        frame = table.to_pandas()
        check_splits(frame, "this source")
        photometry, geometry = self.photometry.to_dict(), self.geometry.to_dict()
        info = {
            "schema_version": SCHEMA_VERSION,
            "carina": __version__,
            "scales": list(self.recipe.scales),
            "encoding": {"format": "raw", "bits": 8},
            "photometry": photometry,
            "geometry": geometry,
            "synthetic": self.recipe.synthetic,
            "sources": [self.recipe.source],
            "labels": self.label_columns,
            "lesions": self.lesions,
            "counts": _counts(frame, rejected.to_pandas(), self.label_columns),
            "store_hash": store_hash(frame, photometry, geometry),
            "labels_hash": labels_hash(frame),
            "key_check": self.key.check,
            "plan": plan,
        }
        write_table(_paths_file(self.key, info["store_hash"]), paths)
        contact_sheet(self.out, frame, min(self.recipe.scales, key=lambda scale: abs(scale - 160)))
        info["bytes"] = folder_size(self.out / "images") + folder_size(self.out / "masks")
        write_json(self.out / "store.json", info)
        return info


def _text_schema(*names: str) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names])


def _counts(table: pd.DataFrame, rejected: pd.DataFrame, labels: list[str]) -> dict[str, Any]:
    def by(column: str) -> dict[str, int]:
        return {
            str(k) or "unknown": int(v) for k, v in sorted(Counter(table[column]).items(), key=lambda kv: str(kv[0]))
        }

    return {
        "images": len(table),
        "patients": int(table["patient_id"].nunique()),
        "patients_unknown": int(table["patient_id"].str.startswith("file-").sum()),
        "split": by("split"),
        "patients_by_split": {k: int(v) for k, v in table.groupby("split")["patient_id"].nunique().items()},
        "view": by("view"),
        "sex": by("sex"),
        "rejected": len(rejected),
        "reasons": {str(k): int(v) for k, v in Counter(rejected["reason"]).most_common()},
        "lungs_source": by("lungs_source"),
        "lungs_implausible": int((~table["lungs_plausible"] & (table["lungs_source"] != "none")).sum()),
        "polarity_suspicious": int((table["polarity"] != "ok").sum()),
        "positive": {name: int((table[LABEL + name] == 1).sum()) for name in labels},
        "negative": {name: int((table[LABEL + name] == 0).sum()) for name in labels},
        "uncertain": {name: int((table[LABEL + name] == -1).sum()) for name in labels},
    }


def summary(info: dict[str, Any]) -> list[str]:
    """What a user wants to know of a store, a sentence a line."""
    counts = info["counts"]
    splits = ", ".join(f"{name} {number}" for name, number in counts["split"].items())
    lines = [
        f"{counts['images']} images of {counts['patients']} patients at scale "
        f"{', '.join(map(str, info['scales']))} ({splits}); {counts['rejected']} files rejected."
    ]
    lines += [f"  rejected {number}: {reason}" for reason, number in list(counts["reasons"].items())[:8]]
    if counts["patients_unknown"]:
        lines.append(
            f"Warning: for {counts['patients_unknown']} images no patient is known, so each counts as a patient of its "
            "own; name a column with patient= or a pattern with patient_regex=, or splits may leak."
        )
    if counts["lungs_implausible"]:
        lines.append(
            f"{counts['lungs_implausible']} lung masks are implausible and marked so (column lungs_plausible): look at "
            "the contact sheet."
        )
    if counts["polarity_suspicious"]:
        lines.append(f"{counts['polarity_suspicious']} images may be inverted (column polarity): look at them.")
    return lines
