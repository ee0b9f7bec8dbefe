"""The report's figures: SVG charts with the points that they draw, and pictures of example images.

Every function gives the same for the same input. With `synthetic` the figure carries that word. Charts by label give their
points alone where they are not `shown`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from carina.metrics.ranking import Ranking, precision_recall_curve, roc_curve
from carina.metrics.resampling import patient_codes, patient_resamples

INK, QUIET, RULE = "#1d252c", "#5b6670", "#c3cbd3"
BLUE, ORANGE = "#1f5f8b", "#c2641b"  # told apart in every common color blindness, and by lightness
MAX_POINTS = 400
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "carina",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 10,
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
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
}


class Drawing(NamedTuple):
    """svg: one element, to be put into a page. data: a row a drawn point."""

    svg: str
    data: pd.DataFrame


Run = tuple[np.ndarray, np.ndarray, np.ndarray]  # targets, scores, patients


def _panel(x_label: str, y_label: str, synthetic: bool) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.0, 2.8))
    axes = figure.add_axes((0.185, 0.175, 0.765, 0.755))
    axes.set_xlabel(x_label, labelpad=3)
    axes.set_ylabel(y_label, labelpad=4)
    _mark(figure, synthetic)
    return figure, axes


def _mark(figure: Figure, synthetic: bool) -> None:
    if synthetic:
        figure.text(0.98, 0.99, "synthetic", ha="right", va="top", color=ORANGE, fontsize=9, style="italic")


def _unit_square(axes: Axes, end: float = 1.0) -> None:
    ticks = np.linspace(0, end, 6)
    axes.set(xlim=(-0.01 * end, 1.01 * end), ylim=(-0.01 * end, 1.02 * end), xticks=ticks, yticks=ticks)


def _svg(figure: Figure) -> bytes:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    # The viewer's own sans-serif instead of matplotlib's list of font names, so figures match the page.
    text = re.sub(r"'DejaVu Sans'(?:, [^;\"]*?)?sans-serif", "system-ui, sans-serif", buffer.getvalue())
    return text.encode()


def _inline(figure: Figure) -> str:
    """One <svg> element without anything that only a file of its own needs."""
    text = _svg(figure).decode()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(<svg)[^>]*?(viewBox="[^"]*")[^>]*>', r"\1 \2>", text, count=1)
    text = text.replace("xlink:href", "href").replace(' xmlns="http://www.w3.org/2000/svg"', "")
    return re.sub(r"\n\s*", "\n", text).replace(">\n<", "><").strip()


def distinct(svg: str, number: int) -> str:
    """The same element with identifiers that no other element of the page has."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="c{number}-\1"', svg)
    return re.sub(r'(href="|url\()#', rf"\g<1>#c{number}-", svg)


def _thinned(*curves: np.ndarray) -> list[np.ndarray]:
    """At most MAX_POINTS of a curve's points, ends included: more cannot be seen and make the page heavy."""
    number = len(curves[0])
    if number <= MAX_POINTS:
        return list(curves)
    rows = np.unique(np.linspace(0, number - 1, MAX_POINTS).round().astype(int))
    return [curve[rows] for curve in curves]


def _points(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame(columns)


def roc_band(
    target: np.ndarray, score: np.ndarray, patients: np.ndarray, resamples: int = 400, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False-positive rates (101,) and the lower and upper true-positive rates there, by the patient bootstrap.

    The band is pointwise: at each false-positive rate it covers with `level`, not the whole curve at once. Of more than
    2,000 thresholds 2,000 are followed.
    """
    ranking, codes, grid = Ranking(target, score), patient_codes(patients), np.linspace(0, 1, 101)
    score = np.asarray(score, dtype=np.float64)
    thresholds = np.unique(score[np.concatenate([ranking.positives, ranking.negatives])])[::-1]
    thresholds = thresholds[np.unique(np.linspace(0, len(thresholds) - 1, 2000).round().astype(int))]
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


def roc(runs: Sequence[Run], band: bool, synthetic: bool, shown: bool = True) -> Drawing:
    """ROC curves of one label; a band is drawn for a single run only."""
    curves = [_thinned(*roc_curve(target, score)[:2]) for target, score, _ in runs]
    frames = [
        _points(what="curve", run=number, false_positive_rate=false, true_positive_rate=true)
        for number, (false, true) in enumerate(curves)
    ]
    if not shown:
        return Drawing("", pd.concat(frames, ignore_index=True))
    with rc_context(_STYLE):
        figure, axes = _panel("false-positive rate", "true-positive rate", synthetic)
        axes.plot([0, 1], [0, 1], color=RULE, linewidth=1, linestyle=(0, (3, 3)))
        if band and len(runs) == 1:
            grid, low, high = roc_band(*runs[0])
            axes.fill_between(grid, low, high, color=BLUE, alpha=0.16, linewidth=0)
            frames.insert(0, _points(what="band", run=0, false_positive_rate=grid, low=low, high=high))
        for false, true in curves:
            axes.plot(false, true, color=BLUE, linewidth=1.6 if len(runs) == 1 else 0.9)
        _unit_square(axes)
        return Drawing(_inline(figure), pd.concat(frames, ignore_index=True))


def precision_recall(runs: Sequence[Run], synthetic: bool, shown: bool = True) -> Drawing:
    """Precision-recall curves of one label; the dashed line is the prevalence, the precision of guessing."""
    prevalence = float(np.nanmean(runs[0][0]))
    found = (precision_recall_curve(target, score)[:2] for target, score, _ in runs)
    curves = [_thinned(recall, precision) for precision, recall in found]
    data = pd.concat(
        [_points(what="prevalence", run=0, recall=[0.0, 1.0], precision=prevalence)]
        + [
            _points(what="curve", run=n, recall=recall, precision=precision)
            for n, (recall, precision) in enumerate(curves)
        ],
        ignore_index=True,
    )
    if not shown:
        return Drawing("", data)
    with rc_context(_STYLE):
        figure, axes = _panel("recall", "precision", synthetic)
        axes.axhline(prevalence, color=RULE, linewidth=1, linestyle=(0, (3, 3)))
        for recall, precision in curves:
            axes.step(recall, precision, where="pre", color=BLUE, linewidth=1.6 if len(runs) == 1 else 0.9)
        _unit_square(axes)
        return Drawing(_inline(figure), data)


def histogram(target: np.ndarray, score: np.ndarray, probability: bool, synthetic: bool, shown: bool = True) -> Drawing:
    """How the scores of images with and without the finding are distributed, each class as shares of itself."""
    known = score[~np.isnan(target)]
    low, high = (0.0, 1.0) if probability else (known.min(), known.max())
    bins = np.linspace(low, high if high > low else low + 1, 25)
    classes = {word: score[target == value] for value, word in ((0, "absent"), (1, "present"))}
    shares = {
        word: np.histogram(chosen, bins, weights=np.full(len(chosen), 1 / len(chosen)))[0]
        for word, chosen in classes.items()
        if len(chosen)
    }
    data = pd.concat(
        [_points(what=word, score_from=bins[:-1], score_to=bins[1:], share=share) for word, share in shares.items()],
        ignore_index=True,
    )
    if not shown:
        return Drawing("", data)
    with rc_context(_STYLE):
        figure, axes = _panel("score", "share of the class", synthetic)
        for word, share in shares.items():
            color = {"absent": BLUE, "present": ORANGE}[word]
            axes.stairs(share, bins, fill=True, color=color, alpha=0.25)
            axes.stairs(share, bins, color=color, linewidth=1.3, label=word)
        # Room above the bars for the legend.
        axes.set_ylim(0, 1.22 * axes.dataLim.y1)
        axes.locator_params(axis="y", nbins=5)
        axes.legend(frameon=False, fontsize=9, loc="upper center", ncols=2, borderaxespad=0, handlelength=1.2)
        return Drawing(_inline(figure), data)


def calibration(found: Sequence[Mapping[str, float]], synthetic: bool, shown: bool = True) -> Drawing:
    """Groups {predicted, observed, low, high, n} against the diagonal, on which a probability means what it says."""
    data = pd.DataFrame(found)
    if not shown:
        return Drawing("", data)
    with rc_context(_STYLE):
        figure, axes = _panel("predicted probability", "observed share", synthetic)
        most = float(data[["predicted", "high"]].max().max())
        end = next(
            (end for end in (0.1, 0.2, 0.5) if most <= end), 1.0
        )  # rare findings fill a corner of the whole square
        axes.plot([0, end], [0, end], color=RULE, linewidth=1, linestyle=(0, (3, 3)))
        bars = data.dropna(subset=["low", "high"])
        axes.vlines(bars["predicted"], bars["low"], bars["high"], color=BLUE, alpha=0.4, linewidth=1.2)
        axes.plot(data["predicted"], data["observed"], color=BLUE, linewidth=1.2, marker="o", markersize=3.5)
        _unit_square(axes, end)
        return Drawing(_inline(figure), data)


def decision(
    found: Mapping[str, Sequence[float]], synthetic: bool, shown: bool = True, units: str = "images"
) -> Drawing:
    """Net benefit of 100 units against the threshold probability: by the model, calling all, calling none (0).

    Drawn up to four times the prevalence, and at least to 0.2: whoever would act only beyond that calls nobody.
    """
    data = pd.DataFrame({name: found[name] for name in ("threshold", "model", "all")}).assign(none=0.0)
    prevalence = float((data["all"] + data["threshold"] - data["all"] * data["threshold"]).iloc[0])
    data = data[data["threshold"] <= min(max(4 * prevalence, 0.2), 0.95)]
    points = data.melt("threshold", var_name="what", value_name="net_benefit")
    if not shown:
        return Drawing("", points)
    lines = {"none": ("call none", RULE, "-"), "all": ("call all", QUIET, (0, (3, 2))), "model": ("model", BLUE, "-")}
    with rc_context(_STYLE):
        figure, axes = _panel("threshold probability", f"net benefit of 100 {units}", synthetic)
        for name, (word, color, line) in lines.items():
            width = 1.6 if name == "model" else 1
            axes.plot(data["threshold"], 100 * data[name], color=color, linestyle=line, linewidth=width, label=word)
        top = max(100 * float(data[["model", "all"]].max().max()), 0.1)
        axes.set(xlim=(0, float(data["threshold"].max())), ylim=(-0.25 * top, 1.3 * top))
        axes.locator_params(nbins=5)
        handles, words = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], words[::-1], frameon=False, fontsize=8.5, loc="upper center", ncols=3,
                    borderaxespad=0, handlelength=1.2, columnspacing=0.9, handletextpad=0.4)  # fmt: skip
        return Drawing(_inline(figure), points)


def audit_curve(series: Sequence[Mapping[str, Any]], x: str, y: str, level: float | None, synthetic: bool) -> Drawing:
    """Series {name, x, value, low, high} over one unit; level: a dashed line, what they are held against."""
    colors = dict.fromkeys(one["name"].rsplit(" ", 1)[0] for one in series)
    shades = dict(zip(colors, (BLUE, ORANGE, "#4d7f3a", "#7a5195")))
    frames, named = [], set()
    with rc_context(_STYLE):
        figure, axes = _panel(x, y, synthetic)
        if level is not None:
            axes.axhline(level, color=QUIET, linewidth=1, linestyle=(0, (3, 3)))
        for one in series:
            group = one["name"].rsplit(" ", 1)[0]
            color = shades.get(group, BLUE)
            values, low, high = (np.array(one[key], dtype=float) for key in ("value", "low", "high"))
            axes.fill_between(one["x"], low, high, color=color, alpha=0.14, linewidth=0)
            axes.plot(one["x"], values, color=color, linewidth=1.4, marker="o", markersize=3,
                      label=None if group in named else group)  # fmt: skip
            named.add(group)
            frames.append(_points(series=one["name"], x=one["x"], value=values, low=low, high=high))
        seen = np.concatenate(
            [*(frame[["value", "low", "high"]].to_numpy().ravel() for frame in frames), [level or np.nan]]
        )
        bottom = np.floor(10 * min(np.nanmin(seen), 0.95)) / 10 if np.isfinite(seen).any() else 0
        axes.set_ylim(bottom, 1.01)
        axes.locator_params(axis="x", nbins=5)
        if len(named) > 1:
            axes.legend(frameon=False, fontsize=9, loc="lower right", borderaxespad=0.2, handlelength=1.2)
        return Drawing(_inline(figure), pd.concat(frames, ignore_index=True))


def _stack_figure(found: Mapping[str, Any], synthetic: bool) -> Figure:
    labels, scales = list(found["weights"]), found["scales"]
    weights = np.array([found["weights"][label] for label in labels])
    shades = colormaps["Blues"](np.linspace(0.3, 0.9, len(scales)))
    figure = Figure(figsize=(6.4, 0.75 + 0.3 * len(labels)))
    axes = figure.add_axes((0.26, 0.42 / figure.get_figheight(), 0.7, 0.3 * len(labels) / figure.get_figheight()))
    left = np.zeros(len(labels))
    for shade, number in zip(shades, np.argsort(scales)):
        share = weights[:, number]
        axes.barh(range(len(labels)), share, left=left, color=shade, height=0.72, label=f"{scales[number]} px")
        for row, (start, part) in enumerate(zip(left, share)):
            if part >= 0.08:
                axes.text(start + part / 2, row, f"{part:.2f}", ha="center", va="center", fontsize=8,
                          color=INK if shade[:3].mean() > 0.62 else "white")  # fmt: skip
        left += share
    axes.set(yticks=range(len(labels)), xlim=(0, 1), ylim=(len(labels) - 0.5, -0.5), xlabel="weight in the stack")
    axes.set_yticklabels([label.replace("_", " ") for label in labels], color=INK)
    axes.tick_params(labelsize=8.5, left=False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=8.5, loc="upper right", bbox_to_anchor=(0.97, 1.0),
                  ncols=len(scales), handlelength=1.0, columnspacing=1.2, borderaxespad=0.2)  # fmt: skip
    if synthetic:
        figure.text(0.02, 0.985, "synthetic", ha="left", va="top", color=ORANGE, fontsize=8.5, style="italic")
    return figure


def stack_drawing(found: Mapping[str, Any], synthetic: bool) -> Drawing:
    """How much each scale counts for each finding: a bar a finding, small scales light and large ones dark, after the
    chart of Haque et al. (2023). found: `scales` of metrics.json."""
    with rc_context(_STYLE):
        svg = _inline(_stack_figure(found, synthetic))
    rows = [(name, scale, w) for name, row in found["weights"].items() for scale, w in zip(found["scales"], row)]
    return Drawing(svg, pd.DataFrame(rows, columns=["label", "scale", "weight"]))


def stack_chart(found: Mapping[str, Any], synthetic: bool, kind: str = "svg") -> bytes:
    """The same as a file. kind: svg or png."""
    with rc_context(_STYLE):
        figure = _stack_figure(found, synthetic)
        if kind == "svg":
            return _svg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
        return buffer.getvalue()


def _enlarged(values: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(np.asarray(values, dtype=np.float32)).resize(size, how))


def example(
    image: np.ndarray, heat: np.ndarray | None, lungs: np.ndarray | None, synthetic: bool, kind: str = "png"
) -> bytes:
    """A picture of one image; with a heat map a second pane shows it over the same image.

    image: (H, W) in [0, 1]. heat: (H, W) in [0, 1], clipped, 0 shows nothing. lungs: (H, W) mask, drawn as a contour.
    kind: png, or webp, which is some ten times smaller and not exact.
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
    if kind == "webp":
        picture.save(buffer, format="WEBP", quality=88, method=6)
    else:
        picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
