"""The engine of both training stages: Accelerate, steps, checkpoints, resume, signals, and the guard against NaN."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from pydantic import Field
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from carina.data.batches import Batch, Batches, Plan
from carina.data.store import Selection
from carina.draws import hash64
from carina.errors import CarinaError, Preempted
from carina.models.backbones import Backbone
from carina.progress import Progress
from carina.recipes import Section
from carina.runs import Run
from carina.training.optim import OptimSettings, base_rate, decay_at, make_optimizer, rate_at, rate_in_words
from carina.training.states import (
    load_optimizer_tensors,
    load_task_tensors,
    newest_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    task_tensors,
    whole,
)
from carina.training.tracking import Mode, Tracker

NAN_LIMIT = 3  # a stray one is skipped, the third in a row stops the run
SKIPS = 20  # fp16's scale begins at 2 ** 16 and halves with every step that it leaves out
# What FSDP shards together: the repeated parts of timm's networks, by the ends of their classes' names.
BLOCKS = ("Block", "Bottleneck", "DenseLayer", "InvertedResidual")
Precision = Literal["auto", "no", "bf16", "fp16"]


class TrainingSettings(Section):
    """The keys that both training stages share; values and their meaning stand in their default.yaml."""

    seed: int
    steps: Annotated[int, Field(ge=1)] | None
    epochs: Annotated[float, Field(gt=0)] | None
    batch_size: Annotated[int, Field(ge=2)]
    accumulate: Annotated[int, Field(ge=1)]
    optim: OptimSettings
    precision: Precision
    parallel: Literal["ddp", "fsdp"]
    sync_batch_norm: bool
    checkpoint_activations: bool
    compile: bool
    threads: Annotated[int, Field(ge=1)] | None
    workers: Annotated[int, Field(ge=0)]
    checkpoint_every: Annotated[int, Field(ge=1)]
    keep_checkpoints: Annotated[int, Field(ge=1)]
    keep_every: Annotated[int, Field(ge=1)] | None
    wandb: Mode

    def total_steps(self, count: int) -> int:
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise CarinaError("the recipe says neither steps nor epochs; give one of them")
        return max(1, round(self.epochs * (count // self.batch_size)))


class Task(nn.Module):
    """What the engine trains: the networks, their loss on a batch, and what follows an optimizer step.

    backbone: what is exported, whose layers `layer_decay` counts. skips_parameters: some steps leave parameters without
    a gradient, which DDP must be told.
    """

    backbone: Backbone
    skips_parameters = False

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Named scalar losses; `loss` is what is minimized."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after every optimizer step, on every rank."""


def best_precision(device: torch.device, wanted: Precision) -> str:
    """bf16 where the GPU or the CPU computes in it, else full precision."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolved(settings: TrainingSettings, out: str | Path | None, resume: bool) -> TrainingSettings:
    """The settings with precision and threads decided; on resume the threads of the run that is continued.

    Bits on a CPU are promised at one thread count, which is why it is part of the recipe.
    """
    threads = settings.threads
    if resume and threads is None and out and (Path(out) / "recipe.yaml").is_file():
        threads = Run.open(out).recipe().get("threads")
    threads = threads or max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return settings.model_copy(
        update={"threads": threads, "precision": best_precision(pick_device(), settings.precision)}
    )


def keep_memory() -> None:
    """Let the C library keep what is freed: it gives large tensors back to the system otherwise and faults them in again at
    every step, a fifth of the time of a ResNet-18 on a CPU. M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's mallopt(3)."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        library.mallopt(-3, 2**31 - 1)
        library.mallopt(-1, -1)


class Engine:
    """One training run of a task on a selection."""

    def __init__(
        self,
        task: Task,
        selection: Selection,
        settings: TrainingSettings,
        *,
        scales: Sequence[int],
        scale_plan: str = "mixed",
        positives: str = "image",
        masks: bool = False,
        targets: np.ndarray | None = None,
        name: str = "train",
        quiet: bool = False,
    ):
        torch.set_num_threads(settings.threads)
        cuda = torch.cuda.is_available()
        if not cuda:
            keep_memory()
        # Batch norm keeps the statistics of its own rank; rank 0's running ones are exported (docs/multi-gpu.md).
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=task.skips_parameters)
        AcceleratorState._reset_state()  # it refuses another precision than that of an earlier run in this process
        self.accelerator = Accelerator(
            mixed_precision=settings.precision,
            cpu=not cuda,
            kwargs_handlers=[ddp],
            fsdp_plugin=_sharding(task) if settings.parallel == "fsdp" else None,
        )
        if settings.parallel == "fsdp" and not self.accelerator.is_fsdp2:
            raise CarinaError(
                "parallel=fsdp needs several GPUs, started by torchrun or accelerate launch; leave it at ddp here"
            )
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.device = self.accelerator.device
        self.settings, self.name, self.quiet = settings, name, quiet or self.rank > 0
        self.plan = Plan(
            count=len(selection),
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            world=self.world,
            rank=self.rank,
            scales=tuple(scales),
            scale_plan=scale_plan,
            seed=settings.seed,
            steps=settings.total_steps(len(selection)),
        )
        self.batches = Batches(
            selection,
            self.plan,
            device=self.device,
            workers=settings.workers,
            masks=masks,
            targets=targets,
            positives=positives,
        )
        self.peak = base_rate(settings.optim, settings.batch_size)
        if settings.parallel == "fsdp" and settings.optim.name == "lars":
            raise CarinaError(
                "lars looks at whole parameters, which fsdp shards; give parallel=ddp or optim.name=adamw"
            )
        if settings.sync_batch_norm and self.world > 1:
            if not cuda:
                raise CarinaError("sync_batch_norm works on GPUs alone; leave it at false here")
            task = convert_sync_batchnorm(
                task
            )  # timm's: torch's own drops the activation that timm puts into its norms
        self.task = task.to(self.device)
        if settings.compile:
            for part in self.task.modules():
                if isinstance(part, Backbone):  # pooled and dense methods both pass through it
                    part.network.forward_features = torch.compile(part.network.forward_features)
        optimizer = make_optimizer(self.task, settings.optim, self.peak, self.task.backbone.network)
        with warnings.catch_warnings():
            # newer torch calls it forward_sync_buffers, which accelerate cannot pass on yet
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            self.model, self.optimizer = self.accelerator.prepare(self.task, optimizer)
        self.statistics = [
            value
            for part in self.task.modules()
            if isinstance(part, nn.modules.batchnorm._BatchNorm)
            for value in part.buffers(recurse=False)
            if value.is_floating_point()
        ]
        self.kept_statistics = [value.clone() for value in self.statistics]
        self.signal, self.skipped = 0, 0

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self, step: int, pieces: list[Batch]) -> tuple[dict[str, float], bool]:
        """One optimizer step on its micro-batches; returns the mean losses over all ranks and whether all were finite."""
        # dropout and drop path draw from torch's generator: a seed per step makes a resume exact
        torch.manual_seed(hash64("step", self.settings.seed, step, self.rank) >> 1)
        rate = rate_at(step, self.plan.steps, self.peak, self.settings.optim)
        decay = decay_at(step, self.plan.steps, self.settings.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
            group["weight_decay"] = decay if group["weight_decay"] else 0.0
        self.model.train()
        if self.statistics:
            torch._foreach_copy_(self.kept_statistics, self.statistics)
        sums: dict[str, torch.Tensor] = {}
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with self.accelerator.no_sync(self.model) if not last else contextlib.nullcontext():
                with self.accelerator.autocast():
                    losses = self.model(piece)
                self.accelerator.backward(losses["loss"] / len(pieces))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / len(pieces)
        names = sorted(sums)
        ranks = self.accelerator.gather(torch.stack([sums[name] for name in names])[None]).cpu()
        means = dict(zip(names, ranks.mean(dim=0).tolist()))
        finite = bool(torch.isfinite(ranks).all())
        self.sick = [
            f"{name} on rank {rank}" for rank, row in enumerate(ranks.tolist())
            for name, value in zip(names, row) if not math.isfinite(value)
        ]  # fmt: skip
        if finite:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.optim.clip or math.inf)
            means["grad_norm"] = float(whole(norm))
            # a gradient scaler (fp16) meets infinite gradients on purpose and skips them by itself
            finite = self.accelerator.scaler is not None or math.isfinite(means["grad_norm"])
            self.sick = [] if finite else ["the gradient"]
        if finite:
            self.optimizer.step()
            finite = self._scaled_step_is_sound()
        if not finite and self.statistics:  # the forward pass of a sick step has moved them already
            torch._foreach_copy_(self.statistics, self.kept_statistics)
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step(step)
        return {**means, "lr": rate}, finite

    def _scaled_step_is_sound(self) -> bool:
        """False when fp16's scaler has left out more steps in a row than finding its scale can take."""
        if self.accelerator.scaler is None:
            return True
        self.skipped = self.skipped + 1 if self.optimizer.step_was_skipped else 0
        if self.skipped > SKIPS:
            self.sick = [f"the gradient in fp16, left out {self.skipped} times,"]
        return self.skipped <= SKIPS

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, run: Run, step: int, seconds: float) -> None:
        """Write checkpoints/step-XXXXXXXX (the state after `step` steps) and drop the oldest beyond what is kept."""
        task, optimizer = task_tensors(self.task), optimizer_tensors(self.optimizer.optimizer)
        if self.rank == 0:
            scaler = self.accelerator.scaler
            facts = {"seconds": seconds, "scaler": scaler.state_dict() if scaler else None}
            keep = {"keep": self.settings.keep_checkpoints, "keep_every": self.settings.keep_every}
            save_checkpoint(run, step, task, optimizer, facts, **keep)
        self.accelerator.wait_for_everyone()

    def load(self, run: Run) -> tuple[int, float]:
        """Take the newest checkpoint; returns the step to go on from and the seconds spent so far."""
        found = newest_checkpoint(run)
        if found is None:
            return 0, 0.0
        task, optimizer, state = found
        load_task_tensors(self.task, task)
        load_optimizer_tensors(self.optimizer.optimizer, optimizer)
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state["step"], state["seconds"]

    # -- the loop ---------------------------------------------------------------------------------------------------

    def fit(
        self,
        run: Run,
        *,
        resume: bool = False,
        observe: Callable[[int, dict[str, float]], dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Train to the last step; returns facts for the card (steps, images, hours, device).

        observe: called on rank 0 after every sound step with its number and mean losses; what it returns is logged.
        """
        first, spent = self.load(run) if resume else (0, 0.0)
        main = self.rank == 0
        if main:
            run.forget_metrics_after(first - 1)
            run.note_environment(**self.machine(), steps_planned=self.plan.steps)
            self._say(run, first)
        tracker = Tracker(run, self.settings.wandb, run.recipe()) if main else None
        self._catch_signals()
        began = last_log = time.perf_counter()
        bad = 0
        try:
            with (
                self.memory_told(),
                Progress(self.name, self.plan.steps, unit="steps", done=first, quiet=self.quiet) as progress,
            ):
                for step, pieces in self.batches.from_step(first):
                    means, finite = self.step(step, pieces)
                    bad = 0 if finite else bad + 1
                    now = time.perf_counter()
                    rate = self.plan.batch_size / max(now - last_log, 1e-9)
                    wait = self.batches.waited / max(now - began, 1e-9)
                    if main:
                        seen = observe(step, means) if observe is not None and finite else {}
                        tracker.step({"step": step, **_json_numbers(means), "images_per_second": round(rate, 1),
                                      "data_wait": round(wait, 4), **seen})  # fmt: skip
                    last_log = time.perf_counter()  # a look of the observer is no time of training
                    progress.advance(1, f"loss {means['loss']:.4f}  {rate:,.0f} images/s  data wait {wait:.0%}")
                    if bad >= NAN_LIMIT:
                        raise CarinaError(
                            f"{', '.join(self.sick)} was not finite {NAN_LIMIT} times in a row, last at step {step}; start "
                            "anew with another out= and a lower optim.lr, optim.clip=1 or precision=no"
                        )
                    done = step + 1
                    seconds = spent + now - began
                    # a sick step is never saved, so a signal waits for a sound one or for the third sick one
                    stop = self._stop_wanted() if bad == 0 else 0
                    due = any(n and done % n == 0 for n in (self.settings.checkpoint_every, self.settings.keep_every))
                    if bad == 0 and (due or done == self.plan.steps or stop):
                        self.save(run, done, seconds)
                    if stop and done < self.plan.steps:
                        word = "interrupted" if stop == signal.SIGINT else "asked to stop"
                        raise Preempted(
                            f"{word} after step {done} of {self.plan.steps}; a checkpoint is written: go on with --resume",
                            128 + stop,
                        )
        finally:
            if tracker is not None:
                tracker.close()
            self._release_signals()
        if bad:
            raise CarinaError(
                "the loss of the last step was not finite; lower optim.lr and start anew with another out="
            )
        seconds = spent + time.perf_counter() - began
        facts = {
            "steps": self.plan.steps,
            "images_seen": self.plan.steps * self.plan.batch_size,
            "hours": round(seconds / 3600, 4),
            "world_size": self.world,
        }
        if main:
            run.note_environment(**facts)
        return facts

    def _say(self, run: Run, first: int) -> None:
        s = self.settings
        run.log(
            f"{self.name}: {self.plan.count} images, {self.plan.steps} steps of {s.batch_size} "
            f"({self.plan.steps * s.batch_size / self.plan.count:.1f} epochs), scale {list(self.plan.scales)}, "
            f"{self.device.type} x {self.world}, precision {s.precision}, learning rate "
            f"{rate_in_words(s.optim, s.batch_size)}"
        )
        if first:
            run.log(f"{self.name}: going on from step {first}")

    @contextlib.contextmanager
    def memory_told(self) -> Iterator[None]:
        """Turn running out of memory into a sentence that says what to change."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise CarinaError(self._out_of_memory()) from None

    def _out_of_memory(self) -> str:
        s = self.settings
        advice = [f"double accumulate (now {s.accumulate})"]
        if not s.checkpoint_activations:
            advice.append("give checkpoint_activations=true")
        if s.precision == "no":
            advice.append("give precision=bf16")
        return (
            f"out of memory with micro-batches of {self.plan.micro_batch} at scale {max(self.plan.scales)}; "
            f"{', or '.join(advice)}, or lower batch_size or the scale, and start anew with another out="
        )

    def machine(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "device": self.device.type,
            "world_size": self.world,
            "precision": self.settings.precision,
            "threads": self.settings.threads,
        }
        if self.device.type == "cuda":
            facts |= {
                "gpu": torch.cuda.get_device_name(self.device),
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
                "tf32": torch.backends.cuda.matmul.allow_tf32,
            }
        return facts

    # -- signals ----------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        def note(number, _frame):
            if number == self.signal == signal.SIGINT:  # who presses Ctrl-C twice does not want to wait for the step
                raise KeyboardInterrupt
            self.signal = number

        self._old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def _release_signals(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _stop_wanted(self) -> int:
        """The signal that any rank received, agreed on by all, so that they stop at the same step."""
        if self.world == 1:
            return self.signal
        flag = torch.tensor([self.signal], device=self.device)
        return int(self.accelerator.gather(flag).max())


def _json_numbers(values: dict[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _sharding(task: Task) -> FullyShardedDataParallelPlugin:
    """FSDP2 with the network's repeated blocks as units. Weights stay in float32; autocast decides what is computed in."""
    names = {type(part).__name__ for part in task.backbone.network.modules()}
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(name for name in names if name.endswith(BLOCKS)),
        reshard_after_forward=True,
        state_dict_type="FULL_STATE_DICT",
        mixed_precision_policy=MixedPrecisionPolicy(),
    )
