"""Several scales through the real verbs: members, what they share, their stack, and what a resume does not do again."""

import json

import numpy as np
import pytest
import torch
from scipy.special import expit, logit

from carina.data.batches import in_order
from carina.data.labels import to_targets
from carina.data.store import select
from carina.errors import CarinaError, Preempted
from carina.evaluate.score import evaluate, member_scores
from carina.finetune.run import finetune, training_targets
from carina.models.backbones import resize_images
from carina.models.predictor import load_predictor
from carina.training.engine import Engine

LABELS = ["Cardiomegaly", "Effusion", "abnormal"]


@pytest.fixture(scope="module")
def common(phantom_store):
    return {
        "store": str(phantom_store),
        "backbone": "random",
        "architecture": "test_resnet",
        "labels": LABELS,
        "scales": [32, 64],
        "steps": 4,
        "batch_size": 8,
        "threads": 1,
        "wandb": "off",
    }


def predictor_files(run):
    return {p.relative_to(run / "predictor").as_posix() for p in (run / "predictor").rglob("*") if p.is_file()}


def check_scores(run, store, weights_from):
    """The stack's scores are what the saved members and predictor.json say, derived anew."""
    predictor = load_predictor(run)
    info = predictor.info
    assert info["stack_from"] == weights_from and set(info["stack"]) == set(LABELS)
    weights = np.array([info["stack"][label] for label in LABELS])
    assert (weights >= 0).all() and np.allclose(weights.sum(axis=1), 1)
    rows = select(str(store)).split("test")
    total = 0
    for number, member in enumerate(predictor.members):
        pixels = torch.cat([images for _, images in in_order(rows, member.scale, torch.device("cpu"))])
        with torch.no_grad():
            view = resize_images(pixels, member.backbone.spec.size)
            logits = member.head(member.head.read(member.backbone, view)).double().numpy()
        total = total + expit(logits) * weights[:, number]
    temperatures = np.array([info.get("temperature", {}).get(label, 1.0) for label in LABELS])
    expected = expit(logit(total) / temperatures)
    np.testing.assert_allclose(predictor.combine(member_scores(predictor, rows)), expected, atol=1e-6)
    return predictor


def test_frozen_scales_share_the_backbone_and_cross_fitted_scores_weigh_them(common, phantom_store, tmp_path):
    cache = tmp_path / "features"
    finetune("classify", {**common, "cache": str(cache), "out": str(tmp_path / "run")}, quiet=True)
    assert len(list(cache.glob("*.safetensors"))) == 2  # one a scale
    files = predictor_files(tmp_path / "run")
    assert {"member-0/model.safetensors", "member-0.safetensors", "member-1.safetensors"} < files
    assert not any(name.startswith("member-1/") for name in files)
    predictor = check_scores(tmp_path / "run", phantom_store, "cross-fitted training scores")
    assert [member.backbone.spec.size for member in predictor.members] == [32, 64]
    assert predictor.members[0].backbone.network is predictor.members[1].backbone.network

    given = {"store": str(phantom_store), "split": "val+test", "resamples": 200, "examples": 3}
    result = evaluate(str(tmp_path / "run"), given, quiet=True)
    out = tmp_path / "run" / "evaluations" / "val-test"
    written = {"predictions.parquet", "metrics.json", "report.html", "report.md", "tables", "figures", "scales.png"}
    assert {p.name for p in out.iterdir()} == written
    found = json.loads((out / "metrics.json").read_text())["scales"]
    assert found["weights"] == predictor.info["stack"] and found["scales"] == [32, 64]
    table = {row["label"]: row["auroc"]["value"] for row in result["table"]}
    measured = [row for row in found["rows"] if row["auroc"]["value"] is not None]
    assert len(measured) >= 4
    for row in measured:
        gap = row["stack_minus"]["value"]
        assert gap == pytest.approx(table[row["label"]] - row["auroc"]["value"], abs=1e-12)
        best = max((r for r in measured if r["label"] == row["label"]), key=lambda r: r["auroc"]["value"])
        assert found["best"][row["label"]]["scale"] == best["scale"]
    page = (out / "report.html").read_text()
    assert "What each scale counts" in page and "64 px" in page
    card = (tmp_path / "run" / "predictor" / "member-0" / "README.md").read_text()
    assert "A stack of 2 scales" in card and "| finding | 32 px | 64 px |" in card


def test_networks_of_their_own_and_finished_scales_are_not_done_again(common, phantom_store, tmp_path, monkeypatch):
    given = {**common, "mode": "full", "out": str(tmp_path / "run")}
    fit, calls = Engine.fit, []

    def counted(self, run, **how):
        calls.append(run.folder.name)
        if len(calls) == 2:
            raise Preempted("asked to stop", 143)
        return fit(self, run, **how)

    monkeypatch.setattr(Engine, "fit", counted)
    with pytest.raises(Preempted):
        finetune("classify", given, quiet=True)
    first = tmp_path / "run" / "scale-32"
    before = {p: p.stat().st_mtime_ns for p in (first / "checkpoints").rglob("*")}
    lines = (first / "metrics.jsonl").read_text()
    finetune("classify", given, resume=True, quiet=True)
    assert {p: p.stat().st_mtime_ns for p in (first / "checkpoints").rglob("*")} == before
    assert (first / "metrics.jsonl").read_text() == lines and len(lines.splitlines()) == 4
    assert calls[2:] == ["scale-32", "scale-64"]
    predictor = check_scores(tmp_path / "run", phantom_store, "validation patients")
    assert predictor.members[0].backbone.network is not predictor.members[1].backbone.network
    assert {"member-0/model.safetensors", "member-1/model.safetensors"} < predictor_files(tmp_path / "run")

    once = {**common, "mode": "full", "out": str(tmp_path / "once")}
    finetune("classify", once, quiet=True)
    other = load_predictor(tmp_path / "once")
    for mine, theirs in zip(predictor.members, other.members):
        for a, b in zip(mine.state_dict().values(), theirs.state_dict().values()):
            assert torch.equal(a, b)


def test_one_network_at_all_scales_with_norms_for_each(common, phantom_store, tmp_path):
    given = {**common, "mode": "full", "shared": True, "threshold_rows": None, "out": str(tmp_path / "run")}
    finetune("classify", given, quiet=True)
    files = predictor_files(tmp_path / "run")
    assert {"member-0/scales.safetensors", "member-0.safetensors"} < files
    assert not any(name.startswith("member-1") for name in files)
    predictor = check_scores(tmp_path / "run", phantom_store, "3 patient folds of training")
    small, large = (member.backbone.network.state_dict() for member in predictor.members)
    different = {key for key in small if not torch.equal(small[key], large[key])}
    modules = predictor.members[0].backbone.network.named_modules()
    norms = tuple(f"{name}." for name, module in modules if isinstance(module, torch.nn.BatchNorm2d))
    assert different and all(key.startswith(norms) for key in different)
    assert predictor.info["labels_used"] == f"{predictor.info['data']['patients']} patients"
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 4 and (tmp_path / "run" / "fold-2" / "metrics.jsonl").is_file()


@pytest.mark.parametrize("architecture", ["test_vit", pytest.param("swin_s3_tiny_224", marks=pytest.mark.slow)])
def test_transformers_at_several_scales(common, phantom_store, tmp_path, architecture):
    head = {"name": "attentive", "hidden": 8}
    given = {**common, "architecture": architecture, "head": head, "patients": 20, "out": str(tmp_path / "run")}
    finetune("classify", given, quiet=True)
    predictor = check_scores(tmp_path / "run", phantom_store, "cross-fitted training scores")
    assert predictor.info["labels_used"] == "20 patients"


def test_permuted_labels_are_one_deal_for_training_and_judging(common, phantom_store):
    from carina.finetune.recipe import FinetuneRecipe
    from carina.recipes import build

    rows = select(str(phantom_store)).split("train")
    plain, dealt, again, other = (
        training_targets(build("finetune", FinetuneRecipe, "classify", {**common, **given}), rows)
        for given in ({}, {"permute_labels": True}, {"permute_labels": True}, {"permute_labels": True, "draw": 1})
    )
    np.testing.assert_array_equal(plain, to_targets(rows.targets(LABELS)))
    np.testing.assert_array_equal(dealt, again)
    assert (dealt != plain).any() and (dealt != other).any()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shared": True, "scales": None}, "give scales="),
        ({"scale": 32}, "scale= is for one scale"),
        ({"size": 32}, "size= is for one scale"),
        ({"scales": [32, 32]}, "names a scale twice"),
        ({"scales": [32, 48]}, "48"),
    ],
)
def test_what_cannot_be_is_said(common, tmp_path, given, said):
    with pytest.raises(CarinaError, match=said):
        finetune("classify", {**common, "out": str(tmp_path / "run"), **given}, quiet=True)
    with pytest.raises(CarinaError, match="stacks classifiers"):
        anomaly = {"store": common["store"], "scales": [32, 64], "out": str(tmp_path / "anomaly")}
        finetune("anomaly", anomaly, quiet=True)
