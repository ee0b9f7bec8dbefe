"""Publishing as a stranger meets it: a hub on the loopback, fresh processes that load by timm, transformers or onnxruntime
alone, and carina by name. benchmarks/strangers.py does the same in environments of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from carina.errors import CarinaError
from carina.files import read_json
from carina.imaging.phantom import phantom
from carina.models.backbones import backbone_record, load_backbone
from carina.models.fetch import fetched
from carina.models.predictor import load_predictor
from carina.publish import publish

SIZE = 64  # of the backbone, in pixels


@pytest.fixture
def hub():
    path = Path(__file__).parents[1] / "benchmarks" / "loopback.py"
    spec = importlib.util.spec_from_file_location("loopback", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.serving() as server:
        yield server


@pytest.fixture(scope="module")
def classified(pretrained, phantom_store, tmp_path_factory):
    from carina.finetune.run import finetune

    out = tmp_path_factory.mktemp("runs") / "classified"
    given = {
        "backbone": str(pretrained),
        "store": str(phantom_store),
        "labels": ["Effusion", "abnormal"],
        "scale": SIZE,
    }
    finetune("classify", {**given, "out": str(out), "mode": "frozen", "threads": 1, "wandb": "off"}, quiet=True)
    return out


def fresh(code: str, without: str, *words, env=None) -> dict[str, np.ndarray]:
    """What a new process, in which the packages `without` cannot be imported, prints as JSON."""
    code = f"import sys; sys.modules |= dict.fromkeys({without.split()})\n" + code
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, **(env or {})})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name: np.array(values) for name, values in json.loads(done.stdout.splitlines()[-1]).items()}


BY_TIMM_AND_TRANSFORMERS = """
import json, numpy as np, timm, torch
from transformers import AutoModel, AutoModelForImageClassification
backbone, predictor, images = sys.argv[1:]
x = torch.from_numpy(np.load(images))
def normalized(config):
    mean, std = (torch.tensor(config[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
    return (x - mean) / std
found = {}
with torch.no_grad():
    for name, repo in (("features", backbone), ("logits", predictor)):
        m = timm.create_model("hf-hub:" + repo, pretrained=True).eval()
        found["timm " + name] = m(normalized(m.pretrained_cfg)).tolist()
    m = AutoModel.from_pretrained(backbone).eval()
    found["transformers features"] = m(normalized(m.config.pretrained_cfg)).pooler_output.tolist()
    m = AutoModelForImageClassification.from_pretrained(predictor).eval()
    found["transformers logits"] = m(normalized(m.config.pretrained_cfg)).logits.tolist()
print(json.dumps(found))
"""
BY_ONNX = """
import json, numpy as np, onnxruntime
from huggingface_hub import hf_hub_download
s = onnxruntime.InferenceSession(hf_hub_download(sys.argv[1], "model.onnx"))
print(json.dumps({"features": s.run(None, {"image": np.load(sys.argv[2])})[0].tolist()}))
"""


def radiographs() -> np.ndarray:
    return np.stack([phantom(1, number, size=SIZE).image for number in range(3)])[:, None].astype(np.float32)


@pytest.fixture
def images(tmp_path):
    np.save(tmp_path / "images.npy", radiographs())
    return tmp_path / "images.npy"


def expected(run) -> np.ndarray:
    with torch.no_grad():
        return load_backbone(str(run)).eval()(torch.from_numpy(radiographs())).numpy()


@pytest.mark.slow
def test_a_killed_upload_goes_on_and_strangers_and_carina_load_by_name(
    hub, carina, pretrained, classified, phantom_store, images, tmp_path
):
    """The whole way through the real commands: published, killed, gone on with, loaded without carina, and by name in
    pretrain, finetune, embed and predict."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("transformers")
    env, out = hub.environment(tmp_path / "home"), tmp_path / "out"
    hub.hold = 1
    words = ["publish", str(pretrained), "repo=org/backbone", "license=mit", f"out={out}", "onnx=true", "--json"]
    running = subprocess.Popen([sys.executable, "-m", "carina", *words], env={**os.environ, **env},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    assert hub.stuck.wait(300)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert hub.commits == 0 and len(hub.objects) == 1, "nothing is visible of a half upload"
    there, hub.hold = set(hub.objects), 10**6
    hub.puts.clear()
    told = json.loads(carina(*words, env=env).stdout)
    assert hub.puts and there.isdisjoint(hub.puts), "what had arrived was not sent again"
    assert hub.commits == 1 and hub.private and set(hub.repos["org/backbone"]) == set(told["files"])
    assert set(told["loads_back"]) == {"timm", "transformers", "onnxruntime", "carina"}
    assert "published backbone" in carina("inspect", out).stdout
    carina("publish", classified, "repo=org/predictor", "license=mit", f"out={tmp_path / 'p'}", "onnx=false", env=env)

    want = expected(pretrained)
    found = fresh(BY_TIMM_AND_TRANSFORMERS, "carina", "org/backbone", "org/predictor", images, env=env)
    found |= fresh(BY_ONNX, "carina torch timm transformers", "org/backbone", images, env=env)
    scores = load_predictor(classified).scores({SIZE: torch.from_numpy(radiographs())})
    assert np.ptp(scores) > 0.01 and len(found) == 5
    for name, values in found.items():
        wanted = scores if name.endswith("logits") else want
        values = 1 / (1 + np.exp(-values)) if name.endswith("logits") else values
        np.testing.assert_allclose(values, wanted, atol=1e-5, err_msg=name)

    small = ["scales=[32]", "steps=2", "batch_size=8", "threads=1", "wandb=off"]
    begun, store = tmp_path / "continued", f"store={phantom_store}"
    carina("pretrain", "debug/moco_anatpaste", store, f"out={begun}", "init=hub:org/backbone", *small, env=env)
    assert read_json(begun / "backbone" / "carina.json")["init"] == "hub:org/backbone"
    given = ["backbone=hub:org/backbone", "labels=[Effusion]", f"scale={SIZE}", "threads=1", "wandb=off"]
    carina("finetune", "classify", *given, store, f"out={tmp_path / 'f'}", env=env)
    assert read_json(tmp_path / "f" / "predictor" / "predictor.json")["pretraining"]["pretexts"]
    for name, run in (("hub", "hub:org/backbone"), ("run", pretrained)):
        carina("embed", run, phantom_store, f"out={tmp_path / name}.parquet", env=env)
    assert (tmp_path / "hub.parquet").read_bytes() == (tmp_path / "run.parquet").read_bytes()
    np.save(tmp_path / "x.npy", (radiographs()[0, 0] * 255).astype(np.uint8))
    by_name, by_run = (
        json.loads(carina("predict", run, tmp_path / "x.npy", "--json", env=env).stdout)["predictions"][0]["scores"]
        for run in ("hub:org/predictor", classified)
    )
    assert by_name == by_run and set(by_name) == {"Effusion", "abnormal"}


def test_a_predictor_loads_back_as_timm_transformers_and_graph(classified, tmp_path):
    result = publish(str(classified), {"repo": "org/name", "out": str(tmp_path / "out")}, dry_run=True, quiet=True)
    assert result["uploaded"] is None and result["kind"] == "classify"
    assert set(result["loads_back"]) >= {"timm", "carina"} and max(result["loads_back"].values()) < 1e-4
    info = read_json(tmp_path / "out" / "predictor.json")
    assert info["pretraining"]["pretexts"] and info["data"]["labels"]["Effusion"]["positive"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "| Effusion |",
        "Pretraining of the backbone",
        "MoCo v2",
        "backbone=hub:org/name",
        "library_name: timm",
    ):
        assert text in card, text


def test_a_name_on_the_hub_stands_wherever_a_folder_may(monkeypatch, pretrained, classified, tmp_path):
    import huggingface_hub

    folders, calls = {}, []
    for name, run in (("org/backbone", pretrained), ("org/predictor", classified)):
        folders[name] = tmp_path / name.replace("/", "-")
        given = {"repo": name, "out": str(folders[name]), "onnx": False}
        monkeypatch.setattr("carina.models.hub.load_back", lambda *_: {})
        publish(str(run), given, dry_run=True, quiet=True)

    def download(name, revision=None, allow_patterns=None):
        calls.append((name, revision))
        return str(folders[name])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fetched.cache_clear()
    assert load_backbone(str(pretrained)).spec.name and load_predictor(classified) and calls == []
    hub = load_backbone("hub:org/backbone@v1", one_channel=True)
    assert calls == [("org/backbone", "v1")] and hub.spec.origin == load_backbone(str(pretrained)).spec.origin
    assert backbone_record("hub:org/backbone")["pretexts"] == backbone_record(str(pretrained))["pretexts"]
    for one in (load_backbone("hub:org/predictor"), load_backbone(str(classified))):
        assert torch.equal(
            one.eval()(torch.ones(1, 1, 32, 32)), load_backbone(str(pretrained)).eval()(torch.ones(1, 1, 32, 32))
        )
    images = {SIZE: torch.from_numpy(radiographs())}
    by_name, by_folder = (load_predictor(run).scores(images) for run in ("hub:org/predictor", classified))
    np.testing.assert_array_equal(by_name, by_folder)
    (folders["org/backbone"] / "config.json").write_text("{}")
    fetched.cache_clear()
    with pytest.raises(CarinaError, match=r"config.json in .* is not what was published"):
        load_backbone("hub:org/backbone")
    with pytest.raises(CarinaError, match="not of the form hub:ORG/NAME"):
        load_backbone("hub:name")
    fetched.cache_clear()


def test_a_hub_that_cannot_be_reached_is_a_sentence(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    fetched.cache_clear()
    with pytest.raises(CarinaError, match=r"hub:org/name could not be fetched \(ConnectionError\)"):
        load_backbone("hub:org/name")


def test_wandb_gets_tables_and_a_reference_but_no_content(monkeypatch, pretrained, tmp_path):
    import shutil

    monkeypatch.setattr("carina.models.hub.load_back", lambda *_: {})
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    run = shutil.copytree(pretrained, tmp_path / "run")
    figure = {"value": 0.812345, "low": 0.7, "high": 0.9}
    row = {"label": "Effusion", "auroc": figure, "ap": figure, "positives": 10, "n": 90, "note": ""}
    metrics = {"kind": "classify", "mode": "frozen", "split": "testing", "synthetic": True, "patients": 9, "table": [row],
               "labels_used": "9 patients", "overlap_sentence": "None was seen."}  # fmt: skip
    (run / "evaluations" / "testing").mkdir(parents=True)
    (run / "evaluations" / "testing" / "metrics.json").write_text(json.dumps(metrics))
    given = {"repo": "org/name", "out": str(tmp_path / "out"), "onnx": False, "wandb": "offline"}
    publish(str(run), given, dry_run=True, quiet=True)
    assert "0.812" in (tmp_path / "out" / "README.md").read_text()

    def written() -> bytes:
        files = [p for folder in (run / "wandb", tmp_path / "data") for p in folder.rglob("*")]
        return b"".join(p.read_bytes() for p in files if p.is_file() and not p.is_symlink())

    wanted, deadline = (b"0.812345", b"hf://org/name", b"evaluation testing"), time.monotonic() + 60
    while not all(text in written() for text in wanted) and time.monotonic() < deadline:
        time.sleep(0.2)  # its service writes on after the run was finished
    data = written()
    assert all(text in data for text in wanted)
    weights = (run / "backbone" / "model.safetensors").read_bytes()[-4096:]
    views = run / "views.png"
    assert weights not in data and str(tmp_path / "out").encode() not in data
    assert not views.is_file() or views.read_bytes()[-1000:] not in data
