"""Publishing as a stranger meets it: a hub on the loopback, fresh processes that load by timm, transformers or onnxruntime
alone, and carina by name."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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

LARGE = (".safetensors", ".onnx")
SIZE = 64  # of the backbone, in pixels


class Hub(ThreadingHTTPServer):
    """As much of the hub's interface as uploads and downloads of one model need; large files by LFS."""

    daemon_threads = True

    def __init__(self):
        self.objects: dict[str, bytes] = {}  # by sha256
        self.files: dict[str, tuple[bytes, str]] = {}  # path -> content, sha256 of large ones
        self.puts: list[str] = []
        self.commits, self.private = 0, True
        self.stuck, self.hold = threading.Event(), 10**6  # from this PUT on nothing is answered
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def environment(self, home) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_x", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value, code=200, headers=None):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Length": str(len(data)), "X-Repo-Commit": "c" * 40, **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        path, files = self.path.split("?")[0], self.server.files
        if found := re.fullmatch(r"/org/name/resolve/[^/]+/(.+)", path):
            if found[1] not in files:
                return self.answer({"error": "x"}, 404, {"X-Error-Code": "EntryNotFound"})
            data, _ = files[found[1]]
            return self.answer(data, headers={"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})
        if re.fullmatch(r"/api/models/org/name/tree/.+", path):
            return self.answer([self._entry(name, *files[name]) for name in sorted(files)])
        if re.fullmatch(r"/api/models/org/name(/revision/.+)?", path):
            names = [{"rfilename": name} for name in sorted(files)]
            about = {"id": "org/name", "private": self.server.private, "sha": "c" * 40, "siblings": names, "tags": []}
            return self.answer(about)
        return self.answer({"error": "x"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    @staticmethod
    def _entry(name, data, oid):
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"lfs": {"oid": oid, "size": len(data), "pointerSize": 130}} if oid else {}
        return {"type": "file", "path": name, "size": len(data), "oid": blob, **lfs}

    def do_POST(self):
        path, data = self.path.split("?")[0], self.body()
        if path == "/api/repos/create":
            wish = json.loads(data)  # newer clients say visibility, older ones private
            self.server.private = wish.get("private", wish.get("visibility") == "private")
            return self.answer({"url": f"{self.server.url}/org/name", "name": "org/name"})
        if path.startswith("/api/models/org/name/preupload/"):
            kinds = [{"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if f["path"].endswith(LARGE) else
                      "regular"} for f in json.loads(data)["files"]]  # fmt: skip
            return self.answer({"files": kinds})
        if path == "/org/name.git/info/lfs/objects/batch":
            objects = []
            for one in json.loads(data)["objects"]:
                href = {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}
                objects.append(one if one["oid"] in self.server.objects else {**one, "actions": href})
            return self.answer({"transfer": "basic", "objects": objects})
        if path.startswith("/api/models/org/name/commit/"):
            for line in data.splitlines():
                entry = json.loads(line)
                kind, value = entry["key"], entry["value"]
                if kind == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"]), ""
                elif kind == "lfsFile":
                    self.server.files[value["path"]] = self.server.objects[value["oid"]], value["oid"]
                elif kind == "deletedFile":
                    del self.server.files[value["path"]]
            self.server.commits += 1
            return self.answer({"commitUrl": f"{self.server.url}/org/name/commit/{'c' * 40}", "commitOid": "c" * 40})
        return self.answer({} if path == "/api/validate-yaml" else {"error": "x"},
                           200 if path == "/api/validate-yaml" else 404)  # fmt: skip

    def do_PUT(self):
        oid = self.path.rsplit("/", 1)[1]
        data = self.body()
        self.server.puts.append(oid)
        if len(self.server.puts) > self.server.hold:
            self.server.stuck.set()
            self.close_connection = True
            return threading.Event().wait(60)
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.objects[oid] = data
        return self.answer(b"")


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


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


def fresh(code: str, *words, env=None) -> np.ndarray:
    """What a new process without carina prints as JSON."""
    code = "import sys; sys.modules['carina'] = None; import json; import numpy as np\n" + code
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, **(env or {})})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1]))


IMAGES = "x = np.load(sys.argv[2])\n"
BY_TIMM = (
    IMAGES
    + """
import timm, torch
m = timm.create_model(sys.argv[1], pretrained=True).eval()
mean, std = (torch.tensor(m.pretrained_cfg[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
print(json.dumps(m((torch.from_numpy(x) - mean) / std).detach().tolist()))
"""
)
BY_TRANSFORMERS = (
    IMAGES
    + """
import torch
from transformers import AutoModel
m = AutoModel.from_pretrained(sys.argv[1]).eval()
mean, std = (torch.tensor(m.config.pretrained_cfg[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
print(json.dumps(m((torch.from_numpy(x) - mean) / std).pooler_output.detach().tolist()))
"""
)
BY_ONNX = (
    IMAGES
    + """
sys.modules["torch"] = None
import onnxruntime
from huggingface_hub import hf_hub_download
s = onnxruntime.InferenceSession(hf_hub_download(sys.argv[1], "model.onnx"))
print(json.dumps(s.run(None, {"image": x})[0].tolist()))
"""
)


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
def test_a_stranger_gets_the_same_features_from_the_hub(hub, carina, pretrained, images, tmp_path):
    pytest.importorskip("onnxruntime")
    env = hub.environment(tmp_path / "home")
    words = ["publish", pretrained, "repo=org/name", "license=mit", f"out={tmp_path / 'out'}", "onnx=true", "--json"]
    told = json.loads(carina(*words, env=env).stdout)
    assert set(hub.files) == set(told["files"]) and hub.private and hub.commits == 1
    assert set(told["loads_back"]) == {"timm", "transformers", "onnxruntime", "carina"}
    want = expected(pretrained)
    assert want.shape[1] == load_backbone(str(pretrained)).dimension
    np.testing.assert_allclose(fresh(BY_TIMM, "hf-hub:org/name", images, env=env), want, atol=1e-5)
    np.testing.assert_allclose(fresh(BY_TRANSFORMERS, "org/name", images, env=env), want, atol=1e-5)
    np.testing.assert_allclose(fresh(BY_ONNX, "org/name", images, env=env), want, atol=1e-5)
    told = carina("inspect", tmp_path / "out").stdout
    assert "published backbone" in told


@pytest.mark.slow
def test_a_killed_upload_goes_on_where_it_was(hub, carina, pretrained, tmp_path):
    pytest.importorskip("onnxruntime")
    env = {**os.environ, **hub.environment(tmp_path / "home")}
    hub.hold = 1
    words = ["publish", str(pretrained), "repo=org/name", "license=mit", f"out={tmp_path / 'out'}", "onnx=true"]
    running = subprocess.Popen([sys.executable, "-m", "carina", *words], env=env, stderr=subprocess.DEVNULL)
    assert hub.stuck.wait(300)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert hub.commits == 0 and len(hub.objects) == 1, "nothing is visible of a half upload"
    there, hub.hold = set(hub.objects), 10**6
    hub.puts.clear()
    carina(*words, env=env)
    assert hub.commits == 1 and len(hub.files) == 7
    assert hub.puts and there.isdisjoint(hub.puts), "what had arrived was not sent again"


def test_a_predictor_loads_back_as_timm_transformers_and_graph(classified, images, tmp_path):
    result = publish(str(classified), {"repo": "org/name", "out": str(tmp_path / "out")}, dry_run=True, quiet=True)
    assert result["uploaded"] is None and result["kind"] == "classify"
    assert set(result["loads_back"]) >= {"timm", "carina"} and max(result["loads_back"].values()) < 1e-4
    info = read_json(tmp_path / "out" / "predictor.json")
    assert info["pretraining"]["pretexts"] and info["data"]["labels"]["Effusion"]["positive"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Effusion |" in card and "pretrained (" in card and "backbone=BACKBONE" in card
    logits = fresh(BY_TIMM, f"local-dir:{tmp_path / 'out'}", images)
    want = load_predictor(classified).scores({SIZE: torch.from_numpy(radiographs())})
    assert np.ptp(want) > 0.01
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), want, atol=1e-6)


def test_a_name_on_the_hub_stands_wherever_a_folder_may(monkeypatch, pretrained, classified, tmp_path):
    import huggingface_hub

    from carina.evaluate.predict import predict

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
    np.save(tmp_path / "x.npy", (phantom(1, 1, size=64).image * 255).astype(np.uint8))
    by_name, by_folder = (
        predict(run, [str(tmp_path / "x.npy")], quiet=True) for run in ("hub:org/predictor", str(classified))
    )
    assert by_name["predictions"] == by_folder["predictions"]
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
    files = [p for p in (run / "wandb").rglob("*") if p.is_file() and not p.is_symlink()]
    data = b"".join(p.read_bytes() for p in [*files, *(p for p in (tmp_path / "data").rglob("*") if p.is_file())])
    assert b"0.812345" in data and b"hf://org/name" in data and b"evaluation testing" in data
    weights = (run / "backbone" / "model.safetensors").read_bytes()[-4096:]
    views = run / "views.png"
    assert weights not in data and str(tmp_path / "out").encode() not in data
    assert not views.is_file() or views.read_bytes()[-1000:] not in data
