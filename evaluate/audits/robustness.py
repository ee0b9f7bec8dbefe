"""Robustness: how AUROC and scores change as pictures are changed more and more (after Hendrycks and Dietterich, ICLR
2019, with changes that radiographs meet).

Every image draws its own direction (brighter or darker, left or right); the strength is the same for all.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from carina.draws import Draws, sample_codes
from carina.evaluate.audits.common import MACRO, Audited, Change, entry, listed, usable
from carina.imaging.views import gaussian_blur
from carina.metrics.intervals import difference, interval

STRENGTHS: dict[str, tuple[str, tuple[float, ...]]] = {
    "gamma": ("exponent, or one over it", (1.1, 1.25, 1.5, 1.8, 2.2)),
    "contrast": ("times less or more, of the range about the mean", (1.1, 1.25, 1.5, 2.0, 2.5)),
    "rotation": ("degrees", (2, 5, 10, 15, 20)),
    "scale": ("times larger or smaller", (1.05, 1.1, 1.2, 1.3, 1.4)),
    "shift": ("share of the side", (0.02, 0.04, 0.06, 0.09, 0.12)),
    "noise": ("standard deviation, of the range", (0.01, 0.02, 0.04, 0.07, 0.1)),
    "blur": ("sigma, share of the side", (0.002, 0.004, 0.008, 0.012, 0.02)),
}


def _moved(images: torch.Tensor, theta: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
    """(B, C, S, S) seen through matrices (B, 2, 3) from output to input coordinates in [-1, 1]; black outside."""
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode="zeros", align_corners=False)


def geometry(kind: str, strength: float, draws: Draws) -> torch.Tensor:
    """(B, 2, 3) matrices from output to input coordinates."""
    sign = 1 - 2 * torch.from_numpy(draws.coin(kind)).float()
    zero, one = torch.zeros_like(sign), torch.ones_like(sign)
    if kind == "rotation":
        angle = sign * math.radians(strength)
        cells = (angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero)
    elif kind == "scale":
        factor = strength**sign
        cells = (factor, zero, zero, zero, factor, zero)
    else:
        way = torch.from_numpy(draws.uniform("way", 0, 2 * math.pi))
        reach = 2 * strength  # the frame is 2 wide in these coordinates
        cells = (one, zero, reach * way.cos(), zero, one, reach * way.sin())
    return torch.stack(cells, dim=1).view(-1, 2, 3)


def disturbed(images: torch.Tensor, kind: str, strength: float, draws: Draws) -> torch.Tensor:
    """Images (B, 1, S, S) in [0, 1] with one disturbance of a strength as STRENGTHS counts it; in [0, 1]."""
    side = images.shape[-1]
    sign = (1 - 2 * torch.from_numpy(draws.coin(kind)).float()).view(-1, 1, 1, 1).to(images.device)
    if kind == "gamma":
        return images.pow(strength**sign)
    if kind == "contrast":
        mean = images.mean(dim=(2, 3), keepdim=True)
        return ((images - mean) * strength**sign + mean).clamp(0, 1)
    if kind == "noise":
        noise = torch.from_numpy(draws.normal("noise", (1, side, side))).to(images.device)
        return (images + strength * noise).clamp(0, 1)
    if kind == "blur":
        sigma = torch.full((len(images),), strength * side, device=images.device)
        return gaussian_blur(images, sigma, strength * side)
    return _moved(images, geometry(kind, strength, draws))


def _change(kind: str, strength: float, codes: np.ndarray, seed: int) -> Change:
    def change(images: torch.Tensor, lungs: torch.Tensor | None, rows: slice) -> tuple:
        draws = Draws(seed, 0, codes[rows]).part("robustness")
        if lungs is not None and kind in ("rotation", "scale", "shift"):
            lungs = _moved(lungs.float(), geometry(kind, strength, draws), "nearest") > 0.5
        return disturbed(images, kind, strength, draws), lungs

    return change


def audit(audited: Audited) -> dict[str, Any]:
    """A row a kind and strength: AUROC (several labels: their mean), what is lost of it, and how scores move."""
    codes = sample_codes(audited.selection.table["image_id"].tolist())
    pairs = [(kind, strength) for kind, (_, strengths) in STRENGTHS.items() for strength in strengths]
    changes = {f"{kind} {value}": _change(kind, value, codes, audited.settings.seed) for kind, value in pairs}
    scores = audited.scores(changes)
    whole, column = audited.measured(audited.as_it_is), 0 if len(audited.labels) == 1 else None
    rows: list[dict[str, Any]] = []
    for kind, value in pairs:
        found = scores[f"{kind} {value}"]
        measured = audited.measured(found)
        moved = found - audited.as_it_is
        rows.append(
            {
                "kind": kind,
                "strength": value,
                "unit": STRENGTHS[kind][0],
                "label": audited.labels[0] if column == 0 else MACRO,
                "auroc": interval(measured, column).to_dict(),
                "drop": difference(whole, measured, column).to_dict(),
                "score_change": float(moved.mean()),
                "score_change_absolute": float(np.abs(moved).mean()),
            }
        )
    start = interval(whole, column).to_dict()
    return entry("robustness", sentence(rows, start), rows, curve(rows, start))


def first_falls(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By kind, the row of the first strength at which the interval of what is lost lies above 0."""
    falls: dict[str, dict[str, Any]] = {}
    for row in rows:
        if usable(row["drop"]) and row["drop"]["low"] > 0:
            falls.setdefault(row["kind"], row)
    return falls


def sentence(rows: list[dict[str, Any]], start: dict[str, Any]) -> str:
    if not usable(start):
        return f"What this predictor withstands cannot be said: {start['reason']}."
    falls, kinds = first_falls(rows), list(dict.fromkeys(row["kind"] for row in rows))
    said = [f"{kind} {row['strength']:g} ({row['auroc']['value']:.2f})" for kind, row in falls.items()]
    firm = [
        f"{kind} up to {max(r['strength'] for r in rows if r['kind'] == kind):g}" for kind in kinds if kind not in falls
    ]
    text = f"From an AUROC of {start['value']:.2f}, "
    text += f"a loss is certain from {listed(said)} on" if said else "nothing that was tried costs AUROC for certain"
    return text + (f"; {listed(firm)} cost nothing that can be shown" if firm and said else "") + "."


def curve(rows: list[dict[str, Any]], start: dict[str, Any]) -> dict[str, Any]:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    series = []
    for kind in kinds:
        own = [row for row in rows if row["kind"] == kind]
        values = {name: [row["auroc"][name] for row in own] for name in ("value", "low", "high")}
        series.append({"name": kind, "unit": own[0]["unit"], "x": [row["strength"] for row in own], **values})
    return {"x": "strength", "y": "AUROC", "start": start, "series": series}
