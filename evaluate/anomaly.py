"""What is said of an anomaly predictor beyond its table: control rows, where its maps point, below chance in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from carina.data.batches import control_chunks, with_lungs
from carina.data.labels import ABNORMAL, to_targets
from carina.data.splits import linked_patients, stable_folds
from carina.data.store import Selection, select
from carina.metrics.intervals import interval
from carina.metrics.localization import box_masks, localization
from carina.metrics.ranking import false_positive_rate
from carina.metrics.resampling import replicate
from carina.models.controls import control_rows, control_scale, controls, describe
from carina.models.predictor import SPAN_IMAGES, Member, Predictor, map_span
from carina.progress import Progress
from carina.training.engine import pick_device


def number(value: float) -> float | None:
    return None if np.isnan(value) else value


def below_chance(auroc: dict[str, Any]) -> bool:
    """Whether the whole interval of an AUROC (`Interval.to_dict()`) lies below 0.5."""
    return auroc["value"] is not None and auroc["estimable"] and auroc["high"] < 0.5


# -- control rows -------------------------------------------------------------------------------------------------------


def training_normals(predictor: Predictor, store: str | list[str]) -> Selection | str:
    """The normal rows that a predictor was fitted on, or why they cannot be had from this store."""
    info = predictor.info
    if "rows" not in info:
        return "No control rows: an older carina made this predictor and did not record its training rows."
    whole = select(store, where=info["where"])
    if whole.hashes != info["store_hashes"]:
        return (
            "No control rows: they learn from the normals that the predictor learned from, and this is another store."
        )
    if info["folds"] is not None:
        number = stable_folds(linked_patients(whole.table).tolist(), info["folds"], info["draw"])
        rows = whole.where(number != info["fold"])
    else:
        rows = whole.split(*info["rows"].split("+"))
    return rows.where(to_targets(rows.targets([ABNORMAL]))[:, 0] == 0)


def measured_controls(
    parts: list[tuple[Predictor, Selection]], store: str | list[str], resamples: int, seed: int, quiet: bool
) -> tuple[list[dict[str, Any]], str]:
    """Control rows on the same images, fitted on the same normals: (rows, why there are none).

    parts: one, or the folds of one run, whose scores are pooled as the run's are. A row holds control, method,
    dimension, auroc, ap, fpr95 and `missing`, which says why it has no figures.
    """
    scores: dict[tuple[str, str], list[np.ndarray]] = {}
    facts: dict[tuple[str, str], Any] = {}
    for predictor, selection in parts:
        normals = training_normals(predictor, store)
        if isinstance(normals, str):
            return [], normals
        scale = control_scale(set.intersection(*(set(one.scales) for one in selection.stores)))
        rows = controls(scale, predictor.info["seed"])
        found = control_rows(
            rows, *(describe(control_chunks(part, scale, quiet), rows) for part in (normals, selection))
        )
        for row in found:
            scores.setdefault((row.control, row.method), []).append(row.scores)
            facts.setdefault((row.control, row.method), row)
            if row.missing:
                facts[row.control, row.method] = row
    target = np.concatenate([to_targets(selection.targets([ABNORMAL]))[:, 0] for _, selection in parts]).astype(float)
    patients = np.concatenate([selection.table["patient_id"].to_numpy() for _, selection in parts])
    return [_control_entry(facts[key], values, target, patients, resamples, seed) for key, values in scores.items()], ""


def _control_entry(row, values, target, patients, resamples: int, seed: int) -> dict[str, Any]:
    entry = {"control": row.control, "method": row.method, "dimension": row.dimension, "missing": row.missing}
    if row.missing:
        return entry
    score = np.concatenate(values)
    figures = {
        key: interval(replicate(target[:, None], score[None, :, None], patients, name, resamples, seed), 0).to_dict()
        for key, name in (("auroc", "auroc"), ("ap", "average_precision"))
    }
    return {**entry, **figures, "fpr95": number(false_positive_rate(target, score))}


# -- where the maps point -----------------------------------------------------------------------------------------------


def lesion_truth(selection: Selection, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Lesions (N, S, S) bool of every row, and where they come from (N,): "masks", "boxes", "masks and boxes" or "".

    The union of an image's lesion masks and of the boxes that archives gave; a box around a mask counts only where the
    mask is too small for this scale.
    """
    names = sorted({name for store in selection.stores for name in store.info.get("lesions", [])})
    masks = np.zeros((len(selection), scale, scale), dtype=bool)
    for name in names:
        masks |= selection.masks(range(len(selection)), scale, f"lesion.{name}")
    origin = np.where(masks.any(axis=(1, 2)), "masks", "").astype(object)
    for number, boxes in enumerate(selection.table["boxes"]):
        boxes = [] if boxes is None else list(boxes)
        given = [box for box in boxes if box["origin"] != "mask"] or ([] if origin[number] else boxes)
        if given:
            masks[number] |= box_masks([[[box[end] for end in ("x0", "y0", "x1", "y1")] for box in given]], scale)[0]
            origin[number] = "masks and boxes" if origin[number] else "boxes"
    return masks, origin


@torch.no_grad()
def anomaly_maps(member: Member, selection: Selection, quiet: bool = True) -> np.ndarray:
    """(N, S, S) float32 of all rows, by a member whose scorer knows positions."""
    device = pick_device()
    member.to(device)
    result = np.empty((len(selection), member.scale, member.scale), dtype=np.float32)
    with Progress("maps", len(selection), unit="images", quiet=quiet) as progress:
        for rows, images, lungs in with_lungs(selection, member.scale, device, member.needs_lungs):
            result[rows] = member.maps(images, lungs).float().cpu().numpy()
            progress.advance(len(images))
    return result


def display_span(predictor: Predictor, selection: Selection) -> tuple[float, float] | None:
    """Between which values the maps of this predictor are drawn: recorded with it, or those of normal rows here."""
    member = predictor.members[0]
    if member.scorer is None or not member.scorer.positions:
        return None
    if "map_span" in predictor.info:
        return tuple(predictor.info["map_span"])
    normal = np.flatnonzero(to_targets(selection.targets([ABNORMAL]))[:, 0] == 0)
    some = normal if len(normal) else np.arange(len(selection))
    return map_span(anomaly_maps(member, selection.where(some[:SPAN_IMAGES])))


def measured_maps(
    predictor: Predictor, selection: Selection, resamples: int, seed: int, quiet: bool
) -> dict[str, Any] | None:
    """How well the anomaly maps find the lesions that somebody marked; None without maps or marks.

    Normal images count for false positives; an abnormal image without marks is left out.
    """
    member = predictor.members[0]
    if member.scorer is None or not member.scorer.positions:
        return None
    masks, origin = lesion_truth(selection, member.scale)
    target = to_targets(selection.targets([ABNORMAL]))[:, 0]
    marked = (target == 1) & masks.any(axis=(1, 2))
    if not marked.any():
        return None
    use = marked | (target == 0)
    masks[target == 0] = False
    rows = selection.where(use)
    maps = anomaly_maps(member, rows, quiet)
    found = localization(maps, masks[use], rows.table["patient_id"].to_numpy(), resamples, seed)
    sources = sorted({part for one in origin[marked] for part in one.split(" and ")}, reverse=True)
    return {**found, "lesions_from": " and ".join(sources), "left_out": int(((target == 1) & ~marked).sum())}


def localization_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of `measured_maps` as rows: name, interval, what chance gives, and words."""
    names = (
        ("pixel_auroc", "pixel AUROC", "lesion pixels against all others, over all images"),
        ("aupro", "AUPRO", f"overlap of each lesion, up to {found['limit']:.0%} of false-positive pixels"),
        ("pointing_game", "pointing game", "images whose highest value lies in a lesion"),
    )
    return [
        {"name": name, "found": found[key], "chance": found["chance"][key], "words": words}
        for key, name, words in names
    ]


def localization_words(found: dict[str, Any]) -> str:
    """What the figures rest on."""
    left = f"; {found['left_out']} abnormal images without marks are left out" if found["left_out"] else ""
    return (
        f"{found['regions']} lesions in {found['images_with_lesions']} of {found['images']} images, marked by "
        f"{found['lesions_from']}{left}."
    )
