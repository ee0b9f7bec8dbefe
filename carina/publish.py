"""The verb publish: backbone or predictor -> the folder that is uploaded, and the upload."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from carina.errors import CarinaError
from carina.recipes import Section, parse_overrides, validate
from carina.runs import Run


class PublishSettings(Section):
    repo: str
    out: str
    license: str | None = None
    private: bool = True
    allow_memory: bool = False


def publish(run: str, overrides: Any = (), *, dry_run: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Write the folder; without ``dry_run`` upload it with the user's token. Private by default."""
    from carina.models.hub import assemble, upload, verify

    given = overrides if isinstance(overrides, dict) else parse_overrides(overrides)
    settings = validate(PublishSettings, given, "publish")
    if settings.repo.count("/") != 1:
        raise CarinaError(f"repo={settings.repo} is not of the form org/name")
    if not dry_run and not settings.license:
        raise CarinaError("an upload needs a license that you choose for these weights; give license=NAME")
    folder = Path(settings.out)
    result = assemble(Run.open(run).folder, folder, settings.license, settings.allow_memory)
    verify(folder)
    url = None if dry_run else upload(folder, settings.repo, settings.private)
    if not quiet:
        where = f"{settings.repo} would receive" if dry_run else f"{url} received"
        print(f"{where} {len(result['files'])} files, {result['bytes'] / 2**20:.1f} MiB: {folder}", file=sys.stderr)
    return {**result, "repo": settings.repo, "out": str(folder), "uploaded": url}
