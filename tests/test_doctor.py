"""doctor: every state of every line, with the machine's facts given instead of asked for; and the real command."""

from __future__ import annotations

import io
import json
import socket
import sys
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from carina import doctor as module
from carina.doctor import doctor, show


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("doctor touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_whole_of_it_on_this_machine(no_network, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setenv("CARINA_KEY", "another secret of mine")
    result = doctor()
    text = json.dumps(result, allow_nan=False)
    assert "secret" not in text
    names = [check["name"] for check in result["checks"]]
    assert len(names) == len(set(names))
    wanted = {
        "python",
        "cores",
        "memory",
        "disk here",
        "torch",
        "training",
        "faiss",
        "DICOM JPEG-LS",
        "hub token",
        "key",
    }
    assert wanted <= set(names)
    for check in result["checks"]:
        assert check["about"] and check["state"] in ("ok", "warn", "missing")
        assert bool(check["mend"]) == (check["state"] != "ok"), check
    assert result["ok"] == all(check["state"] != "missing" for check in result["checks"])


def test_the_command_shows_every_line_and_the_mend(carina):
    result = json.loads(carina("doctor", "--json").stdout)
    console = Console(width=200, file=io.StringIO())
    console.print(show(result))
    text = console.file.getvalue()
    for check in result["checks"]:
        assert check["name"] in text and check["mend"] in text


def test_precision_is_what_the_engine_would_take():
    from carina.training.engine import best_precision, pick_device

    training = next(check for check in module._torch() if check.name == "training")
    assert f"precision=auto gives {best_precision(pick_device(), 'auto')} " in training.about


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10, 9), "missing"), ((3, 11, 0), "ok"), ((3, 13, 1), "ok"), ((4, 0, 0), "ok")]
)
def test_python(version, state):
    assert module._python(version).state == state


@pytest.mark.parametrize(
    ("text", "usable", "driver", "said"),
    [
        ("2.9, CPU build", False, True, "CPU build cannot use"),
        ("2.9, CUDA 13.0 build", False, True, "torch sees no GPU"),
        ("2.9, CUDA 13.0 build", True, True, ""),
        ("2.9, CPU build", False, False, ""),
    ],
)
def test_a_driver_that_torch_cannot_use_is_noticed(text, usable, driver, said):
    check = module._driver(text, usable, driver)
    assert check.state == ("warn" if said else "ok") and said in check.about


def test_both_builds_of_faiss_are_a_fault_that_is_explained():
    check = module._faiss({"faiss-cpu", "faiss-gpu"})
    assert check.state == "missing" and "overwrote each other" in check.about
    assert check.mend.startswith("pip uninstall -y faiss-cpu faiss-gpu && pip install faiss-")


@pytest.mark.parametrize(("builds", "state"), [(set(), "warn"), ({"faiss-cpu"}, "missing")])
def test_faiss_that_cannot_be_imported(builds, state, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    check = module._faiss(builds)
    assert check.state == state and "carina-cxr[cpu]" in check.mend


def test_without_the_extra_codecs_the_lost_syntaxes_are_named(monkeypatch):
    """The plug-ins that pydicom would miss without pylibjpeg-libjpeg, told by taking them from its table."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    lost = {"JPEG lossless", "JPEG-LS"}
    for name in lost:
        for syntax in module.CODECS[name][0]:
            monkeypatch.setattr(get_decoder(UID(syntax)), "_available", {})
    states = {check.name.removeprefix("DICOM "): check for check in module._codecs()}
    assert {name for name, check in states.items() if check.state == "warn"} == lost
    assert all("carina-cxr[codecs]" in states[name].mend for name in lost)


def test_codec_families_cover_what_pydicom_can_decode():
    from pydicom.pixels.decoders.base import _PIXEL_DATA_DECODERS
    from pydicom.uid import JPEGExtended12Bit, RLELossless

    ours = {syntax for syntaxes, _ in module.CODECS.values() for syntax in syntaxes}
    theirs = {str(syntax) for syntax in _PIXEL_DATA_DECODERS if syntax.is_compressed and syntax.is_encapsulated}
    assert ours == theirs - {str(JPEGExtended12Bit), str(RLELossless)}


def test_absent_packages_and_wandb():
    checks = module._packages({"timm": "1.0", "lightly": None})
    assert checks[-1].state == "missing" and checks[-1].mend == "pip install lightly"
    assert len(module._packages({"timm": "1.0"})) == 1
    assert module._wandb(None).state == "warn" and module._wandb("0.22").state == "ok"


def test_little_disk_or_memory_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    assert module._disk("disk here", tmp_path).mend.endswith("out=")
    assert module._disk("disk for temporary files", tmp_path).mend.endswith("TMPDIR")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * 2**30, available=2**30))
    assert module._memory().state == "warn"


def test_a_token_is_seen_in_the_environment_or_its_file(monkeypatch, tmp_path):
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert module._hub().state == "warn"
    (tmp_path / "token").write_text("hf_x")
    assert module._hub().state == "ok"


def test_a_key_that_others_can_read_is_noticed(monkeypatch, tmp_path):
    monkeypatch.delenv("CARINA_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert "none yet" in module._key().about and not list(tmp_path.iterdir())
    key = tmp_path / "carina" / "key"
    key.parent.mkdir()
    key.write_text("0123456789abcdef")
    key.chmod(0o644)
    assert module._key().state == "warn" and module._key().mend == f"chmod 600 {key}"
    key.chmod(0o600)
    assert module._key().state == "ok"
