"""The run folder: what every stage writes beside its artefact."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from carina import __version__
from carina.errors import CarinaError
from carina.files import disk_errors, read_json, write_json, write_text
from carina.recipes import Section, differences, to_yaml

RECIPE, METRICS, LOG, ENVIRONMENT = "recipe.yaml", "metrics.jsonl", "log.txt", "environment.json"
PACKAGES = (
    "torch",
    "timm",
    "lightly",
    "accelerate",
    "datasets",
    "numpy",
    "scikit-learn",
    "pydicom",
    "opencv-python-headless",
)


def package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def environment(**facts: Any) -> dict[str, Any]:
    """Versions and machine facts for reproduction; no host name, user, path or address."""
    return {
        "carina": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "packages": {name: package_version(name) for name in PACKAGES},
        **facts,
    }


class Run:
    """A folder with recipe.yaml, metrics.jsonl, log.txt, environment.json, checkpoints/ and the stage's artefact."""

    def __init__(self, folder: str | Path, *, quiet: bool = False):
        self.folder = Path(folder)
        self.quiet = quiet

    @classmethod
    def start(
        cls,
        folder: str | Path,
        stage: str,
        recipe: Section,
        *,
        resume: bool = False,
        quiet: bool = False,
        free: tuple[str, ...] = (
            "out",
            "workers",
            "wandb",
            "checkpoint_every",
            "keep_checkpoints",
            "keep_every",
            "watch",
        ),
    ) -> Run:
        """Open `folder` for a new run, or for the same recipe again with ``resume``.

        `free` names the keys that may change on resume because they cannot change the result.
        """
        run = cls(folder, quiet=quiet)
        existing = run.folder / RECIPE
        if existing.exists():
            old = yaml.safe_load(existing.read_text(encoding="utf-8"))
            if not resume:
                raise CarinaError(f"{run.folder} already holds a run; go on with --resume, or choose another out=")
            changed = [k for k in differences(old, recipe.model_dump(mode="json")) if k.split(".")[0] not in free]
            if changed:
                raise CarinaError(
                    f"{run.folder} was made with another recipe ({', '.join(changed)} differ); resume with the same "
                    "values, or start anew with another out="
                )
        elif run.folder.exists() and any(run.folder.iterdir()):
            raise CarinaError(f"{run.folder} is not empty and not a run of carina; choose another out=")
        with disk_errors(run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
        write_text(existing, to_yaml(recipe))
        write_json(run.folder / ENVIRONMENT, environment(stage=stage))
        return run

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        run = cls(folder)
        if not (run.folder / RECIPE).is_file():
            raise CarinaError(f"{run.folder} is not a run of carina (no {RECIPE} in it); give the folder named by out=")
        return run

    @property
    def stage(self) -> str:
        return self.environment()["stage"]

    def environment(self) -> dict[str, Any]:
        return read_json(self.folder / ENVIRONMENT)

    def recipe(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / RECIPE).read_text(encoding="utf-8"))

    def log(self, message: str) -> None:
        """One line to log.txt and, unless quiet, to standard error."""
        with disk_errors(self.folder), open(self.folder / LOG, "a", encoding="utf-8") as handle:
            handle.write(time.strftime("%Y-%m-%d %H:%M:%S ") + message + "\n")
        if not self.quiet:
            print(message, file=sys.stderr, flush=True)

    def metric(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with disk_errors(self.folder), open(self.folder / METRICS, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        path = self.folder / METRICS
        if not path.exists():
            return []
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # a killed run may leave half a line at the end
                continue
        return rows

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run writes again, so that each step stands once."""
        path = self.folder / METRICS
        if path.exists():
            kept = [row for row in self.metrics() if row["step"] <= step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def note_environment(self, **facts: Any) -> None:
        """Add what a stage learned about the machine and its own work (device, precision, hours)."""
        write_json(self.folder / ENVIRONMENT, {**self.environment(), **facts})
