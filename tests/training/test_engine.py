"""What the engine promises whatever it trains: rates, averages, checkpoints that last, and faults told in words."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from carina.data.store import select
from carina.errors import CarinaError
from carina.models.backbones import random_backbone
from carina.pretrain.recipe import PretrainRecipe
from carina.recipes import build
from carina.runs import Run
from carina.training.engine import Engine, Task
from carina.training.forecast import forecast
from carina.training.optim import (
    averaged,
    decay_at,
    follow,
    make_optimizer,
    parameter_groups,
    rate_at,
    rate_in_words,
    rising,
)

WORDS = ["steps=8", "batch_size=8", "threads=1", "wandb=off", "checkpoint_every=1", "precision=no"]


class Sum(Task):
    """Pull the mean of the pooled features to 0; `poison` makes the loss NaN from a step on."""

    def __init__(self, poison: int | None = None):
        super().__init__()
        self.backbone = random_backbone("test_resnet", 32, 0)
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))
        self.poison = poison

    def forward(self, batch):
        loss = self.backbone(batch.images).square().mean()
        if self.poison is not None and self.done >= self.poison:
            loss = loss * float("nan")
        return {"loss": loss, "plain": loss.detach()}

    def after_step(self, step):
        self.done.fill_(step + 1)


def settings(*words):
    return build("pretrain", PretrainRecipe, "debug/moco", [*WORDS, *words])


def start(store, out, task=None, words=(), resume=False):
    recipe = settings(*words)
    engine = Engine(task or Sum(), select(str(store), rows="train"), recipe, scales=[32], quiet=True)
    return engine, Run.start(out, "pretrain", recipe, resume=resume, quiet=True)


def test_the_learning_rate_rule_and_its_words():
    linear, root, fixed = (
        settings(f"optim.lr_rule={rule}", "optim.lr=0.1").optim for rule in ("linear", "sqrt", "fixed")
    )
    assert rate_in_words(linear, 512) == "0.2 = 0.1 x 512/256 (linear)"
    assert rate_in_words(root, 1024) == "0.2 = 0.1 x square root of 1024/256 (sqrt)"
    assert rate_in_words(fixed, 1024) == "0.1 (fixed)"
    rates = [rate_at(step, 100, 1.0, linear.model_copy(update={"warmup": 0.1, "final_lr": 0.2})) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[55] == pytest.approx(0.2 + 0.8 * 0.5)
    assert rates[-1] == pytest.approx(0.2, abs=1e-3)
    assert [rising(s, 10, 0.9) for s in (0, 5, 10, 20)] == pytest.approx([0.9, 0.95, 1.0, 1.0])


def test_layer_decay_lowers_the_rate_towards_the_input_and_leaves_heads_alone():
    task = nn.Module()
    task.backbone = random_backbone("test_vit", 32, 0)
    task.head = nn.Linear(task.backbone.dimension, 3)
    optim = settings("optim.layer_decay=0.5", "optim.weight_decay=0.1").optim
    groups = parameter_groups(task, optim, task.backbone.network)
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(task.parameters()))
    network = task.backbone.network
    blocks = [scale[id(block.attn.qkv.weight)] for block in network.blocks]
    assert [high / low for low, high in pairwise(blocks)] == pytest.approx([2.0] * (len(blocks) - 1))
    assert scale[id(network.patch_embed.proj.weight)] == pytest.approx(blocks[0] / 2)
    assert scale[id(task.head.weight)] == scale[id(task.head.bias)] == 1.0
    assert decay[id(network.pos_embed)] == decay[id(network.cls_token)] == decay[id(task.head.bias)] == 0.0
    assert decay[id(task.head.weight)] == 0.1
    plain = parameter_groups(task, settings().optim, network)
    assert {group["scale"] for group in plain} == {1.0}


def test_lars_takes_the_step_of_its_paper():
    """v = m v + trust * |w| / (|g| + decay |w|) * (g + decay w); w -= rate v (You et al., arXiv 1708.03888, eq. 6)."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    optim = settings("optim.name=lars", "optim.weight_decay=0.01", "optim.momentum=0.9").optim
    optimizer = make_optimizer(layer, optim, 0.5)
    w, b = layer.weight.detach().double().numpy().copy(), layer.bias.detach().double().numpy().copy()
    velocity, bias_velocity = np.zeros_like(w), np.zeros_like(b)
    for step in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        g, gb = layer.weight.grad.double().numpy(), layer.bias.grad.double().numpy()
        trust = 0.001 * np.linalg.norm(w) / (np.linalg.norm(g) + 0.01 * np.linalg.norm(w))
        velocity = 0.9 * velocity + trust * (g + 0.01 * w)
        bias_velocity = 0.9 * bias_velocity + gb
        w, b = w - 0.5 * velocity, b - 0.5 * bias_velocity
        optimizer.step()
        np.testing.assert_allclose(layer.weight.detach().numpy(), w, atol=1e-6)
        np.testing.assert_allclose(layer.bias.detach().numpy(), b, atol=1e-6)


def test_an_average_follows_parameters_and_takes_over_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    copy = averaged(model)
    before = [p.clone() for p in copy.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
        model[1].running_mean.fill_(3.0)
    follow(copy, model, 0.9, buffers=True)
    for old, now, new in zip(before, copy.parameters(), model.parameters()):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * new)
        assert not now.requires_grad
    assert torch.equal(copy[1].running_mean, model[1].running_mean)


def test_the_newest_checkpoints_and_the_milestones_stay(phantom_store, tmp_path):
    engine, run = start(phantom_store, tmp_path / "run", words=("keep_checkpoints=2", "keep_every=3"))
    engine.fit(run)
    assert [p.name for p in sorted((run.folder / "checkpoints").iterdir())] == [
        "step-00000003", "step-00000006", "step-00000007", "step-00000008",
    ]  # fmt: skip


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(phantom_store, tmp_path):
    engine, run = start(phantom_store, tmp_path / "run", words=("keep_checkpoints=3",))
    engine.fit(run)
    whole = {key: value.clone() for key, value in engine.task.state_dict().items()}
    newest = run.folder / "checkpoints" / "step-00000008"
    data = (newest / "task.safetensors").read_bytes()
    (newest / "task.safetensors").write_bytes(data[: len(data) // 2])
    engine, run = start(phantom_store, tmp_path / "run", words=("keep_checkpoints=3",), resume=True)
    engine.fit(run, resume=True)
    log = (run.folder / "log.txt").read_text()
    assert "step-00000008 is damaged and passed over" in log and "going on from step 7" in log
    assert all(torch.equal(whole[key], value) for key, value in engine.task.state_dict().items())
    for folder in (run.folder / "checkpoints").iterdir():
        (folder / "task.safetensors").write_bytes(b"")
    engine, run = start(phantom_store, tmp_path / "run", words=("keep_checkpoints=3",), resume=True)
    with pytest.raises(CarinaError, match=r"every checkpoint of .* is damaged"):
        engine.fit(run, resume=True)


def test_the_third_nan_in_a_row_names_losses_and_ranks_and_the_last_good_state_stays(phantom_store, tmp_path):
    engine, run = start(phantom_store, tmp_path / "run", task=Sum(poison=4))
    with pytest.raises(
        CarinaError, match=r"loss on rank 0, plain on rank 0 was not finite 3 times in a row, last at step 6"
    ):
        engine.fit(run)
    kept = sorted((run.folder / "checkpoints").iterdir())
    assert kept[-1].name == "step-00000004"
    rows = run.metrics()
    assert rows[4]["loss"] is None and math.isfinite(rows[3]["loss"])


def test_out_of_memory_says_what_to_change(phantom_store, tmp_path):
    class Hungry(Sum):
        def forward(self, batch):
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine, run = start(phantom_store, tmp_path / "run", task=Hungry())
    with pytest.raises(CarinaError) as told:
        engine.fit(run)
    for words in ("micro-batches of 8 at scale 32", "double accumulate (now 1)", "checkpoint_activations=true",
                  "precision=bf16", "lower batch_size"):  # fmt: skip
        assert words in str(told.value)


def test_what_an_observer_returns_stands_in_the_metrics(phantom_store, tmp_path):
    engine, run = start(phantom_store, tmp_path / "run")
    seen = []

    def observe(step, means):
        seen.append(means["grad_norm"])
        return {"watch.twice": 2 * step} if step % 2 else {}

    engine.fit(run, observe=observe)
    rows = run.metrics()
    assert [row.get("watch.twice") for row in rows] == [None, 2, None, 6, None, 10, None, 14]
    assert seen == [row["grad_norm"] for row in rows]


def test_a_forecast_covers_every_scale_and_all_that_it_costs(phantom_store):
    recipe = settings("scales=[32,64]", "scale_plan=growing", "steps=400", "keep_every=100", "keep_checkpoints=2")
    engine = Engine(
        Sum(), select(str(phantom_store), rows="train"), recipe, scales=[32, 64], scale_plan="growing", quiet=True
    )
    told = forecast(engine)
    assert set(told["seconds_per_step_by_scale"]) == {"32", "64"}
    assert told["steps"] == 400
    assert told["hours"] == pytest.approx(told["seconds_per_step"] * 400 / 3600, abs=1e-3)
    assert told["energy_kwh"] == pytest.approx(10 * told["seconds_per_step"] * 400 / 3.6e6, abs=1e-4)
    assert "assumed 10 W a CPU thread" in told["energy_basis"]
    assert told["disk_mib"] == pytest.approx(told["checkpoint_mib"] * (2 + 1 + 4), rel=0.1)
    assert told["memory_gib"] > 0.1


def test_sharding_without_several_gpus_is_refused(phantom_store):
    with pytest.raises(CarinaError, match="parallel=fsdp needs several GPUs"):
        Engine(Sum(), select(str(phantom_store), rows="train"), settings("parallel=fsdp"), scales=[32], quiet=True)


def test_a_sick_step_leaves_no_trace_in_batch_norm(phantom_store, tmp_path):
    class Infinite(Sum):
        def forward(self, batch):
            images = batch.images * float("inf") if self.done == 3 else batch.images
            return {"loss": self.backbone(images).square().mean()}

    engine, run = start(phantom_store, tmp_path / "run", task=Infinite())
    engine.fit(run)
    assert run.metrics()[3]["loss"] is None and run.metrics()[4]["loss"] is not None
    assert all(torch.isfinite(value).all() for value in engine.task.state_dict().values())
    assert any(part.running_mean.abs().max() > 0 for part in engine.task.modules() if hasattr(part, "running_mean"))


@pytest.mark.parametrize("name", ["densenet121", "test_efficientnet", "test_resnet"])
def test_synchronized_batch_norm_keeps_the_activation_inside_a_norm(name):
    from carina.training.engine import convert_sync_batchnorm

    backbone = random_backbone(name, 64, 0).eval()
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = backbone(images)
        after = convert_sync_batchnorm(backbone).eval()(images)
    assert any(isinstance(part, nn.SyncBatchNorm) for part in backbone.modules())
    torch.testing.assert_close(before, after)


def test_weight_decay_may_rise_and_biases_may_have_a_rate_of_their_own(phantom_store):
    optim = settings("optim.weight_decay=0.04", "optim.final_weight_decay=0.4", "optim.bias_scale=0.1").optim
    assert [decay_at(step, 10, optim) for step in (0, 5, 10)] == pytest.approx([0.04, 0.22, 0.4])
    assert decay_at(7, 10, settings("optim.weight_decay=0.04").optim) == 0.04
    groups = parameter_groups(nn.Linear(2, 2), optim)
    assert [(group["weight_decay"], group["scale"]) for group in groups] == [(0.04, 1.0), (0.0, 0.1)]
    with pytest.raises(CarinaError, match="lars adapts the rate of weights that decay"):
        make_optimizer(nn.Linear(2, 2), settings("optim.name=lars", "optim.weight_decay=0").optim, 0.1)


def test_a_dry_run_out_of_memory_says_what_to_change(phantom_store):
    class Hungry(Sum):
        def forward(self, batch):
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = Engine(Hungry(), select(str(phantom_store), rows="train"), settings(), scales=[32], quiet=True)
    with pytest.raises(CarinaError, match="double accumulate"):
        forecast(engine)
