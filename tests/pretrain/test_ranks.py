"""Two gloo ranks with half a batch each against one process with the whole batch: losses, gradients, state."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from carina.pretrain.pretexts import METHODS

SCRIPT = Path(__file__).with_name("ranks.py")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    done = subprocess.run(
        [*launch, "--rdzv_endpoint", "localhost:0", str(SCRIPT), str(folder)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def ranks():
    spec = importlib.util.spec_from_file_location("ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_equal_the_joined_batch(name, two_ranks, ranks):
    first, second = (load_file(two_ranks / f"{name}-{rank}.safetensors") for rank in (0, 1))
    whole = ranks.run(name, 0, 1)
    assert first.keys() == second.keys() == whole.keys()
    assert any(key.startswith("gradient.1.backbone") and value.abs().max() > 0 for key, value in whole.items())
    for key, value in whole.items():
        if key.startswith(("gradient", "loss")):  # Barlow's sum over the dimensions is far from 1, the others near it
            size = max(1.0, whole[f"loss.{key.split('.')[1]}"].item())
            assert (first[key] - value).abs().max() <= 1e-5 * size, key
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, msg=f"{key} differs between the ranks")
    for key in (k for k in whole if k.startswith("state.") and whole[k].is_floating_point()):
        torch.testing.assert_close(first[key], whole[key], rtol=1e-4, atol=1e-5, msg=key)
