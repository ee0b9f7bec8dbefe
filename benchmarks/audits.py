"""The shortcut audits on real radiographs: a label that is read beside the lungs, and a marker that was planted.

    python benchmarks/audits.py kermany=STORE nih=STORE data=FOLDER work=FOLDER [scale=128] [out=FILE.json]

Frozen ImageNet features with logistic regression, small enough to be trained here. kermany: its test rows are audited for
shortcuts, robustness and leakage. nih: every picture of nih_cxr14 is stamped by class as in benchmarks/shortcut.py (R on
abnormal, L on normal) and prepared into WORK/stamped; models are trained on these and on the store as it is, both on split
train, and the markers of val and test are audited. HOG keeps the places of things, so it learns a letter that goes with the
label: it is to be found out. Pooled features of the frozen network hardly hold it: they are to be cleared, and so is
whatever was trained on clean pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from common import console, script
from pydantic import Field
from rich.table import Table
from shortcut import classifier, marked
from stamps import read_picture
from torch import nn

from carina.data.labels import to_targets
from carina.data.store import Selection, select
from carina.errors import CarinaError
from carina.evaluate import audits
from carina.evaluate.audits import markers
from carina.evaluate.audits.common import Audited, AuditSettings
from carina.files import write_json
from carina.finetune.run import finetune
from carina.intake.prepare import prepare
from carina.models.controls import HOG_SIDE, hog, resized
from carina.models.predictor import Predictor, load_predictor
from carina.progress import Progress
from carina.recipes import Section

SIDE = 512  # at which pictures are stamped


class Arguments(Section):
    kermany: str | None
    nih: str | None
    data: str | None
    work: str
    scale: Annotated[int, Field(ge=32)]
    resamples: Annotated[int, Field(ge=100)]
    threads: Annotated[int, Field(ge=1)]
    out: str | None


DEFAULTS = {"kermany": None, "nih": None, "data": None, "scale": 128, "resamples": 2000, "threads": 1, "out": None}


def probe(given: Arguments, store: str, name: str) -> str:
    """The run of a frozen probe of `abnormal`, trained on split=train; made once."""
    run = Path(given.work) / name
    if not (run / "predictor").is_dir():
        recipe = {"backbone": "imagenet-lite0", "store": store, "labels": ["abnormal"], "out": str(run), "wandb": "off"}
        size = {"scale": given.scale, "size": given.scale, "threads": given.threads, "threshold_rows": None}
        finetune("classify", recipe | size, quiet=True)
    return str(run)


def stamped(given: Arguments) -> str:
    """A store of nih_cxr14 whose markers go with the label; made once."""
    store, folder = Path(given.work) / "stamped", Path(given.work) / "pictures"
    if (store / "store.json").is_file():
        return str(store)
    table = pd.read_csv(Path(given.data) / "nih_cxr14" / "labels.csv", dtype=str)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with Progress("stamp", len(table), unit="images") as progress:
        for number, row in enumerate(table.itertuples()):
            source = pd.Series({"path": f"nih_cxr14/{row.path}", "patient": row.patient_id, "mask": None})
            picture = read_picture(Path(given.data), source, (), SIDE)
            abnormal = row.No_Finding == "0"
            one = marked(picture, "R" if abnormal else "L")
            if one is not None:
                name = f"{number:05d}.png"
                cv2.imwrite(str(folder / name), np.round(255 * one.image).astype(np.uint8))
                facts = {"patient_id": row.patient_id, "split": row.suggested_split, "abnormal": int(abnormal)}
                rows.append({"path": name, **facts})
            progress.advance()
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    columns = {"patient": "patient_id", "split": "split", "labels": ["abnormal"], "lungs": True}
    scales = sorted({given.scale, 224})
    prepare(str(folder / "labels.csv"), {"out": str(store), "scales": scales, "workers": 1, **columns}, quiet=True)
    return str(store)


def kermany(given: Arguments) -> list[dict[str, Any]]:
    run = probe(given, given.kermany, "kermany")
    settings = AuditSettings(resamples=given.resamples, run=run)
    rows = select(given.kermany).split("test")
    return audits.run(["shortcut", "robustness", "leakage"], load_predictor(run), rows, given.kermany, settings, False)


class HogMember(nn.Module):
    """HOG with logistic regression, in the place of a network with its head."""

    needs_lungs = False

    def __init__(self, rows: Selection, scale: int):
        super().__init__()
        self.scale = scale
        features = hog(resized(rows.images(range(len(rows)), scale), HOG_SIDE))
        target = to_targets(rows.targets(["abnormal"]))[:, 0]
        self.model = classifier(features, target, rows.table["patient_id"].to_numpy())

    def scores(self, images: torch.Tensor, lungs: torch.Tensor | None = None) -> torch.Tensor:
        small = F.interpolate(images, (HOG_SIDE, HOG_SIDE), mode="area")[:, 0].numpy()
        return torch.from_numpy(self.model.predict_proba(hog(small))[:, 1:])


def planted(given: Arguments) -> list[dict[str, Any]]:
    """The marker audit of every model on pictures as they came and on stamped ones."""
    stores = {"clean": given.nih, "stamped": stamped(given)}
    settings, found = AuditSettings(resamples=given.resamples), []
    rows = {name: select(store).split("val", "test") for name, store in stores.items()}
    marks = {name: markers.Marks(some, False) for name, some in rows.items()}
    models: dict[tuple[str, str], Predictor] = {}
    for name, store in stores.items():
        member = HogMember(select(store).split("train"), given.scale)
        models["HOG", name] = Predictor({"labels": ["abnormal"], "stack": {"abnormal": [1.0]}}, [member])
        models["frozen network", name] = load_predictor(probe(given, store, f"nih-{name}"))
    for model in ("HOG", "frozen network"):
        for trained, tested in (("stamped", "stamped"), ("clean", "clean"), ("clean", "stamped")):
            look = Audited(models[model, trained], rows[tested], stores[tested], settings, False)
            audit = markers.audit(look, marks[tested])
            found.append({"model": model, "trained_on": trained, "tested_on": tested, **audit})
    return found


def run(given: Arguments) -> dict[str, Any]:
    torch.set_num_threads(given.threads)
    cv2.setNumThreads(1)
    if given.nih and not given.data:
        raise CarinaError("the stamps are put into raw pictures; give their folder as data=FOLDER")
    if not given.kermany and not given.nih:
        raise CarinaError("there is nothing to audit; give kermany=STORE or nih=STORE, or both")
    return {
        "benchmark": "audits",
        "arguments": given.model_dump(include={"scale", "resamples", "threads"}),
        "kermany": kermany(given) if given.kermany else None,
        "planted": planted(given) if given.nih else None,
    }


def figure(value: dict[str, Any] | None) -> str:
    if value is None or value["value"] is None:
        return "-"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" if value["low"] is not None else "-"


def shown(result: dict[str, Any]) -> list[Table | str]:
    parts: list[Table | str] = []
    for found in result["kermany"] or []:
        if found["name"] == "shortcut":
            parts.append(Table(title="Kermany, test rows: AUROC of abnormal", title_justify="left"))
            for head in ("kind", "input", "AUROC", "less than whole (controls: than HOG)"):
                parts[-1].add_column(head)
            for row in found["rows"]:
                parts[-1].add_row(
                    row["kind"], row["input"], row["missing"] or figure(row["auroc"]), figure(row["drop"])
                )
        parts.append(f"{found['name']}: {found['sentence']}")
    if result["planted"]:
        heads = ("whole", "inpainted", "own_class", "other_class", "markers_alone", "drop", "tie")
        parts.append(Table(title="nih_cxr14, val and test: AUROC of abnormal", title_justify="left"))
        for head in ("model", "trained on", "tested on", *(head.replace("_", " ") for head in heads)):
            parts[-1].add_column(head)
        table = parts[-1]
        for found in result["planted"]:
            table.add_row(
                found["model"],
                found["trained_on"],
                found["tested_on"],
                *(figure(found["rows"][0][head]) for head in heads),
            )
            parts.append(f"{found['model']}, {found['trained_on']} on {found['tested_on']}: {found['sentence']}")
    return parts


def work(given: Arguments) -> None:
    result = run(given)
    if given.out:
        write_json(given.out, result)
    out = console(190)
    for part in shown(result):
        out.print(part)


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "audits", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
