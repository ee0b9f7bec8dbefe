"""What a run tells while it trains: metrics.jsonl, the progress line, and wandb where it is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from carina.errors import CarinaError
from carina.runs import Run

Mode = Literal["offline", "online", "off"]


class Tracker:
    """metrics.jsonl always; wandb offline by default, with nothing of the machine, the code or the command line."""

    def __init__(self, run: Run, mode: Mode, config: dict[str, Any]):
        self.run = run
        self.wandb = None
        if mode == "off":
            return
        try:
            import wandb
        except ImportError:
            raise CarinaError("wandb is not installed; pip install wandb, or give wandb=off") from None
        settings = wandb.Settings(
            mode=mode,
            silent=True,
            console="off",
            host="",
            program="carina",
            program_relpath="carina",
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self._api = wandb
        self.wandb = wandb.init(
            project="carina",
            dir=str(run.folder),
            config=public(config),
            settings=settings,
        )

    def step(self, values: dict[str, Any]) -> None:
        self.run.metric(values)
        if self.wandb is not None:
            self.wandb.log(values, step=values["step"])

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of equal keys as a table."""
        if self.wandb is not None and rows:
            columns = list(rows[0])
            self.wandb.log(
                {name: self._api.Table(columns=columns, data=[[row[key] for key in columns] for row in rows])}
            )

    def picture(self, name: str, path: Path, *, shows_patients: bool = True, allowed: bool = False) -> None:
        """A picture file; one that shows patients only where the user has allowed it."""
        if self.wandb is not None and (allowed or not shows_patients) and path.is_file():
            self.wandb.log({name: self._api.Image(str(path))})

    def reference(self, name: str, kind: str, address: str, facts: Mapping[str, Any]) -> None:
        """An artefact by its address, with nothing of its content; `facts`, such as checksums, beside it."""
        if self.wandb is not None:
            artefact = self._api.Artifact(name, type=kind, metadata=dict(facts))
            artefact.add_reference(address, name=name, checksum=False)
            self.wandb.log_artifact(artefact)

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()
            self.wandb = None


PRIVATE = ("store", "out", "init", "backbone", "where")  # folders, and rows that may name a person


def public(config: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what is its owner's own, at any depth."""
    return {
        key: public(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in PRIVATE or isinstance(value, dict)
    }
