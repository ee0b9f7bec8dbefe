"""Anomaly detection: every mistake is a sentence, and what selects or thresholds never saw a label."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from carina.data.store import select
from carina.draws import hash64
from carina.errors import CarinaError
from carina.evaluate.score import evaluate, score_selection
from carina.files import read_json
from carina.finetune.anomaly import (
    aucp,
    collect,
    contaminated,
    cross_fitted_distances,
    distances,
    fit_scorer,
    kept_from_training,
)
from carina.finetune.run import finetune
from carina.intake.prepare import prepare
from carina.models.backbones import random_backbone
from carina.models.checkpoints import save_tensors
from carina.models.predictor import load_predictor
from carina.models.scorers import SCORERS, ScorerSettings
from carina.recipes import merge, read_recipe, validate

ROOT = Path(__file__).resolve().parents[2]
FITTED = sorted(set(SCORERS) - {"head"})


def scorer_settings(name="gaussian", **given):
    return validate(ScorerSettings, {**read_recipe("finetune", "anomaly")["scorer"], "name": name, **given}, "scorer")


def script_of(name, patch):
    """A script of benchmarks/, which imports its neighbors as it does when it is run."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    patch.syspath_prepend(ROOT / "benchmarks")
    patch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def common(phantom_store):
    return {"store": str(phantom_store), "scale": 32, "threads": 1, "wandb": "off"}


@pytest.fixture(scope="module")
def frozen(common, tmp_path_factory):
    out = tmp_path_factory.mktemp("anomaly") / "frozen"
    finetune("anomaly", {**common, "out": str(out)}, quiet=True)
    return out


@pytest.fixture(scope="module")
def chosen(common, tmp_path_factory):
    """A run of mode=full whose checkpoint was chosen by AUCp on a pool that is said to hold few abnormal images."""
    out = tmp_path_factory.mktemp("anomaly") / "chosen"
    short = {"steps": 6, "batch_size": 16, "checkpoint_every": 2, "keep_every": 2}
    selector = {"select": "aucp", "pool_rows": "val", "pool_prevalence": 0.05, "threshold_rows": None}
    finetune("anomaly", {**common, **short, **selector, "mode": "full", "out": str(out)}, quiet=True)
    return out


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Twenty-four noise images of twelve patients that nobody made lung masks for, at 32 and 48 px."""
    folder, random = tmp_path_factory.mktemp("bare"), np.random.default_rng(0)
    rows = []
    for i in range(24):
        cv2.imwrite(str(folder / f"{i}.png"), random.integers(0, 255, (64, 64)).astype(np.uint8))
        split = ("train", "train", "val", "test")[i // 2 % 4]
        rows.append({"path": f"{i}.png", "patient": f"p{i // 2}", "split": split, "abnormal": i % 2})
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    words = ["patient=patient", "split=split", "labels=[abnormal]", "scales=[32,48]", "lungs=false", "workers=1"]
    prepare(str(folder / "labels.csv"), [*words, f"out={folder / 'store'}"], quiet=True)
    return folder / "store"


# -- mistakes are sentences -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"where": "label_abnormal == 1"}, "no training row is known to be normal"),
        (
            {"where": "label_abnormal == 0", "contamination": 0.1},
            "needs .* abnormal images among the rows and there are 0",
        ),
        ({"scorer": {"components": 64}}, "scorer.components=64 is more than .* images of 512 features allow"),
        ({"scorer": {"name": "knn", "neighbors": 500}}, "scorer.neighbors=500 is more than the .* normal images"),
        ({"scorer": {"name": "head"}}, "mode=full"),
        ({"select": "aucp", "pool_rows": "val"}, "mode=frozen makes none"),
        ({"mode": "full", "select": "aucp", "pool_rows": "val"}, "give keep_every=N"),
        ({"mode": "full", "select": "aucp", "keep_every": 2}, "give pool_rows=SPLIT"),
        (
            {"mode": "full", "select": "aucp", "keep_every": 2, "pool_rows": "train"},
            "patients of split=train are trained",
        ),
        ({"mode": "full", "select": "aucp", "keep_every": 2, "pool_rows": "exam"}, "no row has split=exam"),
        ({"mode": "full", "select": "aucp", "keep_every": 2, "pool_rows": "test"}, "test"),
        ({"mode": "full", "select": "aucp", "keep_every": 2, "pool_rows": "val+test"}, "test"),
        ({"mode": "full", "region": "background"}, "region=background leaves out"),
    ],
)
def test_mistakes_are_sentences(common, tmp_path, given, said):
    with pytest.raises(CarinaError, match=said) as caught:
        # one step, should it start all the same
        finetune("anomaly", merge({**common, "steps": 1, "out": str(tmp_path / "run")}, given), quiet=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "predictor").exists()


@pytest.mark.parametrize(
    "given", [{"mode": "full"}, {"region": "lungs"}, {"region": "background"}, {"mode": "full", "region": "lungs"}]
)
def test_without_lungs_the_mend_is_named(bare, tmp_path, given):
    with pytest.raises(CarinaError, match=r"lung masks.*lungs=true"):
        finetune("anomaly", {"store": str(bare), "out": str(tmp_path), "threads": 1, **given}, quiet=True)


def test_a_predictor_of_the_lungs_is_not_fed_whole_images(common, bare, tmp_path):
    """Neither a store without masks nor images without masks: both would be scored as something else in silence."""
    finetune("anomaly", {**common, "region": "lungs", "out": str(tmp_path)}, quiet=True)
    with pytest.raises(CarinaError, match="lung masks"):
        evaluate(str(tmp_path), {"store": str(bare), "split": "test", "out": str(tmp_path / "e")}, quiet=True)
    with pytest.raises(CarinaError, match="region=lungs needs lung masks"):
        load_predictor(tmp_path).scores({32: torch.rand(2, 1, 32, 32)})


def test_a_backbone_that_diverged_is_named(common, tmp_path):
    tensors = random_backbone("resnet18", 32, 0).network.state_dict()
    tensors["conv1.weight"][0] = torch.nan
    save_tensors(tmp_path / "diverged.safetensors", tensors)
    given = {**common, "backbone": str(tmp_path / "diverged.safetensors"), "size": 32, "out": str(tmp_path / "run")}
    with pytest.raises(CarinaError, match="no finite numbers; check the backbone"):
        finetune("anomaly", given, quiet=True)


@pytest.mark.parametrize("name", FITTED)
def test_features_of_another_shape_are_refused(phantom_store, name):
    """Maps of another scale, and pooled features of another network; at the scorer's own shape all are numbers."""
    normals, settings, cpu = (
        select(phantom_store, rows="train", scales=[32]),
        scorer_settings(name),
        torch.device("cpu"),
    )
    own = random_backbone("resnet18", 32, 0)
    other = random_backbone("resnet18", 64, 0) if SCORERS[name].positions else random_backbone("lcnet_035", 32, 0)
    scorer = SCORERS[name].fit(collect(own, normals, 32, settings, "whole", cpu), settings)
    theirs = collect(other, normals, other.spec.size, settings, "whole", cpu)
    mine = collect(own, normals, 32, settings, "whole", cpu)
    with torch.no_grad():
        assert torch.isfinite(scorer([torch.from_numpy(part) for part in mine])).all()
        with pytest.raises(CarinaError, match=f"scorer {name} was fitted on features of shape .* fit it anew"):
            scorer([torch.from_numpy(part) for part in theirs])


@pytest.mark.parametrize("name", FITTED)
def test_more_features_than_images_give_numbers_that_tell_images_apart(common, tmp_path, name):
    """About thirty normals, 512 features: every scorer can be fitted, saved and read, and gives finite scores."""
    given = {"scorer": {"name": name}, "threshold_rows": None, "cross_folds": 3, "out": str(tmp_path)}
    facts = finetune("anomaly", {**common, **given}, quiet=True)
    assert np.isfinite(facts["thresholds"]["abnormal"])
    predictor = load_predictor(tmp_path)
    assert predictor.info["data"]["images"] < predictor.members[0].backbone.dimension
    scores = score_selection(predictor, select(common["store"], rows="val"))
    assert np.isfinite(scores).all() and len(np.unique(scores)) == len(scores)


@pytest.mark.parametrize(("value", "words"), [(0, "0 positive"), (1, "0 negative")])
def test_one_class_only_is_said(frozen, phantom_store, tmp_path, value, words):
    given = {"store": str(phantom_store), "split": "val+test", "resamples": 100, "examples": 0, "controls": value == 0}
    rows = {"where": f"label_abnormal == {value}", "out": str(tmp_path)}
    (row,) = evaluate(str(frozen), {**given, **rows}, quiet=True)["table"]
    assert row["auroc"]["value"] is None and row["ap"]["value"] is None and row["fpr95"] is None
    assert row["note"].startswith("one class only") and words in row["note"]
    assert "Nothing can be estimated: one class only" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_scorer_of_another_scale_is_refused(bare, phantom_store, tmp_path):
    run = tmp_path / "run"
    finetune("anomaly", {"store": str(bare), "scale": 48, "threads": 1, "out": str(run)}, quiet=True)
    with pytest.raises(CarinaError, match="holds scale 32, 64, not 48; choose one of them or prepare"):
        evaluate(str(run), {"store": str(phantom_store), "split": "test"}, quiet=True)


# -- thresholds and selection that see no label -----------------------------------------------------------------------


def oracle_aucp(normals, apart, pool):
    """Ledoit-Wolf of scikit-learn on the normals that are trained on; AUROC of the pool against those kept apart."""
    fitted = LedoitWolf().fit(normals[~apart])
    inside, outside = (fitted.mahalanobis(part) for part in (normals[apart], pool))
    return roc_auc_score(np.repeat([0, 1], [len(inside), len(outside)]), np.concatenate([inside, outside]))


def test_aucp_is_its_definition_and_rises_with_the_true_auroc():
    random, settings = np.random.default_rng(0), scorer_settings(normalize=False)
    normals, patients = random.normal(size=(120, 6)), [f"p{i // 2}" for i in range(120)]
    found, true = [], []
    for shift in (0.0, 0.5, 1.0, 2.0, 4.0):
        sick = random.normal(size=(60, 6)) + shift
        pool = np.concatenate([random.normal(size=(90, 6)), sick[:30]])
        apart = kept_from_training(patients, 0)
        value = aucp(*([part.astype(np.float32)] for part in (normals[~apart], normals[apart], pool)), settings)
        assert value == pytest.approx(oracle_aucp(normals, apart, pool), abs=2e-3)
        fitted, healthy = LedoitWolf().fit(normals), random.normal(size=(60, 6))
        new = fitted.mahalanobis(np.concatenate([healthy, sick]))
        found.append(value)
        true.append(roc_auc_score(np.repeat([0, 1], 60), new))
    assert pearsonr(found, true).statistic > 0.9
    # a quarter of the pool is abnormal, so AUCp cannot pass 0.5 + 0.25 / 2
    assert found[0] == pytest.approx(0.5, abs=0.07) and found[-1] == pytest.approx(0.625, abs=0.07)


def test_the_chosen_checkpoint_has_the_greatest_aucp(chosen, phantom_store):
    """And its AUCp is that of the backbone which was kept, scored anew outside of carina."""
    said, predictor = read_json(chosen / "selection.json"), load_predictor(chosen)
    values = {row["step"]: row["aucp"] for row in said["checkpoints"]}
    assert sorted(values) == [2, 4, 6] and said["aucp"] == max(values.values()) == values[said["step"]]
    assert said["span"] == max(values.values()) - min(values.values())
    assert said["informative"] == (said["span"] >= 0.05)
    member, everything = predictor.members[0], select(phantom_store)
    normal = everything.table["label.abnormal"].to_numpy() == 0
    train = everything.where(normal & (everything.table["split"] == "train").to_numpy())
    reads = [
        collect(member.backbone, rows, 32, member.scorer.settings, "whole", torch.device("cpu"))[0].astype(np.float64)
        for rows in (train, everything.split("val"))
    ]
    normals, pool = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in reads)
    apart, patients = kept_from_training(train.table["patient_id"].tolist(), 0), train.table["patient_id"].to_numpy()
    assert not set(patients[apart]) & set(patients[~apart]) and 0.1 < apart.mean() < 0.3
    assert oracle_aucp(normals, apart, pool) == pytest.approx(values[said["step"]], abs=0.02)
    # labels of the pool are never read: the selection knows the prevalence that was stated, not the true one
    assert said["prevalence"] == 0.05 and said["images"] == len(pool)
    assert (chosen / "predictor-last" / "predictor.json").is_file()


def test_a_pool_with_few_abnormal_images_warns(chosen):
    log = (chosen / "log.txt").read_text(encoding="utf-8")
    assert re.search(r"pool holds \d+ unlabelled images, 5% of them abnormal as stated", log)
    assert re.search(r"warning: below 10% .*AUCp", log)


def test_cross_fitting_leaves_the_whole_patient_out():
    """Copies of a patient's image would make its own distance 0 if one of them were fitted."""
    random = np.random.default_rng(0)
    one = random.normal(size=(40, 5)).astype(np.float32)
    read, patients = [np.repeat(one, 2, axis=0)], [f"p{i // 2}" for i in range(80)]
    settings = scorer_settings("knn", neighbors=1, normalize=False)
    crossed = cross_fitted_distances(read, patients, settings, 0, 4)
    assert crossed.min() > 0.05 and (crossed[::2] == crossed[1::2]).all()
    assert (distances(fit_scorer(read, settings), read) < 1e-3).all()
    with pytest.raises(CarinaError, match="at least two patients"):
        cross_fitted_distances(read, ["p"] * 80, settings, 0, 4)


def test_cross_fitted_distances_are_those_of_new_normals():
    """Distances of fitted images are too small in many dimensions; cross-fitted ones match new images."""
    random, settings = np.random.default_rng(1), scorer_settings(normalize=False)
    normals, fresh = ([random.normal(size=(count, 100)).astype(np.float32)] for count in (120, 2000))
    scorer = fit_scorer(normals, settings)
    crossed = cross_fitted_distances(normals, [str(i) for i in range(120)], settings, 0, 10)
    false_alarms = {
        name: (distances(scorer, fresh) > np.quantile(scores, 0.95)).mean()
        for name, scores in (("fitted", distances(scorer, normals)), ("crossed", crossed))
    }
    assert abs(false_alarms["crossed"] - 0.05) < abs(false_alarms["fitted"] - 0.05) / 2, false_alarms


# -- contamination ----------------------------------------------------------------------------------------------------


def test_contamination_mixes_the_named_share_and_nests(phantom_store):
    rows = select(phantom_store, rows="train")
    target, patients = rows.table["label.abnormal"].to_numpy(), rows.table["patient_id"].to_numpy()
    normal, abnormal = target == 0, target == 1
    before = np.zeros(len(rows), dtype=bool)
    for share in (0.0, 0.05, 0.1, 0.2, 0.4):
        mixed = contaminated(rows, normal, abnormal, share, 7)
        assert mixed[normal].all() and (mixed | ~before).all()  # all normals, and all of the smaller share
        assert abs(mixed[abnormal].sum() / mixed.sum() - share) <= 0.5 / mixed.sum() + 1e-12
        whole = [mixed[abnormal & (patients == patient)] for patient in set(patients[abnormal & mixed])]
        assert sum(not part.all() for part in whole) <= 1  # patient after patient: at most the last is cut
        before = mixed
    others = contaminated(rows, normal, abnormal, 0.2, 8)
    assert (others != contaminated(rows, normal, abnormal, 0.2, 7)).any()
    first = min(set(patients[abnormal]), key=lambda patient: hash64("contamination", 7, patient))
    assert contaminated(rows, normal, abnormal, 0.2, 7)[abnormal & (patients == first)].all()


def test_a_contaminated_run_says_what_it_saw(common, tmp_path):
    finetune("anomaly", {**common, "contamination": 0.2, "out": str(tmp_path)}, quiet=True)
    info, train = load_predictor(tmp_path).info, select(common["store"], rows="train")
    normals = int((train.table["label.abnormal"] == 0).sum())
    assert info["data"]["images"] == normals + round(normals / 4)
    assert "20%" in info["finetune_saw"] and "normals only" not in info["finetune_saw"]


# -- the scripts that measure it --------------------------------------------------------------------------------------


def test_the_script_of_false_positives_counts(common, tmp_path, monkeypatch, capsys):
    script = script_of("false_positives", monkeypatch)
    out = tmp_path / "r.json"
    words = [f"store={common['store']}", "scale=32", "backbones=[random]", "resamples=100", f"out={out}"]
    assert script.main([*words, "scorers=[gaussian,knn]", "folds=[3,5]", "repeats=2"]) == 0
    result = read_json(out)
    assert result["synthetic"] and "synthetic" in capsys.readouterr().out
    assert [row["scorer"] for row in result["rows"]] == ["gaussian", "knn"]
    for row in result["rows"]:
        assert list(row["references"]) == ["the fitted images", "3 folds", "5 folds", "held-out normals"]
        shares = [figure["false_positives"] for figure in row["references"].values()]
        assert all(share["images"] == result["new"]["images"] for share in shares)
        assert all(share["low"] <= share["value"] <= share["high"] for share in shares)
        assert shares[0]["value"] > shares[1]["value"]  # fitted images are nearer than they should be
        assert set(row["redealt"]) == {"3 folds", "5 folds"}
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
    assert script.main([*words, "scorers=[head]"]) == 2
    assert "is no scorer that is fitted" in capsys.readouterr().err


def test_thresholds_of_the_script_are_quantiles(monkeypatch):
    """Two pieces with thresholds of their own; weights stand for copies."""
    script, random = script_of("false_positives", monkeypatch), np.random.default_rng(0)
    pieces = [(random.normal(size=50) + k, None, random.normal(size=30) + k, None) for k in (0, 5)]
    alarms = sum((new > np.quantile(reference, 0.9)).sum() for reference, _, new, _ in pieces)
    assert script.above(pieces, 0.1) == alarms / 60
    weights = [[random.integers(0, 3, 50), random.integers(0, 3, 30)] for _ in pieces]
    copies = [(np.repeat(p[0], w[0]), None, np.repeat(p[2], w[1]), None) for p, w in zip(pieces, weights)]
    assert script.above(pieces, 0.1, weights) == pytest.approx(script.above(copies, 0.1))


def test_the_script_of_aucp_agrees_with_the_run(chosen, phantom_store, tmp_path, monkeypatch, capsys):
    script, out = script_of("aucp", monkeypatch), tmp_path / "aucp.json"
    words = [f"store={phantom_store}", f"runs=[{chosen}]", "resamples=100", f"out={out}"]
    assert script.main(words) == 0
    (part,) = read_json(out)["runs"]
    said = read_json(chosen / "selection.json")
    assert [row["step"] for row in part["checkpoints"]] == [2, 4, 6]
    for row, own in zip(part["checkpoints"], said["checkpoints"]):
        assert row["aucp"] == pytest.approx(own["aucp"], abs=1e-6)
    assert part["chosen"] == said["step"]
    true = [row["auroc"]["value"] for row in part["checkpoints"]]
    assert part["correlation"] == pytest.approx(pearsonr([row["aucp"] for row in part["checkpoints"]], true).statistic)
    assert part["chosen_minus_best"] <= 0 and part["informative"] == (max(true) - min(true) >= 0.05)
    assert cv2.imread(str(out.with_suffix(".png"))) is not None
    # the predictor that the run kept scores the test rows as the script says of the chosen checkpoint
    result = evaluate(
        str(chosen),
        {"store": str(phantom_store), "split": "test", "resamples": 100, "examples": 0, "controls": False},
        quiet=True,
    )
    step = {row["step"]: row for row in part["checkpoints"]}[said["step"]]
    assert result["table"][0]["auroc"]["value"] == pytest.approx(step["auroc"]["value"], abs=1e-6)
    capsys.readouterr()
    for given, message in (("pool=test", "stand in both pool= and test="), ("pool=train", "in both rows= and pool=")):
        assert script.main([*words, given]) == 2
        assert message in capsys.readouterr().err
