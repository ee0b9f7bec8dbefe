"""The verb publish: backbone or predictor -> the folder that is uploaded, the test that it loads, and the upload."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from carina.errors import CarinaError
from carina.recipes import Section, parse_overrides, validate
from carina.runs import Run


class PublishSettings(Section):
    """confirm: clauses of upstream terms that the user has cleared. evaluations: folders of evaluations that belong in a
    backbone's card. onnx: null writes it where its packages are installed. watts: of one process, for the energy."""

    repo: str
    out: str
    license: str | None = None
    private: bool = True
    allow_memory: bool = False
    confirm: str | list[str] | None = None
    evaluations: str | list[str] | None = None
    onnx: bool | None = None
    watts: Annotated[float, Field(gt=0)] | None = None
    wandb: Literal["offline", "online", "off"] = "off"


def publish(run: str, overrides: Any = (), *, dry_run: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Write the folder and load it back; without ``dry_run`` upload it with the user's token. Private by default.

    Refused: weights of sources whose owners want to be asked, until their clauses are confirmed; identifiers, pictures
    and memories of patients; a folder that gives other numbers than the run.
    """
    from carina.data.manifest import find_manifest
    from carina.models.hub import Told, assemble, clauses_of, load_back, upload, verify
    from carina.models.hub.clauses import unconfirmed
    from carina.models.hub.folder import evaluations_of, read_artefact
    from carina.training.tracking import public

    given = overrides if isinstance(overrides, dict) else parse_overrides(overrides)
    settings = validate(PublishSettings, given, "publish")
    if settings.repo.count("/") != 1:
        raise CarinaError(f"repo={settings.repo} is not of the form org/name")
    if not dry_run and not settings.license:
        raise CarinaError("an upload needs a license that you choose for these weights; give license=NAME")

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    opened = Run.open(run)
    artefact = read_artefact(opened.folder)
    clauses, confirmed = clauses_of(artefact.record), _listed(settings.confirm)
    _check_known(confirmed, [clause.id for clause in clauses])
    missing = unconfirmed(clauses, confirmed)
    if missing and not dry_run:
        raise CarinaError(
            " ".join(clause.sentence() + "." for clause in missing)
            + f" If you may publish these weights, give confirm=[{','.join(c.id for c in clauses)}]"
        )
    told = Told(
        license=settings.license,
        repo=settings.repo,
        confirmed=[clause for clause in clauses if clause.id in confirmed],
        environment=opened.environment(),
        backbone=_named(opened.recipe().get("backbone") or ""),
        rows_chosen=opened.recipe().get("where") is not None,
        watts=settings.watts,
    )
    manifest, folder = find_manifest(run), Path(settings.out)
    hashes = set() if manifest is None else set(manifest[["patient_id", "image_id", "content_hash"]].to_numpy().ravel())
    metrics = evaluations_of(opened.folder, artefact, _listed(settings.evaluations))
    result = assemble(
        artefact,
        folder,
        told,
        public(opened.recipe()),
        metrics=metrics,
        onnx=settings.onnx,
        allow_memory=settings.allow_memory,
        hashes=hashes,
        names=_file_names(artefact.record.get("store_hashes", [])),
        say=say,
    )
    differences = load_back(artefact, folder)
    for clause in missing:
        say(f"before the upload: {clause.sentence()} (confirm={clause.id})")
    url = None
    if not dry_run:
        verify(folder)
        url = upload(folder, settings.repo, settings.private)
    if settings.wandb != "off":
        _track(opened, settings, folder, result["kind"], metrics)
    where = f"{settings.repo} would receive" if dry_run else f"{url} received"
    say(f"{where} {len(result['files'])} files, {result['bytes'] / 2**20:.1f} MiB: {folder}")
    say(
        "loads back in a fresh process: " + ", ".join(f"{name} (differs by {d:.0e})" for name, d in differences.items())
    )
    return {
        **result,
        "repo": settings.repo,
        "out": str(folder),
        "uploaded": url,
        "private": settings.private,
        "loads_back": differences,
        "to_confirm": [{"id": clause.id, "clause": clause.sentence()} for clause in missing],
    }


def _track(run: Run, settings: PublishSettings, folder: Path, kind: str, metrics: list[dict[str, Any]]) -> None:
    """Tables of the evaluations, the curves of pretraining and the artefact by its address, for wandb; no image of a person
    and no weights."""
    from carina.models.hub.folder import read_sums
    from carina.training.tracking import Tracker

    tracker = Tracker(run, settings.wandb, run.recipe())
    try:
        for one in metrics:
            rows = [{"label": row["label"], **{f"{name} {key}": row[name][key] for name in ("auroc", "ap")
                     for key in ("value", "low", "high")}, "positives": row["positives"], "n": row["n"]}
                    for row in one["table"]]  # fmt: skip
            tracker.table(f"evaluation {one['split']}", rows)
        tracker.picture("watched while it trained", run.folder / "watch.png", shows_patients=False)
        name = settings.repo.replace("/", "-")
        tracker.reference(name, "model", f"hf://{settings.repo}", {"kind": kind, "sha256": read_sums(folder)})
    finally:
        tracker.close()


def _named(backbone: str) -> str:
    """What a predictor began with, for the command that makes it again: public names only, no folders or files."""
    from carina.models.external import ADAPTERS

    kind = backbone.partition(":")[0]
    if backbone.startswith(("random", "timm:", "hub:")) or backbone in ADAPTERS:
        return backbone
    return f"{kind}:FILE" if kind in ADAPTERS else "BACKBONE"


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _check_known(confirmed: list[str], known: list[str]) -> None:
    from carina.errors import nearest

    other = next((one for one in confirmed if one not in known), None)
    if other is not None:
        asked = f"what can be confirmed here: {', '.join(known)}" if known else "nothing here needs to be confirmed"
        raise CarinaError(f"confirm={other} is no clause of these weights{nearest(other, known)}; {asked}")


def _file_names(store_hashes: list[str]) -> set[str]:
    """Names of the owner's files, from the private tables beside the key; none where the stores were made elsewhere."""
    import pyarrow.parquet as pq

    from carina.intake.keys import settings_folder

    tables = [settings_folder() / "paths" / f"{one}.parquet" for one in store_hashes]
    paths = (Path(p) for t in tables if t.is_file() for p in pq.read_table(t, columns=["path"])["path"].to_pylist())
    return {name for path in paths for name in (path.stem, path.name)}
