"""A hub on this machine alone: as much of the interface of huggingface.co as uploads and downloads of models need.

    with serving() as hub:
        subprocess.run(..., env={**os.environ, **hub.environment(home)})

Repositories live in memory and exist from the first commit on; large files go by LFS. Nothing is checked of tokens.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LARGE = (".safetensors", ".onnx")
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """repos: repository -> path -> (content, sha256 of large ones). puts: the large objects sent. From PUT number `hold`
    on nothing is answered, and `stuck` is set."""

    daemon_threads = True

    def __init__(self):
        self.repos: dict[str, dict[str, tuple[bytes, str]]] = defaultdict(dict)
        self.objects: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.commits, self.private = 0, True
        self.stuck, self.hold = threading.Event(), 10**6
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: str | Path) -> dict[str, str]:
        """What makes huggingface_hub talk to this hub; `home` holds its cache."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_x", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}  # fmt: skip


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value, code=200, headers=None):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self):
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            files = self.server.repos.get(found[1], {})
            if found[2] not in files:
                return self.answer({"error": "x"}, 404, {"X-Error-Code": "EntryNotFound"})
            data, _ = files[found[2]]
            return self.answer(data, headers={"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/tree/.+|/revision/.+)?", path):
            files = self.server.repos.get(found[1])
            if files is not None and (found[2] or "").startswith("/tree"):
                return self.answer([self._entry(name, *files[name]) for name in sorted(files)])
            if files is not None:
                names = [{"rfilename": name} for name in sorted(files)]
                return self.answer({"id": found[1], "private": self.server.private, "sha": COMMIT,
                                    "siblings": names, "tags": []})  # fmt: skip
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
            name = f"{wish['organization']}/{wish['name']}" if wish.get("organization") else wish["name"]
            self.server.repos[name]
            return self.answer({"url": f"{self.server.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.answer({})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/.+", path):
            kinds = [{"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if f["path"].endswith(LARGE) else
                      "regular"} for f in json.loads(data)["files"]]  # fmt: skip
            return self.answer({"files": kinds})
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = []
            for one in json.loads(data)["objects"]:
                href = {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}
                objects.append(one if one["oid"] in self.server.objects else {**one, "actions": href})
            return self.answer({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.+", path):
            return self._commit(found[1], data)
        return self.answer({"error": "x"}, 404)

    def _commit(self, repo: str, data: bytes):
        files = self.server.repos[repo]
        for line in data.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"]), ""
            elif kind == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]], value["oid"]
            elif kind == "deletedFile":
                del files[value["path"]]
        self.server.commits += 1
        return self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_PUT(self):
        oid, data = self.path.rsplit("/", 1)[1], self.body()
        self.server.puts.append(oid)
        if len(self.server.puts) > self.server.hold:
            self.server.stuck.set()
            self.close_connection = True
            return threading.Event().wait(60)
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer({"error": "x"}, 400)
        self.server.objects[oid] = data
        return self.answer(b"")
