"""Invariances of the real command: killed and resumed, repeated, with other workers, on other ranks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS, EVERY = 60, 5
COMMON = (
    f"steps={STEPS}",
    "batch_size=16",
    f"checkpoint_every={EVERY}",
    "threads=1",
    "precision=no",
    "pretexts.moco.queue=64",
)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "backbone" / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except json.JSONDecodeError:
            continue
    return -1


FAMILIES = {
    "queue": ("debug/moco", "pretexts.moco.queue=32", "positives=patient"),
    "teacher": ("debug/dino", "ema=0.9", "export=teacher"),
    "prototypes": (
        "debug/swav", "pretexts.swav.queue=32", "pretexts.swav.supervised=0.5", "pretexts.swav.labels=[abnormal]"
    ),
    "masks": ("debug/mae_vit",),
    "tokens": ("debug/dinov2_vit",),
    "mixture": ("debug/moco_anatpaste", "pretexts.byol.weight=0.5", "scales=[32,64]"),
    "scales": ("debug/scales", "scales=[32,64]", "export=ema", "ema=0.9"),
    "growing": ("debug/barlow", "scales=[32,64]", "scale_plan=growing", "optim.name=lars"),
    "workers": ("debug/simclr", "workers=2"),
}  # fmt: skip


def killed(words: list[str], out: Path, kept: Path, moments: list[int]) -> None:
    """Run the command and kill it at each of these steps, with --resume from the second time on; then let it end."""
    killed_at, lasts = -1, []
    for number, moment in enumerate(moments):
        process = subprocess.Popen(words + (["--resume"] if number else []), stderr=subprocess.PIPE)
        deadline = time.time() + 240
        while last_step(out) < moment and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, process.stderr.read().decode()
        process.send_signal(signal.SIGKILL)
        process.wait()
        before, killed_at = killed_at, last_step(out)
        assert killed_at >= moment > before
        shutil.copy(out / "metrics.jsonl", kept / f"killed-{number}.jsonl")
        lasts.append(killed_at)
    done = subprocess.run([*words, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert steps(out) == list(range(STEPS))
    # It did not start over: the log says from where it went on, never more than one interval back.
    lines = (out / "log.txt").read_text().splitlines()
    resumed = [int(line.rsplit(" ", 1)[1]) for line in lines if "going on from" in line]
    assert len(resumed) == len(moments)
    for first, last in zip(resumed, lasts):
        assert first >= last - EVERY


@pytest.fixture(scope="module")
def reference(carina, phantom_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "run"
    carina(
        "pretrain", "debug/moco_anatpaste", f"store={phantom_store}", f"out={out}", "scales=[32,64]", *COMMON, "--quiet"
    )
    return out


def test_killed_three_times_and_resumed_gives_the_same_bits(phantom_store, reference, tmp_path):
    out = tmp_path / "run"
    words = [sys.executable, "-m", "carina", "pretrain", "debug/moco_anatpaste", f"store={phantom_store}", f"out={out}"]
    words += ["scales=[32,64]", *COMMON, "--quiet"]
    killed(words, out, tmp_path, sorted(random.Random(7).sample(range(6, STEPS - 4), 3)))
    assert same(out, reference)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_killed_five_times_and_resumed_gives_the_same_bits(family, phantom_store, carina, tmp_path):
    recipe, *extra = FAMILIES[family]
    common = [word for word in COMMON if "queue" not in word]
    whole, out = tmp_path / "whole", tmp_path / "run"
    base = ["pretrain", recipe, f"store={phantom_store}", *common, *extra, "--quiet"]
    carina(*base, f"out={whole}")
    moments = sorted(random.Random(family).sample(range(EVERY + 1, STEPS - 6), 5))
    killed([sys.executable, "-m", "carina", *base, f"out={out}"], out, tmp_path, moments)
    assert same(out, whole)
    newest = [load_file(sorted((run / "checkpoints").iterdir())[-1] / "task.safetensors") for run in (whole, out)]
    assert newest[0].keys() == newest[1].keys()
    assert all(torch.equal(newest[0][key], newest[1][key]) for key in newest[0])


def test_the_same_recipe_twice_and_any_number_of_workers(carina, phantom_store, reference, tmp_path):
    for workers in (0, 1, 2):
        out = tmp_path / f"workers-{workers}"
        words = (f"store={phantom_store}", f"out={out}", "scales=[32,64]", f"workers={workers}", *COMMON, "--quiet")
        carina("pretrain", "debug/moco_anatpaste", *words)
        assert same(out, reference), f"workers={workers}"
    assert not same(reference, _other_seed(carina, phantom_store, tmp_path))


def _other_seed(carina, store, tmp_path) -> Path:
    out = tmp_path / "seed"
    words = (f"store={store}", f"out={out}", "scales=[32,64]", "seed=1", *COMMON, "--quiet")
    carina("pretrain", "debug/moco_anatpaste", *words)
    return out


def test_resume_refuses_another_recipe_and_a_run_is_never_overwritten(carina, phantom_store, reference):
    words = (
        "pretrain",
        "debug/moco_anatpaste",
        f"store={phantom_store}",
        f"out={reference}",
        "scales=[32,64]",
        *COMMON,
    )
    assert "already holds a run" in carina(*words, code=2).stderr
    assert "optim.lr differ" in carina(*words, "--resume", "optim.lr=0.2", code=2).stderr


def test_a_signal_writes_a_checkpoint_and_exits_143(carina, phantom_store, tmp_path):
    out = tmp_path / "run"
    words = [
        "pretrain",
        "debug/moco",
        f"store={phantom_store}",
        f"out={out}",
        "steps=5000",
        "batch_size=16",
        "threads=1",
    ]
    process = subprocess.Popen([sys.executable, "-m", "carina", *words], stderr=subprocess.PIPE, text=True)
    while last_step(out) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "a checkpoint is written: go on with --resume" in errors
    state = json.loads((sorted((out / "checkpoints").iterdir())[-1] / "state.json").read_text())
    assert state["step"] == last_step(out) + 1


def test_two_ranks_equal_one_process_with_the_joined_batch(carina, phantom_store, tmp_path):
    """No batch norm in backbone or head: losses over ranks agree with one process to 1e-4 for 50 steps."""
    common = (
        f"store={phantom_store}",
        "steps=50",
        "batch_size=16",
        "threads=1",
        "precision=no",
        "pretexts.moco.queue=64",
        "optim.lr=0.0003",  # AdamW turns rounding into steps: at a high rate the last digits grow within 50 of them
    )
    one, two = tmp_path / "one", tmp_path / "two"
    carina("pretrain", "debug/moco_vit", f"out={one}", *common, "--quiet")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "carina.pretrain"]
    done = subprocess.run(
        [*launch, "debug/moco_vit", f"out={two}", *common, "--quiet"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((two / "environment.json").read_text())["world_size"] == 2
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)
    ]
    assert len(losses[0]) == 50
    assert max(abs(a - b) for a, b in zip(*losses)) < 1e-4


def test_accumulation_changes_nothing_where_no_batch_norm_is(carina, phantom_store, tmp_path):
    runs = []
    for accumulate in (1, 2):
        out = tmp_path / f"accumulate-{accumulate}"
        words = (
            f"store={phantom_store}",
            "steps=12",
            "batch_size=16",
            "threads=1",
            "precision=no",
            "pretexts.moco.queue=64",
        )
        carina("pretrain", "debug/moco_vit", f"out={out}", f"accumulate={accumulate}", *words, "--quiet")
        runs.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert max(abs(a - b) for a, b in zip(*runs)) < 1e-4
