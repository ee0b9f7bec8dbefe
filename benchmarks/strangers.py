"""What strangers get: environments without carina load what was published, and give the numbers that carina gives.

    python benchmarks/strangers.py [runs=[RUN,...]] [out=FILE.json] [work=FOLDER] [images=16]

A backbone (224 px) and a classifier are trained for a few steps on synthetic radiographs; with those of `runs` they are
published by the real command to a hub on the loopback. Then three environments are made with venv and pip, one after the
other, each deleted when it was used: `pip install timm`, `pip install transformers timm` (its TimmWrapper needs timm),
`pip install onnxruntime` (no torch). In each a few lines that a stranger would write fetch every repository by name and
take `images` images of the network's size, every second one noise, the others synthetic radiographs. Features, or scores
of a classifier, must be those of the run to 1e-5, relative to the largest where that is above 1. Terms of the sources of
`runs` are confirmed for this hub alone, which ends with the script.

It is no test: each environment with torch takes gigabytes from the package index.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from common import console, script
from loopback import Hub, serving
from pydantic import Field
from rich.table import Table
from scipy.special import expit

from carina.data.phantoms import write_phantoms
from carina.errors import CarinaError
from carina.files import folder_size, write_json
from carina.finetune.run import finetune
from carina.imaging.phantom import phantom
from carina.intake.prepare import prepare
from carina.models.backbones import Backbone
from carina.models.export import distance
from carina.models.hub import clauses_of
from carina.models.hub.folder import Artefact, read_artefact
from carina.pretrain.run import pretrain
from carina.recipes import Section

TOLERANCE, SIDE, WATCHED = 1e-5, 224, ("timm", "torch", "transformers", "onnxruntime", "numpy", "huggingface_hub")
TIMM = """
import timm, torch
m = timm.create_model("hf-hub:" + repo, pretrained=True).eval()
mean, std = (torch.tensor(m.pretrained_cfg[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
y = m((torch.from_numpy(x) - mean) / std).detach().numpy()
"""
TRANSFORMERS = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
config = AutoConfig.from_pretrained(repo)
kind = AutoModelForImageClassification if kinds[repo] != "backbone" else AutoModel
m = kind.from_pretrained(repo).eval()
mean, std = (torch.tensor(config.pretrained_cfg[k]).view(1, -1, 1, 1) for k in ("mean", "std"))
y = m((torch.from_numpy(x) - mean) / std)
y = (y.pooler_output if kind is AutoModel else y.logits).detach().numpy()
"""
ONNX = """
import onnxruntime, os, urllib.request
graph = urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/" + repo + "/resolve/main/model.onnx").read()
y = onnxruntime.InferenceSession(graph).run(None, {"image": x})[0]
"""
STRANGERS = {
    "timm": (["timm"], TIMM, ["carina", "transformers", "onnxruntime"]),
    "transformers": (["transformers", "timm"], TRANSFORMERS, ["carina", "onnxruntime"]),
    "onnxruntime": (["onnxruntime"], ONNX, ["carina", "torch", "timm", "transformers"]),
}
AROUND = """
import importlib.metadata, importlib.util, json, sys
import numpy as np
folder, kinds, absent, watched = json.loads(sys.argv[1])
there = [name for name in absent if importlib.util.find_spec(name)]
if there:
    sys.exit("this environment has " + ", ".join(there))
for repo in kinds:
    x = np.load(folder + "/" + repo.replace("/", "-") + ".npy")
{code}
    np.save(folder + "/" + repo.replace("/", "-") + ".found.npy", y)
packages = {{d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}}
print(json.dumps({{name: packages[name] for name in watched if name in packages}}))
"""


class Arguments(Section):
    runs: list[str]
    out: str | None
    work: str | None
    images: Annotated[int, Field(ge=1)]


DEFAULTS = {"runs": [], "out": None, "work": None, "images": 16}


def main(words: list[str] | None = None) -> int:
    return script(words, "strangers.py", __doc__ or "", Arguments, DEFAULTS, run)


def run(arguments: Arguments) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.work) as place, serving() as hub:
        work = Path(place)
        artefacts = {f"org/{name}": (read_artefact(folder), folder) for name, folder in _runs(work, arguments.runs)}
        for repo, (artefact, folder) in artefacts.items():
            _publish(hub, work, repo, artefact, folder)
        want = {repo: _given(work, repo, artefact, arguments.images) for repo, (artefact, _) in artefacts.items()}
        kinds = {repo: artefact.kind for repo, (artefact, _) in artefacts.items()}
        environments = {name: _stranger(hub, work, name, kinds) for name in STRANGERS}
        rows = [
            {"environment": name, "repository": repo, "kind": kinds[repo], "size": found["sizes"][repo],
             "values": list(want[repo].shape), "largest": float(np.abs(want[repo]).max()),
             "differs": distance(found["values"][repo], want[repo])}
            for name, found in environments.items() for repo in kinds
        ]  # fmt: skip
    _show(rows, environments)
    if arguments.out:
        facts = {name: {key: found[key] for key in ("installed", "packages", "seconds", "gigabytes")}
                 for name, found in environments.items()}  # fmt: skip
        write_json(Path(arguments.out), {"tolerance": TOLERANCE, "environments": facts, "rows": rows})
    worst = max(row["differs"] for row in rows)
    if worst > TOLERANCE:
        raise CarinaError(f"a stranger gets other numbers than the run (by {worst:.1e})")


def _runs(work: Path, given: list[str]) -> list[tuple[str, Path]]:
    """A backbone and a classifier, trained for a few steps, and those that were given."""
    write_phantoms(work / "phantoms", patients=24, seed=3, size=256)
    columns = {"patient": "patient_id", "labels": ["Effusion", "abnormal"], "synthetic": True, "source": "phantoms"}
    store, quick = work / "store", {"threads": 1, "wandb": "off"}
    settings = {**columns, "out": str(store), "scales": [SIDE], "workers": 1}
    prepare(str(work / "phantoms" / "labels.csv"), settings, quiet=True)
    steps = {"store": str(store), "scales": [SIDE], "steps": 4, "batch_size": 8, **quick}
    pretrain("debug/moco_anatpaste", {**steps, "out": str(work / "backbone")}, quiet=True)
    learned = {"backbone": str(work / "backbone"), "store": str(store), "labels": ["Effusion", "abnormal"]}
    learned |= {"scale": SIDE, "out": str(work / "classifier"), **quick}
    finetune("classify", learned, quiet=True)
    made = [("backbone", work / "backbone"), ("classifier", work / "classifier")]
    return made + [(Path(folder).name, Path(folder)) for folder in given]


def _publish(hub: Hub, work: Path, repo: str, artefact: Artefact, run: Path) -> None:
    confirmed = ",".join(clause.id for clause in clauses_of(artefact.record))
    words = ["publish", str(run), f"repo={repo}", f"out={work / 'out' / repo}", "license=other", "onnx=true"]
    words += [f"confirm=[{confirmed}]"] if confirmed else []
    done = subprocess.run([sys.executable, "-m", "carina", *words], capture_output=True, text=True,
                          env={**os.environ, **hub.environment(work / "home")})  # fmt: skip
    if done.returncode:
        raise CarinaError(f"{run} was not published: {done.stderr.strip().splitlines()[-1]}")


@torch.no_grad()
def _given(work: Path, repo: str, artefact: Artefact, images: int) -> np.ndarray:
    """Write images of the network's size; what the run itself makes of them."""
    model = artefact.model
    side = model.spec.size if isinstance(model, Backbone) else model.scales[0]
    x = np.random.default_rng(0).random((images, 1, side, side), dtype=np.float32)
    for number in range(1, images, 2):
        x[number, 0] = phantom(5, number, size=side).image
    np.save(_file(work, repo), x)
    given = torch.from_numpy(x)
    return model(given).numpy() if isinstance(model, Backbone) else model.scores({side: given})


def _file(work: Path, repo: str, end: str = ".npy") -> Path:
    return work / f"{repo.replace('/', '-')}{end}"


def _stranger(hub: Hub, work: Path, name: str, kinds: dict[str, str]) -> dict[str, Any]:
    """Make the environment, run in it what a stranger would write, delete it."""
    wanted, code, absent = STRANGERS[name]
    place, started = work / "environment", time.perf_counter()
    python = place / "bin" / "python"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    for words in ([sys.executable, "-m", "venv", place], [python, "-m", "pip", "install", "--quiet", *wanted]):
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=clean)
        if done.returncode:
            raise CarinaError(f"the environment {name} could not be made: {done.stderr.strip()[-300:]}")
    seconds, size = time.perf_counter() - started, folder_size(place)
    code = AROUND.format(code=code.strip().replace("\n", "\n    ").join(["    ", ""]))
    given = json.dumps([str(work), kinds, absent, WATCHED])
    done = subprocess.run([python, "-I", "-c", code, given], capture_output=True, text=True, cwd=work,
                          env={**clean, **hub.environment(work / f"home-{name}")})  # fmt: skip
    shutil.rmtree(place)
    if done.returncode:
        raise CarinaError(f"a stranger with {name} fails: {done.stderr.strip()[-500:]}")
    values = {repo: np.load(_file(work, repo, ".found.npy")) for repo in kinds}
    if name != "onnxruntime":  # logits
        values = {repo: y if kinds[repo] == "backbone" else expit(y) for repo, y in values.items()}
    return {"values": values, "sizes": {repo: int(np.load(_file(work, repo)).shape[-1]) for repo in kinds},
            "installed": wanted, "packages": json.loads(done.stdout.splitlines()[-1]), "seconds": round(seconds),
            "gigabytes": round(size / 1e9, 2)}  # fmt: skip


def _show(rows: list[dict[str, Any]], environments: dict[str, dict[str, Any]]) -> None:
    table = Table(title="What environments without carina get from the hub")
    for column in ("pip install", "repository", "kind", "px", "values", "largest value", "differs by"):
        table.add_column(column, justify="right" if column in ("px", "largest value", "differs by") else "left")
    for row in rows:
        installed = " ".join(environments[row["environment"]]["installed"])
        values = " x ".join(map(str, row["values"]))
        table.add_row(installed, row["repository"], row["kind"], str(row["size"]), values, f"{row['largest']:.3f}",
                      f"{row['differs']:.1e}")  # fmt: skip
    console().print(table)
    for name, found in environments.items():
        packages = ", ".join(f"{package} {version}" for package, version in found["packages"].items())
        console().print(f"{name}: {packages}; {found['gigabytes']:.1f} GB, made in {found['seconds']} s")


if __name__ == "__main__":
    sys.exit(main())
