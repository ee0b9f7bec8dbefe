"""What is installed: the list of packages, the version, the recipes that ship, the wheel, and a quick --help."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import carina as package
from carina.cli import VERBS
from carina.inspect import STAGES, recipe_model
from carina.recipes import build, read_recipe, shipped

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PLACES = PROJECT["tool"]["setuptools"]["package-dir"]


def folders() -> dict[str, Path]:
    """Dotted name -> folder of everything with an __init__.py below the places that pyproject.toml maps."""
    found = {}
    for name, place in PLACES.items():
        for init in (ROOT / place).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / place).parts
            found[".".join((name, *inner))] = init.parent
    return found


def test_the_list_of_packages_is_the_folders():
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folders())


def test_every_module_lies_in_a_package():
    """A folder with modules but without __init__.py would be left out of the wheel in silence."""
    lost = [
        path.relative_to(ROOT)
        for place in PLACES.values()
        for path in (ROOT / place).rglob("*.py")
        if path.parent not in folders().values()
    ]
    assert lost == []


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert package.__version__ == PROJECT["project"]["version"] == citation["version"] == newest[1]
    assert str(citation["date-released"]) == newest[2]


@pytest.mark.parametrize("stage", STAGES)
def test_every_recipe_that_ships_is_valid(stage):
    for name in ["default", *shipped(stage)]:
        model = recipe_model(stage)
        recipe = build(stage, model, name, [])
        assert recipe.model_dump(mode="json").keys() == read_recipe(stage, "default").keys(), name


def test_shipped_recipes_say_what_they_are():
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# "), path


def test_every_accelerate_configuration_is_read_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    paths = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
    assert paths
    for path in paths:
        config = load_config_from_file(str(path))
        assert config.num_processes % config.num_machines == 0
        # accelerate drops the keys it does not know with an error; every key must have come through
        for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            assert str(getattr(config, key)).rpartition(".")[2] in (str(value), str(value).upper()), (path.name, key)


@pytest.mark.parametrize("command", [["-m", "carina", "--help"], ["-m", "carina", "pretrain", "--help"], ["script"]])
def test_help_lists_the_verbs_and_does_not_import_torch(command):
    if command == ["script"]:
        script = Path(sys.executable).with_name("carina")
        if not script.is_file():
            pytest.skip("carina is not installed, so there is no console script")
        command = [str(script), "--help"]
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "carina.cli" in loaded and not loaded & {"torch", "timm", "pandas", "pyarrow", "pydicom"}
    if "pretrain" in command:
        assert "--resume" in done.stdout and "example: " in done.stdout
    else:
        assert [verb for verb in VERBS if f"carina {verb}" not in done.stdout] == []


def test_every_verb_has_its_function():
    """The stages are imported on first use, so a wrong name would show only when the verb is called."""
    missing = []
    for node in ast.walk(ast.parse((ROOT / "carina" / "cli.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("carina."):
            module = __import__(node.module, fromlist=["_"])
            missing += [f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]
    assert missing == []


def test_the_wheel_holds_recipes_templates_and_types(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="older ones cannot build this project")
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    source = tmp_path / "source"
    for place in {Path(place).parts[0] for place in PLACES.values()}:
        for path in (ROOT / place).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*wheel, str(source)], check=True, capture_output=True, text=True)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
    wanted = {"carina/py.typed"}
    for name, folder in folders().items():
        inside = name.replace(".", "/")
        wanted |= {f"{inside}/{path.name}" for path in folder.iterdir() if path.suffix in (".py", ".html", ".css")}
    configs = ROOT / "configs"
    wanted |= {f"carina/configs/{path.relative_to(configs).as_posix()}" for path in configs.rglob("*.yaml")}
    assert wanted - names == set()
    assert not [name for name in names if name.startswith(("evaluate/", "tests/", "pretrain/"))]
    assert any(name.endswith("LICENSE") for name in names)
