"""A dry run: a few real steps, nothing written, and what the whole recipe would take."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from itertools import islice
from typing import Any

import numpy as np
import torch

from carina.progress import clock
from carina.training.engine import Engine
from carina.training.states import optimizer_tensors, task_tensors

STEPS = 5
WATTS_PER_THREAD = 10.0  # of a server CPU under load, with its share of memory; said to be assumed wherever it is used


def gpu_watts(device: torch.device) -> float | None:
    """What this GPU draws now, by nvidia-smi; None where it cannot be asked."""
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    words = ["nvidia-smi", "-i", identity, "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(words, capture_output=True, text=True, timeout=20)
        return float(asked.stdout.split()[0])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return None  # no nvidia-smi, one that hangs, or [N/A] of a card that does not tell


def watts(engine: Engine) -> tuple[float, str]:
    """Power of all ranks in watts, and how it is known."""
    if engine.device.type == "cuda":
        measured = gpu_watts(engine.device)
        if measured is not None:
            return measured * engine.world, "measured on this process's GPU in its last steps, times the GPUs"
        return 0.0, "unknown: nvidia-smi does not tell"
    threads = engine.settings.threads * engine.world
    return threads * WATTS_PER_THREAD, f"assumed {WATTS_PER_THREAD:g} W a CPU thread"


def forecast(engine: Engine) -> dict[str, Any]:
    """Memory, speed, time, energy and disk of the whole recipe, from a few steps of it on every scale."""
    plan = engine.plan
    firsts: dict[int, int] = {}
    for step in range(plan.steps):
        firsts.setdefault(plan.scale(step * plan.accumulate), step)
    durations: dict[int, list[float]] = {scale: [] for scale in firsts}
    power = (0.0, "")
    for first in firsts.values():
        for step, pieces in islice(engine.batches.from_step(first), STEPS):
            began = time.perf_counter()
            with engine.memory_told():
                engine.step(step, pieces)
                if engine.device.type == "cuda":
                    torch.cuda.synchronize(engine.device)
            durations[pieces[0].scale].append(time.perf_counter() - began)
            power = watts(engine)  # right after a step: the card's figure is an average over the last moments
    # the first step of a scale also builds what later ones reuse
    per_scale = {scale: float(np.median(times[1:] or times)) for scale, times in durations.items()}
    each = float(np.mean(list(per_scale.values())))  # every plan gives each scale its equal share
    # ru_maxrss counts kilobytes on Linux and bytes on macOS
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = torch.cuda.max_memory_allocated(engine.device) if engine.device.type == "cuda" else resident
    tensors = [*task_tensors(engine.task).values(), *optimizer_tensors(engine.optimizer.optimizer).values()]
    state = sum(v.numel() * v.element_size() for v in tensors)
    settings, steps = engine.settings, plan.steps
    kept = settings.keep_checkpoints + 1 + (steps // settings.keep_every if settings.keep_every else 0)
    seconds = each * steps
    return {
        **engine.machine(),
        "steps": steps,
        "images_per_second": round(plan.batch_size / each, 1),
        "seconds_per_step": round(each, 4),
        "seconds_per_step_by_scale": {str(scale): round(value, 4) for scale, value in sorted(per_scale.items())},
        "hours": round(seconds / 3600, 4),
        "time": clock(seconds),
        "memory_gib": round(memory / 2**30, 3),
        "energy_kwh": round(power[0] * seconds / 3.6e6, 5),
        "energy_basis": power[1],
        "checkpoint_mib": round(state / 2**20, 1),
        "disk_mib": round(state * kept / 2**20, 1),
        "learning_rate": engine.peak,
    }
