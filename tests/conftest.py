"""What every test may use: the real radiographs, a private configuration folder, the real command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real radiographs; skipped when absent, failed when CARINA_REQUIRE_DATA=1."""
    folder = Path(os.environ.get("CARINA_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "SOURCES.md").is_file():
        message = f"no real radiographs at {folder}; set CARINA_TEST_DATA"
        if os.environ.get("CARINA_REQUIRE_DATA") == "1":
            pytest.fail(message + " (CARINA_REQUIRE_DATA=1)")
        pytest.skip(message)
    return folder


@pytest.fixture(autouse=True, scope="session")
def _own_settings(tmp_path_factory):
    """Keys and path tables go to a folder of the test session, never to the developer's own."""
    settings = tmp_path_factory.mktemp("config")
    os.environ["XDG_CONFIG_HOME"] = str(settings)
    # patients are dealt by the keyed hash: with a key of its own every session would test other splits
    (settings / "carina").mkdir()
    (settings / "carina" / "key").write_text("the one key of all test sessions")
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CARINA_TEST_CUDA", "")
    os.environ.pop("CARINA_KEY", None)


@pytest.fixture(scope="session")
def carina():
    """Run the real command: ``carina("prepare", folder, "out=store")``; checks the exit code and returns the process."""

    def call(*arguments, code: int = 0, env: dict | None = None, timeout: float = 600):
        done = subprocess.run(
            [sys.executable, "-m", "carina", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **(env or {})},
        )
        assert done.returncode == code, f"exit {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
        if code == 2:
            assert "Traceback" not in done.stderr, done.stderr
        return done

    return call


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory) -> Path:
    """Synthetic radiographs of 48 patients, DICOM and PNG, with their table labels.csv."""
    from carina.data.phantoms import write_phantoms

    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, patients=48, seed=3, size=128, file_format="mixed")
    return folder


PHANTOM_COLUMNS = {
    "patient": "patient_id",
    "study": "study_id",
    "view": "view",
    "sex": "sex",
    "age": "age",
    "labels": ["Opacity", "Nodule", "Effusion", "Cardiomegaly", "Pneumothorax", "abnormal"],
    "lesions": {"Opacity": "mask_Opacity", "Nodule": "mask_Nodule"},
    "synthetic": True,
    "source": "phantoms",
}


@pytest.fixture(scope="session")
def phantom_store(phantom_folder, tmp_path_factory) -> Path:
    """Those radiographs prepared at 32 and 64 px."""
    from carina.intake.prepare import prepare

    out = tmp_path_factory.mktemp("stores") / "phantoms"
    given = {"out": str(out), "scales": [32, 64], "mask": "lung_mask", "workers": 1, **PHANTOM_COLUMNS}
    prepare(str(phantom_folder / "labels.csv"), given, quiet=True)
    return out


@pytest.fixture(scope="session")
def pretrained(phantom_store, tmp_path_factory) -> Path:
    """A run of debug/moco_anatpaste on them."""
    from carina.pretrain.run import pretrain

    out = tmp_path_factory.mktemp("runs") / "pretrained"
    given = {"store": str(phantom_store), "out": str(out), "steps": 6, "batch_size": 16, "threads": 1}
    pretrain("debug/moco_anatpaste", given, quiet=True)
    return out
