"""The report's figures: one small SVG per label and kind, and PNGs of example images.

Every function returns bytes that are the same for the same input. With `synthetic` the figure carries that word.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from carina.metrics.ranking import Ranking, precision_recall_curve, roc_curve
from carina.metrics.resampling import patient_codes, patient_resamples

INK, QUIET, RULE = "#1d252c", "#66727d", "#c9d1d8"
BLUE, ORANGE = "#1f5f8b", "#c2641b"
MAX_POINTS = 400
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "carina",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
}


def _panel(x_label: str, y_label: str, synthetic: bool) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.0, 2.75))
    axes = figure.add_axes((0.17, 0.165, 0.79, 0.765))
    axes.set_xlabel(x_label, labelpad=3)
    axes.set_ylabel(y_label, labelpad=4)
    if synthetic:
        figure.text(0.97, 0.985, "synthetic", ha="right", va="top", color=ORANGE, fontsize=8, style="italic")
    return figure, axes


def _unit_square(axes: Axes) -> None:
    ticks = np.linspace(0, 1, 6)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), xticks=ticks, yticks=ticks)
    axes.tick_params(labelsize=8)


def _svg(figure: Figure) -> bytes:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    # The viewer's own sans-serif instead of matplotlib's list of font names, so figures match the page.
    text = re.sub(r"'DejaVu Sans'(?:, [^;\"]*?)?sans-serif", "system-ui, sans-serif", buffer.getvalue())
    return text.encode()


def _thinned(*curves: np.ndarray) -> list[np.ndarray]:
    """At most MAX_POINTS of a curve's points, ends included: more cannot be seen and make the page heavy."""
    count = len(curves[0])
    if count <= MAX_POINTS:
        return list(curves)
    rows = np.unique(np.linspace(0, count - 1, MAX_POINTS).round().astype(int))
    return [curve[rows] for curve in curves]


def roc_band(
    target: np.ndarray, score: np.ndarray, patients: np.ndarray, resamples: int = 400, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False-positive rates (101,) and the lower and upper true-positive rates there, by the patient bootstrap.

    The band is pointwise: at each false-positive rate it covers with `level`, not the whole curve at once.
    """
    ranking, codes, grid = Ranking(target, score), patient_codes(patients), np.linspace(0, 1, 101)
    score = np.asarray(score, dtype=np.float64)
    thresholds = np.unique(score[np.concatenate([ranking.positives, ranking.negatives])])[::-1]
    curves = []
    for multiplicities in patient_resamples(codes, resamples, seed=0):
        weights = multiplicities[codes]
        rates = []
        for rows in (ranking.negatives, ranking.positives):
            total = np.vstack([np.zeros(weights.shape[1]), np.cumsum(weights[rows[::-1]], axis=0)])
            above = len(rows) - np.searchsorted(score[rows], thresholds, side="left")
            rates.append(np.vstack([total[:1], total[above]]))
        for false, true in zip(rates[0].T, rates[1].T):
            if false[-1] > 0 and true[-1] > 0:
                curves.append(np.interp(grid, false / false[-1], true / true[-1]))
    low, high = np.quantile(curves, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return grid, low, high


def roc(runs: list[tuple[np.ndarray, np.ndarray, np.ndarray]], band: bool, synthetic: bool) -> bytes:
    """ROC curves of one label. runs: (target, score, patients) of each run; a band is drawn for a single run only."""
    with rc_context(_STYLE):
        figure, axes = _panel("false-positive rate", "true-positive rate", synthetic)
        axes.plot([0, 1], [0, 1], color=RULE, linewidth=1, linestyle=(0, (3, 3)))
        if band and len(runs) == 1:
            grid, low, high = roc_band(*runs[0])
            axes.fill_between(grid, low, high, color=BLUE, alpha=0.16, linewidth=0)
        for target, score, _ in runs:
            axes.plot(*_thinned(*roc_curve(target, score)[:2]), color=BLUE, linewidth=1.6 if len(runs) == 1 else 0.9)
        _unit_square(axes)
        return _svg(figure)


def precision_recall(runs: list[tuple[np.ndarray, np.ndarray, np.ndarray]], synthetic: bool) -> bytes:
    """Precision-recall curves of one label; the dashed line is the prevalence, the precision of guessing."""
    with rc_context(_STYLE):
        figure, axes = _panel("recall", "precision", synthetic)
        axes.axhline(np.nanmean(runs[0][0]), color=RULE, linewidth=1, linestyle=(0, (3, 3)))
        for target, score, _ in runs:
            precision, recall, _ = precision_recall_curve(target, score)
            recall, precision = _thinned(recall, precision)
            axes.step(recall, precision, where="pre", color=BLUE, linewidth=1.6 if len(runs) == 1 else 0.9)
        _unit_square(axes)
        return _svg(figure)


def histogram(target: np.ndarray, score: np.ndarray, probability: bool, synthetic: bool) -> bytes:
    """How the scores of images with and without the finding are distributed, each class as shares of itself."""
    with rc_context(_STYLE):
        figure, axes = _panel("score", "share of the class", synthetic)
        known = score[~np.isnan(target)]
        low, high = (0.0, 1.0) if probability else (known.min(), known.max())
        bins = np.linspace(low, high if high > low else low + 1, 25)
        for value, color, word in ((0, BLUE, "absent"), (1, ORANGE, "present")):
            chosen = score[target == value]
            if len(chosen):
                share, _ = np.histogram(chosen, bins, weights=np.full(len(chosen), 1 / len(chosen)))
                axes.stairs(share, bins, fill=True, color=color, alpha=0.25)
                axes.stairs(share, bins, color=color, linewidth=1.3, label=word)
        # Room above the bars for the legend.
        axes.set_ylim(0, 1.22 * axes.dataLim.y1)
        axes.tick_params(labelsize=8)
        axes.legend(frameon=False, fontsize=8, loc="upper center", ncols=2, borderaxespad=0, handlelength=1.2)
        return _svg(figure)


def calibration(target: np.ndarray, score: np.ndarray, synthetic: bool, bins: int = 10) -> bytes:
    """Observed share against predicted probability in bins of equal counts, with 95 % intervals (Wilson 1927)."""
    known = ~np.isnan(target)
    order = np.argsort(score[known], kind="stable")
    parts = [rows for rows in np.array_split(order, bins) if len(rows)]
    count = np.array([len(rows) for rows in parts])
    predicted = np.array([score[known][rows].mean() for rows in parts])
    observed = np.array([target[known][rows].mean() for rows in parts])
    squared = 1.959964**2
    middle = (observed + squared / (2 * count)) / (1 + squared / count)
    half = np.sqrt(squared * (observed * (1 - observed) / count + squared / (4 * count**2))) / (1 + squared / count)
    with rc_context(_STYLE):
        figure, axes = _panel("predicted probability", "observed share", synthetic)
        axes.plot([0, 1], [0, 1], color=RULE, linewidth=1, linestyle=(0, (3, 3)))
        axes.vlines(predicted, middle - half, middle + half, color=BLUE, alpha=0.4, linewidth=1.2)
        axes.plot(predicted, observed, color=BLUE, linewidth=1.2, marker="o", markersize=3.5)
        _unit_square(axes)
        return _svg(figure)


def stack_chart(found: dict[str, Any], synthetic: bool, kind: str = "svg") -> bytes:
    """How much each scale counts for each finding: a bar a finding, small scales light and large ones dark, after the
    chart of Haque et al. (2023). found: `scales` of metrics.json. kind: svg or png."""
    labels, scales = list(found["weights"]), found["scales"]
    weights = np.array([found["weights"][label] for label in labels])
    order = np.argsort(scales)
    shades = colormaps["Blues"](np.linspace(0.3, 0.9, len(scales)))
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 0.75 + 0.3 * len(labels)))
        axes = figure.add_axes((0.26, 0.42 / figure.get_figheight(), 0.7, 0.3 * len(labels) / figure.get_figheight()))
        left = np.zeros(len(labels))
        for shade, number in zip(shades, order):
            axes.barh(
                range(len(labels)),
                weights[:, number],
                left=left,
                color=shade,
                height=0.72,
                label=f"{scales[number]} px",
            )
            for row, (start, share) in enumerate(zip(left, weights[:, number])):
                if share >= 0.08:
                    light = shade[:3].mean() > 0.62
                    axes.text(start + share / 2, row, f"{share:.2f}", ha="center", va="center", fontsize=7.5,
                              color=INK if light else "white")  # fmt: skip
            left += weights[:, number]
        axes.set(yticks=range(len(labels)), xlim=(0, 1), ylim=(len(labels) - 0.5, -0.5), xlabel="weight in the stack")
        axes.set_yticklabels([label.replace("_", " ") for label in labels], color=INK)
        axes.tick_params(labelsize=8, left=False)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(0.97, 1.0),
                      ncols=len(scales), handlelength=1.0, columnspacing=1.2, borderaxespad=0.2)  # fmt: skip
        if synthetic:
            figure.text(0.02, 0.985, "synthetic", ha="left", va="top", color=ORANGE, fontsize=8, style="italic")
        if kind == "svg":
            return _svg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
        return buffer.getvalue()


def _enlarged(values: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(np.asarray(values, dtype=np.float32)).resize(size, how))


def example(image: np.ndarray, heat: np.ndarray | None, lungs: np.ndarray | None, synthetic: bool) -> bytes:
    """A PNG of one image; with a heat map a second pane shows it over the same image.

    image: (H, W) in [0, 1]. heat: (H, W) in [0, 1], clipped, 0 shows nothing. lungs: (H, W) mask, drawn as a contour.
    """
    image = np.asarray(image, dtype=np.float32)
    assert image.ndim == 2, f"an example image is (height, width), not {image.shape}"
    factor = max(1.0, 288 / max(image.shape))
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    grey = _enlarged(image, size, Image.Resampling.BICUBIC).clip(0, 1)
    panes = [np.repeat(grey[..., None], 3, axis=2)]
    if heat is not None:
        warmth = _enlarged(heat, size, Image.Resampling.BICUBIC).clip(0, 1)[..., None]
        colors = colormaps["inferno"](0.25 + 0.75 * warmth[..., 0])[..., :3]
        strength = 0.75 * warmth
        panes.append(panes[0] * (1 - strength) + colors * strength)
    if lungs is not None:
        inside = _enlarged(np.asarray(lungs) > 0, size, Image.Resampling.BICUBIC) > 0.5
        edge = inside & ~binary_erosion(inside)
        for pane in panes:
            pane[edge] = (0.35, 0.85, 0.95)
    gap = np.ones((size[1], 4, 3))
    joined = panes[0] if len(panes) == 1 else np.concatenate([panes[0], gap, panes[1]], axis=1)
    picture = Image.fromarray((joined * 255).round().astype(np.uint8))
    if synthetic:
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
        draw.text(
            (6, size[1] - 20), "synthetic", font=font, fill=(255, 190, 120), stroke_width=2, stroke_fill=(0, 0, 0)
        )
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
