"""The verbs predict and embed: files or rows -> scores, heat maps, features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from carina.data.batches import in_order
from carina.data.encoding import Encoding
from carina.data.store import Selection, select, unit
from carina.errors import CarinaError
from carina.evaluate.agreement import agreement, agreement_map
from carina.evaluate.explain import heat_maps
from carina.files import write_bytes, write_table, write_text
from carina.imaging.dicom import Unreadable, list_files, read_radiograph
from carina.imaging.frames import make_frames
from carina.imaging.geometry import Geometry, resize_mask
from carina.imaging.photometry import Photometry
from carina.isolation import isolated
from carina.models.backbones import Backbone, load_backbone
from carina.models.fetch import fetched
from carina.models.predictor import Predictor, load_predictor, map_span
from carina.progress import Progress
from carina.recipes import Section, parse_overrides, validate
from carina.training.engine import pick_device

BATCH = 32  # files read and scored at a time


@dataclass(frozen=True)
class _Reader:
    """One file as prepare would store it, scale -> (S, S) float32, and its lungs where they are asked for, scale -> (S, S)
    bool; or why it cannot be. Runs in another process.

    encodings: of every scale that the store has, because smaller scales, markers and lungs are made from larger ones.
    """

    scales: tuple[int, ...]
    encodings: dict[int, Encoding]
    photometry: Photometry
    geometry: Geometry
    lungs: bool

    def __call__(self, path: str) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray], str]:
        cv2.setNumThreads(1)
        try:
            radiograph = read_radiograph(path, self.photometry)
        except Unreadable as error:
            return {}, {}, str(error)
        spacing = radiograph.facts.get("spacing")
        frames = make_frames(
            radiograph.image, sorted(self.encodings), self.photometry, self.geometry, spacing, find_lungs=self.lungs
        )
        whole = Geometry("stretch")
        lungs = {scale: resize_mask(frames.lungs, scale, whole) for scale in self.scales} if self.lungs else {}
        images = {}
        for scale in self.scales:
            encoding = self.encodings[scale]
            images[scale] = unit(encoding.decode(encoding.encode(encoding.quantize(frames.images[scale])), scale))
        return images, lungs, ""


def read_files(
    paths: Sequence[str],
    scales: Sequence[int],
    photometry: Photometry,
    geometry: Geometry,
    lungs: bool = False,
    encodings: dict[int, Encoding] | None = None,
) -> Iterator[tuple[list[str], dict[int, torch.Tensor], dict[int, torch.Tensor], list[dict[str, str]]]]:
    """Files as prepare would store them, 32 at a time: (paths read, scale -> images (N, 1, S, S) in [0, 1], scale -> lungs
    (N, 1, S, S) bool, empty unless `lungs`, rejected).

    encodings: of all scales of the store whose bytes are to be reproduced (default: 8 bits at `scales`, and no others).
    They are decoded in another process, so that a file that kills its decoder costs that file.
    """
    scales = tuple(dict.fromkeys(scales))
    reader = _Reader(scales, encodings or dict.fromkeys(scales, Encoding()), photometry, geometry, lungs)
    results = zip(paths, isolated(reader, paths))
    while group := list(islice(results, BATCH)):
        read, images, fields, rejected = [], [], [], []
        for path, (result, fault) in group:
            frames, field, reason = result or ({}, {}, fault)
            if reason:
                rejected.append({"path": str(path), "reason": reason})
            else:
                read.append(str(path))
                images.append(frames)
                fields.append(field)
        yield read, _stacked(images), _stacked(fields), rejected


def _stacked(frames: list[dict[int, np.ndarray]]) -> dict[int, torch.Tensor]:
    """One (S, S) a file by scale -> (N, 1, S, S) by scale."""
    scales = frames[0] if frames else ()
    return {scale: torch.from_numpy(np.stack([frame[scale] for frame in frames]))[:, None] for scale in scales}


def expand(paths: Sequence[str]) -> list[str]:
    """Files as given, folders and globs as the files in them."""
    files = [str(f) for p in paths for f in (list_files(p) if Path(p).is_dir() or any(c in p for c in "*?[") else [p])]
    if not files:
        raise CarinaError(f"{', '.join(paths)} holds no files; check the path")
    return files


def predict(
    run: str,
    paths: Sequence[str],
    *,
    maps: str | None = None,
    method: str | None = None,
    others: Sequence[str] = (),
    csv: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Scores of files: {"predictions": [{"path", "scores", "above_threshold"}], "rejected": [{"path", "reason"}]}.

    Files are read as prepare read those that the predictor was trained on, its encoding included, so a file's scores are
    those that evaluate gives its row. maps: a folder that receives a heat map (PNG) per file and label, of a stack by the
    member that counts most for the label. method: of the maps, see `heat_maps`. others: runs for the same labels whose
    maps are held against those of `run`: each prediction then has `agreement`, the figures of
    `carina.evaluate.agreement` by label, and `maps` a picture of it beside each heat map. csv: a file that receives the
    scores, a row a file. A predictor of the lungs or the background alone finds the lungs of each file itself.
    """
    if maps is None and (method is not None or others):
        raise CarinaError(
            "a method of heat maps, or other runs to hold them against, need a folder for the maps; give maps"
        )
    device = pick_device()
    predictor = load_predictor(run, device)
    predictors = [predictor, *(_alike(other, predictor, device) for other in others)]
    photometry, geometry = (
        Photometry.from_dict(predictor.info["photometry"]),
        Geometry.from_dict(predictor.info["geometry"]),
    )
    predictions, rejected = [], []
    files = expand(paths)
    names, spans = _map_names(files), [given.info.get("map_span") for given in predictors]
    need_lungs = any(member.needs_lungs for given in predictors for member in given.members)
    scales = [scale for given in predictors for scale in given.scales]
    reading = read_files(files, scales, photometry, geometry, need_lungs, _encodings(predictor))
    with Progress("predict", len(files), unit="files", quiet=quiet) as progress:
        for read, images, lungs, bad in reading:
            rejected += bad
            if read:
                images, lungs = ({s: part.to(device) for s, part in some.items()} for some in (images, lungs))
                scores = predictor.scores(images, lungs)
                for path, row in zip(read, scores):
                    values = {label: float(value) for label, value in zip(predictor.labels, row)}
                    above = {label: value >= predictor.info["thresholds"][label] for label, value in values.items()}
                    predictions.append({"path": path, "scores": values, "above_threshold": above})
                if maps:
                    spans = [span or _first_span(p, images, lungs) for span, p in zip(spans, predictors)]
                    own = [names[path] for path in read]
                    agreed = _write_maps(Path(maps), predictors, own, images, lungs, spans, method)
                    for row, found in zip(predictions[-len(read) :], agreed):
                        row["agreement"] = found
            progress.advance(len(read) + len(bad))
    if not predictions:
        raise CarinaError(f"none of the {len(rejected)} files could be read; the first reason: {rejected[0]['reason']}")
    result = {
        "kind": predictor.info["kind"],
        "score": predictor.info["score"],
        "thresholds": predictor.info["thresholds"],
        "predictions": predictions,
        "rejected": rejected,
    }
    if csv:
        write_text(csv, _as_csv(result))
    return result


def _encodings(predictor: Predictor) -> dict[int, Encoding] | None:
    """Of all scales of the store that it was trained on; None where an older carina recorded none."""
    found = predictor.info.get("encoding")
    return found and {int(s): Encoding(e["format"], int(e["bits"]), int(e["quality"])) for s, e in found.items()}


def _as_csv(result: dict[str, Any]) -> str:
    """A row a file: path, of each label the score and whether it is at or above its threshold (1 or 0), and why a file was
    rejected."""
    columns = [column for label in result["thresholds"] for column in (label, f"{label}_above_threshold")]
    rows = []
    for row in result["predictions"]:
        found = {f"{label}_above_threshold": int(above) for label, above in row["above_threshold"].items()}
        rows.append({"path": row["path"], **row["scores"], **found})
    frame = pd.DataFrame(rows + result["rejected"], columns=["path", *columns, "reason"])
    whole = {column: "Int64" for column in columns if column.endswith("_above_threshold")}
    return frame.astype(whole).to_csv(index=False)


def _map_names(files: Sequence[str]) -> dict[str, str]:
    """A name for each file's maps: its stem, with a number where several files share it."""
    names: dict[str, str] = {}
    for file in dict.fromkeys(files):
        stem, number = Path(file).stem, 1
        while (name := stem if number == 1 else f"{stem}-{number}") in names.values():
            number += 1
        names[file] = name
    return names


@torch.no_grad()
def _first_span(predictor: Predictor, images: dict[int, torch.Tensor], lungs: dict[int, torch.Tensor]) -> Any:
    """Without recorded values one scale of anomaly maps for all files, from the first of them; None without such maps."""
    member = predictor.members[0]
    found = member.maps(images[member.scale], lungs.get(member.scale))
    return None if found is None else map_span(found.float().cpu().numpy())


def _alike(run: str, first: Predictor, device: torch.device) -> Predictor:
    """Another predictor, for images prepared as for the first and with all its labels."""
    predictor = load_predictor(run, device)
    if _encodings(predictor) != _encodings(first):
        raise CarinaError(
            f"{run} was trained on a store of other scales or another encoding, so a file is not the same picture to it; "
            "give runs of one store"
        )
    first.check_prepared(predictor.info["photometry"], predictor.info["geometry"], f"the training store of {run}")
    if missing := [label for label in first.labels if label not in predictor.labels]:
        raise CarinaError(
            f"{run} does not score {missing[0]}, so its heat maps cannot be compared; give runs of its labels"
        )
    return predictor


def _write_maps(
    folder: Path,
    predictors: Sequence[Predictor],
    names: list[str],
    images: dict[int, torch.Tensor],
    lungs: dict[int, torch.Tensor],
    spans: Sequence[Any],
    method: str | None,
) -> list[dict[str, dict[str, float | None]]]:
    """A picture a file and label by the first predictor; with several a second one of how far they agree, and of each file
    the figures by label."""
    from carina.evaluate.report.figures import example

    found: list[dict[str, dict[str, float | None]]] = [{} for _ in names] if len(predictors) > 1 else []
    for label in predictors[0].labels:
        heats, pixels = [], None
        for predictor, span in zip(predictors, spans):
            column = predictor.labels.index(label)
            member = predictor.leading(column)
            view = images[member.scale]
            pixels = view if pixels is None else pixels
            heats.append(heat_maps(member, view, column, lungs.get(member.scale), span, method))
        for number, (name, image) in enumerate(zip(names, pixels.cpu())):
            pictures = {f"{name}-{label}": heats[0][number]}
            if found:
                side = max(heat.shape[-1] for heat in heats)
                several = np.stack([cv2.resize(heat[number], (side, side)) for heat in heats])
                values = agreement(several)
                found[number][label] = {key: value if np.isfinite(value) else None for key, value in values.items()}
                pictures[f"{name}-{label}-agreement"] = agreement_map(several)
            for stem, heat in pictures.items():
                write_bytes(folder / f"{stem}.png", example(image[0].numpy(), heat, None, False))
    return found


class EmbedSettings(Section):
    out: str
    where: str | None = None
    scale: int | None = None
    rows: str = "all"


def embed(run: str, sources: Sequence[str], overrides: Any = (), *, quiet: bool = False) -> dict[str, Any]:
    """Features of a store's rows (image_id, patient_id, split, features) or of files (path, features) as Parquet."""
    given = overrides if isinstance(overrides, dict) else parse_overrides(overrides)
    settings = validate(EmbedSettings, given, "embed")
    device, run = pick_device(), fetched(run)
    backbone = load_backbone(run).to(device).eval()
    if len(sources) == 1 and (Path(sources[0]) / "store.json").is_file():
        selection = select(sources[0], rows=settings.rows, where=settings.where)
        table, rejected = _embed_store(backbone, selection, settings.scale, device, quiet), []
    else:
        table, rejected = _embed_files(run, backbone, sources, device)
    write_table(settings.out, table)
    return {"out": settings.out, "images": len(table), "dimension": backbone.dimension, "rejected": rejected}


def scale_for(backbone: Backbone, selection: Selection, scale: int | None) -> int:
    """The wanted scale, or the smallest of the store that is not below the backbone's size."""
    scales = sorted(set.intersection(*(set(store.scales) for store in selection.stores)))
    chosen = scale or next((s for s in scales if s >= backbone.spec.size), scales[-1])
    for store in selection.stores:
        store.check_scale(chosen)
    return chosen


@torch.no_grad()
def _embed_store(backbone: Backbone, selection: Selection, scale: int | None, device, quiet: bool) -> pa.Table:
    scale = scale_for(backbone, selection, scale)
    parts = []
    with Progress("embed", len(selection), unit="images", quiet=quiet) as progress:
        for _, images in in_order(selection, scale, device):
            parts.append(backbone.features(images).float().cpu().numpy())
            progress.advance(len(images))
    columns = {name: pa.array(selection.table[name].tolist()) for name in ("image_id", "patient_id", "split")}
    return pa.table({**columns, "features": _vectors(np.concatenate(parts))})


def _vectors(features: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])


@torch.no_grad()
def _embed_files(run: str, backbone: Backbone, sources: Sequence[str], device) -> tuple[pa.Table, list[dict[str, str]]]:
    from carina.files import read_json

    facts = {}
    for inner in ("backbone/carina.json", "carina.json", "predictor/predictor.json", "predictor.json"):
        if (Path(run) / inner).is_file():
            facts = read_json(Path(run) / inner)
            break
    photometry = Photometry.from_dict(facts["photometry"]) if "photometry" in facts else Photometry()
    geometry = Geometry.from_dict(facts["geometry"]) if "geometry" in facts else Geometry()
    files, done, rejected, features = expand(sources), [], [], []
    for read, images, _, bad in read_files(files, [backbone.spec.size], photometry, geometry):
        rejected += bad
        if read:
            done += read
            features.append(backbone.features(images[backbone.spec.size].to(device)).float().cpu().numpy())
    if not done:
        raise CarinaError(f"none of the {len(rejected)} files could be read; the first reason: {rejected[0]['reason']}")
    return pa.table({"path": pa.array(done), "features": _vectors(np.concatenate(features))}), rejected


def terminal_table(result: dict[str, Any]) -> Any:
    """The scores for a terminal; those above their threshold are marked."""
    from rich.table import Table

    labels = list(result["predictions"][0]["scores"])
    words = "* at or above the threshold"
    if "agreement" in result["predictions"][0]:
        words += "; in brackets: rank correlation of the heat maps of the models"
    table = Table(title=f"{result['kind']}: {result['score']} ({words})")
    table.add_column("file")
    for label in labels:
        table.add_column(label, justify="right")
    for row in result["predictions"]:
        cells = [f"{row['scores'][label]:.3f}{'*' if row['above_threshold'][label] else ' '}" for label in labels]
        if "agreement" in row:
            cells = [f"{cell} ({row['agreement'][label]['spearman']:.2f})" for cell, label in zip(cells, labels)]
        table.add_row(Path(row["path"]).name, *cells)
    for row in result["rejected"]:
        table.add_row(Path(row["path"]).name, *[f"rejected: {row['reason']}", *[""] * (len(labels) - 1)])
    return table
