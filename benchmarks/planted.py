"""Planted lesions: what detectors see of soft round nodules that no pasting method makes, by contrast, size and place.

    python benchmarks/planted.py store=STORE [runs=[RUN,...]] [primary=RUN] [out=FILE.json] [rows=val+test]
                                 [contrasts=[1,2,4]] [diameters=[0.04,0.08,0.16,0.32]] [images=100] [where=...]
                                 [parts=[curves,patches]] [backbone=imagenet-lite0] [layers=[2,3]] [scale=128]
                                 [patches=[0.08,0.16,0.32]] [places=lungs] [focal=true] [reach=0] [normals=300]

curves: each run is an anomaly predictor; normal images of `rows` are scored as they are and with one nodule planted
inside the lungs or outside them (carina.imaging.planting), the same image both times. AUROC tells with from without over
all images; AUPRO and the pointing game judge the maps, the images without counting for false positives. `primary` is the
run that was named beforehand: it is held to the bars (contrast 2, inside, diameters from 8 %: AUROC 0.85, AUPRO 0.5).
patches: a patch memory on the training normals with several patch sizes at once beside each size alone, at contrast 2
inside the lungs. With out=FILE.json the curves are drawn into FILE.png.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from common import console, script
from matplotlib.figure import Figure
from pydantic import Field
from rich.table import Table

from carina.data.labels import ABNORMAL
from carina.data.store import Selection, select
from carina.draws import Draws, permutation, sample_codes
from carina.errors import CarinaError
from carina.files import atomic_path, write_json
from carina.finetune.anomaly import collect, fit_scorer
from carina.finetune.recipe import FinetuneRecipe
from carina.imaging.planting import Place, plant
from carina.metrics.intervals import interval
from carina.metrics.localization import aupro, pixel_auroc, pointing_game
from carina.metrics.resampling import replicate
from carina.models.backbones import load_backbone
from carina.models.features import only
from carina.models.predictor import Member, load_predictor
from carina.models.scorers import SCORERS, Scorer
from carina.models.scorers.base import highest, parted
from carina.progress import Progress
from carina.recipes import Section, build
from carina.training.engine import pick_device

PLACES: tuple[Place, ...] = ("inside", "outside")
BAR_CONTRAST, BAR_DIAMETER, BAR_AUROC, BAR_AUPRO, BAR_SINGLE = 2.0, 0.08, 0.85, 0.5, 0.01
BATCH = 64
Positive = Annotated[float, Field(gt=0)]


class Arguments(Section):
    store: Annotated[str | list[str], Field(min_length=1)]
    runs: list[str]
    primary: str | None
    out: str | None
    rows: str
    where: str | None
    contrasts: Annotated[list[Positive], Field(min_length=1)]
    diameters: Annotated[list[Positive], Field(min_length=1)]
    images: Annotated[int, Field(ge=4)]
    parts: list[Literal["curves", "patches"]]
    backbone: str
    layers: list[int] | None
    scale: int
    patches: Annotated[list[Positive], Field(min_length=2)]
    places: Literal["all", "lungs"]
    focal: bool
    reach: float
    normals: Annotated[int, Field(ge=10)]
    resamples: Annotated[int, Field(ge=100)]
    seed: int


DEFAULTS = {
    "runs": [],
    "primary": None,
    "out": None,
    "rows": "val+test",
    "where": None,
    "contrasts": [1.0, 2.0, 4.0],
    "diameters": [0.04, 0.08, 0.16, 0.32],
    "images": 100,
    "parts": ["curves", "patches"],
    "backbone": "imagenet-lite0",  # patches: the memory's features
    "layers": [2, 3],
    "scale": 128,
    "patches": [0.08, 0.16, 0.32],
    "places": "lungs",
    "focal": True,
    "reach": 0.0,
    "normals": 300,
    "resamples": 1000,
    "seed": 0,
}


def normals(given: Arguments, rows: str, count: int) -> Selection:
    """Up to `count` normal images of the rows, one a patient as long as there are patients."""
    selection = select(given.store, where=given.where)
    selection = selection.split(*rows.split("+"))
    selection = selection.where(selection.targets([ABNORMAL])[:, 0] == 0)
    selection = selection.where((selection.table["lungs_source"] != "none").to_numpy())
    if len(selection) < 4:
        raise CarinaError(
            f"split={rows} holds {len(selection)} normal images with lung masks; give rows= to match, or prepare the store "
            "with lungs=true"
        )
    order = permutation(len(selection), "planted", given.seed)
    first = ~selection.table["patient_id"].iloc[order].duplicated().to_numpy()
    chosen = np.concatenate([order[first], order[~first]])[:count]
    return selection.where(np.sort(chosen))


def batches(selection: Selection, scale: int, seed: int, device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    """(images, lungs, draws) of all rows in order."""
    for start in range(0, len(selection), BATCH):
        rows = range(start, min(start + BATCH, len(selection)))
        images = selection.images(rows, scale)
        images = torch.from_numpy(images).unsqueeze(1).float().div_(np.iinfo(images.dtype).max)
        lungs = torch.from_numpy(selection.masks(rows, scale)).unsqueeze(1)
        codes = sample_codes(selection.table["image_id"].iloc[rows.start : rows.stop].tolist())
        yield images.to(device), lungs.to(device), Draws(seed, 0, codes)


def planted_batches(
    selection: Selection, scale: int, seed: int, device: torch.device, how: dict[str, Any] | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(images, lungs, masks of what was planted) of all rows in order; `how`: arguments of `plant`, None plants nothing."""
    for images, lungs, draws in batches(selection, scale, seed, device):
        mask = torch.zeros_like(lungs)
        if how is not None:
            images, mask = plant(images, lungs, draws, **how)
        yield images, lungs, mask


@torch.no_grad()
def looked_at(member: Member, selection: Selection, seed: int, device, how: dict | None) -> tuple[np.ndarray, ...]:
    """Distances (N,), maps (N, S, S) or None, masks (N, S, S) of what was planted."""
    parts = []
    for images, lungs, mask in planted_batches(selection, member.scale, seed, device, how):
        seen = only(images, lungs, member.region)
        read = member.scorer.read(member.backbone, seen, member.scorer.settings, lungs)
        parts.append((*judged(member.scorer, read, member.scale), mask[:, 0].cpu().numpy()))
    return joined(parts)


def judged(scorer: Scorer, read: list[torch.Tensor], side: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Distances (B,) and maps (B, side, side), None without positions."""
    if not scorer.positions:
        return scorer(read).double().cpu().numpy(), None
    maps, settings = scorer.maps(read), scorer.settings
    # their score is of the map, which is what takes the time
    of_map = settings.name in ("memory", "padim")
    scores = highest(maps, parted(read, settings)[1], settings) if of_map else scorer(read)
    return scores.double().cpu().numpy(), full_size(maps, side)


def full_size(maps: torch.Tensor, side: int) -> np.ndarray:
    """Anomaly maps (B, h, w) at image size, as `Member.maps` gives them."""
    return F.interpolate(maps[:, None].float(), (side, side), mode="bilinear", align_corners=False)[:, 0].cpu().numpy()


def joined(parts: list[tuple]) -> tuple[np.ndarray, ...]:
    return tuple(None if column[0] is None else np.concatenate(column) for column in zip(*parts))


def cell(without: tuple, planted: tuple, patients: np.ndarray, given: Arguments) -> dict[str, Any]:
    """One contrast, diameter and place: with a nodule against without, over the images that have a place for it."""
    there = planted[2].any(axis=(1, 2))
    count = int(there.sum())
    if count < 4:
        return {"pairs": count}
    target = np.repeat([0.0, 1.0], count)
    score = np.concatenate([without[0][there], planted[0][there]])
    both = np.concatenate([patients[there]] * 2)
    auroc = interval(replicate(target[:, None], score[None, :, None], both, "auroc", given.resamples, given.seed), 0)
    row: dict[str, Any] = {
        "pairs": count,
        "auroc": auroc.to_dict(),
        "higher_with": float((planted[0][there] > without[0][there]).mean()),
    }
    if planted[1] is not None:
        maps = np.concatenate([without[1][there], planted[1][there]])
        masks = np.concatenate([without[2][there], planted[2][there]])
        row["aupro"], row["pixel_auroc"] = aupro(maps, masks), pixel_auroc(maps, masks)
        row["pointing_game"] = float(np.nanmean(pointing_game(maps, masks)))
    return row


def curves(given: Arguments) -> dict[str, Any]:
    """Every run on every cell."""
    selection, device = normals(given, given.rows, given.images), pick_device()
    patients = selection.table["patient_id"].to_numpy()
    cells = [(p, c, d) for p in PLACES for c in given.contrasts for d in given.diameters]
    rows = []
    with Progress("curves", len(given.runs) * (len(cells) + 1), unit="cells") as progress:
        for run in given.runs:
            predictor = load_predictor(run, device)
            if predictor.info["kind"] != "anomaly":
                raise CarinaError(f"{run} holds no anomaly predictor; give runs of carina finetune anomaly")
            predictor.check_prepared(selection.photometry, selection.geometry, "the store")
            member = predictor.members[0]
            without = looked_at(member, selection, given.seed, device, None)
            progress.advance()
            for place, contrast, diameter in cells:
                how = {"place": place, "contrast": contrast, "diameter": diameter}
                planted = looked_at(member, selection, given.seed, device, how)
                rows.append({"run": Path(run).name, **how, **cell(without, planted, patients, given)})
                progress.advance(note=Path(run).name)
    facts = {"images": len(selection), "patients": len(set(patients)), "synthetic": selection.synthetic}
    return {**facts, "cells": rows, "bars": _bars(rows, Path(given.primary).name) if given.primary else None}


def _bars(rows: list[dict[str, Any]], primary: str) -> dict[str, Any]:
    held = [
        row
        for row in rows
        if row["run"] == primary
        and row["place"] == "inside"
        and row["contrast"] == BAR_CONTRAST
        and row["diameter"] >= BAR_DIAMETER
        and "auroc" in row
    ]
    if not held:
        raise CarinaError(f"primary={primary} is none of the runs, or no cell of it has contrast 2; give both")
    auroc = min(row["auroc"]["value"] for row in held)
    overlap = min(row.get("aupro", float("nan")) for row in held)
    return {
        "primary": primary,
        "least_auroc": auroc,
        "least_aupro": overlap,
        "met": bool(auroc >= BAR_AUROC and overlap >= BAR_AUPRO),
    }


def patches(given: Arguments) -> dict[str, Any]:
    """A patch memory with all sizes at once, and with each alone, at contrast 2 inside the lungs."""
    device = pick_device()
    train, selection = normals(given, "train", given.normals), normals(given, given.rows, given.images)
    patients = selection.table["patient_id"].to_numpy()
    own = {key: getattr(given, key) for key in ("layers", "patches", "places", "focal", "reach")} | {"name": "memory"}
    settings = build("finetune", FinetuneRecipe, "anomaly", {"scorer": own}).scorer
    backbone = load_backbone(given.backbone, size=given.scale).to(device).eval()
    rows: list[dict[str, Any]] = []
    read = collect(backbone, train, given.scale, settings, "whole", device)
    hows = [None, *({"place": "inside", "contrast": BAR_CONTRAST, "diameter": d} for d in given.diameters)]
    seen = []  # what the memory reads of every cell, shared by all choices of patches
    with (
        Progress("patches", len(hows) + (len(given.patches) + 1) * len(hows), unit="cells") as progress,
        torch.no_grad(),
    ):
        for how in hows:
            parts = [
                ([r.cpu() for r in SCORERS["memory"].read(backbone, images, settings, lungs)], mask[:, 0].cpu().numpy())
                for images, lungs, mask in planted_batches(selection, given.scale, given.seed, device, how)
            ]
            seen.append(parts)
            progress.advance(note="features")
        for sizes in (given.patches, *([size] for size in given.patches)):
            scorer = fit_scorer(read, settings.model_copy(update={"patches": sizes})).to(device)
            looks = []
            for parts in seen:
                looks.append(
                    joined([(*judged(scorer, [r.to(device) for r in f], given.scale), mask) for f, mask in parts])
                )
                progress.advance(note=str(sizes))
            cells = [{**how, **cell(looks[0], look, patients, given)} for how, look in zip(hows[1:], looks[1:])]
            known = [row for row in cells if "auroc" in row]
            rows.append(
                {
                    "patches": sizes,
                    "cells": cells,
                    "auroc": float(np.mean([row["auroc"]["value"] for row in known])),
                    "aupro": float(np.mean([row["aupro"] for row in known])),
                }
            )
    several, singles = rows[0], rows[1:]
    return {
        "normals": len(train),
        "images": len(selection),
        "rows": rows,
        **{
            f"{name}_{word}": several[name] - choose(row[name] for row in singles)
            for name in ("auroc", "aupro")
            for word, choose in (("minus_best_single", max), ("minus_worst_single", min))
        },
        "met": several["auroc"] >= max(row["auroc"] for row in singles) - BAR_SINGLE
        and several["auroc"] > min(row["auroc"] for row in singles),
    }


def drawn(found: dict[str, Any], given: Arguments, path: Path) -> None:
    """AUROC and AUPRO against the diameter: a column a contrast, a color a run, dashed outside the lungs."""
    figure = Figure(figsize=(3.4 * len(given.contrasts), 5.4), layout="constrained")
    grid = figure.subplots(2, len(given.contrasts), sharex=True, sharey="row", squeeze=False)
    names = list(dict.fromkeys(row["run"] for row in found["cells"]))
    for column, contrast in enumerate(given.contrasts):
        for axes, key, word, chance in zip(grid[:, column], ("auroc", "aupro"), ("AUROC", "AUPRO"), (0.5, 0.15)):
            axes.axhline(chance, color="#c9d1d8", linewidth=1, linestyle=(0, (3, 3)))
            for number, name in enumerate(names):
                for place, style in zip(PLACES, ("-", "--")):
                    rows = [
                        r
                        for r in found["cells"]
                        if (r["run"], r["place"], r["contrast"]) == (name, place, contrast) and key in r
                    ]
                    values = [r[key]["value"] if key == "auroc" else r[key] for r in rows]
                    label = name if place == "inside" and column == 0 and key == "auroc" else None
                    size = [100 * r["diameter"] for r in rows]
                    axes.plot(size, values, style, marker="o", markersize=3, color=f"C{number % 10}", label=label)
            axes.set(xscale="log", ylim=(-0.02, 1.02))
            axes.set_xticks([100 * d for d in given.diameters], [f"{100 * d:g}" for d in given.diameters], minor=False)
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(word)
        grid[0, column].set_title(f"contrast {contrast:g}", fontsize=10)
        grid[1, column].set_xlabel("diameter, % of the side")
    word = "synthetic radiographs" if found["synthetic"] else "real radiographs"
    figure.suptitle(f"Planted nodules, {word}\ninside the lungs (solid) and outside (dashed)", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def curve_tables(found: dict[str, Any], given: Arguments) -> list[Table]:
    tables = []
    word = "synthetic, " if found["synthetic"] else ""
    for place in PLACES:
        table = Table(
            title=f"planted {place} the lungs, {word}{found['images']} normal images of {found['patients']} patients",
            caption="AUROC of with against without [95 % interval, patients drawn] / AUPRO / pointing game",
        )
        table.add_column("run")
        table.add_column("contrast")
        for diameter in given.diameters:
            table.add_column(f"{100 * diameter:g} %")
        for run in dict.fromkeys(row["run"] for row in found["cells"]):
            for contrast in given.contrasts:
                cells = [r for r in found["cells"] if (r["run"], r["place"], r["contrast"]) == (run, place, contrast)]
                table.add_row(run, f"{contrast:g}", *(_shown(row) for row in cells))
        tables.append(table)
    return tables


def _shown(row: dict[str, Any]) -> str:
    if "auroc" not in row:
        return f"{row['pairs']} pairs"
    auroc = row["auroc"]
    text = f"{auroc['value']:.2f} [{auroc['low']:.2f}, {auroc['high']:.2f}]"
    return text + (f" / {row['aupro']:.2f} / {row['pointing_game']:.2f}" if "aupro" in row else "")


def patch_table(found: dict[str, Any], given: Arguments) -> Table:
    table = Table(
        title=f"patch memory on {given.backbone}, {found['normals']} training normals, contrast 2, inside the lungs",
        caption=f"several sizes minus the best single size: AUROC {found['auroc_minus_best_single']:+.3f}, AUPRO "
        f"{found['aupro_minus_best_single']:+.3f}; minus the worst {found['auroc_minus_worst_single']:+.3f}, "
        f"{found['aupro_minus_worst_single']:+.3f}",
    )
    for name in ("patches", *(f"{100 * d:g} %" for d in given.diameters), "mean AUROC", "mean AUPRO"):
        table.add_column(name)
    for row in found["rows"]:
        name = " + ".join(f"{100 * size:g} %" for size in row["patches"])
        table.add_row(name, *map(_shown, row["cells"]), f"{row['auroc']:.3f}", f"{row['aupro']:.3f}")
    return table


def work(given: Arguments) -> None:
    if "curves" in given.parts and not given.runs and given.parts != DEFAULTS["parts"]:
        raise CarinaError("the curves need predictors; give runs=[RUN,...]")
    out = console()
    hidden = {"out", "store", "runs", "primary"}
    result: dict[str, Any] = {"benchmark": "planted", "arguments": given.model_dump(exclude=hidden)}
    if "curves" in given.parts and given.runs:
        found = result["curves"] = curves(given)
        for table in curve_tables(found, given):
            out.print(table)
        if found["bars"]:
            bars = found["bars"]
            out.print(
                f"{bars['primary']}, named beforehand, contrast 2, inside, diameters from 8 %: least AUROC "
                f"{bars['least_auroc']:.3f} (bar {BAR_AUROC}), least AUPRO {bars['least_aupro']:.3f} (bar {BAR_AUPRO})"
            )
        if given.out:
            drawn(found, given, Path(given.out).with_suffix(".png"))
    if "patches" in given.parts:
        result["patches"] = patches(given)
        out.print(patch_table(result["patches"], given))
    if given.out:
        write_json(given.out, result)


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "planted", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
