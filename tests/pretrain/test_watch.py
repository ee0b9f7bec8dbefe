"""Observers: they change nothing, tell what is there, and accuse the sick and not the healthy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from carina.data.store import select
from carina.errors import CarinaError
from carina.metrics.representation import knn_scores, rankme
from carina.pretrain.recipe import PretrainRecipe
from carina.pretrain.run import build_task, pretrain
from carina.pretrain.verdicts import Judge
from carina.pretrain.watch import Watch, still
from carina.recipes import build, merge
from carina.runs import Run
from carina.training.engine import Engine, resolved

SMALL = {"threads": 1, "batch_size": 16, "scales": [32], "wandb": "off", "precision": "no", "watch": {"images": 16}}


def set_up(store, folder, name="debug/byol", **over):
    """What `pretrain` puts together for a new run: the engine, the run and its watch."""
    recipe = build("pretrain", PretrainRecipe, name, merge({**SMALL, "store": str(store), "steps": 4}, over))
    recipe = resolved(recipe, None, False)
    corpus = select(recipe.store, rows=recipe.rows, where=recipe.where, scales=recipe.scales)
    engine = Engine(build_task(recipe, corpus, 1), corpus, recipe, scales=recipe.scales, quiet=True)
    run = Run.start(folder, "pretrain", recipe, quiet=True)
    return engine, run, Watch(recipe.watch, recipe, corpus, engine.task, run, engine.device, engine.plan.steps)


REST = {
    "rows": "all",
    "where": "split != 'train'",
    "batch_size": 8,
}  # a corpus that leaves the larger part to be watched


def said(folder: Path) -> str:
    return (folder / "log.txt").read_text(encoding="utf-8")


def verdicts(folder: Path) -> list[tuple[int, str]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["watch.verdict"]) for row in rows if "watch.verdict" in row]


# -- it changes nothing -------------------------------------------------------------------------------------------------


def test_watching_changes_no_bit_of_a_run_and_no_mode_of_a_module(phantom_store, tmp_path):
    states, looks = [], 0
    for observed in (False, True):
        engine, run, watch = set_up(phantom_store, tmp_path / str(observed), watch={"every": 1, "pictures": observed})
        task = engine.task
        odd = next(m for m in task.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
        if observed:
            watch.start()

        def observe(step, means, watch=watch, task=task, odd=odd, observed=observed):
            nonlocal looks
            odd.eval()  # one part in another mode than the rest
            modes, noise = [m.training for m in task.modules()], torch.get_rng_state()
            seen = watch(step, means) if observed else {}
            looks += "watch.rankme" in seen
            assert [m.training for m in task.modules()] == modes and not odd.training and task.backbone.training
            assert torch.equal(torch.get_rng_state(), noise)
            return seen

        engine.fit(run, observe=observe)
        states.append(task.state_dict())
    assert looks == 4
    facts, last = watch.finish(), run.metrics()[-1]
    assert facts["verdict"] == last["watch.verdict"] == "healthy" and facts["ever"] == []
    assert facts["rankme"] == last["watch.rankme"] and "at the end healthy, RankMe" in said(run.folder)
    with Image.open(run.folder / "watch.png") as curves:
        assert curves.width > 2 * curves.height
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_a_run_that_goes_on_knows_what_was_before(phantom_store, tmp_path):
    engine, run, watch = set_up(phantom_store, tmp_path / "run", steps=6, watch={"every": 2})
    engine.fit(run, observe=watch)
    _, other, late = set_up(phantom_store, tmp_path / "other", steps=6, watch={"every": 2})
    rows = run.metrics()
    for row in rows[:4]:
        other.metric(row)
    for row in rows[4:]:
        late(row["step"], {name: value for name, value in row.items() if not name.startswith("watch.")})
    assert late.judge.steps == watch.judge.steps == 6 and late.judge.before.keys() == watch.judge.before.keys()
    for name in ("loss", "byol.spread"):
        assert list(late.judge.curves[name].recent) == list(watch.judge.curves[name].recent)


# -- it tells what is there ---------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_network_that_is_exported(phantom_store, tmp_path):
    engine, _, watch = set_up(phantom_store, tmp_path / "run", export="teacher")
    with torch.no_grad():
        for parameter in engine.task.backbone.parameters():
            parameter.mul_(2)
    teacher, images = engine.task.exported("teacher"), watch.sample.images(range(16), 32)
    with still(teacher):
        features = teacher(torch.from_numpy(images)[:, None] / 255).numpy()
    figures = watch.figures()
    assert figures["watch.rankme"] == pytest.approx(rankme(features), abs=1e-4)
    assert figures["watch.weights"] == pytest.approx(2, abs=1e-4), "of the network that is trained"
    assert all(figures[name] == watch.judge.before[name] for name in ("watch.rankme", "watch.deviation"))
    assert not any(name.endswith("auroc") for name in figures)


def test_labelled_figures_are_macro_averages_over_patients_of_their_own(phantom_store, tmp_path, monkeypatch):
    seen = select(str(phantom_store), rows="train")
    counts = {name: min((seen.table[f"label.{name}"] == kind).sum() for kind in (0, 1)) for name in seen.labels}
    enough = max(2, sorted(counts.values())[2])
    monkeypatch.setattr("carina.pretrain.watch.FEWEST", enough)
    given = {"store": str(phantom_store), "rows": "train", "neighbors": 3}
    engine, run, watch = set_up(phantom_store, tmp_path / "run", watch=given, **REST)
    watch.start()
    mine, table = watch.labelled, watch.labelled.selection.table
    assert mine.labels == [name for name in counts if counts[name] >= enough]
    assert mine.left_out == [name for name in counts if counts[name] < enough]
    if mine.left_out:
        assert f"{len(mine.left_out)} labels are too rare there: {', '.join(mine.left_out)}" in said(run.folder)
    with still(engine.task):
        features = engine.task.backbone(torch.from_numpy(mine.selection.images(range(len(table)), 32))[:, None] / 255)
    features, targets = features.double().numpy(), mine.targets
    probe = np.full(targets.shape, np.nan)
    for fold in range(3):
        out = mine.folds == fold
        assert not set(table["patient_id"][out]) & set(table["patient_id"][~out])
        for column in range(targets.shape[1]):
            if len(set(targets[~out, column])) == 2:
                model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
                model.fit(features[~out], targets[~out, column])
                probe[out, column] = model.decision_function(features[out])
    votes = knn_scores(features, targets, table["patient_id"].to_numpy(), 3)
    figures = watch.figures()
    for name, scores in (("knn", votes), ("probe", probe)):
        known = ~np.isnan(scores)
        oracle = [roc_auc_score(t[k], s[k]) for t, s, k in zip(targets.T, scores.T, known.T)]
        assert figures[f"watch.{name}_auroc"] == pytest.approx(np.mean(oracle), abs=1e-6)


def test_a_limit_on_labelled_images_takes_whole_patients(phantom_store, tmp_path, monkeypatch):
    monkeypatch.setattr("carina.pretrain.watch.FEWEST", 2)
    given = {"store": str(phantom_store), "rows": "train"}
    _, _, watch = set_up(phantom_store, tmp_path / "all", watch=given, **REST)
    every = watch.labelled.selection.table["patient_id"].value_counts()
    monkeypatch.setattr(watch.settings, "labelled", int(every.sum()) - 1)
    few = type(watch.labelled)(watch.settings, watch.corpus, 32, 0).selection.table["patient_id"].value_counts()
    assert 0 < len(few) < len(every) and all(every[patient] == count for patient, count in few.items())


def test_a_watched_store_that_cannot_serve_is_refused_in_a_sentence(phantom_store, tmp_path):
    for number, (given, words) in enumerate(
        (
            ({"rows": "all"}, r"\d+ patients of watch.store=.* are in the corpus too; .*watch.rows=val"),
            ({"rows": "val"}, "none of .* has 20 images with and 20 without it"),
            ({"rows": "val", "labels": ["Opacty"]}, "no label 'Opacty'"),
        )
    ):
        with pytest.raises(CarinaError, match=words):
            set_up(phantom_store, tmp_path / str(number), watch={"store": str(phantom_store), **given})
    for key, value, words in (("key_check", "else", "another key"), ("geometry", {"fit": "crop"}, "geometry")):
        other = tmp_path / key
        shutil.copytree(phantom_store, other)
        info = json.loads((other / "store.json").read_text())
        (other / "store.json").write_text(json.dumps({**info, key: value}))
        with pytest.raises(CarinaError, match=words):
            set_up(phantom_store, tmp_path / f"run {key}", watch={"store": str(other), "rows": "val"})


def test_pictures_and_sentences_of_a_run(phantom_store, tmp_path):
    """A row of views for every scale and method, with and without masks; a test split that is watched is told."""
    two = {"moco": {"weight": 1.0, "queue": 32}, "anatpaste": {"weight": 1.0}}
    engine, run, watch = set_up(phantom_store, tmp_path / "run", "debug/moco", scales=[32, 64], pretexts=two)
    watch.start()
    with Image.open(run.folder / "views.png") as sheet:
        rows = np.asarray(sheet)
    assert rows.shape == (2 * (1 + 2 + 2) * 96, 190 + 6 * 96)
    tiles = rows[:, 190:].reshape(10, 96, 6, 96).swapaxes(1, 2)
    assert (tiles[:, :, 2:-2, 2:-2].std(axis=(2, 3)) > 5).all(), "a picture in every place"
    for name, pretext in engine.task.pretexts.items():
        assert f"{name}: a healthy curve: {pretext.healthy}." in said(run.folder)
    assert "before training RankMe" in said(run.folder)


def test_without_the_whole_network_only_the_losses_are_watched(phantom_store, tmp_path):
    _, run, watch = set_up(phantom_store, tmp_path / "run", watch={"every": 1})
    recipe = watch.recipe.model_copy(update={"parallel": "fsdp"})
    sharded = Watch(recipe.watch, recipe, watch.corpus, watch.task, run, watch.device, 4)
    sharded.start()
    assert "with parallel=fsdp only losses" in said(run.folder)
    assert sharded(0, {"loss": 1.0, "byol.loss": 1.0, "byol.spread": 0.8}) == {"watch.verdict": "healthy"}


# -- it accuses the sick and not the healthy ----------------------------------------------------------------------------


class Method:
    remedy = "the remedy"


def judged(steps=160, before=20.0, **curves):
    """Kinds of fault, and when each was found, of curves given as functions of the step from 0 to 1."""
    judge, found, noise = Judge({"m": Method()}, steps // 20, {"watch.rankme": before}), {}, np.random.default_rng(0)
    for step in range(steps):
        values = {name.replace("m_", "m.").replace("watch_", "watch."): c(step / steps) for name, c in curves.items()}
        values = {name: value * (1 + 0.01 * noise.normal()) for name, value in values.items()}
        if step % 10:
            values = {name: value for name, value in values.items() if not name.startswith("watch.")}
        judge.add(values | {"loss": values.get("m.loss", 1.0)})
        for kind, words in judge.findings().items():
            assert "the remedy" in words
            found.setdefault(kind, step)
    return found


def falling(x):
    return 4 - x


def high(x):
    return 0.9


HEALTHY = {
    "a queue that fills": {
        "m_loss": lambda x: 1.5 + 9 * min(1, 8 * x) - x,
        "m_spread": lambda x: 0.56 - 1.3 * x if x < 0.25 else 0.3 + x / 2,
    },
    "slow": {"m_loss": lambda x: 8 - 0.4 * x, "m_information": lambda x: 0.2 if x < 0.1 else 0.01 + 0.02 * x},
    "solved well": {"m_loss": lambda x: 4 * np.exp(-6 * x), "m_spread": high},
    "two classes": {"m_loss": lambda x: 0.7 - 0.5 * x, "watch_rankme": lambda x: 20 * np.exp(-5 * x) + 1},
    "a transformer": {"m_loss": falling, "m_spread": high, "watch_rankme": lambda x: 13 * np.exp(-9 * x) + 2.6},
    "steeper": {"m_loss": falling, "grad_norm": lambda x: 0.01 + 5 * x, "watch_weights": lambda x: 1 + x},
}
SICK = {
    "collapsed": {"m_loss": lambda x: 2 * np.exp(-40 * x), "m_spread": lambda x: 0.17 + 0.6 * np.exp(-30 * x)},
    "one assignment": {"m_loss": falling, "m_information": lambda x: 0.2 * np.exp(-30 * x)},
    "no learning": {"m_loss": lambda x: 6.24},
    "few dimensions": {"m_loss": falling, "m_spread": high, "watch_rankme": lambda x: 1 + 19 * np.exp(-9 * x)},
    "diverged": {"m_loss": lambda x: 1 + 100 * x**2},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_curves_are_not_accused(name):
    assert judged(**HEALTHY[name]) == {}


@pytest.mark.parametrize("kind", SICK)
def test_each_fault_is_told_and_no_other(kind):
    assert set(judged(**SICK[kind])) == {kind}


def test_weights_that_were_blown_up_and_gradients_that_explode_are_divergence():
    blown = {"m_loss": lambda x: 4 - x, "watch_weights": lambda x: 16 if x < 0.3 else 2}
    steep = {"m_loss": lambda x: 1 + x, "grad_norm": lambda x: 1 + 1000 * x**2}
    assert set(judged(**blown)) == set(judged(**steep)) == {"diverged"}
    assert judged(steps=4000, m_loss=lambda x: 4 - x, watch_weights=lambda x: 1 + 9 * x) == {}, "a long run may grow"


BROKEN = {  # kind -> recipe and what is wrong with it
    "collapsed": ("debug/byol", {"pretexts": {"byol": {"predictor": False}}}),
    "one assignment": ("debug/swav", {"pretexts": {"swav": {"temperature": 10.0}}}),
    "no learning": ("debug/simclr", {"pretexts": {"simclr": {"temperature": 100.0}}}),
    "diverged": ("debug/simclr", {"optim": {"lr": 100.0}}),
}
FAIR = ("debug/byol", "debug/simclr", "debug/moco")


def run_of(store, folder, name, **over):
    given = merge({**SMALL, "store": str(store), "out": str(folder), "watch": {"every": 50, "pictures": False}}, over)
    pretrain(name, given, quiet=True)
    return folder


def test_a_huge_rate_is_told_through_the_log_once_and_a_healthy_run_is_not_accused(phantom_store, tmp_path):
    name, wrong = BROKEN["diverged"]
    folder = run_of(phantom_store, tmp_path / "sick", name, steps=30, **wrong)
    assert verdicts(folder)[-1][1].split(", ")[-1] == "diverged" and verdicts(folder)[0][0] <= 24
    assert said(folder).count(", diverged: the weights had grown to") == 1 and "lower optim.lr" in said(folder)
    folder = run_of(phantom_store, tmp_path / "fair", name, steps=30)
    assert {verdict for _, verdict in verdicts(folder)} == {"healthy"} and ", diverged: " not in said(folder)


def test_without_its_predictor_byol_is_told_to_collapse(phantom_store, tmp_path):
    name, wrong = BROKEN["collapsed"]
    folder = run_of(phantom_store, tmp_path / "sick", name, steps=120, **wrong)
    assert verdicts(folder)[-1] == (119, "collapsed")
    assert "keep pretexts.byol.predictor=true" in said(folder)


@pytest.fixture(scope="module")
def real_store(real_data, tmp_path_factory):
    from carina.intake.prepare import prepare

    out = tmp_path_factory.mktemp("kermany") / "store"
    columns = {"patient": "patient_id", "split": "suggested_split", "labels": ["abnormal"], "view": "view"}
    given = {"out": str(out), "scales": [64], "workers": 1, "lungs": False, "duplicates": False, **columns}
    prepare(str(real_data / "kermany_224" / "labels.csv"), given, quiet=True)
    return out


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", [*BROKEN, "healthy"])
def test_on_radiographs_collapse_is_told_within_200_steps_and_healthy_runs_are_not_accused(
    real_store, tmp_path, kind, seed
):
    common = {"scales": [64], "batch_size": 32, "steps": 200, "seed": seed, "watch": {"images": 128}}
    if kind == "healthy":
        name = FAIR[seed]
        folder = run_of(real_store, tmp_path / "run", name, **common)
        assert {verdict for _, verdict in verdicts(folder)} == {"healthy"}, name
    else:
        name, wrong = BROKEN[kind]
        folder = run_of(real_store, tmp_path / "run", name, **merge(common, wrong))
        assert kind in verdicts(folder)[-1][1].split(", ")
