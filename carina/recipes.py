"""Recipes: YAML files plus ``key=value`` overrides become one validated model.

A stage's ``default.yaml`` holds every key with its value and a comment; shipped recipes and the user's own files name
only what differs. The pydantic models give types and limits, never values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from carina.errors import CarinaError, nearest


class Section(BaseModel):
    """Part of a recipe. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


Model = TypeVar("Model", bound=Section)


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """``["optim.lr=0.1", "scales=[128,256]"]`` -> a nested dict; values are read as YAML."""
    result: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise CarinaError(f"'{word}' is not of the form key=value")
        set_key(result, key, parse_value(text, word))
    return result


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: `no` and `off` are texts, 1e-4 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in found if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_value(text: str, word: str = "") -> Any:
    """The value of an override, read as YAML."""
    if not text:
        return ""
    try:
        value = yaml.load(text, _Loader)
        if value is None and text.strip() not in ("null", "Null", "NULL", "~"):
            raise CarinaError(
                f"all of the value in '{word or text}' reads as a comment; put it in quotes within quotes"
            )
        return value
    except yaml.YAMLError:
        raise CarinaError(f"the value in '{word or text}' cannot be read; put it in quotes") from None


def set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise CarinaError(f"{dotted} is set beside a value for {parent}; give one of them")
    tree[last] = value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, key by key; a mapping is merged, anything else replaced."""
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def shipped(stage: str) -> list[str]:
    """Names of the recipes of a stage that ship with carina, without the default."""
    root = resources.files("carina.configs") / stage

    def walk(folder, prefix: str):
        for entry in sorted(folder.iterdir(), key=lambda e: e.name):
            if entry.is_dir() and not entry.name.startswith("_"):
                yield from walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml") and entry.name != "default.yaml":
                yield prefix + entry.name[: -len(".yaml")]

    return list(walk(root, ""))


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        value = yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise CarinaError(f"{where} is not valid YAML{line}; mend that line") from None
    if not isinstance(value, dict):
        raise CarinaError(f"{where} must hold keys and values")
    return value


def read_recipe(stage: str, name: str) -> dict[str, Any]:
    """The keys that the recipe `name` (a shipped name or a YAML file) sets, laid on the stage's default."""
    root = resources.files("carina.configs") / stage
    default = _read_yaml((root / "default.yaml").read_text(encoding="utf-8"), "default.yaml")
    if name in ("", "default"):
        return default
    names = shipped(stage)
    if name in names:
        own = _read_yaml(root.joinpath(*f"{name}.yaml".split("/")).read_text(encoding="utf-8"), name)
    else:
        path = Path(name)
        if not path.is_file():
            raise CarinaError(
                f"there is no recipe '{name}' for {stage}: give a YAML file or one of {', '.join(names)}"
                + nearest(name, names)
            )
        own = _read_yaml(path.read_text(encoding="utf-8"), str(path))
    return merge(default, own)


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for key, field in model.model_fields.items():
        keys.append(prefix + key)
        inner = _section_of(field.annotation)
        if inner is not None:
            keys += _known_keys(inner, f"{prefix}{key}.")
    return keys


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None


def validate(model: type[Model], values: Mapping[str, Any], what: str) -> Model:
    """The recipe as a model; the first mistake becomes one sentence with the nearest valid key."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _known_keys(model)
            raise CarinaError(f"{what}: '{key}' is not a key here{nearest(key, known)}") from None
        if first["type"] == "missing":
            raise CarinaError(f"{what}: '{key}' is needed; give it as {key}=VALUE") from None
        message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        given = first.get("input")
        shown = "" if isinstance(given, Mapping) else f" (given: {given!r})"
        raise CarinaError(f"{what}: {key or 'the recipe'}: {message[:1].lower() + message[1:]}{shown}") from None


def build(stage: str, model: type[Model], name: str, overrides: Sequence[str] | Mapping[str, Any]) -> Model:
    """Default, shipped or own recipe, and overrides, in this order, as one validated model."""
    over = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    return validate(model, merge(read_recipe(stage, name), over), f"{stage} recipe")


def to_yaml(recipe: Section) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two resolved recipes."""
    changed = []
    for key in sorted(set(old) | set(new)):
        left, right = old.get(key), new.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            changed += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            changed.append(prefix + key)
    return changed
