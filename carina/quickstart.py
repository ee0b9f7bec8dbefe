"""The verb quickstart: every stage once, on synthetic radiographs, ending in one table."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from carina.errors import CarinaError
from carina.files import write_json, write_text
from carina.progress import clock
from carina.recipes import Section, parse_overrides, validate

SCALES = [64, 96]
ARCHITECTURE = "resnet10t"  # small enough for two cores; the recipes for real work name larger ones
ARMS = ("pretrained", "random")
MODES = ("frozen", "full")
SPLIT, EVALUATION = "val+test", "val-test"
STEPS = {"classify": 160, "anomaly": 80}


class QuickstartSettings(Section):
    out: str = "carina-quickstart"
    patients: Annotated[int, Field(ge=60)] = 480
    steps: Annotated[int, Field(ge=1)] | None = None  # of pretraining; default: the recipe's
    seed: int = 0


def quickstart(overrides: Any = (), *, quiet: bool = False, as_json: bool = False) -> dict[str, Any]:
    """Prepare, pretrain, fine-tune both tasks in both modes, evaluate, compare and publish (dry) on phantoms."""
    given = overrides if isinstance(overrides, dict) else parse_overrides(overrides)
    settings = validate(QuickstartSettings, given, "quickstart")
    out = Path(settings.out)
    if out.exists() and any(out.iterdir()):
        raise CarinaError(f"{out} is not empty; remove it or choose another out=")
    began = time.monotonic()
    stages = _Stages(out, settings, quiet)
    result = stages.run()
    result["seconds"] = round(time.monotonic() - began, 1)
    text = closing_words(result, out)
    write_json(out / "quickstart.json", result)
    write_text(out / "table.md", markdown_table(result["rows"]) + "\n")
    if not as_json:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 110)
        console.print(terminal_table(result["rows"]))
        console.print(text, highlight=False, soft_wrap=True)
    return result


class _Stages:
    def __init__(self, out: Path, settings: QuickstartSettings, quiet: bool):
        self.out, self.settings, self.quiet = out, settings, quiet
        self.store, self.pretrained = out / "store", out / "pretrained"

    def say(self, verb: str, what: object, given: dict[str, Any], flags: str = "") -> dict[str, Any]:
        """Show the command that does the same, so that the quickstart teaches the command line; returns `given`."""
        if not self.quiet:
            words = " ".join(f"{key}={_plain(value)}" for key, value in given.items())
            print(f"\n$ carina {verb} {what} {words} {flags}".rstrip(), file=sys.stderr, flush=True)
        return given

    def run(self) -> dict[str, Any]:
        from carina.imaging.phantom import FINDINGS

        self.prepare(list(FINDINGS))
        self.pretrain()
        rows, folders = [], {}
        for task in ("classify", "anomaly"):
            for mode in MODES:
                for arm in ARMS:
                    folders[task, mode, arm], row = self.finetune(task, mode, arm, list(FINDINGS))
                    rows.append(row)
        differences = [self.compare(task, mode, folders) for task in ("classify", "anomaly") for mode in MODES]
        published = self.publish()
        report = folders["classify", "frozen", "pretrained"] / "evaluations" / EVALUATION / "report.html"
        return {
            "synthetic": True,
            "rows": rows,
            "differences": differences,
            "published": published,
            "report": str(report),
        }

    def prepare(self, findings: list[str]) -> None:
        from carina.data.phantoms import write_phantoms
        from carina.intake.prepare import prepare
        from carina.progress import Progress

        raw = self.out / "radiographs"
        patients = self.settings.patients
        with Progress("draw synthetic radiographs", patients, unit="patients", quiet=self.quiet) as progress:
            table = write_phantoms(
                raw,
                patients=patients,
                seed=self.settings.seed,
                size=256,
                file_format="mixed",
                progress=lambda *_: progress.advance(),
            )
        columns = {key: f"{key}_id" for key in ("patient", "study")} | {key: key for key in ("view", "sex", "age")}
        given = {"out": str(self.store), "scales": SCALES, "source": "phantoms", "synthetic": True}
        given |= {"labels": [*findings, "abnormal"], **columns}
        prepare(str(table), self.say("prepare", table, given), quiet=self.quiet)

    def pretrain(self) -> None:
        from carina.pretrain.run import pretrain

        given = {"store": str(self.store), "out": str(self.pretrained), "seed": self.settings.seed}
        given |= {} if self.settings.steps is None else {"steps": self.settings.steps}
        pretrain("quickstart", self.say("pretrain", "quickstart", given), quiet=self.quiet)

    def finetune(self, task: str, mode: str, arm: str, findings: list[str]) -> tuple[Path, dict[str, Any]]:
        from carina.evaluate.score import evaluate
        from carina.finetune.run import finetune

        folder = self.out / f"{task}-{mode}-{arm}"
        backbone = str(self.pretrained) if arm == "pretrained" else f"random:{ARCHITECTURE}"
        given = {"backbone": backbone, "store": str(self.store), "out": str(folder), "mode": mode}
        given |= {"scale": SCALES[-1], "size": SCALES[-1], "steps": STEPS[task], "threshold_rows": None, "wandb": "off"}
        given |= {"labels": findings} if task == "classify" else {}
        finetune(task, self.say("finetune", task, given), quiet=self.quiet)
        # every setting is fixed beforehand and thresholds are cross-fitted, so both held-out splits can be the test
        given = {"store": str(self.store), "split": SPLIT, "resamples": 1000}
        result = evaluate(str(folder), self.say("evaluate", folder, given), quiet=True)
        head = result["table"][0]
        return folder, {
            "task": task,
            "label": head["label"],
            "backbone": arm,
            "mode": mode,
            "auroc": head["auroc"],
            "ap": head["ap"],
            "labels_used": result["labels_used"],
            "patients": result["patients"],
        }

    def compare(self, task: str, mode: str, folders: dict[tuple[str, str, str], Path]) -> dict[str, Any]:
        from carina.evaluate.compare import compare

        a, b = ([str(folders[task, mode, arm] / "evaluations" / EVALUATION)] for arm in ARMS)
        result = compare(a, b, 2000, names=ARMS)
        row = next(row for row in result["rows"] if row["role"] == "primary")
        return {"task": task, "mode": mode, "sentence": row["sentence"], "difference": row["difference"]}

    def publish(self) -> str:
        from carina.publish import publish

        folder = self.out / "published"
        given = self.say("publish", self.pretrained, {"repo": "org/name", "out": str(folder)}, "--dry-run")
        publish(str(self.pretrained), given, dry_run=True, quiet=self.quiet)
        return str(folder)


def _plain(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _figure(value: dict[str, Any]) -> str:
    if value["value"] is None:
        return "-"
    return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


HEADER = ("task", "backbone", "frozen", "fully fine-tuned")


def _cells(rows: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """A line per task and backbone, frozen beside full."""
    cells = []
    for task in ("classify", "anomaly"):
        for arm in ARMS:
            found = {row["mode"]: row for row in rows if row["task"] == task and row["backbone"] == arm}
            what = f"{task} ({found['frozen']['label']})"
            cells.append((what, arm, _figure(found["frozen"]["auroc"]), _figure(found["full"]["auroc"])))
    return cells


TITLE = "AUROC with 95 % intervals on test patients: *synthetic* radiographs, so nothing here speaks of patients"


def terminal_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=TITLE.replace("*", ""))
    for name in HEADER:
        table.add_column(name)
    for cells in _cells(rows):
        table.add_row(*cells)
    return table


def markdown_table(rows: list[dict[str, Any]]) -> str:
    lines = [TITLE, "", "| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in _cells(rows))])


def closing_words(result: dict[str, Any], out: Path) -> str:
    """The differences in words, where to look, and what to run on one's own images."""
    lines = ["", *(f"* {row['task']}, {row['mode']}: {row['sentence']}" for row in result["differences"])]
    lines += [
        "",
        f"Done in {clock(result['seconds'])}. Where to look:",
        f"  {out}/store/sheet.html        the radiographs, what they are and how they are spread",
        f"  {result['report']}   the report of one run; each run has its own",
        f"  {out}/published/README.md     the model card that would be published",
        "",
        "Next, on your own images:",
        "  carina prepare /path/to/images out=store scales=[128,224]",
        "  carina pretrain moco_anatpaste_resnet18 store=store out=runs/pretrained --dry-run",
        "  carina pretrain moco_anatpaste_resnet18 store=store out=runs/pretrained",
    ]
    return "\n".join(lines)
