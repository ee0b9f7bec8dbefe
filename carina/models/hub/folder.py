"""The folder that is published: an artefact, its card, its recipe, its checksums, and formats for those without carina."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from carina.errors import CarinaError
from carina.files import atomic_folder, read_json, sha256, write_json, write_text
from carina.models.backbones import Backbone, load_backbone
from carina.models.export import (
    ONNX,
    BackboneGraph,
    PredictorGraph,
    fit_to_geometry,
    write_classifier,
    write_onnx,
)
from carina.models.hub.card import backbone_card, predictor_card
from carina.models.hub.few import told_people
from carina.models.hub.results import evaluation_table
from carina.models.hub.scan import findings
from carina.models.hub.sections import Told
from carina.models.predictor import FILE as PREDICTOR
from carina.models.predictor import Predictor, load_predictor

SUMS = "SHA256SUMS"
PRIVATE = "not published"  # what stands for a condition on rows, which may name a person


@dataclass(frozen=True)
class Artefact:
    """What a run made: a backbone or a predictor, where it lies, and its record (carina.json or predictor.json)."""

    model: Backbone | Predictor
    folder: Path
    record: dict[str, Any]

    @property
    def kind(self) -> str:
        return "backbone" if isinstance(self.model, Backbone) else self.record["kind"]

    @property
    def graph(self) -> BackboneGraph | PredictorGraph:
        return BackboneGraph(self.model) if isinstance(self.model, Backbone) else PredictorGraph(self.model)


def read_artefact(run: Path) -> Artefact:
    """Raises CarinaError for a run without an artefact."""
    if (run / "predictor" / PREDICTOR).is_file():
        predictor = load_predictor(run)
        return Artefact(predictor, run / "predictor", predictor.info)
    if (run / "backbone" / "config.json").is_file():
        folder = run / "backbone"
        return Artefact(load_backbone(str(folder)).eval(), folder, read_json(folder / "carina.json"))
    raise CarinaError(f"{run} holds neither a backbone nor a predictor; publish a finished run")


def evaluations_of(run: Path, artefact: Artefact, named: Sequence[str]) -> list[dict[str, Any]]:
    """metrics.json of the run's own evaluations and of those `named`, which must be of this backbone."""
    found = [read_json(path) for path in sorted(run.glob("evaluations/*/metrics.json"))]
    for folder in named:
        path = Path(folder) / "metrics.json"
        if not path.is_file():
            raise CarinaError(
                f"{folder} holds no evaluation (metrics.json); give the folder that carina evaluate wrote"
            )
        metrics = read_json(path)
        origin = artefact.model.spec.origin if isinstance(artefact.model, Backbone) else None
        if metrics.get("backbone") != origin:
            raise CarinaError(
                f"{folder} is an evaluation of another backbone ({metrics.get('backbone')}); name those of predictors that "
                "were fine-tuned from this run"
            )
        found.append(metrics)
    return found


def assemble(
    artefact: Artefact,
    out: Path,
    told: Told,
    recipe: Mapping[str, Any],
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    onnx: bool | None = None,
    allow_memory: bool = False,
    hashes: Iterable[str] = (),
    names: Iterable[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the folder that would be uploaded, whole or not at all. Nothing else leaves.

    recipe: what may be published of the run's. onnx: None writes it where its packages are there. hashes, names: of the
    training data (see `findings`). Raises CarinaError where anything in it names a person or shows a picture, and for a
    scorer that remembers patients' features unless allowed.
    """
    _refuse_memory(artefact, allow_memory)
    if out.exists() and any(out.iterdir()):
        if not (out / SUMS).is_file():
            raise CarinaError(f"{out} is not empty; choose another out=")
        verify(out)  # an earlier dry run or a failed upload: made anew, unless somebody changed it
    with atomic_folder(out) as temporary:
        shutil.copytree(artefact.folder, temporary, dirs_exist_ok=True)
        record = _public(artefact.record)
        for path in temporary.rglob("carina.json"):
            write_json(path, _public(read_json(path)))
        write_text(temporary / "recipe.yaml", yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True))
        formats = _formats(artefact, temporary, record, onnx, say)
        told = Told(**{**vars(told), "formats": formats, "results": [evaluation_table(one) for one in metrics],
                       "audits": [audit for one in metrics for audit in one.get("audits") or ()]})  # fmt: skip
        if isinstance(artefact.model, Backbone):
            card = backbone_card(artefact.model, record, told)
        else:
            write_json(temporary / PREDICTOR, record)
            card = predictor_card(record, told)
        write_text(temporary / "README.md", card)
        found = findings(temporary, hashes, names, allow_memory=allow_memory)
        if found:
            more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            raise CarinaError(
                f"{artefact.folder} cannot be published: {'; '.join(found[:3])}{more}; take it out of the run's artefact or "
                "make that anew"
            )
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        sums = "".join(f"{sha256(p)}  {p.relative_to(temporary).as_posix()}\n" for p in files)
        write_text(temporary / SUMS, sums)
    listed = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    total = sum((out / name).stat().st_size for name in listed)
    return {"kind": artefact.kind, "files": listed, "bytes": total, "formats": formats}


def _refuse_memory(artefact: Artefact, allowed: bool) -> None:
    if isinstance(artefact.model, Backbone) or allowed:
        return
    memories = [m.scorer.settings.name for m in artefact.model.members if m.scorer is not None and m.scorer.memory]
    if memories:
        raise CarinaError(
            f"this predictor's scorer ({memories[0]}) holds features of patients and stays with the owner; publish a "
            "gaussian one, or give allow_memory=true if you may share them"
        )


def _public(record: dict[str, Any]) -> dict[str, Any]:
    record = told_people(record)
    return {**record, "where": PRIVATE} if record.get("where") is not None else record


def _formats(
    artefact: Artefact, folder: Path, record: Mapping[str, Any], onnx: bool | None, say: Callable[[str], None]
) -> dict[str, str]:
    """Write what is for those without carina; package -> what it gets from the folder."""
    model, geometry = artefact.model, record["geometry"]
    if isinstance(model, Backbone):
        formats = {
            "timm": "features: the folder itself",
            "transformers": "`AutoModel` and `AutoImageProcessor`: features",
        }
    elif write_classifier(folder, model):
        formats = {
            "timm": "logits of the labels (scores are their sigmoid): the folder itself",
            "transformers": "`AutoModelForImageClassification` and `AutoImageProcessor`: the same logits",
        }
    else:
        formats = {
            "timm": "features of the backbone: `member-0`",
            "transformers": "`AutoModel` with `subfolder` member-0: the same features",
        }
    for path in [*folder.glob("config.json"), *folder.glob("member-*/config.json")]:
        write_json(path, fit_to_geometry(read_json(path), geometry))
    if onnx is not False:
        graph = artefact.graph
        facts = {"labels": getattr(model, "labels", []), "use": "research only, not a medical device",
                 "images": "one channel in [0, 1], bright = dense", "photometry": record["photometry"],
                 "geometry": geometry}  # fmt: skip
        try:
            write_onnx(folder / ONNX, graph, facts)
        except CarinaError as error:
            if onnx:
                raise CarinaError(f"{error}; or leave onnx=true out") from None
            say(f"no {ONNX}: {error}")
        else:
            sides = "; ".join(f"`{name}` (N, 1, {side}, {side})" for name, side in graph.inputs.items())
            formats["onnxruntime"] = f"`{ONNX}`: {sides} in [0, 1] to `{graph.output}`, normalization inside"
    return formats


def read_sums(folder: Path) -> dict[str, str]:
    """SHA256SUMS of a published folder: name -> checksum."""
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def verify(folder: Path, whole: bool = True) -> None:
    """Check SHA256SUMS of a published folder; without `whole` files may be absent, as where only some were fetched."""
    for name, digest in read_sums(folder).items():
        if not whole and not (folder / name).is_file():
            continue
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise CarinaError(f"{name} in {folder} is not what was published; get it again, or choose another folder")
