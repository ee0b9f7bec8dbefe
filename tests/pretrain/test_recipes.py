"""The recipes that ship and how parts of a recipe work together, through the real command or its function."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from carina.errors import CarinaError
from carina.pretrain.pretexts import METHODS
from carina.pretrain.recipe import PretrainRecipe
from carina.pretrain.run import listing, pretrain
from carina.recipes import build, shipped
from carina.runs import Run

SHORT = {"steps": 4, "batch_size": 16, "threads": 1, "checkpoint_every": 4, "wandb": "off", "precision": "no"}
DEBUG = [name for name in shipped("pretrain") if name.startswith("debug/")]


def train(recipe, store, out, **over):
    pretrain(recipe, {"store": str(store), "out": str(out), **SHORT, **over}, quiet=True)
    return load_file(out / "backbone" / "model.safetensors")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_every_method_has_a_debug_recipe_and_the_list_tells_what_each_is(carina):
    rows = json.loads(carina("pretrain", "--list", "--json").stdout)["recipes"]
    assert rows == listing()
    assert {row["name"] for row in rows} == set(shipped("pretrain"))
    assert all(len(row["about"]) > 20 for row in rows)
    used = {name: set(build("pretrain", PretrainRecipe, name, []).pretexts.weights()) for name in DEBUG}
    assert set().union(*used.values()) == set(METHODS)
    whole = {name for name in shipped("pretrain") if name not in DEBUG}
    assert {
        "chess_resnet50",
        "moco_cxr_resnet18",
        "medical_mae_vit_s16",
        "rad_dino_vit_b14",
        "anatpaste_resnet18",
    } <= whole
    assert {f"corpus_{size}" for size in ("1k", "10k", "100k", "1m")} <= whole
    architectures = {build("pretrain", PretrainRecipe, name, []).architecture for name in whole}
    assert architectures >= {
        "resnet18", "resnet50", "densenet121", "efficientnet_b4", "convnext_tiny", "vit_small_patch16_224",
        "vit_base_patch16_224", "swin_tiny_patch4_window7_224",
    }  # fmt: skip
    assert all(timm.is_model(name) for name in architectures)


def test_a_pretext_of_weight_zero_changes_no_bit(phantom_store, tmp_path):
    alone = train("debug/moco", phantom_store, tmp_path / "alone")
    for name in ("anatpaste", "simclr", "byol", "swav"):
        mixed = train("debug/moco", phantom_store, tmp_path / name, pretexts={name: {"weight": 0.0}})
        assert same(alone, mixed), name
    both = train("debug/moco", phantom_store, tmp_path / "both", pretexts={"simclr": {"weight": 0.5}})
    assert not same(alone, both)


def test_a_mixture_is_the_weighted_sum_of_its_parts(phantom_store, tmp_path):
    pretexts = {"simclr": {"weight": 0.25}, "simmim": {"weight": 2.0}}
    train("debug/moco", phantom_store, tmp_path / "run", pretexts=pretexts)
    for row in Run(tmp_path / "run").metrics():
        parts = row["moco.loss"] + 0.25 * row["simclr.loss"] + 2 * row["simmim.loss"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)


def test_the_supervised_term_of_weight_zero_changes_no_bit_and_labels_are_recorded(phantom_store, tmp_path):
    plain = train("debug/swav", phantom_store, tmp_path / "plain")
    named = {"swav": {"supervised": 0.0, "labels": ["abnormal"]}}
    assert same(plain, train("debug/swav", phantom_store, tmp_path / "named", pretexts=named))
    named["swav"]["supervised"] = 0.5
    assert not same(plain, train("debug/swav", phantom_store, tmp_path / "taught", pretexts=named))
    records = [json.loads((tmp_path / run / "backbone" / "carina.json").read_text()) for run in ("named", "taught")]
    assert records[0]["labels_used"] == "none"
    assert records[1]["labels_used"] == "for the loss (abnormal)"


def test_what_is_exported_can_be_the_average_or_the_teacher(phantom_store, tmp_path):
    last = train("debug/dino", phantom_store, tmp_path / "last", ema=0.5)
    average = train("debug/dino", phantom_store, tmp_path / "ema", ema=0.5, export="ema")
    teacher = train("debug/dino", phantom_store, tmp_path / "teacher", ema=0.5, export="teacher")
    state = load_file(tmp_path / "last" / "checkpoints" / "step-00000004" / "task.safetensors")
    key = "conv1.weight" if "conv1.weight" in last else next(k for k in last if last[k].ndim == 4)
    assert torch.equal(last[key], state[f"backbone.network.{key}"])
    assert torch.equal(average[key], state[f"average.network.{key}"])
    assert torch.equal(teacher[key], state[f"pretexts.dino.teacher_backbone.network.{key}"])
    assert not torch.equal(last[key], average[key]) and not torch.equal(last[key], teacher[key])
    with pytest.raises(CarinaError, match="export=teacher needs one pretext with a teacher"):
        train("debug/simclr", phantom_store, tmp_path / "none", export="teacher")
    with pytest.raises(CarinaError, match="export=ema needs an average"):
        train("debug/simclr", phantom_store, tmp_path / "none", export="ema")


def test_accumulation_warns_where_it_changes_the_objective(phantom_store, tmp_path):
    train("debug/simclr", phantom_store, tmp_path / "simclr", accumulate=2)
    assert "accumulate=2 it sees 8 at a time and not 16" in (tmp_path / "simclr" / "log.txt").read_text()
    train("debug/simmim", phantom_store, tmp_path / "simmim", accumulate=2)
    assert "another objective" not in (tmp_path / "simmim" / "log.txt").read_text()


@pytest.mark.parametrize("pretext", ["mae", "dinov2"])
def test_a_method_on_an_architecture_that_it_does_not_fit_is_refused(pretext, carina, phantom_store, tmp_path):
    words = (f"store={phantom_store}", f"out={tmp_path / 'run'}", f"pretexts.{pretext}.weight=1")
    told = carina("pretrain", "debug/moco", *words, code=2).stderr
    assert pretext in told.lower() and "test_resnet" in told and "vit_" in told
    assert not (tmp_path / "run").exists()


def test_a_growing_recipe_takes_its_scales_one_after_the_other_and_the_backbone_works_at_each(phantom_store, tmp_path):
    out = tmp_path / "run"
    over = {"scales": [32, 64], "scale_plan": "growing", "norms": "per_size", "steps": 6}
    train("debug/simclr", phantom_store, out, **over)
    record = json.loads((out / "backbone" / "carina.json").read_text())
    assert record["scales"] == [32, 64] and record["norms"] == "per_size" and record["norm_sizes"] == [32, 64]
    assert (out / "backbone" / "scales.safetensors").is_file()


def test_the_watched_store_may_not_share_patients_and_never_leaves_the_run(phantom_store, tmp_path, carina):
    words = (f"store={phantom_store}", f"out={tmp_path / 'run'}", *(f"{k}={v}" for k, v in SHORT.items()))
    told = carina("pretrain", "debug/moco", *words, f"watch.store={phantom_store}", code=2).stderr
    assert "patients" in told and "Traceback" not in told
    words = ("debug/simclr", f"store={phantom_store}", f"out={tmp_path / 'run'}", "rows=val", "batch_size=4", "steps=2")
    carina("pretrain", *words, "threads=1", "wandb=off", f"watch.store={phantom_store}", "watch.rows=train", "--quiet")
    seen = Run(tmp_path / "run").metrics()[-1]
    assert 0 <= seen["watch.knn_auroc"] <= 1 and 0 <= seen["watch.probe_auroc"] <= 1
    published = (tmp_path / "run" / "backbone" / "carina.json").read_text()
    assert str(phantom_store) not in published


@pytest.fixture(scope="module")
def children(real_data, tmp_path_factory):
    """kermany_224 at 64 and 128 px."""
    from carina.intake.prepare import prepare

    out = tmp_path_factory.mktemp("real") / "kermany"
    given = {
        "out": str(out), "scales": [64, 128], "patient": "patient_id", "view": "view", "split": "suggested_split",
        "labels": ["abnormal"], "source": "kermany",
    }  # fmt: skip
    prepare(str(real_data / "kermany_224" / "labels.csv"), given, quiet=True)
    return out


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("recipe", DEBUG)
def test_every_debug_recipe_learns_on_real_radiographs_within_about_a_minute(recipe, children, tmp_path):
    out = tmp_path / "run"
    began = time.perf_counter()
    command = [sys.executable, "-m", "carina", "pretrain", recipe, f"store={children}", f"out={out}", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr
    losses = np.array([row["loss"] for row in Run(out).metrics()])
    quarter = len(losses) // 4
    first, last = losses[:quarter].mean(), losses[-quarter:].mean()
    print(f"{recipe}: {seconds:.0f} s, {len(losses)} steps, loss {first:.4f} -> {last:.4f}")
    assert last < first and seconds < 90
    model = timm.create_model(f"local-dir:{out / 'backbone'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.isfinite(model(torch.rand(2, *model.pretrained_cfg["input_size"]))).all()
