"""Tensors on disk: whole, or not there."""

from __future__ import annotations

import errno
import resource
import stat
from pathlib import Path

import pytest
import torch

from carina.models.checkpoints import load_tensors, save_tensors


def test_what_is_saved_comes_back_whatever_memory_it_shares(tmp_path):
    torch.manual_seed(0)
    table = torch.randn(6, 8)
    given = {
        "whole": table,
        "again": table,
        "rows": table[2:4],
        "columns": table[:, 3:5],
        "turned": table.T,
        "repeated": table[:1].expand(4, 8),
        "parameter": torch.nn.Parameter(table[0]),
        "none": torch.empty(0, 3),
        "none again": torch.empty(2, 0),
        "number": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "half": table.bfloat16(),
    }
    save_tensors(tmp_path / "x.safetensors", given)
    found = load_tensors(tmp_path / "x.safetensors")
    assert found.keys() == given.keys()
    for key, value in given.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    """A limit on the size of files stands for a full disk: the system says no in the middle of the writing."""
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.ones(3)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OSError) as raised:
            save_tensors(path, {"x": torch.ones(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(load_tensors(path)["x"], torch.ones(3))


def most_resident() -> int:
    """The largest resident set since it was last reset, in kB (Linux)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmHWM"].split()[0])


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the largest resident set is reset on Linux only"
)
def test_saving_takes_no_second_copy(tmp_path):
    values = {"x": torch.ones(1 << 24)}  # 64 MB
    save_tensors(tmp_path / "small.safetensors", {"x": torch.ones(3)})
    Path("/proc/self/clear_refs").write_text("5")
    before = most_resident()
    save_tensors(tmp_path / "x.safetensors", values)
    assert most_resident() - before < 1 << 14  # 16 MB
