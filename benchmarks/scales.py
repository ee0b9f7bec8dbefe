"""Several scales and their stack: what it adds to the best single one, and whether weights follow the size of findings.

    python benchmarks/scales.py [stores=[STORE,...]] [out=FILE.json] [work=FOLDER] [scales=[64,128,256]] [folds=5]
                                [backbone=imagenet-lite0] [positives=50] [phantoms=600] [small=0.04] [large=0.25] ...

stores: real radiographs prepared at those scales. Each is dealt into patient folds; a frozen backbone with a probe for every
scale and the stack's weights are fitted on the others, everything inside them, and the folds are pooled. Labels are those
with at least `positives` positive images. The stack is held against the best single scale twice: the one that is best on
these very images (oracle, which nobody can choose), and the one that cross-fitted training scores chose for each finding.
The bar: stack minus oracle of the mean over labels, lower bound above -0.02.
phantoms: as many normal phantoms, with a small soft nodule planted in half of them and a large one in half of them,
independently (carina.imaging.planting; diameters are fractions of the side). The bar: the small one puts more weight
on the largest scale than the large one. With out=FILE.json the weights are drawn into FILE-STORE.png.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
from common import console, script
from PIL import Image
from pydantic import Field
from rich.table import Table

from carina.data.features import read_all
from carina.data.labels import to_targets
from carina.data.store import LABEL, Selection, select
from carina.draws import Draws
from carina.errors import CarinaError
from carina.evaluate.report.figures import stack_chart
from carina.evaluate.scales import scale_table
from carina.evaluate.score import evaluation_rows
from carina.files import atomic_path, write_json
from carina.finetune.classifier import probabilities
from carina.finetune.run import finetune
from carina.imaging.phantom import phantom
from carina.imaging.planting import plant
from carina.intake.prepare import prepare
from carina.metrics.intervals import difference, interval
from carina.metrics.resampling import replicate
from carina.models.predictor import Member, load_predictor, stacked
from carina.progress import Progress
from carina.recipes import Section

BAR = -0.02
SMALL, LARGE = "Small_Lesion", "Large_Lesion"


class Arguments(Section):
    stores: list[str]
    out: str | None
    work: str | None
    scales: Annotated[list[int], Field(min_length=2)]
    folds: Annotated[int, Field(ge=2)]
    backbone: str
    positives: Annotated[int, Field(ge=1)]
    labels: list[str] | None
    where: str | None
    phantoms: Annotated[int, Field(ge=0)]
    small: Annotated[float, Field(gt=0, le=1)]
    large: Annotated[float, Field(gt=0, le=1)]
    small_contrast: Annotated[float, Field(gt=0)]
    large_contrast: Annotated[float, Field(gt=0)]
    resamples: Annotated[int, Field(ge=100)]
    seed: int


DEFAULTS = {
    "stores": [],
    "out": None,
    "work": None,  # runs and features; a temporary folder otherwise
    "scales": [64, 128, 256],
    "folds": 5,
    "backbone": "imagenet-lite0",
    "positives": 50,
    "labels": None,
    "where": None,
    "phantoms": 600,
    "small": 0.04,
    "large": 0.25,
    "small_contrast": 4.0,
    "large_contrast": 2.5,
    "resamples": 2000,
    "seed": 0,
}


def labels_of(given: Arguments, store: str) -> list[str]:
    selection = select(store, where=given.where)
    there = [c.removeprefix(LABEL) for c in selection.table.columns if c.startswith(LABEL)]
    counts = (selection.targets(there) == 1).sum(axis=0)
    known = [n for n, count in zip(there, counts) if count >= given.positives and n != "No_Finding"]
    known = [n for n in known if given.labels is None or n in given.labels]
    if not known:
        raise CarinaError(f"{store} has no label with {given.positives} positives; lower positives=")
    return known


def measure(given: Arguments, store: str, folder: Path) -> dict[str, Any]:
    """All folds of one store: the stack, each scale, and the best of them."""
    labels = labels_of(given, store)
    done, parts = [], []
    common = {
        "store": store,
        "backbone": given.backbone,
        "labels": labels,
        "scales": given.scales,
        "where": given.where,
    }
    for fold in range(given.folds):
        run = folder / f"{Path(store).name}-{fold}"
        if not (run / "predictor").is_dir():
            own = {"folds": given.folds, "fold": fold, "out": str(run), "cache": str(folder / "features")}
            finetune("classify", {**common, **own, "seed": given.seed, "threads": torch.get_num_threads()}, quiet=True)
        predictor = load_predictor(run)
        rows = evaluation_rows(predictor, SimpleNamespace(store=store, where=given.where, split="fold"))
        parts.append([_scored(member, rows, folder / "features") for member in predictor.members])
        done.append((predictor, rows, predictor.combine(parts[-1]), None))
        print(f"{Path(store).name}: fold {fold + 1} of {given.folds}", file=sys.stderr)
    how = SimpleNamespace(level="image", pool="max", resamples=given.resamples, seed=given.seed)
    table = scale_table(done, parts, how)
    return {"labels": labels, **_against(given, done, parts, labels), "scales": table}


def _scored(member: Member, rows: Selection, cache: Path) -> np.ndarray:
    """(N, L) float64 probabilities of a member, as carina evaluate gives them, from the features that fitting kept."""
    how = {"cache": cache, "device": torch.device("cpu")}
    return probabilities(member.head, read_all(member.backbone, rows, member.scale, member.head.read, "pooled", **how))


def _against(given: Arguments, done: list[tuple], parts: list[list[np.ndarray]], labels: list[str]) -> dict[str, Any]:
    """Stack, oracle, chosen scale and equal weights, each with its interval, and the stack minus each, paired."""
    targets = np.concatenate([to_targets(rows.targets(labels)) for _, rows, _, _ in done])
    patients = np.concatenate([rows.table["patient_id"].to_numpy() for _, rows, _, _ in done])
    members = [np.concatenate([part[number] for part in parts]) for number in range(len(given.scales))]
    equal = np.full((len(labels), len(members)), 1 / len(members))
    chosen = []
    for (predictor, *_), part in zip(done, parts):
        best = [np.argmax(list(predictor.info["stack_auroc"][label].values())) for label in labels]
        chosen.append(np.stack([part[number][:, column] for column, number in enumerate(best)], axis=1))

    def measured(scores: np.ndarray) -> Any:
        return replicate(targets, scores[None], patients, "auroc", given.resamples, given.seed)

    singles = [measured(scores) for scores in members]
    arms = {
        "stack": measured(np.concatenate([scores for _, _, scores, _ in done])),
        "chosen": measured(np.concatenate(chosen)),
        "equal": measured(np.concatenate([stacked(part, equal) for part in parts])),
    }
    rows = []
    for column in [*([None] if len(labels) > 1 else []), *range(len(labels))]:
        values = [interval(single, column).value for single in singles]
        oracle = singles[int(np.argmax(values))]
        rows.append(
            {
                "label": "macro" if column is None else labels[column],
                "oracle_scale": given.scales[int(np.argmax(values))],
                "positives": int((targets == 1).sum() if column is None else (targets[:, column] == 1).sum()),
                **{name: interval(arm, column).to_dict() for name, arm in arms.items()},
                "oracle": interval(oracle, column).to_dict(),
                "stack_minus_oracle": difference(arms["stack"], oracle, column).to_dict(),
                "stack_minus_chosen": difference(arms["stack"], arms["chosen"], column).to_dict(),
                "stack_minus_equal": difference(arms["stack"], arms["equal"], column).to_dict(),
            }
        )
    weights = np.array([[p.info["stack"][label] for label in labels] for p, *_ in done])
    valid = bool((weights >= 0).all() and np.allclose(weights.sum(axis=2), 1))
    low = rows[0]["stack_minus_oracle"]["low"]
    facts = {"images": len(targets), "patients": len(set(patients)), "synthetic": done[0][1].synthetic}
    return {
        **facts,
        "rows": rows,
        "weights_by_fold": weights.tolist(),
        "weights_valid": valid,
        "met": valid and low > BAR,
    }


def draw_phantoms(given: Arguments, folder: Path) -> Path:
    """Normal phantoms at the largest scale with nodules of two sizes planted, as a store."""
    side, store = max(given.scales), folder / "phantoms"
    if (store / "store.json").is_file():
        return store
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    kinds = {SMALL: (given.small, given.small_contrast), LARGE: (given.large, given.large_contrast)}
    with (
        open(folder / "labels.csv", "w", newline="", encoding="utf-8") as handle,
        Progress("phantoms", given.phantoms, unit="phantoms") as progress,
    ):
        table = csv.writer(handle)
        table.writerow(["path", "patient", *kinds])
        for patient in range(given.phantoms):
            drawn = phantom(given.seed, patient, size=side, view="PA", findings=(), marker=False)
            image = torch.from_numpy(drawn.image.astype(np.float32))[None, None]
            lungs = torch.from_numpy(np.asarray(drawn.lungs) > 0)[None, None]
            draws = Draws(given.seed, 0, np.array([patient], dtype=np.uint64))
            there = [bool(draws.coin(name)[0]) for name in kinds]
            for (name, (diameter, contrast)), present in zip(kinds.items(), there):
                if present:
                    how = {"diameter": diameter, "contrast": contrast, "place": "inside"}
                    image, _ = plant(image, lungs, draws.part(name), **how)
            pixels = np.rint(image[0, 0].numpy() * 255).astype(np.uint8)
            Image.fromarray(pixels).save(pictures / f"{patient:05d}.png")
            table.writerow([f"pictures/{patient:05d}.png", f"P{patient:05d}", *map(int, there)])
            progress.advance()
    own = {"out": str(store), "scales": given.scales, "patient": "patient", "labels": list(kinds), "synthetic": True}
    prepare(str(folder / "labels.csv"), {**own, "source": "phantoms", "lungs": False, "workers": 1}, quiet=True)
    return store


def follows_size(given: Arguments, found: dict[str, Any]) -> dict[str, Any]:
    """Weight on the largest scale, by finding, over the folds."""
    largest = int(np.argmax(given.scales))
    weights = np.array(found["weights_by_fold"])[:, :, largest]
    small, large = (weights[:, found["labels"].index(name)] for name in (SMALL, LARGE))
    return {
        "largest_scale": given.scales[largest],
        "small": float(small.mean()),
        "large": float(large.mean()),
        "folds_with_more": int((small > large).sum()),
        "met": bool(small.mean() > large.mean()),
    }


def shown(given: Arguments, name: str, found: dict[str, Any]) -> Table:
    word = "synthetic, " if found["synthetic"] else ""
    table = Table(
        title=f"{name}: {word}{found['images']} images of {found['patients']} patients, {given.folds} folds pooled",
        caption="AUROC; differences with 95 % intervals, patients resampled together; weights: mean over folds",
    )
    singles = [f"{scale} px" for scale in given.scales]
    names = [
        "label",
        "positives",
        *singles,
        "stack",
        "equal",
        "- best here",
        "- chosen in training",
        "- equal",
        "weights",
    ]
    for column in names:
        table.add_column(column)
    cells = {(row["label"], row["scale"]): row for row in found["scales"]["rows"]}
    for row in found["rows"]:
        own = [cells[row["label"], scale] for scale in given.scales]
        table.add_row(
            row["label"],
            str(row["positives"]),
            *(f"{one['auroc']['value']:.3f}" for one in own),
            f"{row['stack']['value']:.3f}",
            f"{row['equal']['value']:.3f}",
            *(_interval(row[f"stack_minus_{arm}"]) for arm in ("oracle", "chosen", "equal")),
            " ".join(f"{one['weight']:.2f}" for one in own),
        )
    return table


def _interval(found: dict[str, Any]) -> str:
    return f"{found['value']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def work(given: Arguments) -> None:
    if not given.stores and not given.phantoms:
        raise CarinaError("nothing to measure; give stores=[STORE,...] or phantoms=N")
    out, result = (
        console(170),
        {"benchmark": "scales", "arguments": given.model_dump(exclude={"out", "work", "stores"})},
    )
    result |= {"sets": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.work or scratch)
        stores = list(given.stores)
        if given.phantoms:
            stores.append(str(draw_phantoms(given, folder / "phantoms")))
        for store in stores:
            name = Path(store).name
            found = result["sets"][name] = measure(given, store, folder)
            out.print(shown(given, name, found))
            if given.out:
                with atomic_path(Path(given.out).with_suffix("").as_posix() + f"-{name}.png") as temporary:
                    temporary.write_bytes(stack_chart(found["scales"], found["synthetic"], "png"))
            if given.phantoms and store == stores[-1]:
                size = result["size"] = follows_size(given, found)
                out.print(
                    f"weight on {size['largest_scale']} px: small lesion {size['small']:.2f}, large lesion "
                    f"{size['large']:.2f}; more for the small one in {size['folds_with_more']} of {given.folds} folds"
                )
            else:
                low = found["rows"][0]["stack_minus_oracle"]["low"]
                out.print(f"{name}: lower bound of stack minus best single scale {low:+.3f} (bar {BAR}), weights valid: "
                          f"{found['weights_valid']}")  # fmt: skip
            if given.out:
                write_json(given.out, result)


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "scales", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
