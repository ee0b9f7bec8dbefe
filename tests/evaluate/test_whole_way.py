"""From a pretrained backbone to predictors, evaluations, features, scores of files and published folders."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from carina.errors import CarinaError

LABELS = ["Cardiomegaly", "Effusion"]
MEMBER = {"member-0/config.json", "member-0/model.safetensors", "member-0/carina.json", "member-0/README.md"}
PREDICTOR_FILES = {"predictor.json", "member-0.safetensors", *MEMBER}
EVALUATION_FILES = {"predictions.parquet", "metrics.json", "report.html", "report.md", "tables", "figures"}
PREDICTION_COLUMNS = [
    "image_id", "patient_id", "study_id", "split", "fold", "seed", "view", "sex", "age", "manufacturer", "label",
    "target", "score",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(pretrained, phantom_store, tmp_path_factory):
    from carina.finetune.run import finetune

    folder = tmp_path_factory.mktemp("finetuned")
    common = {"store": str(phantom_store), "backbone": str(pretrained), "threads": 1, "wandb": "off", "scale": 64}
    made = {}
    for task in ("classify", "anomaly"):
        for mode in ("frozen", "full"):
            out = folder / f"{task}-{mode}"
            labels = {"labels": LABELS} if task == "classify" else {}
            small = {"steps": 4, "batch_size": 8}
            finetune(task, {**common, **labels, **small, "mode": mode, "out": str(out)}, quiet=True)
            made[task, mode] = out
    return made


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def evaluated(runs, phantom_store):
    from carina.evaluate.score import evaluate

    given = {"store": str(phantom_store), "split": "val+test", "resamples": 200, "examples": 4}
    return {key: evaluate(str(run), given, quiet=True) for key, run in runs.items()}


@pytest.mark.parametrize("task", ["classify", "anomaly"])
@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_artefacts_and_numbers(runs, evaluated, task, mode):
    run, result = runs[task, mode], evaluated[task, mode]
    assert {f for f in files(run / "predictor")} == PREDICTOR_FILES
    out = run / "evaluations" / "val-test"
    assert {path.name for path in out.iterdir()} == EVALUATION_FILES
    frame = pd.read_parquet(out / "predictions.parquet")
    assert list(frame.columns) == PREDICTION_COLUMNS
    assert set(frame["split"]) <= {"val", "test"}
    for row in result["table"]:
        if row["label"] == "macro" or row["auroc"]["value"] is None:
            continue
        part = frame[(frame["label"] == row["label"]) & frame["target"].notna()]
        assert row["auroc"]["value"] == pytest.approx(roc_auc_score(part["target"], part["score"]), abs=1e-12)
        assert row["ap"]["value"] == pytest.approx(average_precision_score(part["target"], part["score"]), abs=1e-12)
        if row["fpr95"] is not None:
            false, true, _ = roc_curve(part["target"], part["score"], drop_intermediate=False)
            assert row["fpr95"] == pytest.approx(false[true >= 0.95].min())
    page = (out / "report.html").read_text()
    assert ("Control rows" in page) == ("controls" in result) == (task == "anomaly")
    assert "synthetic" in page and "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    assert result["synthetic"] is True and json.loads((out / "metrics.json").read_text())["table"]
    overlap = result["overlap"]
    assert overlap["known"] and overlap["doubts"] == [] and overlap["stages"]["pretrain"]["patients"] == 0
    thresholds = frame.loc[frame["split"] == "val"]
    if task == "anomaly":
        thresholds = thresholds[thresholds["target"] == 0]
    assert overlap["stages"]["thresholds"]["patients"] == thresholds["patient_id"].nunique()
    assert result["pretext_saw"].startswith("a mixture with") and result["transductive"] is False
    assert not set(frame["image_id"]) & {i for i in frame["patient_id"]}


def test_overlap_with_what_was_seen_is_told(runs, phantom_store, tmp_path):
    from carina.evaluate.score import evaluate

    given = {"store": str(phantom_store), "split": "train", "resamples": 100, "examples": 0, "out": str(tmp_path)}
    result = evaluate(str(runs["classify", "frozen"]), given, quiet=True)
    with pytest.raises(CarinaError, match=r"holds an evaluation of other rows \(split differ\)"):
        evaluate(str(runs["classify", "frozen"]), {**given, "split": "val"}, quiet=True)
    seen = result["overlap"]["stages"]["pretrain"]
    assert seen["patients"] == result["patients"] and seen["identical_images"] == result["images"]
    assert (
        f"{result['patients']} of {result['patients']} test patients were seen in pretrain"
        in result["overlap_sentence"]
    )


def test_scores_of_files_are_those_of_the_store(carina, runs, evaluated, phantom_folder, phantom_store):
    """predict reads raw DICOM and PNG as prepare did: the same scores to 1e-6."""
    frame = pd.read_parquet(runs["classify", "frozen"] / "evaluations" / "val-test" / "predictions.parquet")
    ids = pd.read_parquet(_paths_table(phantom_store))
    paths = dict(zip(ids["image_id"], ids["path"]))
    chosen = frame["image_id"].unique()[:6]
    told = carina("predict", runs["classify", "frozen"], *[paths[i] for i in chosen], "--json", "--quiet").stdout
    scores = {row["path"]: row["scores"] for row in json.loads(told)["predictions"]}
    for image_id in chosen:
        for _, row in frame[frame["image_id"] == image_id].iterrows():
            assert scores[paths[image_id]][row["label"]] == pytest.approx(row["score"], abs=1e-6)


def _paths_table(store):
    import os
    from pathlib import Path

    info = json.loads((store / "store.json").read_text())
    return Path(os.environ["XDG_CONFIG_HOME"]) / "carina" / "paths" / f"{info['store_hash']}.parquet"


def test_predict_maps_and_bad_files(carina, runs, phantom_folder, tmp_path):
    good = sorted((phantom_folder / "images").iterdir())[:2]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    words = ("predict", runs["anomaly", "full"], *good, bad, f"--maps={tmp_path / 'maps'}", "--json", "--quiet")
    told = json.loads(carina(*words).stdout)
    assert len(told["predictions"]) == 2 and told["rejected"][0]["path"] == str(bad)
    assert len(list((tmp_path / "maps").glob("*-abnormal.png"))) == 2


@pytest.mark.parametrize("head", ["linear", "mlp", "attentive", "lse", "multiscale"])
@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_convnext", "swin_s3_tiny_224"])
def test_heat_maps_of_every_layout(architecture, head):
    import torch

    from carina.evaluate.explain import heat_maps
    from carina.models.backbones import random_backbone
    from carina.models.heads import HeadSettings, make_head
    from carina.models.predictor import Member

    backbone = random_backbone(architecture, 64, 0)
    settings = HeadSettings(name=head, hidden=8, dropout=0.0, layers=None, sharpness=5.0, noisy_or=True)
    member = Member(backbone, 64, make_head(settings, backbone, ["Nodule", "Effusion", "abnormal"], 0), None)
    for column in range(3):
        maps = heat_maps(member, torch.rand(3, 1, 96, 96), column)
        assert maps.shape == (3, 96, 96) and maps.min() >= 0 and maps.max() <= 1


def test_embed_a_store_and_files(carina, pretrained, phantom_store, phantom_folder, tmp_path):
    import torch

    from carina.data.store import select
    from carina.models.backbones import load_backbone

    out = tmp_path / "features.parquet"
    told = json.loads(carina("embed", pretrained, phantom_store, f"out={out}", "--json", "--quiet").stdout)
    frame = pd.read_parquet(out)
    selection = select(str(phantom_store))
    assert told["images"] == len(frame) == len(selection)
    backbone = load_backbone(str(pretrained)).eval()
    pixels = torch.from_numpy(selection.images(range(5), 64)).unsqueeze(1).float() / 255
    with torch.no_grad():
        expected = backbone.features(pixels).numpy()
    np.testing.assert_allclose(np.stack(frame["features"][:5]), expected, atol=1e-5)
    some = sorted((phantom_folder / "images").iterdir())[:3]
    carina("embed", pretrained, *some, f"out={tmp_path / 'files.parquet'}", "--quiet")
    assert len(pd.read_parquet(tmp_path / "files.parquet")) == 3


def test_compare_two_arms(carina, runs, evaluated):
    a, b = (runs["classify", mode] / "evaluations" / "val-test" for mode in ("frozen", "full"))
    told = json.loads(carina("compare", f"a={a}", f"b={b}", "resamples=200", "--json").stdout)
    row = next(r for r in told["rows"] if r["role"] == "primary")
    difference = evaluated["classify", "frozen"]["table"][0]["auroc"]["value"]
    difference -= evaluated["classify", "full"]["table"][0]["auroc"]["value"]
    assert row["difference"]["value"] == pytest.approx(difference, abs=1e-9)


def test_publish_a_predictor_and_refuse_memories(carina, runs, evaluated, phantom_store, pretrained, tmp_path):
    out = tmp_path / "published"
    carina("publish", runs["anomaly", "frozen"], "repo=org/name", f"out={out}", "license=mit", "--dry-run", "--quiet")
    assert files(out) == PREDICTOR_FILES | {"README.md", "SHA256SUMS", "recipe.yaml", "model.onnx"}
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "synthetic" in card and "not a medical device" in card and "| abnormal |" in card
    knn = tmp_path / "knn"
    words = (f"backbone={pretrained}", f"store={phantom_store}", f"out={knn}", "scorer.name=knn", "scale=64", "--quiet")
    carina("finetune", "anomaly", *words)
    refused = carina("publish", knn, "repo=org/name", f"out={tmp_path / 'no'}", "--dry-run", code=2).stderr
    assert "holds features of patients" in refused
    assert "license=NAME" in carina("publish", pretrained, "repo=org/name", f"out={tmp_path / 'no'}", code=2).stderr


def test_folds_are_pooled_and_a_fold_run_is_not_scored_on_a_split(phantom_store, pretrained, tmp_path):
    from carina.evaluate.score import evaluate
    from carina.finetune.run import finetune

    given = {"store": str(phantom_store), "backbone": str(pretrained), "labels": ["abnormal"], "scale": 64, "folds": 3}
    for fold in range(3):
        finetune("classify", {**given, "fold": fold, "out": str(tmp_path / str(fold))}, quiet=True)
    runs = ",".join(str(tmp_path / str(fold)) for fold in range(3))
    common = {"store": str(phantom_store), "resamples": 100, "examples": 0}
    result = evaluate(runs, {**common, "split": "fold", "out": str(tmp_path / "pooled")}, quiet=True)
    assert result["images"] == len(pd.read_parquet(phantom_store / "table.parquet"))
    frame = pd.read_parquet(tmp_path / "pooled" / "predictions.parquet")
    assert frame.groupby("patient_id")["fold"].nunique().max() == 1 and set(frame["fold"]) == {0, 1, 2}
    with pytest.raises(CarinaError, match="split=fold"):
        evaluate(str(tmp_path / "0"), {**common, "split": "test"}, quiet=True)


def test_a_store_prepared_otherwise_is_refused(runs, phantom_folder, tmp_path):
    from carina.evaluate.score import evaluate
    from carina.intake.prepare import prepare

    labels = [*LABELS, "abnormal"]
    given = {"out": str(tmp_path / "store"), "scales": [64], "fit": "stretch", "labels": labels, "workers": 1}
    prepare(str(phantom_folder / "labels.csv"), given, quiet=True)
    with pytest.raises(CarinaError, match="was prepared with geometry"):
        evaluate(str(runs["classify", "frozen"]), {"store": str(tmp_path / "store")}, quiet=True)


def test_few_labels_use_only_their_patients(phantom_store, pretrained, tmp_path):
    from carina.finetune.run import finetune

    given = {
        "store": str(phantom_store),
        "backbone": str(pretrained),
        "labels": ["abnormal"],
        "scale": 64,
        "patients": 12,
    }
    finetune("classify", {**given, "out": str(tmp_path / "few")}, quiet=True)
    info = json.loads((tmp_path / "few" / "predictor" / "predictor.json").read_text())
    assert info["data"]["patients"] == 12 and info["labels_used"] == "12 patients"
    assert info["thresholds_from"].startswith("cross-fitted")
