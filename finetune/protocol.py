"""A protocol: whatever a result rests on, named beforehand, and run cell by cell to one table. ``task: anomaly`` compares
scorers of one-class detection, ``task: classify`` arms and modes over counts of labelled patients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from carina.errors import CarinaError, nearest
from carina.finetune import few_labels_page, protocol_anomaly_page
from carina.finetune.few_labels import FewLabels
from carina.finetune.few_labels_plan import LabelsPlan, LabelsRecipe
from carina.finetune.protocol_anomaly import Bench
from carina.finetune.protocol_anomaly_plan import Plan, ProtocolRecipe
from carina.recipes import merge, parse_overrides, read_recipe, validate

TASKS = {"anomaly": (ProtocolRecipe, Plan, Bench), "classify": (LabelsRecipe, LabelsPlan, FewLabels)}


def read_protocol(name: str, overrides: Any = ()) -> ProtocolRecipe | LabelsRecipe:
    """The recipe of a protocol, of a shipped name or a YAML file, with overrides, by its task."""
    default = read_recipe("protocol", "default")
    over = overrides if isinstance(overrides, dict) else parse_overrides(overrides)
    values = merge(read_recipe("protocol", name), over)
    if values["task"] not in TASKS:
        raise CarinaError(
            f"protocol recipe: task '{values['task']}' is none of {', '.join(TASKS)}{nearest(values['task'], TASKS)}"
        )
    model = TASKS[values["task"]][0]
    # the default holds the keys of all tasks; one of another task is a mistake only where it is given
    others = {key for key in default if key not in model.model_fields and values[key] == default[key]}
    return validate(model, {key: value for key, value in values.items() if key not in others}, "protocol recipe")


def protocol(name: str, overrides: Any = (), *, dry_run: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run the protocol `name` (a shipped name or a YAML file) with overrides; returns what table.json says, or what is
    planned. Raises CarinaError for rows that are not the protocol's, and for cells that other settings made."""
    recipe = read_protocol(name, overrides)
    if not recipe.out:
        raise CarinaError("a protocol needs a place for its runs and tables; give out=FOLDER")
    _, plan, bench = TASKS[recipe.task]
    work = bench(plan(recipe), Path(recipe.out), quiet)
    return work.forecast() if dry_run else work.run()


def terminal(result: dict[str, Any]) -> Any:
    """The tables for a terminal."""
    return (few_labels_page if result.get("task") == "classify" else protocol_anomaly_page).terminal(result)
