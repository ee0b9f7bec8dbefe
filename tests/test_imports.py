"""Who may import whom (CONTRIBUTING.md), read from the source of every module, function bodies included."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("pretrain", "finetune", "evaluate")

# room -> the other rooms it may import; everyone may import BASE
BASE = {"version", "errors", "files", "recipes", "runs", "draws", "progress", "isolation"}
TRUNK = {"imaging", "metrics", "models", "data", "training"}
ALLOWED: dict[str, set[str]] = {
    "imaging": set(),
    "metrics": set(),
    "models": {"imaging"},
    "data": {"imaging", "models"},
    "training": {"data", "models", "metrics"},
    "intake": {"imaging", "models", "data"},
    **{stage: TRUNK for stage in STAGES},
    "configs": set(),
}
TOP = {"cli", "__main__", "quickstart", "doctor", "inspect", "publish"}
# torch itself, and packages that import it
TORCH = {"torch", "torchvision", "timm", "lightly", "accelerate", "captum", "torchmetrics", "pytorch_lightning"}


def sources() -> list[tuple[str, Path]]:
    """(dotted module name, file) of every module that is installed."""
    found = [(_dotted("carina", ROOT / "carina", path), path) for path in (ROOT / "carina").rglob("*.py")]
    for folder in (*STAGES, "configs"):
        found += [(_dotted(f"carina.{folder}", ROOT / folder, path), path) for path in (ROOT / folder).rglob("*.py")]
    return sorted(found)


def _dotted(package: str, folder: Path, path: Path) -> str:
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


def room(module: str) -> str:
    """The part after `carina`: `models` of carina.models.heads; entry points of stages count as the command line."""
    parts = module.split(".")
    if parts[-1] == "__main__":
        return "__main__"
    return parts[1] if len(parts) > 1 else "version"  # all that `carina` itself holds


def imported(source: str, module: str) -> list[tuple[int, str]]:
    """(line, dotted name) of every import statement, wherever it stands; `from a import b` gives a.b."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level]
                base = ".".join([*above, *([base] if base else [])])
            names += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return names


def faults(module: str, source: str) -> list[str]:
    """What a module imports and may not, a sentence each."""
    own, found = room(module), []
    for line, name in imported(source, module):
        top = name.split(".")[0]
        if own in BASE | {"metrics"} and top in TORCH:
            found.append(f"{module}:{line} imports {top}; {own} does without torch")
        if top != "carina":
            if top in STAGES:
                found.append(f"{module}:{line} imports {name}; the stages are installed as carina.{top}")
            continue
        other = room(name)
        if other not in KNOWN:  # a name in carina/__init__.py
            other = "version"
        if own in TOP or other in BASE or (other == own and own in ALLOWED):
            continue
        if other not in ALLOWED.get(own, set()):
            found.append(f"{module}:{line} imports {name}; {own} may not import {other}")
    return found


KNOWN = {room(name) for name, _ in sources()}
MODULES = sources()


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_a_module_imports_only_what_its_room_may(module, path):
    assert faults(module, path.read_text(encoding="utf-8")) == []


def test_every_module_has_a_room():
    """A new file beside the rooms must be given a place in the order before anything imports it."""
    assert KNOWN - BASE - set(ALLOWED) - TOP == set()


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("carina.finetune.run", "from carina.pretrain.run import pretrain", "finetune may not import pretrain"),
        ("carina.evaluate.score", "def f():\n    from carina.intake.keys import load_key", "may not import intake"),
        ("carina.data.store", "import carina.training.engine", "data may not import training"),
        ("carina.models.heads", "from ..data import store", "models may not import data"),
        ("carina.metrics.ranking", "from carina import imaging", "metrics may not import imaging"),
        ("carina.metrics.ranking", "if True:\n    import torch.nn", "metrics does without torch"),
        ("carina.runs", "def f():\n    import timm", "runs does without torch"),
        ("carina.files", "from carina.data.store import Store", "files may not import data"),
        ("carina.training.engine", "from carina.cli import main", "training may not import cli"),
        ("carina.pretrain.run", "import pretrain.recipe", "the stages are installed as carina.pretrain"),
    ],
)
def test_the_rule_finds_what_breaks_it(module, source, said):
    found = faults(module, source)
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("carina.cli", "def f():\n    from carina.pretrain.run import pretrain\n    import torch"),
        ("carina.pretrain.__main__", "from carina.cli import main"),
        ("carina.models.hub", "from carina import __version__\nfrom carina.errors import CarinaError\nimport torch"),
        ("carina.training.engine", "from carina.data.store import Store\nfrom . import optim"),
    ],
)
def test_the_rule_lets_pass_what_keeps_it(module, source):
    assert faults(module, source) == []


def test_the_base_and_the_metrics_load_without_torch():
    """What the sources say, and what happens: no package on the way imports torch either."""
    modules = [name for name, _ in MODULES if room(name) in BASE | {"metrics"}]
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
