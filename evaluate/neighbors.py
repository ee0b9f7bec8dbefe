"""Features as `carina embed` writes them, looked at: the nearest neighbors of a case, and all images on a plane.

Images are named by image_id alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from matplotlib import colormaps
from matplotlib.figure import Figure
from pydantic import Field

from carina.data.labels import to_targets
from carina.data.store import Selection, select
from carina.draws import permutation
from carina.errors import CarinaError, nearest
from carina.files import write_bytes
from carina.models.scorers.neighbors import import_faiss
from carina.recipes import Section, parse_overrides, validate

MOST_TSNE = 10_000  # images that t-SNE lays out; it takes minutes from there on
DIMENSIONS = 50  # that PCA leaves for t-SNE
KINDS = 10  # values of a column with colors of their own; the rest is gray
COLUMNS = ("split", "view", "sex", "manufacturer", "source", "age")  # that a map may be colored by, beside labels


class LookSettings(Section):
    """nearest: an image_id. k: neighbors. map: a PNG to write. color: a column or a label. method: of the map. store: what
    the features were made of, for labels and columns."""

    nearest: str | None = None
    k: Annotated[int, Field(ge=1)] = 10
    map: str | None = None
    color: str = "split"
    method: Literal["pca", "tsne"] = "pca"
    store: str | Sequence[str] | None = None
    seed: int = 0


def unit_features(features: np.ndarray) -> np.ndarray:
    """(N, D) float32: centered on their mean, rows of length 1 (0 stays 0)."""
    centered = features - features.mean(axis=0, dtype=np.float64)
    length = np.linalg.norm(centered, axis=1, keepdims=True)
    return np.ascontiguousarray(centered / np.maximum(length, 1e-12), dtype=np.float32)


def nearest_rows(features: np.ndarray, row: int, patients: Sequence[Any], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest images of other patients: rows (k,), nearest first, and their distances (k,), 1 - cosine of centered
    features, in [0, 2]. Exact, by faiss. features: (N, D). patients: (N,). Fewer than k where there are no more."""
    faiss = import_faiss()
    patients, units = np.asarray(patients), unit_features(features)
    index = faiss.IndexFlatIP(units.shape[1])
    index.add(units)
    cosine, rows = index.search(units[row : row + 1], min(len(units), k + int((patients == patients[row]).sum())))
    other = patients[rows[0]] != patients[row]
    return rows[0][other][:k], 1 - cosine[0][other][:k].astype(np.float64)


def plane(features: np.ndarray, method: str = "pca", seed: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """Features (N, D) -> points (N, 2), by principal components, or by t-SNE (van der Maaten and Hinton, JMLR 2008) on the
    first 50 of them; and of the former the share of the variance (2,) that each axis holds."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(features) < 3:
        raise CarinaError(f"a map of {len(features)} images shows nothing; give features of at least 3")
    if method == "pca":
        fitted = PCA(2, svd_solver="full").fit(features)
        return fitted.transform(features), fitted.explained_variance_ratio_
    reduced = PCA(min(DIMENSIONS, *features.shape), random_state=seed).fit_transform(features)
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced), None


def look(path: str, overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """What `nearest` and `map` ask of a file of features.

    nearest: `neighbors`, a row each with image_id, distance, split and, with a store, its labels (1, 0, or nothing where
    unknown), and `vote`: for each label the share of the neighbors that have it among those where it is known. Images of
    the case's own patient are left out, because they would vote for themselves. map: a PNG, a point an image.
    """
    given = dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)
    settings = validate(LookSettings, given, "inspect")
    if settings.nearest is None and settings.map is None:
        raise CarinaError(f"nothing is asked of {path}; give nearest=IMAGE_ID, or map=FILE.png")
    table, features = _read(path)
    selection = None
    if settings.store is not None:
        selection = select(settings.store)
        known = selection.table.set_index("image_id", drop=False)
        if absent := int((~table["image_id"].isin(known.index)).sum()):
            raise CarinaError(
                f"{absent} of {len(table)} images of {path} are not in the store; give the one it was made of"
            )
        places = pd.Series(np.arange(len(known)), known.index)[table["image_id"]].to_numpy()
        selection = selection.where(places)
    result: dict[str, Any] = {}
    if settings.nearest is not None:
        result |= _neighbors(table, features, selection, settings)
    if settings.map is not None:
        result |= _mapped(table, features, selection, settings)
    return result


def _read(path: str) -> tuple[pd.DataFrame, np.ndarray]:
    names = set(pq.read_schema(path).names) if Path(path).is_file() else set()
    if not {"features", "image_id", "patient_id"} <= names:
        raise CarinaError(f"{path} holds no features of a store; write them with: carina embed RUN STORE out={path}")
    table = pq.read_table(path)
    features = np.stack(table["features"].to_numpy()).astype(np.float32)
    if not np.isfinite(features).all():
        raise CarinaError(f"{path} holds features that are no finite numbers; check the backbone and embed again")
    return table.drop_columns("features").to_pandas(), features


def _neighbors(
    table: pd.DataFrame, features: np.ndarray, selection: Selection | None, settings: LookSettings
) -> dict[str, Any]:
    found = np.flatnonzero(table["image_id"] == settings.nearest)
    if not len(found):
        raise CarinaError(
            f"no image has the image_id {settings.nearest}; the column image_id of the features lists them"
        )
    rows, distances = nearest_rows(features, int(found[0]), table["patient_id"].to_numpy(), settings.k)
    labels = [] if selection is None else selection.labels
    targets = to_targets(selection.targets(labels)) if labels else np.empty((len(table), 0))
    neighbors = [
        {
            "image_id": table["image_id"].iloc[row],
            "distance": round(float(distance), 6),
            "split": table["split"].iloc[row],
            **{label: int(value) for label, value in zip(labels, targets[row]) if not np.isnan(value)},
        }
        for row, distance in zip(rows, distances)
    ]
    vote = {}
    for column, label in enumerate(labels):
        known = targets[rows, column][~np.isnan(targets[rows, column])]
        if len(known):
            vote[label] = {"share": float(known.mean()), "of": len(known)}
    return {"what": "nearest neighbors", "image_id": settings.nearest, "neighbors": neighbors, "vote": vote}


def _mapped(
    table: pd.DataFrame, features: np.ndarray, selection: Selection | None, settings: LookSettings
) -> dict[str, Any]:
    values = _values(table, selection, settings.color)
    if settings.method == "tsne" and len(features) > MOST_TSNE:
        chosen = np.sort(permutation(len(features), "map", settings.seed)[:MOST_TSNE])
        features, values = features[chosen], values.iloc[chosen]
    points, variance = plane(features, settings.method, settings.seed)
    synthetic = selection is not None and selection.synthetic
    write_bytes(Path(settings.map), drawn(points, values, settings.color, settings.method, variance, synthetic))
    return {
        "map": settings.map,
        "images_drawn": len(points),
        "variance": None if variance is None else [round(float(share), 4) for share in variance],
    }


def _values(table: pd.DataFrame, selection: Selection | None, color: str) -> pd.Series:
    """What each point is colored by: text, or numbers for age; empty where unknown."""
    if color in table and color in COLUMNS:
        return table[color]
    if selection is None:
        raise CarinaError(f"color={color} is not among the features; give the store that they were made of with store=")
    if color in COLUMNS:
        return selection.table[color].reset_index(drop=True)
    if color not in selection.labels:
        choices = [*COLUMNS, *selection.labels]
        raise CarinaError(f"color={color} is no column or label{nearest(color, choices)}; choose {', '.join(choices)}")
    words = {1.0: "present", 0.0: "absent"}
    return pd.Series(to_targets(selection.targets([color]))[:, 0]).map(words)


def drawn(
    points: np.ndarray,
    values: pd.Series,
    color: str,
    method: str,
    variance: np.ndarray | None = None,
    synthetic: bool = False,
) -> bytes:
    """PNG of points (N, 2) colored by `values` (N,): numbers by a scale, all else by kind, the ten most frequent ones."""
    from carina.evaluate.report.figures import INK, ORANGE, QUIET, RULE

    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.subplots()
    dots = {"s": float(np.clip(4000 / len(points), 2, 20)), "linewidths": 0}
    values = values.reset_index(drop=True)
    if pd.api.types.is_numeric_dtype(values):
        there = values.notna().to_numpy()
        axes.scatter(*points[~there].T, color=RULE, **dots)
        shown = axes.scatter(*points[there].T, c=values[there], cmap="viridis", **dots)
        figure.colorbar(shown, ax=axes, label=color)
    else:
        words = values.fillna("").astype(str).replace("", "unknown")
        counts = words[words != "unknown"].value_counts()
        kinds = [str(kind) for kind in counts.index[:KINDS]]
        shades = dict(zip(sorted(kinds), colormaps["tab10"].colors))
        order = permutation(len(points), "map")  # or the kind that is drawn last would hide the others
        hues = np.array([shades.get(word, RULE) for word in words], dtype=object)
        axes.scatter(*points[order].T, color=hues[order].tolist(), alpha=0.8, **dots)
        rest = [("other", words[~words.isin([*kinds, "unknown"])]), ("unknown", words[words == "unknown"])]
        legend = [(shades[kind], f"{kind} ({counts[kind]})") for kind in sorted(kinds)]
        legend += [(RULE, f"{word} ({len(some)})") for word, some in rest if len(some)]
        for shade, word in legend:
            axes.scatter([], [], color=shade, s=20, linewidths=0, label=word)
        axes.legend(frameon=False, fontsize=8, title=color.replace("_", " "), title_fontsize=8, loc="center left",
                    bbox_to_anchor=(1, 0.5))  # fmt: skip
    names = ["t-SNE 1", "t-SNE 2"] if variance is None else [
        f"principal component {n + 1} ({100 * share:.0f} % of the variance)" for n, share in enumerate(variance)
    ]  # fmt: skip
    axes.set_xlabel(names[0], color=QUIET, fontsize=8.5)
    axes.set_ylabel(names[1], color=QUIET, fontsize=8.5)
    axes.set(xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{len(points):,} images by {method.upper().replace('TSNE', 't-SNE')} of their features", fontsize=9.5,
                   color=INK, loc="left")  # fmt: skip
    if synthetic:
        figure.text(0.99, 0.99, "synthetic", ha="right", va="top", color=ORANGE, fontsize=8, style="italic")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
