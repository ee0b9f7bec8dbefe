"""Prepare through the real command, killed without warning and given again: nothing is lost, nothing done twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from carina.draws import hash64
from carina.imaging.phantom import phantom
from carina.intake.keys import load_key

pytestmark = pytest.mark.slow

SHARD, SHARDS = 20, 5
FILES = SHARD * SHARDS

# Python imports a module of this name in every process that it starts, so the workers are watched too. Shards are made
# small, every file that is read is written down, and the process group dies at the given rename, half done.
WATCH = """
import importlib.util, os, signal, sys

def small_shards(module):
    module.SHARD_SIZE = int(os.environ["WATCH_SHARD"])

def logged(module):
    read = module.prepare_file
    def prepare_file(item, settings):
        with open(os.environ["WATCH_LOG"], "a") as log:
            log.write(item.relative + "\\n")
        return read(item, settings)
    module.prepare_file = prepare_file

class Watch:
    patches = {"carina.data.store": small_shards, "carina.intake.images": logged}
    def find_spec(self, name, path=None, target=None):
        patch = self.patches.pop(name, None)
        spec = patch and importlib.util.find_spec(name)
        if spec:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), patch(module))
        return spec

sys.meta_path.insert(0, Watch())
replace, renames = os.replace, []

def counted(source, target):
    if str(source).endswith(".tmp"):
        renames.append(target)
        with open(os.environ["WATCH_LOG"] + ".renames", "a") as log:
            log.write(os.path.basename(target) + "\\n")
        if len(renames) == int(os.environ.get("WATCH_KILL", 0)):
            os.killpg(os.getpgrp(), signal.SIGKILL)
    replace(source, target)

os.replace = counted
"""


class Prepare:
    """The command on one folder, started, killed and given again; knows which files each call has read."""

    def __init__(self, folder: Path):
        self.folder, self.images, self.log = folder, folder / "images", folder / "read.txt"
        self.images.mkdir(parents=True)
        for number in range(FILES):
            image = phantom(5, number // 2, image=number % 2, size=64).image
            cv2.imwrite(
                str(self.images / f"p{number // 2:03d}_{number:03d}.png"), np.round(image * 255).astype(np.uint8)
            )
        # Two that are left out: rejected files belong to finished shards as well.
        (self.images / "p001_002.png").write_bytes(b"")
        (self.images / "p040_080.png").write_text("no picture")
        self.names = sorted(path.name for path in self.images.iterdir())
        (folder / "watch").mkdir()
        (folder / "watch" / "sitecustomize.py").write_text(WATCH)

    def start(self, out: Path, kill_at: int = 0) -> subprocess.Popen:
        self.log.write_text("")
        self.log.with_name("read.txt.renames").write_text("")
        words = ["prepare", str(self.images), f"out={out}", "scales=[32,48]", "workers=2", r"patient_regex=p\d+"]
        watch = {"WATCH_LOG": self.log, "WATCH_SHARD": SHARD, "WATCH_KILL": kill_at}
        path = os.pathsep.join([str(self.folder / "watch"), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [sys.executable, "-m", "carina", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in watch.items()}},
        )

    def finish(self, out: Path, kill_at: int = 0) -> int:
        process = self.start(out, kill_at)
        _, said = process.communicate(timeout=120)
        assert process.returncode == (-signal.SIGKILL if kill_at else 0), said
        return process.returncode

    def read(self) -> list[str]:
        """The files that the last call has read."""
        return self.log.read_text().split()

    def renames(self) -> list[str]:
        return self.log.with_name("read.txt.renames").read_text().split()

    def finished(self, out: Path) -> set[str]:
        """The files of shards that are whole: a shard's part of the table is written last."""
        if (out / "store.json").exists():
            return set(self.names)
        shards = [int(part.stem.split("-")[1]) for part in (out / "parts").glob("rows-*.parquet")]
        return {name for shard in shards for name in self.names[shard * SHARD : (shard + 1) * SHARD]}


def digest(store: Path) -> dict[str, bytes]:
    return {p.relative_to(store).as_posix(): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The command on five shards, what an uninterrupted run has written, how long it took, and its renames."""
    load_key(None)  # made once, so that every run has the same renames
    prepare = Prepare(tmp_path_factory.mktemp("killed"))
    out, began = prepare.folder / "whole", time.monotonic()
    prepare.finish(out)
    seconds, bytes_ = time.monotonic() - began, digest(out)
    assert {f"images/{scale}/{shard:05d}.arrow" for scale in (32, 48) for shard in range(SHARDS)} <= set(bytes_)
    assert sorted(prepare.read()) == prepare.names
    renames = prepare.renames()
    prepare.finish(out)
    assert prepare.read() == [], "a finished store was read again"
    assert digest(out) == bytes_
    return prepare, bytes_, seconds, renames


def test_killed_at_ten_random_moments_the_store_is_the_same_and_nothing_is_done_twice(whole):
    prepare, bytes_, seconds, _ = whole
    random = np.random.Generator(np.random.Philox(key=hash64("killed at random moments")))
    kills, stores, out = 0, 0, prepare.folder / "killed-0"
    for _ in range(40):
        if kills == 10:
            break
        before = prepare.finished(out)
        process = prepare.start(out)
        try:
            process.communicate(timeout=float(random.uniform(0, seconds)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        assert not before & set(prepare.read()), "a finished shard was read again"
        if process.returncode == 0:
            assert digest(out) == bytes_
            stores += 1
            out = prepare.folder / f"killed-{stores}"
        else:
            assert process.returncode == -signal.SIGKILL
            assert not (out / "store.json").exists() or digest(out).items() >= bytes_.items()
    assert kills == 10
    before = prepare.finished(out)
    prepare.finish(out)
    assert not before & set(prepare.read())
    assert digest(out) == bytes_


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_killed_between_writing_and_naming_a_file(whole, share):
    """The worst moments: the plan, a shard, a part of the table or store.json lies there under its temporary name."""
    prepare, bytes_, _, renames = whole
    moment = 1 + round(share * (len(renames) - 1))
    out = prepare.folder / f"renamed-{moment}"
    prepare.finish(out, kill_at=moment)
    assert prepare.renames() == renames[:moment]
    before = prepare.finished(out)
    assert before or share < 0.3
    prepare.finish(out)
    assert not before & set(prepare.read())
    assert sorted(before | set(prepare.read())) == prepare.names
    assert digest(out) == bytes_
    settings = Path(os.environ["XDG_CONFIG_HOME"])
    assert not [path for path in settings.rglob("*") if path.suffix == ".tmp" or "unfinished" in path.name]
