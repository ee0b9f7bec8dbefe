"""The commands that make published weights again, for their card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carina import __version__
from carina.models.hub.sections import Told


def prepare_commands(record: Mapping[str, Any]) -> list[str]:
    """A command for each source: catalogs by name, other files as the publisher has them."""
    chosen = {**record["photometry"], **record["geometry"]}
    stored = next(iter(record.get("encoding", {}).values()), {})
    chosen |= {"encoding": stored["format"], "bits": stored["bits"]} if stored else {}
    used = record.get("scales") or sorted({member["scale"] for member in record["members"]})
    scales = sorted(record.get("encoding", {}), key=int) or used  # a store's hash is of its largest scale
    given = " ".join(f"{key}={value}" for key, value in chosen.items())
    origins, sources = record["data"].get("origins", {}), list(record["data"].get("source", [])) or ["SOURCE"]
    return [
        f"carina prepare {f'{name}:FOLDER' if (origins.get(name, {}).get('terms') or {}).get('license') else 'FILES'} "
        f"out={store} scales=[{','.join(map(str, scales))}] {given}" + (f" source={name}" if name != "SOURCE" else "")
        for name, store in zip(sources, _store_names(sources))
    ]


def store_words(record: Mapping[str, Any]) -> str:
    names = _store_names(list(record["data"].get("source", [])) or ["SOURCE"])
    return names[0] if len(names) == 1 else f"[{','.join(names)}]"


def _store_names(sources: list[str]) -> list[str]:
    return ["STORE"] if len(sources) == 1 else [f"STORE_{name}" for name in sources]


def rebuild(record: Mapping[str, Any], told: Told, command: str, besides: str) -> list[str]:
    """The commands that make it again; `besides`: what the recipe leaves out."""
    packages = ", ".join(
        f"{name} {version}" for name, version in told.environment.get("packages", {}).items() if version
    )
    where = record.get("where") or told.rows_chosen
    return [
        "## Rebuild",
        "",
        f"`recipe.yaml` holds every value of this run but {besides}. Patients are dealt to splits by a keyed hash: the same "
        "split needs the publisher's key or the sources' own splits.",
        "",
        "```bash",
        f"pip install carina-cxr=={told.environment.get('carina', __version__)}",
        *prepare_commands(record),
        command,
        "```",
        "",
        *(["Rows were chosen by a condition that is not published, since it may name persons.", ""] if where else []),
        *([f"Made with {packages} on Python {told.environment.get('python', 'unknown')}, "
           f"{told.environment.get('system', 'unknown')}.", ""] if packages else []),
    ]  # fmt: skip
