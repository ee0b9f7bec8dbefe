"""Does pretraining help? A linear probe on frozen features, pretrained and not, on patients that no pretext saw.

    python benchmarks/pretexts.py stores=FOLDER runs=FOLDER [parts=[train,table]] [arms=[moco,dino]] [steps=20]
                                  [threads=2] [resamples=10000] [out=FILE.json]

FOLDER of stores holds kermany_224, kermany, nih and nih64, made under one key with label abnormal and lungs, at scale
64, the first three at 224 as well. train: `carina pretrain` for every arm with the settings below, fixed beforehand;
finished runs are left as they are, unfinished ones are resumed. table: features of every arm that is there, the probe of
`carina finetune` on them, intervals, paired differences.

Few labels: 16 and 64 labelled patients of kermany_224 (20 and 10 draws, nested, shared by all arms), validation and test
patients together as test, one strength of the probe for all arms, fixed beforehand. NIH: five patient folds, their scores
pooled, the strength chosen by patient-grouped folds inside the training folds from one grid for all arms.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from common import console, script
from pydantic import Field
from rich.table import Table

from carina.data.batches import in_order, intensity
from carina.data.labels import ABNORMAL, to_targets
from carina.data.manifest import find_manifest, overlap
from carina.data.splits import linked_patients, patient_subset, stable_folds
from carina.data.store import Selection, select
from carina.draws import hash64
from carina.errors import CarinaError, nearest
from carina.files import atomic_path, read_json, write_json
from carina.finetune.probe import probe
from carina.finetune.recipe import ProbeSettings
from carina.metrics.intervals import Interval, difference, holm, interval
from carina.metrics.ranking import auroc
from carina.metrics.representation import rankme
from carina.metrics.resampling import Replicates, replicate
from carina.models.backbones import Backbone, load_backbone, random_backbone
from carina.models.controls import HOG_SIDE, blocks_opened, hog, resized
from carina.pretrain.pretexts import method
from carina.pretrain.run import pretrain
from carina.pretrain.verdicts import Judge
from carina.progress import Progress
from carina.recipes import Section, merge
from carina.runs import Run, environment
from carina.training.engine import pick_device

KERMANY, NIH = "kermany_224", "nih"
CORPUS = (KERMANY, "kermany", NIH, "nih64")  # of the arms from scratch; at 224 px without the last
DRAWS = {16: 20, 64: 10}  # labelled patients -> draws
STRENGTH = 0.01  # of the probe with few labels, fixed beforehand
OTHER_STRENGTHS = (1e-4, 1e-3, 1e-1, 1.0)  # how far the figures hang on it; looked at afterwards, exploratory
GRID = (1e-4, 1e-3, 1e-2, 1e-1)  # of the probe with many labels
FOLDS = 5
MIN_POSITIVES = 50
RANDOM_SEEDS = 5
RANK_ROWS = 1024  # training images whose features tell the rank
VIEWS = ("", "AP", "PA")
HEADLINE = ("kermany 16", "kermany 64", "nih abnormal", "nih abnormal AP", "nih abnormal PA")
SEEN = {"kermany test seen": KERMANY, "nih seen": NIH}  # share of the scored images that a corpus held, unlabelled
CPU = "cpu_minutes"  # in the run's environment.json
PRIMARY = ("imagenet_moco_anatpaste", "imagenet", "kermany 16")  # the one contrast that is not exploratory

SCRATCH = {
    "scales": [64],
    "architecture": "resnet18",
    "steps": 500,
    "batch_size": 64,
    "optim": {"name": "sgd", "lr": 0.06, "lr_rule": "fixed", "weight_decay": 5e-4, "warmup": 0.05},
}
ADAMW = {"name": "adamw", "lr": 1e-3, "lr_rule": "fixed", "weight_decay": 0.05, "warmup": 0.1, "clip": 3.0}
CONTINUED = {
    "scales": [224],
    "init": "imagenet-lite0",
    "steps": 150,
    "batch_size": 32,
    "precision": "no",  # depthwise convolutions gain nothing from bf16 on the CPU
    "optim": {"name": "adamw", "lr": 1e-4, "lr_rule": "fixed", "weight_decay": 0.05, "warmup": 0.1, "clip": 1.0},
}
MOCO_ANATPASTE = {"moco": {"weight": 1.0}, "anatpaste": {"weight": 0.5}}
CROPS = {"global_area": [0.4, 1.0], "local_area": [0.1, 0.4], "locals": 2, "local_size": 0.5}
DINO = {"prototypes": 1024, "hidden": 512, "bottleneck": 128, "momentum": 0.99, "crops": CROPS}
SWAV = {"prototypes": 128, "queue": 512, "crops": CROPS}


@dataclass(frozen=True)
class Arm:
    """A row of the table. pixels: side of what is read and of what enters the network. recipe: what differs from the
    default of `carina pretrain`; None where nothing is trained. start: the arm with the same weights before training."""

    name: str
    title: str
    pixels: int
    recipe: dict[str, Any] | None = None
    start: str | None = None


def _scratch(name: str, title: str, pretexts: dict[str, Any], **over: Any) -> Arm:
    return Arm(name, title, 64, merge(SCRATCH, {"pretexts": pretexts, **over}), "random")


ARMS = (
    Arm("hog", "HOG", 224),
    Arm("random", "ResNet-18, random weights", 64),
    Arm("opened", "ResNet-18, random weights, blocks opened", 64),
    _scratch("moco", "ResNet-18, MoCo", {"moco": {"weight": 1.0}}),
    _scratch("moco_anatpaste", "ResNet-18, MoCo + AnatPaste", MOCO_ANATPASTE),
    _scratch("dino", "ResNet-18, DINO", {"dino": {"weight": 1.0, **DINO}}, optim=ADAMW),
    _scratch("swav", "ResNet-18, SwAV", {"swav": {"weight": 1.0, **SWAV}}, optim=ADAMW),
    _scratch("simmim", "ResNet-18, SimMIM", {"simmim": {"weight": 1.0}}, optim=ADAMW),
    Arm("imagenet", "EfficientNet-Lite0, ImageNet", 224),
    Arm(
        "imagenet_moco_anatpaste",
        "EfficientNet-Lite0, ImageNet, continued with MoCo + AnatPaste",
        224,
        merge(CONTINUED, {"pretexts": MOCO_ANATPASTE}),
        "imagenet",
    ),
)


class Arguments(Section):
    stores: Annotated[str, Field(min_length=1)]
    runs: Annotated[str, Field(min_length=1)]
    parts: list[Literal["train", "table"]]
    arms: list[str] | None
    steps: Annotated[int, Field(ge=1)] | None
    threads: Annotated[int, Field(ge=1)] | None
    resamples: Annotated[int, Field(ge=100)]
    seed: int
    out: str | None


DEFAULTS = {
    "parts": ["train", "table"],
    "arms": None,  # null: all
    "steps": None,  # instead of an arm's own, to try the script out
    "threads": None,
    "resamples": 10_000,
    "seed": 0,
    "out": None,
}


# --- training -----------------------------------------------------------------------------------------------------


def corpus_of(arm: Arm, stores: Path) -> list[str]:
    return [str(stores / name) for name in (CORPUS if arm.pixels == 64 else CORPUS[:3])]


def train(arm: Arm, given: Arguments) -> None:
    """`carina pretrain` for one arm; nothing where its backbone is there already."""
    out = Path(given.runs) / arm.name
    if arm.recipe is None or finished(out):
        return
    steps = given.steps or arm.recipe["steps"]
    fixed = {
        "store": corpus_of(arm, Path(given.stores)),
        "out": str(out),
        "epochs": None,
        "steps": steps,
        "threads": given.threads,
        "seed": given.seed,
        "checkpoint_every": 100,
        "keep_checkpoints": 1,
        "wandb": "off",
    }
    resume = (out / "recipe.yaml").is_file()
    began, spent = time.process_time(), Run.open(out).environment().get(CPU, 0.0) if resume else 0.0
    try:
        pretrain("default", merge(arm.recipe, fixed), resume=resume)
    finally:  # seconds of a clock hang on what else the machine does, so those of the processor are kept beside them
        if (out / "environment.json").is_file():
            Run.open(out).note_environment(**{CPU: round(spent + (time.process_time() - began) / 60, 2)})


def finished(run: Path) -> bool:
    return (run / "backbone" / "config.json").is_file()


# --- features -----------------------------------------------------------------------------------------------------


def cached(folder: Path, key: Sequence[object], make: Callable[[], np.ndarray]) -> np.ndarray:
    path = folder / f"{hash64('pretexts', *key):016x}.npy"
    if not path.is_file():
        with atomic_path(path) as temporary, open(temporary, "wb") as handle:
            np.save(handle, make(), allow_pickle=False)
    return np.load(path, allow_pickle=False)


def fingerprint(backbone: Backbone) -> int:
    weights = {name: value.numpy().tobytes() for name, value in backbone.network.state_dict().items()}
    return hash64(backbone.spec, *(hash64(name, hash64(value.hex())) for name, value in weights.items()))


def networks(arm: Arm, given: Arguments) -> list[Backbone]:
    """The arm's frozen networks: one a seed where nothing is trained and seeds cost nothing."""
    if arm.name in ("random", "opened"):
        corpus = select(corpus_of(arm, Path(given.stores)), rows="train", scales=[arm.pixels])
        mean, std = intensity(corpus, arm.pixels)  # as carina pretrain begins
        seeds = range(given.seed, given.seed + RANDOM_SEEDS)
        found = [random_backbone(SCRATCH["architecture"], arm.pixels, seed, mean, std) for seed in seeds]
        return [blocks_opened(backbone) for backbone in found] if arm.name == "opened" else found
    reference = "imagenet-lite0" if arm.recipe is None else str(Path(given.runs) / arm.name)
    return [load_backbone(reference, size=arm.pixels)]


def feature_sets(arm: Arm, given: Arguments, selection: Selection) -> list[np.ndarray]:
    """Frozen features (N, D) of every image, one array a network."""
    folder = Path(given.runs) / "features"
    folder.mkdir(parents=True, exist_ok=True)
    if arm.name == "hog":
        return [cached(folder, ("hog", *selection.hashes), partial(extract_hog, selection, arm.pixels))]
    return [
        cached(folder, (fingerprint(network), *selection.hashes), partial(extract, network, selection, arm.pixels))
        for network in networks(arm, given)
    ]


def extract_hog(selection: Selection, scale: int) -> np.ndarray:
    chunks = np.array_split(np.arange(len(selection)), max(1, len(selection) // 256))
    return np.concatenate([hog(resized(selection.images(rows, scale), HOG_SIDE)) for rows in chunks])


@torch.no_grad()
def extract(backbone: Backbone, selection: Selection, scale: int) -> np.ndarray:
    device = pick_device()
    backbone = backbone.to(device).eval()
    parts = []
    with Progress("features", len(selection), unit="images") as progress:
        for _, images in in_order(selection, scale, device, batch_size=64):
            parts.append(backbone.features(images).float().cpu().numpy())
            progress.advance(len(images))
    return np.concatenate(parts)


# --- the two tests ------------------------------------------------------------------------------------------------


def _probed(
    train_x: np.ndarray, target: np.ndarray, patients: list[str], test_x: np.ndarray, strengths: Sequence[float]
) -> np.ndarray:
    settings = ProbeSettings(strengths=list(strengths), folds=3)
    weight, bias, _, _ = probe(train_x, target[:, None], patients, [ABNORMAL], settings, seed=0)
    return test_x.astype(np.float64) @ weight[0] + bias[0]


class FewLabels:
    """kermany_224: the probe of some labelled training patients, scored on validation and test patients."""

    def __init__(self, selection: Selection):
        self.selection = selection
        split = selection.table["split"]
        self.train, self.test = (split == "train").to_numpy(), split.isin(["val", "test"]).to_numpy()
        self.target = to_targets(selection.targets([ABNORMAL]))[:, 0]
        self.patients = selection.table["patient_id"].to_numpy()

    def scores(self, sets: list[np.ndarray], count: int, strength: float = STRENGTH) -> np.ndarray:
        """(draws, n): draw i is probed on the features of network i modulo their number."""
        rows, scores = np.flatnonzero(self.train), []
        for draw in range(DRAWS[count]):
            mine = rows[patient_subset(self.patients[rows].tolist(), count, draw)]
            features = sets[draw % len(sets)]
            own = self.patients[mine].tolist()
            scores.append(_probed(features[mine], self.target[mine], own, features[self.test], [strength]))
        return np.stack(scores)


class PatientFolds:
    """nih_cxr14: every row is scored by a probe of the other folds' patients."""

    def __init__(self, selection: Selection):
        self.selection = selection
        positives = {label: int((selection.targets([label]) == 1).sum()) for label in selection.labels}
        apart = ("No_Finding", ABNORMAL)
        self.labels = [ABNORMAL, *(k for k, v in positives.items() if v >= MIN_POSITIVES and k not in apart)]
        self.folds = stable_folds(linked_patients(selection.table).tolist(), FOLDS)
        self.patients = selection.table["patient_id"].to_numpy()
        self.views = selection.table["view"].to_numpy()

    def scores(self, sets: list[np.ndarray], label: str) -> np.ndarray:
        """(networks, N)."""
        target = to_targets(self.selection.targets([label]))[:, 0]
        result = np.full((len(sets), len(target)), np.nan)
        for line, features in zip(result, sets):
            for fold in range(FOLDS):
                rest, own = self.folds != fold, self.folds == fold
                line[own] = _probed(features[rest], target[rest], self.patients[rest].tolist(), features[own], GRID)
        return result


@dataclass(frozen=True)
class Test:
    """A column of the table: targets (n,) and patients (n,) of the rows that are scored. scores: features of every
    network -> (k, n), k draws or networks. key: the store, and what else they hang on beside the features."""

    name: str
    target: np.ndarray
    patients: np.ndarray
    rows: np.ndarray | slice
    scores: Callable[[list[np.ndarray]], np.ndarray]
    key: tuple[object, ...]


def tests(few: FewLabels, nih: PatientFolds) -> list[Test]:
    found = []
    target, patients = few.target[few.test], few.patients[few.test]
    for count in DRAWS:
        key = (KERMANY, count, DRAWS[count], STRENGTH)
        scores = partial(few.scores, count=count)
        found.append(Test(f"kermany {count}", target, patients, slice(None), scores, key))
    for label in nih.labels:
        target = to_targets(nih.selection.targets([label]))[:, 0]
        for view in VIEWS:
            rows = nih.views == view if view else np.ones(len(target), dtype=bool)
            scores, key = partial(nih.scores, label=label), (NIH, label, FOLDS, GRID)
            name = f"nih {label} {view}".strip()
            found.append(Test(name, target[rows], nih.patients[rows], rows, scores, key))
    return found


# --- the table ----------------------------------------------------------------------------------------------------


def about(arm: Arm, given: Arguments, few: FewLabels, nih: PatientFolds) -> dict[str, Any]:
    """What was trained, on what, for how long, and whether the test images were in the corpus."""
    if arm.recipe is None:
        return {"trained": None, "seen": "no radiograph"}
    run = Run.open(Path(given.runs) / arm.name)
    facts, record, lines = run.environment(), read_json(run.folder / "backbone" / "carina.json"), run.metrics()
    recipe = run.recipe()
    quarter = max(1, len(lines) // 4)
    manifest, shares = find_manifest(str(run.folder)), {}
    for name, scored in ((KERMANY, few.selection.where(few.test)), (NIH, nih.selection)):
        found = overlap(manifest, scored)["stages"]["pretrain"]
        shares[name] = {**found, "share": round(found["images_of_those"] / len(scored), 4)}
    return {
        "trained": {
            "pretexts": record["pretexts"],
            "optim": recipe["optim"],
            "init": record["init"],
            "batch_size": recipe["batch_size"],
            "steps": facts["steps"],
            "seeds": 1,
            "corpus_images": record["data"]["images"],
            "epochs": round(facts["images_seen"] / record["data"]["images"], 1),
            "minutes": round(60 * facts["hours"], 1),
            "cpu_minutes": facts[CPU],
            "precision": facts["precision"],
            "loss_first_quarter": round(float(np.mean([line["loss"] for line in lines[:quarter]])), 4),
            "loss_last_quarter": round(float(np.mean([line["loss"] for line in lines[-quarter:]])), 4),
            "verdict": collapse(recipe, lines),
            "labels_used": record["labels_used"],
            "pretext_saw": record["pretext_saw"],
        },
        "seen": shares,
    }


def collapse(recipe: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    """`healthy`, or what carina's observer finds in the curves of a finished run."""
    names = [name for name, settings in recipe["pretexts"].items() if settings["weight"] > 0]
    warm = round(recipe["optim"]["warmup"] * len(lines))
    judge = Judge({name: method(name) for name in names}, warm, {})
    for line in lines:
        judge.add(line)
    return ", ".join(judge.findings()) or "healthy"


class Measured:
    """One arm on every test. sets: by store the features of each network."""

    def __init__(self, arm: Arm, given: Arguments, few: FewLabels, nih: PatientFolds, every: Sequence[Test]):
        self.arm, self.few = arm, few
        self.facts = about(arm, given, few, nih)
        self.sets = {name: feature_sets(arm, given, test.selection) for name, test in ((KERMANY, few), (NIH, nih))}
        folder = Path(given.runs) / "features"
        self.replicates: dict[str, Replicates] = {}
        for test in every:
            sets = self.sets[test.key[0]]
            marks = [hash64(features.tobytes().hex()) for features in sets]
            scores = cached(folder, ("scores", *marks, *test.key), partial(test.scores, sets))[:, test.rows]
            self.replicates[test.name] = replicate(
                test.target[:, None], scores[:, :, None], test.patients, "auroc", given.resamples, given.seed
            )

    def row(self) -> dict[str, Any]:
        features = [sets[self.few.train][:RANK_ROWS] for sets in self.sets[KERMANY]]
        return {
            "arm": self.arm.name,
            "title": self.arm.title,
            "pixels": self.arm.pixels,
            "networks": len(features),
            "dimension": features[0].shape[1],
            "rankme": round(float(np.mean([rankme(values) for values in features])), 1),
            **self.facts,
            "auroc": {name: brief(interval(found, 0)) for name, found in self.replicates.items()},
            "by_strength": self.by_strength(),
        }

    def by_strength(self) -> dict[str, float]:
        """Mean AUROC with 16 patients at other strengths of the probe."""
        target = self.few.target[self.few.test]
        values = {}
        for strength in OTHER_STRENGTHS:
            scores = self.few.scores(self.sets[KERMANY], min(DRAWS), strength)
            values[f"{strength:g}"] = round(float(np.mean([auroc(target, line) for line in scores])), 4)
        return values


def brief(found: Interval) -> dict[str, Any]:
    """What a table needs of an interval; counts stand once beside the data."""
    values = found.to_dict()
    kept = {name: round(values[name], 4) for name in ("value", "low", "high")}
    return kept if found.estimable else {**kept, "not_estimable": found.reason}


def contrasts(measured: dict[str, Measured], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Paired differences of every trained arm: from every untrained one on the headline tests, from the weights that it
    began with on NIH's single labels too. All but the primary one are corrected together by Holm's method."""
    found = []
    for name, arm in measured.items():
        for other, control in measured.items():
            if arm.arm.recipe is None or control.arm.recipe is not None:
                continue
            for test in (*HEADLINE, *(f"nih {label}" for label in labels if other == arm.arm.start)):
                value = difference(arm.replicates[test], control.replicates[test], 0)
                found.append({"arm": name, "minus": other, "test": test, **brief(value), "p": round(value.p_value, 5)})
    rest = [line for line in found if (line["arm"], line["minus"], line["test"]) != PRIMARY]
    for line, corrected in zip(rest, holm(np.array([line["p"] for line in rest], dtype=np.float64))):
        line["p_holm"] = round(float(corrected), 5)
    return found


def verdicts(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The two questions asked beforehand, answered by intervals; the second line holds methods to the stronger control."""
    first = f"kermany {min(DRAWS)}"

    def above(control: str) -> list[str]:
        mine = [line for line in lines if line["minus"] == control and line["test"] == first]
        return [line["arm"] for line in mine if line["arm"] != PRIMARY[0] and line["low"] > 0]

    primary = next((line for line in lines if (line["arm"], line["minus"], line["test"]) == PRIMARY), None)
    return {
        "better_than_random_at_16": above("random"),
        "better_than_opened_at_16": above("opened"),
        "two_or_more_better_than_random": len(above("random")) >= 2,
        "continued_does_not_lose": None if primary is None else primary["high"] >= 0,
    }


def table(given: Arguments, arms: Sequence[Arm]) -> dict[str, Any]:
    stores = Path(given.stores)
    few = FewLabels(select(stores / KERMANY, scales=[64, 224]))
    nih = PatientFolds(select(stores / NIH, scales=[64, 224]))
    every, measured = tests(few, nih), {}
    present = [arm for arm in arms if arm.recipe is None or finished(Path(given.runs) / arm.name)]
    with Progress("arms", len(present), unit="arms") as progress:
        for arm in present:
            measured[arm.name] = Measured(arm, given, few, nih, every)
            progress.advance(note=arm.name)
    lines = contrasts(measured, [label for label in nih.labels if label != ABNORMAL])
    return {
        "benchmark": "pretexts",
        "settings": {
            "few_labels": {"patients_and_draws": DRAWS, "strength": STRENGTH, "test": "val + test"},
            "nih": {"folds": FOLDS, "strengths": GRID, "labels": nih.labels},
            "resamples": given.resamples,
            "primary": PRIMARY,
            "seed": given.seed,
        },
        "environment": environment(),
        "data": {
            KERMANY: {"store_hashes": few.selection.hashes, **_counts(few.target[few.test], few.patients[few.test])},
            NIH: {
                "store_hashes": nih.selection.hashes,
                **{test.name: _counts(test.target, test.patients) for test in every if test.key[0] == NIH},
            },
        },
        "rows": [arm.row() for arm in measured.values()],
        "contrasts": lines,
        "verdicts": verdicts(lines),
    }


def _counts(target: np.ndarray, patients: np.ndarray) -> dict[str, int]:
    return {"images": len(target), "patients": len(set(patients)), "positives": int((target == 1).sum())}


def _figure(value: dict[str, Any], sign: str = "") -> str:
    return f"{value['value']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def shown(result: dict[str, Any]) -> list[Table]:
    """AUROC of every arm on the headline tests, what was trained, and the paired differences."""
    figures = Table(
        title=f"AUROC of a linear probe, BCa 95 % intervals; kermany: labels of {' and '.join(map(str, DRAWS))} patients",
        caption="nih: labels of four of five folds; no arm's pretext used labels",
        title_justify="left",
        caption_justify="left",
    )
    trained = Table(title="what was trained (one seed)", title_justify="left")
    paired = Table(title="paired differences, percentile 95 % intervals", title_justify="left")
    for head in ("arm", "pixels", *HEADLINE):
        figures.add_column(head)
    for head in ("arm", "images", "epochs", "CPU minutes", "loss, quarters 1 and 4", "verdict", "RankMe", *SEEN):
        trained.add_column(head)
    for head in ("arm", "minus", *HEADLINE):
        paired.add_column(head)
    for row in result["rows"]:
        figures.add_row(row["title"], str(row["pixels"]), *(_figure(row["auroc"][test]) for test in HEADLINE))
        facts = row["trained"]
        if facts is None:
            continue
        loss = f"{facts['loss_first_quarter']:.3f}, {facts['loss_last_quarter']:.3f}"
        cells = [facts["corpus_images"], facts["epochs"], facts[CPU], loss, facts["verdict"], row["rankme"]]
        trained.add_row(row["arm"], *map(str, cells), *(f"{row['seen'][name]['share']:.0%}" for name in SEEN.values()))
    for arm, other in dict.fromkeys((line["arm"], line["minus"]) for line in result["contrasts"]):
        mine = {line["test"]: line for line in result["contrasts"] if (line["arm"], line["minus"]) == (arm, other)}
        paired.add_row(arm, other, *(_figure(mine[test], "+") for test in HEADLINE))
    return [figures, trained, paired]


def work(given: Arguments) -> None:
    names = [arm.name for arm in ARMS]
    for name in given.arms or ():
        if name not in names:
            raise CarinaError(f"there is no arm '{name}'{nearest(name, names)}; it is one of {', '.join(names)}")
    arms = [arm for arm in ARMS if given.arms is None or arm.name in given.arms]
    if given.threads:
        torch.set_num_threads(given.threads)
    if "train" in given.parts:
        for arm in arms:
            train(arm, given)
    if "table" not in given.parts:
        return
    result = table(given, arms)
    if given.out:
        write_json(given.out, result)
    out = console(220)
    for part in shown(result):
        out.print(part)
    for question, answer in result["verdicts"].items():
        out.print(f"{question}: {answer}")


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "pretexts", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
