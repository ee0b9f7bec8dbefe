import functools
import hashlib
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from carina.data import features as module
from carina.data.batches import in_order
from carina.data.features import read_all, weights_digest
from carina.data.store import select
from carina.errors import CarinaError
from carina.models.backbones import random_backbone, resize_images

CPU = torch.device("cpu")


def pooled(backbone, images):
    return [backbone(images)]


def two_stages(backbone, images):
    return backbone.network.forward_intermediates(
        backbone.normalize(images), indices=[1, 2], intermediates_only=True, output_fmt="NCHW"
    )


def directly(backbone, selection, read, scale=32, size=None):
    """One image at a time, in evaluation mode."""
    backbone.eval()
    rows = []
    with torch.no_grad():
        for _, images in in_order(selection, scale, CPU, batch_size=1):
            rows.append([part.numpy() for part in read(backbone, resize_images(images, size or backbone.spec.size))])
    return [np.concatenate(part) for part in zip(*rows)]


class Counted:
    def __init__(self, read):
        self.read, self.images = read, 0

    def __call__(self, backbone, images):
        self.images += len(images)
        return self.read(backbone, images)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "in_order", functools.partial(in_order, batch_size=16))


@pytest.fixture(scope="module")
def backbone():
    return random_backbone("resnet10t", 32, 0)


def test_rows_come_in_the_order_asked_for_and_are_read_once(phantom_store, backbone, tmp_path, small_batches):
    everything = select(phantom_store)
    rows = np.random.default_rng(0).permutation(len(everything))[:30]
    some = everything.where(rows)
    for name, read in (("pooled", pooled), ("stages 2 3", two_stages)):
        expected, counted = directly(backbone, some, read), Counted(read)
        backbone.train()  # rests all the same
        (plain, *_), cached = (
            read_all(backbone, some, 32, counted, name, cache=cache, device=CPU) for cache in (None, tmp_path)
        )
        assert counted.images == 30 + len(everything)
        again = read_all(backbone, everything.where(rows[::-1]), 32, counted, name, cache=tmp_path, device=CPU)
        assert counted.images == 30 + len(everything)
        np.testing.assert_allclose(plain, expected[0], atol=1e-4)
        for ours, theirs, turned in zip(cached, expected, again):
            assert ours.dtype == np.float32 and len(cached) == len(expected)
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
            np.testing.assert_array_equal(ours, turned[::-1])


def test_the_file_holds_all_rows_in_the_order_of_image_id_and_no_identifier(phantom_store, backbone, tmp_path):
    everything = select(phantom_store)
    read_all(backbone, everything.split("train"), 32, pooled, "pooled", cache=tmp_path, device=CPU)
    (file,) = tmp_path.glob("*.safetensors")
    order = np.argsort(everything.table["image_id"].to_numpy())
    (tensor,) = load_file(file).values()
    np.testing.assert_allclose(tensor, directly(backbone, everything.where(order), pooled)[0], atol=1e-4)
    data = file.read_bytes()
    for column in ("image_id", "patient_id", "study_id"):
        assert not any(str(value).encode() in data for value in everything.table[column])
    assert {f.name for f in tmp_path.iterdir()} == {file.name, "README.txt"}
    assert "data of patients" in (tmp_path / "README.txt").read_text()


def test_whatever_changes_the_values_misses_and_labels_do_not(phantom_store, backbone, tmp_path):
    some = select(phantom_store).split("train")

    def files(network=backbone, scale=32, name="pooled", size=None, selection=some):
        read_all(network, selection, scale, pooled, name, size=size, cache=tmp_path, device=CPU)
        return len(list(tmp_path.glob("*.safetensors")))

    assert files() == 1 == files(size=32) == files(selection=select(phantom_store).split("test", "val"))
    assert files(scale=64) == 2 and files(size=48) == 3 and files(name="other") == 4
    other = random_backbone("resnet10t", 32, 0)
    assert weights_digest(other) == weights_digest(backbone) and files(other) == 4
    with torch.no_grad():
        next(other.network.parameters()).view(-1)[0] += 1e-6
    assert files(other) == 5
    norms = random_backbone("resnet10t", 32, 0)
    next(value for name, value in norms.network.named_buffers() if name.endswith("running_mean"))[0] = 0.1
    assert files(norms) == 6
    assert files(random_backbone("resnet10t", 32, 0, mean=(0.4,))) == 7
    relabelled = tmp_path / "relabelled"
    shutil.copytree(phantom_store, relabelled)
    info = json.loads((relabelled / "store.json").read_text())
    (relabelled / "store.json").write_text(json.dumps(info | {"origins": {}}))
    assert files(selection=select(relabelled).split("train")) == 7
    (relabelled / "store.json").write_text(json.dumps(info | {"store_hash": hashlib.sha256(b"x").hexdigest()[:32]}))
    assert files(selection=select(relabelled).split("train")) == 8


def test_several_stores_have_a_file_each_and_few_rows_none(phantom_store, backbone, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(phantom_store, copy)
    info = json.loads((copy / "store.json").read_text())
    (copy / "store.json").write_text(json.dumps(info | {"store_hash": "0" * 32}))
    both = select([phantom_store, copy])
    rows = np.random.default_rng(1).permutation(len(both))
    cache = tmp_path / "cache"
    found = read_all(backbone, both.where(rows), 32, pooled, "pooled", cache=cache, device=CPU)[0]
    np.testing.assert_allclose(found, directly(backbone, both.where(rows), pooled)[0], atol=1e-4)
    assert len(list(cache.glob("*.safetensors"))) == len(set(both.table["_store"]))
    counted = Counted(pooled)
    few = select(phantom_store).where(np.array([5, 2]))
    found = read_all(backbone, few, 64, counted, "pooled", cache=cache, device=CPU)[0]
    assert counted.images == 2 and len(list(cache.glob("*.safetensors"))) == len(set(both.table["_store"]))
    np.testing.assert_allclose(found, directly(backbone, few, pooled, 64)[0], atol=1e-4)


def test_a_stopped_run_leaves_nothing_and_a_damaged_file_is_said(phantom_store, backbone, tmp_path, small_batches):
    everything = select(phantom_store)

    def fails(network, images):
        raise RuntimeError("stopped")

    def stops_later(network, images):
        if stops_later.seen:
            raise RuntimeError("stopped")
        stops_later.seen = True
        return pooled(network, images)

    stops_later.seen = False
    for read in (fails, stops_later):
        with pytest.raises(RuntimeError, match="stopped"):
            module.read_all(backbone, everything, 32, read, "pooled", cache=tmp_path, device=CPU)
        assert [f.name for f in tmp_path.iterdir()] == ["README.txt"]
    read_all(backbone, everything, 32, pooled, "pooled", cache=tmp_path, device=CPU)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CarinaError, match="delete it"):
        read_all(backbone, everything, 32, pooled, "pooled", cache=tmp_path, device=CPU)


PROCESS = """
import sys, torch
torch.set_num_threads(1)
from carina.data.features import read_all
from carina.data.store import select
from carina.models.backbones import random_backbone
found = read_all(random_backbone("resnet10t", 32, 0), select(sys.argv[1]), 32, lambda b, i: [b(i)], "pooled",
                 cache=sys.argv[2], device=torch.device("cpu"))
print(found[0].sum())
"""


@pytest.mark.slow
def test_two_processes_may_fill_one_cache(phantom_store, tmp_path):
    started = [
        subprocess.Popen([sys.executable, "-c", PROCESS, phantom_store, tmp_path], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = {process.communicate(timeout=300)[0] for process in started}
    assert all(process.returncode == 0 for process in started) and len(results) == 1
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_the_second_reading_is_a_matter_of_the_disk(phantom_store, tmp_path):
    network, everything, seconds = random_backbone("resnet18", 64, 0), select(phantom_store), []
    for _ in range(2):
        began = time.perf_counter()
        read_all(network, everything, 64, pooled, "pooled", cache=tmp_path, device=CPU)
        seconds.append(time.perf_counter() - began)
    assert seconds[1] < seconds[0] / 2
