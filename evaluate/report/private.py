"""What a report keeps to itself: where files lie, and conditions that may name a person."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from carina.models.hub.few import OLDEST

PLACES = ("store", "out", "backbone", "cache", "wandb", "init", "pretrained", "scratch")  # keys that name places
COLUMNS = ("view", "sex", "source", "manufacturer", "split", "age")  # and labels: what a shown condition may ask for
LABELS = "label_"
HIDDEN = "a condition that is not shown"
WHERE = "where "  # how the step of the flow that applied it begins

_CONDITION = re.compile(r"[=!<>]=|[<>]|\bin\s*[\[(]|\b(?:image|patient|study)_id\b|\bcontent_hash\b|\bduplicates\b")
_SHAPES = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.BinOp, ast.BitAnd, ast.BitOr, ast.UnaryOp, ast.Not, ast.Invert),
    *(ast.USub, ast.Compare, ast.cmpop, ast.Name, ast.Constant, ast.List, ast.Tuple, ast.expr_context),
)
_NAME = r"[^\s'\",;/\\<>|]+(?: [^\s'\",;:/\\<>|]+){0,4}"  # of a folder, which may hold blanks
_ROOT = (
    r"\b(?!https?:)[A-Za-z][\w+.\-]*:/{2,}",  # file:///, s3://
    r"(?<![\w/.\-~])~?/+",  # also after the colon of CATALOG:FOLDER
    r"(?<![\w/.\-~])(?=~\w)",
    r"(?<![\w/.\\\-])(?:\.{1,2}[/\\]+)+",
    r"(?<!\w)[A-Za-z]:[/\\]+",
    r"(?<![\w\\])\\{2,}(?=\w)",
)
_PATH = re.compile(rf"(https?://\S+)|(?:{'|'.join(_ROOT)})(?:{_NAME}[/\\]+)+")
_NAMED = re.compile(r"(?:hub|hf-hub|timm|random|imagenet[\w\-]*)(?::(?![/\\~.]).*)?$")  # weights, which are no place


def printable(value: Any) -> Any:
    """Plain Python values with file paths cut down to their last name."""
    if isinstance(value, Mapping):
        return {str(key): printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [printable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return printable(value.tolist())
    if isinstance(value, (str, Path)):
        return _PATH.sub(lambda found: found[1] or "", str(value))
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def settings(value: Any, place: bool = False) -> Any:
    """A recipe or an environment: of places the last name alone, whatever they look like, and no private condition."""
    if isinstance(value, Mapping):
        return {
            key: condition(item) if key == "where" and isinstance(item, str) else settings(item, key in PLACES)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple, set)):
        return [settings(item, place) for item in value]
    if not isinstance(value, (str, Path)):
        return value
    text = str(value)
    if _CONDITION.search(text):
        return condition(text)
    if (place or len(re.findall(r"[/\\]", text)) > 1) and not _NAMED.match(text):
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return text


def condition(where: str | None) -> str | None:
    """A condition on rows where it is made of columns that name nobody, and asks for no single age; else that it is hid."""
    if where is None:
        return None
    try:
        nodes = list(ast.walk(ast.parse(where, mode="eval")))
    except (SyntaxError, ValueError):
        return HIDDEN
    names = [node for node in nodes if isinstance(node, ast.Name)]
    allowed = all(isinstance(node, _SHAPES) for node in nodes)
    allowed &= all(node.id in COLUMNS or node.id.startswith(LABELS) for node in names)
    asked = [[node.left, *node.comparators] for node in nodes if isinstance(node, ast.Compare) and _ordered(node)]
    bounds = [side for sides in asked if any(map(_age, sides)) for side in sides]
    allowed &= sum(map(_age, bounds)) == sum(map(_age, names))
    years = [side.value for side in bounds if isinstance(side, ast.Constant) and isinstance(side.value, (int, float))]
    allowed &= len(years) == len(bounds) - sum(map(_age, bounds)) and max(years, default=0) <= OLDEST
    return where if allowed else HIDDEN


def _age(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "age"


def _ordered(node: ast.Compare) -> bool:
    return all(isinstance(how, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)) for how in node.ops)


def told(result: Mapping[str, Any]) -> dict[str, Any]:
    """metrics.json without conditions that may name a person."""
    result = dict(result)
    if "where" in result:
        result["where"] = condition(result["where"])
    if flow := result.get("flow"):
        result["flow"] = [{**step, "step": _step(step["step"])} for step in flow]
    return result


def _step(step: str) -> str:
    return WHERE + str(condition(step.removeprefix(WHERE))) if step.startswith(WHERE) else step
