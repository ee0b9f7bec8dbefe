"""Pictures of a run: the views that its pretexts learn from, and the course of its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from carina.data.batches import Batches, Plan
from carina.data.store import Selection
from carina.files import atomic_path
from carina.pretrain.pretexts import Pretext

SHOWN, CELL, MARGIN = 6, 96, 190  # images of a row, pixels of an image's side, pixels left of a row for its caption
POINTS = 400  # of a curve; more cannot be seen


def image_batches(views: Any) -> list[torch.Tensor]:
    """All batches of images (B, 1, H, W) in what a pretext calls its views, in order, however they are nested."""
    if isinstance(views, torch.Tensor):
        return [views] if views.ndim == 4 and views.shape[1] == 1 and views.is_floating_point() else []
    inner = views.values() if isinstance(views, dict) else views if isinstance(views, (list, tuple)) else ()
    return [images for view in inner for images in image_batches(view)]


@torch.no_grad()
def view_rows(
    pretexts: dict[str, Pretext], corpus: Selection, recipe: Any, device: torch.device
) -> list[tuple[str, np.ndarray]]:
    """(caption, images (N, H, W) in [0, 1]) for every scale: some images of the corpus, then each pretext's views."""
    count = min(SHOWN, len(corpus))
    plan = Plan(len(corpus), count, 1, 1, 0, tuple(recipe.scales), recipe.seed, len(recipe.scales))
    masks = any(pretext.needs_masks for pretext in pretexts.values())
    batches = Batches(corpus, plan, device=device, masks=masks, positives=recipe.positives)
    rows = []
    for _, (batch,) in batches.from_step(0):
        shown = {f"image, {batch.scale} px": [batch.images]}
        if recipe.positives != "image":
            shown[f"of the same {recipe.positives}"] = [batch.others]
        shown |= {name: image_batches(pretext.views(batch)) for name, pretext in pretexts.items()}
        for name, views in shown.items():
            for number, images in enumerate(views, start=1):
                caption = f"{name}, view {number}, {images.shape[-1]} px" if name in pretexts else name
                rows.append((caption, images[:, 0].float().clamp(0, 1).cpu().numpy()))
    return rows


def write_views(path: Path, rows: list[tuple[str, np.ndarray]]) -> None:
    """A PNG with a row of radiographs for each caption; every image takes the same room, whatever its size."""
    columns = max(len(images) for _, images in rows)
    sheet = Image.new("L", (MARGIN + columns * CELL, len(rows) * CELL), 255)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, (caption, images) in enumerate(rows):
        draw.text((6, (row + 0.5) * CELL), caption, fill=0, font=font, anchor="lm")
        for column, image in enumerate(images):
            tile = Image.fromarray(np.round(image * 255).astype(np.uint8)).resize((CELL - 2, CELL - 2), Image.BILINEAR)
            sheet.paste(tile, (MARGIN + column * CELL + 1, row * CELL + 1))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


PANELS = {
    "loss": ("loss",),
    "spread and information": (".spread", ".information"),
    "RankMe": ("watch.rankme",),
    "macro AUROC": ("watch.knn_auroc", "watch.probe_auroc"),
}  # title -> figures, by the end of their names


def write_curves(path: Path, rows: list[dict[str, Any]], before: dict[str, float]) -> None:
    """A PNG with the course of loss, spread, RankMe and AUROC over the steps; dashed: before training."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, (int, float)))
    panels = {title: [n for n in names if n == ends[0] or n.endswith(ends)] for title, ends in PANELS.items()}
    panels["loss"] = ["loss"]
    panels = {title: found for title, found in panels.items() if found}
    figure = Figure(figsize=(3.4 * len(panels), 2.7), layout="constrained")
    for axes, (title, found) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items()):
        for color, name in enumerate(found):
            _draw(axes, rows, name, f"C{color}")
            if name in before:
                axes.axhline(before[name], color=f"C{color}", linestyle="--", linewidth=0.8)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        if len(found) > 1:
            axes.legend(fontsize=7, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw(axes: Axes, rows: list[dict[str, Any]], name: str, color: str) -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    parts = np.array_split(np.array(points, dtype=float), min(POINTS, len(points)))
    steps, values = np.array([part.mean(axis=0) for part in parts]).T
    axes.plot(steps, values, color=color, linewidth=1.2, label=name.removeprefix("watch."))
