"""Pasting beside AnatPaste as published: images a second, shapes that degenerate, and what the pastes look like.

    python benchmarks/pasting.py store=STORE [parts=[speed,shapes,grid]] [out=FILE.json] [pictures=DIR] [name=STORE's]
                                 [images=64] [repeats=9] [every=1]

The store's training images that are not abnormal (all where nothing is known of them), at its largest scale, resized.
speed: 256 x 256 pixels on one core and one thread, the jitter of the whole and of the patch included, both sides in turn
in this process; the published side computes its mask for every sample, and once more is given it. Ours is given the
store's masks, returns the jittered images as well as the pasted ones, and works on a batch of `images`.
As in training, glibc is kept from handing the memory of a batch back to the system (carina.training.engine.keep_memory),
which would cost ours, and not the other side, as much time as all the rest. Where torch sees a GPU, ours is timed
there too. shapes: the share of pastes that cover less than 1 % of the lungs, at 64 to 1024 pixels, by ours and by the
published lengths in pixels (lungs a quarter of the image). grid: 5 x 8 samples of each method in `pictures`, every
`every`-th image.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from common import console, script
from PIL import Image
from published_anatpaste import SIDE, published
from pydantic import Field
from rich.table import Table

from carina.data.batches import unit_tensor
from carina.data.store import LABEL, select
from carina.draws import Draws, sample_codes
from carina.errors import CarinaError
from carina.files import atomic_path, read_json, write_json
from carina.imaging.pasting import anatpaste
from carina.models.backbones import resize_images
from carina.models.pasting import Method, pasted_views
from carina.recipes import Section
from carina.training.engine import keep_memory

BAR, BAR_SHAPES = 40.0, 0.05
SIDES = (64, 128, 256, 512, 1024)
EPOCHS = 8  # batches of ours in one timing, which would be too short otherwise
ROWS, COLUMNS, CELL = 5, 8, 112  # of a grid; pixels of an image's side in it


class Arguments(Section):
    store: str
    parts: list[Literal["speed", "shapes", "grid"]]
    out: str | None
    pictures: str | None
    name: str | None
    images: Annotated[int, Field(ge=2)]
    repeats: Annotated[int, Field(ge=3)]
    every: Annotated[int, Field(ge=1)]


DEFAULTS = {
    "parts": ["speed", "shapes"],
    "out": None,
    "pictures": None,
    "name": None,
    "images": 64,
    "repeats": 9,
    "every": 1,
}


def load(arguments: Arguments, count: int) -> tuple[torch.Tensor, torch.Tensor, Draws]:
    """(N, 1, S, S) images in [0, 1] and their lungs at the store's largest scale, and their draws."""
    everything = select(arguments.store)
    everything.check_lungs()
    use = (everything.table["split"] == "train").to_numpy()
    if LABEL + "abnormal" in everything.table:
        use = use & (everything.table[LABEL + "abnormal"] != 1).to_numpy()
    rows = np.flatnonzero(use)[:: arguments.every][:count]
    if len(rows) < count:
        raise CarinaError(
            f"{arguments.store} has {len(rows)} such images and {count} are needed; lower every= or images="
        )
    scale = max(everything.stores[0].info["scales"])
    images = unit_tensor(torch.from_numpy(everything.images(rows, scale)))
    lungs = torch.from_numpy(everything.masks(rows, scale)).unsqueeze(1)
    return images, lungs, Draws(0, 0, sample_codes(everything.table["image_id"].iloc[rows].tolist()))


def sized(images: torch.Tensor, lungs: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    return resize_images(images, side).clamp(0, 1), resize_images(lungs.float(), side) >= 0.5


# --- speed ------------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], Any], images: int) -> float:
    """Images a second."""
    start = time.perf_counter()
    work()
    return images / (time.perf_counter() - start)


def speed(arguments: Arguments) -> dict[str, Any]:
    keep_memory()
    images, lungs, draws = load(arguments, arguments.images)
    images, lungs = sized(images, lungs, SIDE)
    pictures, masks = images[:, 0].numpy(), lungs[:, 0].numpy()
    rng = np.random.default_rng(0)
    epochs = [Draws(0, epoch, draws.codes) for epoch in range(EPOCHS)]
    sides: dict[str, Callable[[], Any]] = {
        "published": lambda: [published(picture, rng) for picture in pictures],
        "published, mask cached": lambda: [published(picture, rng, mask) for picture, mask in zip(pictures, masks)],
        "carina": lambda: [pasted_views(images, lungs, epoch, "anatpaste", maps=False) for epoch in epochs],
        "carina, with alphas": lambda: [pasted_views(images, lungs, epoch, "anatpaste") for epoch in epochs],
    }
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for repeat in range(arguments.repeats + 1):
            for name in list(sides)[:: 1 if repeat % 2 else -1]:
                rate = timed(sides[name], len(images) * (EPOCHS if name.startswith("carina") else 1))
                if repeat:  # the first round warms up
                    rates[name].append(rate)
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
    median = {name: statistics.median(found) for name, found in rates.items()}
    pairs = [ours / theirs for ours, theirs in zip(rates["carina"], rates["published"])]
    cached = [ours / theirs for ours, theirs in zip(rates["carina"], rates["published, mask cached"])]
    return {
        "side": SIDE,
        "batch": len(images),
        "threads": 1,
        "load_before": round(os.getloadavg()[0], 2),
        "images_per_second": {name: round(rate, 1) for name, rate in median.items()},
        "ratio": round(statistics.median(pairs), 1),
        "ratio_quartiles": [round(float(q), 1) for q in np.percentile(pairs, (25, 75))],
        "ratio_mask_cached": round(statistics.median(cached), 2),
        "bar": BAR,
        "gpu": gpu(images, lungs, draws, arguments.repeats) if torch.cuda.is_available() else None,
    }


def gpu(images: torch.Tensor, lungs: torch.Tensor, draws: Draws, repeats: int) -> dict[str, Any]:
    """Images a second of every method on the GPU, copies to it not counted."""
    images, lungs = images.cuda(), lungs.cuda()
    rates = {}
    for method in get_args(Method):
        found = []
        for _ in range(repeats + 3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            pasted_views(images, lungs, draws, method)
            torch.cuda.synchronize()
            found.append(len(images) / (time.perf_counter() - start))
        rates[method] = round(statistics.median(found[3:]), 0)
    return {"device": torch.cuda.get_device_name(), "images_per_second": rates}


# --- shapes -----------------------------------------------------------------------------------------------------------


def shapes(arguments: Arguments) -> dict[str, Any]:
    """Share of pastes below 1 % of the lungs; and, by the published pixels, of shapes that margins have eaten."""
    images, lungs, draws = load(arguments, arguments.images)
    rows = []
    for side in SIDES:
        small, outside = [], 0
        for image, lung, number in zip(*(part.split(8) for part in sized(images, lungs, side)), range(10**9)):
            part = draws.select(np.arange(number * 8, number * 8 + len(image)))
            pasted, alpha = anatpaste(image, lung, part)
            outside += int((pasted != image)[~lung].sum())
            small.append((alpha > 0).sum(dim=(1, 2, 3)) / lung.sum(dim=(1, 2, 3)) < 0.01)
        rows.append(
            {
                "side": side,
                "below_1_percent": round(float(torch.cat(small).float().mean()), 3),
                "pixels_changed_outside": outside,
                "published_degenerate": round(published_degenerate(side), 3),
            }
        )
    return {"images": len(images), "rows": rows, "bar": BAR_SHAPES}


def published_degenerate(side: int, draws: int = 20000) -> float:
    """Share of the published shapes that a margin of 10 pixels leaves without an inside, or with one of 1 % of the lungs,
    when the lungs are a quarter of the image."""
    rng = np.random.default_rng(0)
    area, ratio = rng.uniform(0.02, 0.15, draws) * side**2, np.exp(rng.uniform(np.log(0.3), -np.log(0.3), draws))
    inner = [np.maximum(np.sqrt(part) - 20, 0) for part in (area * ratio, area / ratio)]
    return float((inner[0] * inner[1] < 0.01 * side**2 / 4).mean())


# --- pictures -----------------------------------------------------------------------------------------------------------


def grid(arguments: Arguments) -> dict[str, Any]:
    """One PNG a method with ROWS x COLUMNS pasted images."""
    if not arguments.pictures:
        raise CarinaError("the part grid writes pictures; give pictures=DIR")
    images, lungs, draws = load(arguments, ROWS * COLUMNS)
    folder, written = Path(arguments.pictures), []
    name = arguments.name or Path(arguments.store).name
    folder.mkdir(parents=True, exist_ok=True)
    for method in get_args(Method):
        if method in ("cutpaste_union", "cutpaste_3way"):  # made of the two others
            continue
        (_, pasted), _ = pasted_views(images, lungs, draws, method)
        tiles = F.pad(resize_images(pasted, CELL - 2).clamp(0, 1), (1, 1, 1, 1), value=1.0)[:, 0]
        rows = [torch.cat(list(tiles[start : start + COLUMNS]), dim=1) for start in range(0, len(tiles), COLUMNS)]
        path = folder / f"{name}_{method}.png"
        with atomic_path(path) as temporary:
            pixels = (torch.cat(rows).numpy() * 255).round().astype(np.uint8)
            Image.fromarray(pixels).save(temporary, format="PNG", optimize=True)
        written.append(str(path))
    return {"written": written}


# --- the script ---------------------------------------------------------------------------------------------------------


def shown(result: dict[str, Any]) -> None:
    out = console()
    if "speed" in result:
        found = result["speed"]
        table = Table(title=f"{SIDE} x {SIDE}, one core", title_justify="left")
        for head in ("side", "images/s"):
            table.add_column(head)
        for name, rate in found["images_per_second"].items():
            table.add_row(name, f"{rate:.0f}")
        out.print(table)
        low, high = found["ratio_quartiles"]
        out.print(
            f"ratio {found['ratio']} (quartiles {low}-{high}; bar {BAR}), masks cached {found['ratio_mask_cached']}"
        )
        if found["gpu"]:
            rates = ", ".join(f"{name} {rate:.0f}" for name, rate in found["gpu"]["images_per_second"].items())
            out.print(f"on {found['gpu']['device']}, images/s: {rates}")
    if "shapes" in result:
        table = Table(title="shapes below 1 % of the lungs", title_justify="left")
        for head in ("px", "carina", "published lengths", "pixels changed outside the lungs"):
            table.add_column(head)
        for row in result["shapes"]["rows"]:
            values = (row["side"], row["below_1_percent"], row["published_degenerate"], row["pixels_changed_outside"])
            table.add_row(*map(str, values))
        out.print(table)
    for path in result.get("grid", {}).get("written", []):
        out.print(path)


def work(arguments: Arguments) -> None:
    parts = {"speed": speed, "shapes": shapes, "grid": grid}
    result = {part: parts[part](arguments) for part in arguments.parts}
    if arguments.out:
        known = read_json(arguments.out) if Path(arguments.out).is_file() else {}
        write_json(arguments.out, {"benchmark": "pasting", **known, **{k: v for k, v in result.items() if k != "grid"}})
    shown(result)


def main(words: Sequence[str] | None = None) -> int:
    """Run the script and return its exit code: 0, or 2 for a mistake in what was asked."""
    return script(words, "pasting", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
