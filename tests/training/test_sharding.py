"""FSDP: the same losses as one process, a whole checkpoint, and a resume from it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("sharded_cpu.py")
COMMON = (
    "steps=8",
    "batch_size=16",
    "threads=1",
    "precision=no",
    "checkpoint_every=4",
    "wandb=off",
    "ema=0.9",
    "optim.lr=0.0003",
)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def sharded(*words: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    done = subprocess.run(
        [*launch, "--rdzv_endpoint", "localhost:0", str(SCRIPT), "pretrain", *words, *COMMON, "parallel=fsdp"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("recipe", ["debug/moco_vit", pytest.param("debug/dino_vit", marks=pytest.mark.slow)])
def test_sharded_training_equals_one_process_and_resumes(recipe, carina, phantom_store, tmp_path):
    if recipe == "debug/dino_vit":
        extra = ("export=teacher", "scales=[64]")
    else:
        extra = ("pretexts.moco.queue=64",)
    one, two = tmp_path / "one", tmp_path / "two"
    carina("pretrain", recipe, f"store={phantom_store}", f"out={one}", *COMMON, *extra, "--quiet")
    sharded(recipe, f"store={phantom_store}", f"out={two}", *extra, "--quiet")
    assert len(losses(one)) == 8
    assert max(abs(a - b) for a, b in zip(losses(one), losses(two))) < 1e-4
    left, right = (load_file(run / "backbone" / "model.safetensors") for run in (one, two))
    assert left.keys() == right.keys()
    assert max((left[key] - right[key]).abs().max() for key in left) < 1e-3
    kept = load_file(two / "checkpoints" / "step-00000008" / "task.safetensors")
    single = load_file(one / "checkpoints" / "step-00000008" / "task.safetensors")
    assert {key: value.shape for key, value in kept.items()} == {key: value.shape for key, value in single.items()}

    first = losses(two)
    shutil.rmtree(two / "checkpoints" / "step-00000008")
    shutil.rmtree(two / "backbone")
    sharded(recipe, f"store={phantom_store}", f"out={two}", *extra, "--quiet", "--resume")
    assert "going on from step 4" in (two / "log.txt").read_text()
    assert max(abs(a - b) for a, b in zip(first, losses(two))) < 1e-6
    again = load_file(two / "backbone" / "model.safetensors")
    assert all(torch.allclose(again[key], right[key], atol=1e-6) for key in right)
