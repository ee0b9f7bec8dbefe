"""How well a router learned from pixels tells chests from other radiographs, and PA from AP.

    python benchmarks/router.py data=FOLDER work=FOLDER [folds=5] [out=FILE.json]

`data` holds the test radiographs (body_parts.csv, nih_cxr14, nih_cxr14_64, kermany_224, hand_64, pelvis_ddh, dicom);
everything that is made goes to `work`. All pictures are cut to their central square, brought to 48 x 48 pixels by one
area filter and written as JPEG of one quality: smaller than the smallest original, so that neither size nor sharpness
nor compression tells where one came from, and square, so that no padding does. Then the commands that a user would
type, printed as they run: prepare, finetune classify (the router), finetune anomaly (the detector of what is unlike
every chest), evaluate.

Size and strength of the probe were chosen by cross-fitted log-loss of the training patients. The detector has the
shipped settings but for its rate of false alarms. It was added after the router alone had taken pelves and hips for
chests: they are in no training set, and no classifier knows what it was never shown. `folds` adds patient folds over
all pictures, where the pelves of other patients are shown. View is learned and scored on NIH alone: Kermany's AP would
only say "child".
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import pandas as pd
from common import console, script
from pydantic import Field
from rich.table import Table
from scipy.special import ndtri

from carina.data.splits import split_of
from carina.errors import CarinaError
from carina.files import read_json, write_bytes, write_json, write_text
from carina.finetune.probe import probe
from carina.finetune.recipe import FinetuneRecipe
from carina.imaging.dicom import Unreadable, read_radiograph
from carina.imaging.geometry import Geometry, resize
from carina.imaging.routing import FAMILIAR, best_view, by_header, decide
from carina.intake.router import Router
from carina.metrics.intervals import paired_difference, patient_bootstrap
from carina.models.controls import HOG_SIDE, PERCENTILES, RING_SIDE, RING_WIDTH, hog
from carina.recipes import Section, build

SIDE, QUALITY = 48, 90
NETWORK = ["store=store", "backbone=imagenet-lite0", "size=128", "mode=frozen"]
STRENGTH, FALSE_ALARMS = 0.1, 0.01
LABELS = ["chest", "PA", "AP"]
REJECT_BELOW = 0.8  # the default of carina prepare
NIH = ("nih_cxr14", "nih_cxr14_64")


class Arguments(Section):
    data: str
    work: str
    folds: Annotated[int, Field(ge=2)] | None
    resamples: Annotated[int, Field(ge=100)]
    out: str | None


DEFAULTS = {"folds": 5, "resamples": 2000, "out": None}


def sources(data: Path) -> pd.DataFrame:
    """file, folder, part, patient, split ("" not dealt yet), chest, PA, AP ("" unknown) of every picture."""
    frames = []
    for folder in NIH:
        table = pd.read_csv(data / folder / "labels.csv", dtype=str, keep_default_na=False)
        frame = pd.DataFrame({"file": folder + "/" + table["path"], "split": table["suggested_split"]})
        frame["patient"] = "nih-" + table["patient_id"].str.zfill(8)
        frame["PA"], frame["AP"] = (np.where(table["view"] == view, "1", "0") for view in ("PA", "AP"))
        frames.append(frame.assign(part="chest"))
    listed = pd.read_csv(data / "body_parts.csv", dtype=str, keep_default_na=False).drop_duplicates("path")
    listed = listed[~listed["path"].str.startswith(tuple(f"{folder}/" for folder in NIH))]
    kermany = pd.read_csv(data / "kermany_224" / "labels.csv", dtype=str).set_index("path")["suggested_split"]
    frame = pd.DataFrame({"file": listed["path"], "part": listed["body_part"], "PA": "", "AP": ""})
    owner = listed["patient_id"].where(listed["patient_id"] != "", listed["path"])  # every hand is its own patient
    frame["patient"] = listed["body_part"].where(listed["body_part"] != "chest", "other") + "-" + owner
    # this file is a picture of NIH's patient 00000002
    frame.loc[frame["file"] == "dicom/NIH_DX_chest_implicit.dcm", "patient"] = "nih-00000002"
    frame["split"] = frame["file"].str.removeprefix("kermany_224/").map(kermany)
    frame.loc[frame["part"] == "hand", "split"] = [split_of(p) for p in frame.loc[frame["part"] == "hand", "patient"]]
    table = pd.concat([*frames, frame], ignore_index=True)
    dealt = table.dropna(subset="split").groupby("patient")["split"].first()
    table["split"] = table["split"].fillna(table["patient"].map(dealt)).fillna("test")  # hips, teeth, pelves, DICOM
    table["chest"] = (table["part"] == "chest").astype(int)
    table["abnormal"] = 1 - table["chest"]  # to the detector a chest is normal
    table["folder"] = table["file"].str.split("/").str[0]
    return table


def write_pictures(data: Path, work: Path, table: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray, list[str]]:
    """Write the pictures and labels.csv; returns the rows written, their pixels (N, 48, 48) uint8, and what failed."""
    names, pixels, sizes, failed = [], [], [], []
    for number, file in enumerate(table["file"]):
        name = f"{number:05d}.jpg"
        try:
            radiograph = read_radiograph(data / file)
        except Unreadable as error:
            failed.append(f"{file}: {error}")
            names.append("")
            continue
        image = resize(radiograph.image, SIDE, Geometry("crop"), radiograph.facts.get("spacing"))[0]
        _, encoded = cv2.imencode(".jpg", np.round(image * 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        write_bytes(work / "pictures" / name, encoded.tobytes())
        names.append(name)
        sizes.append(len(encoded))
        pixels.append(cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE))
    table = table.assign(path=names)[np.array(names) != ""].reset_index(drop=True).assign(bytes=sizes)
    columns = ["path", "patient", "split", *LABELS, "abnormal"]
    write_text(work / "pictures" / "labels.csv", table[columns].to_csv(index=False))
    write_text(work / "key", "the key of a benchmark, which hides nobody\n")
    return table, np.stack(pixels), failed


class Commands:
    """The real command, run in `work`, its line kept and its time taken."""

    def __init__(self, work: Path):
        self.work, self.done = work, []

    def __call__(self, *words: str) -> None:
        line = " ".join(("carina", *words))
        print(f"$ {line}", flush=True)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "carina", *words, "--quiet"], cwd=self.work, check=False)
        if done.returncode:
            raise CarinaError(f"'{line}' ended with {done.returncode}; its message stands above")
        self.done.append({"command": line, "seconds": round(time.perf_counter() - start, 1)})


def evaluated(work: Path, evaluation: str, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `table` that an evaluation scored, with the columns score_chest, score_PA, score_AP."""
    frame = pd.read_parquet(work / evaluation / "predictions.parquet")
    wide = frame.pivot(index="image_id", columns="label", values="score").add_prefix("score_").reset_index()
    private = work / "paths" / f"{read_json(work / 'store' / 'store.json')['store_hash']}.parquet"
    wide = wide.merge(pd.read_parquet(private), on="image_id", validate="one_to_one")
    wide["path"] = wide["path"].map(lambda path: Path(path).name)
    return table.merge(wide.drop(columns="image_id"), on="path", validate="one_to_one")


def wilson(right: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share."""
    z = float(ndtri(0.5 + level / 2))
    center, spread = right + z * z / 2, z * np.sqrt(right * (count - right) / count + z * z / 4)
    return float((center - spread) / (count + z * z)), float((center + spread) / (count + z * z))


def recalls(rows: pd.DataFrame, scores: Sequence[dict[str, float]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Per body part (and folder) what pixels alone decide: chests should be kept, all else left out, for doubt or as no
    chest. A patient is right when all of its images are."""
    nothing, outcome = by_header({}), []
    for score in scores:
        route = decide(nothing, score, "chest", REJECT_BELOW)
        outcome.append("kept" if route.keep else "no chest" if "saw no chest" in route.reason else "doubt")
    found = []
    for key, group in rows.assign(outcome=outcome).groupby(list(by)):
        counts = group["outcome"].value_counts()
        whole = (group["outcome"].eq("kept") == (group["chest"] == 1)).groupby(group["patient"]).all()
        low, high = wilson(int(whole.sum()), len(whole))
        found.append(
            {
                **dict(zip(by, key)),
                "images": len(group),
                **{name: int(counts.get(name, 0)) for name in ("kept", "doubt", "no chest")},
                "patients": len(whole),
                "patients_right": int(whole.sum()),
                "recall_of_patients": float(whole.mean()),
                "low": low,
                "high": high,
            }
        )
    return found


def hog_features(pixels: np.ndarray) -> np.ndarray:
    large = np.stack([cv2.resize(image, (HOG_SIDE, HOG_SIDE), interpolation=cv2.INTER_LINEAR) for image in pixels])
    return np.concatenate([hog(part.astype(np.float32) / 255) for part in np.array_split(large, len(large) // 64 + 1)])


def control_features(pixels: np.ndarray, table: pd.DataFrame) -> dict[str, np.ndarray]:
    """What tells a chest from a hand without showing either: (N, D) each."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float64) / 255
    ring = np.ones((RING_SIDE, RING_SIDE), dtype=bool)
    ring[RING_WIDTH:-RING_WIDTH, RING_WIDTH:-RING_WIDTH] = False
    small = np.stack([cv2.resize(image, (RING_SIDE, RING_SIDE), interpolation=cv2.INTER_AREA) for image in pixels])
    moments = (flat.mean(axis=1), flat.std(axis=1), flat.min(axis=1), flat.max(axis=1))
    return {
        "pixels, outer ring (10 % of the side)": small[:, ring] / 255,
        "nine intensity statistics": np.stack([*moments, *np.percentile(flat, PERCENTILES, axis=1)], axis=1),
        "bytes of the written file": table[["bytes"]].to_numpy(np.float64),
    }


class Scored:
    """AUROC with its patient interval, for the same rows from any features: fitted on `train`, scored on `test`."""

    def __init__(self, table: pd.DataFrame, target: str, parts: Sequence[str], resamples: int):
        known = table["part"].isin(parts) & (table[target] != "")
        self.train, self.test = (known & (table["split"] == split) for split in ("train", "test"))
        self.table, self.name, self.resamples = table, target, resamples
        self.y = table.loc[self.test, target].to_numpy(np.float64)
        self.patients = table.loc[self.test, "patient"].to_numpy()

    def fitted(self, features: np.ndarray) -> np.ndarray:
        recipe = build("finetune", FinetuneRecipe, "classify", {"labels": [self.name]})
        target = self.table.loc[self.train, self.name].to_numpy(np.float64)[:, None]
        owners = self.table.loc[self.train, "patient"].tolist()
        weight, bias, _, _ = probe(features[self.train], target, owners, [self.name], recipe.probe, recipe.seed)
        return features[self.test] @ weight[0] + bias[0]

    def auroc(self, scores: np.ndarray, rows: np.ndarray | None = None) -> dict[str, Any]:
        use = np.ones(len(self.y), dtype=bool) if rows is None else rows
        found = patient_bootstrap(self.y[use], scores[use], self.patients[use], resamples=self.resamples)
        return found.to_dict()

    def difference(self, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
        return paired_difference(self.y, a[None], b[None], self.patients, resamples=self.resamples).to_dict()


def view_calls(rows: pd.DataFrame) -> dict[str, Any]:
    """Views as prepare would give them: named at `REJECT_BELOW` or left unknown."""
    named = [best_view({"PA": row.score_PA, "AP": row.score_AP}) for row in rows.itertuples()]
    called = np.array([confidence >= REJECT_BELOW for _, confidence in named])
    right = np.array([view == ("PA" if row.PA == "1" else "AP") for (view, _), row in zip(named, rows.itertuples())])
    low, high = wilson(int((called & right).sum()), int(called.sum()))
    named_right = float(right[called].mean())
    return {
        "images": len(rows), "named": int(called.sum()), "right": int((called & right).sum()),
        "accuracy": named_right, "low": low, "high": high,
    }  # fmt: skip


def as_delivered(router: Router, data: Path) -> list[dict[str, Any]]:
    """The DICOM files as prepare shows them to a router, not written anew: pixels alone, then header and pixels."""
    parts = pd.read_csv(data / "dicom" / "labels.csv", dtype=str, keep_default_na=False).set_index("path")["body_part"]
    rows = []
    for name, part in parts.items():
        try:
            radiograph = read_radiograph(data / "dicom" / name, router.photometry)
        except Unreadable:
            continue
        image, _ = resize(radiograph.image, router.scale, router.geometry, radiograph.facts.get("spacing"))
        scores = router.scores(np.round(image * 255).astype(np.uint8)[None])[0]
        header = by_header(radiograph.facts)
        both = decide(header, scores, "frontal", REJECT_BELOW)
        rows.append(
            {
                "file": name,
                "part": part,
                "chest": scores["chest"],
                "familiar": bool(scores[FAMILIAR]),
                "pixels": decide(by_header({}), scores, "frontal", REJECT_BELOW).keep,
                "kept": both.keep,
                "reason": both.reason,
            }
        )
    return rows


def run(arguments: Arguments) -> dict[str, Any]:
    data, work = Path(arguments.data).resolve(), Path(arguments.work).resolve()
    if not (data / "body_parts.csv").is_file():
        raise CarinaError(f"{arguments.data} holds no body_parts.csv; give the folder of the test radiographs as data=")
    if work.exists() and any(work.iterdir()):
        raise CarinaError(f"{arguments.work} is not empty; give a new folder as work=")
    table, pixels, failed = write_pictures(data, work, sources(data))
    carina, labels = Commands(work), ",".join(LABELS)
    carina(
        "prepare", "pictures/labels.csv", "out=store", f"scales=[{SIDE}]", "fit=crop", "keep=all", "lungs=false",
        "patient=patient", "split=split", f"labels=[{labels},abnormal]", "key=key",
    )  # fmt: skip
    learn = ["finetune", "classify", *NETWORK, f"labels=[{labels}]", f"probe.strengths=[{STRENGTH}]"]
    carina(*learn, "out=router")
    carina("finetune", "anomaly", *NETWORK, f"false_positive_rate={FALSE_ALARMS}", "out=detector")
    carina("evaluate", "router", "store=store", "split=test", "examples=0", "out=evaluation")
    router = Router(f"{work / 'router'},{work / 'detector'}")
    result = {
        "arguments": {"folds": arguments.folds, "resamples": arguments.resamples},
        "pictures": {
            "side": SIDE, "jpeg_quality": QUALITY, "unreadable": failed,
            "images": table.groupby(["part", "folder", "split"]).size().rename("images").reset_index().to_dict("records"),
        },
        **test_split(evaluated(work, "evaluation", table), table, pixels, router, arguments.resamples),
        "dicom_as_delivered": as_delivered(router, data),
    }  # fmt: skip
    if arguments.folds:
        runs = [f"fold{number}" for number in range(arguments.folds)]
        for number, name in enumerate(runs):
            carina(*learn, f"folds={arguments.folds}", f"fold={number}", f"out={name}")
        carina("evaluate", ",".join(runs), "store=store", "split=fold", "examples=0", "out=folded")
        result["folds"] = folded(evaluated(work, "folded", table), arguments.resamples)
    return {**result, "commands": carina.done}


def test_split(
    scored: pd.DataFrame, table: pd.DataFrame, pixels: np.ndarray, router: Router, resamples: int
) -> dict[str, Any]:
    """Trained on the training patients, scored on the test patients: the router beside its controls."""
    by_path = scored.set_index("path")
    view, hand = Scored(table, "PA", ["chest"], resamples), Scored(table, "chest", ["chest", "hand"], resamples)
    features = hog_features(pixels)
    ours, theirs = by_path.loc[table.loc[view.test, "path"], "score_PA"].to_numpy(), view.fitted(features)
    folders = table.loc[view.test, "folder"].to_numpy()
    controls = {"HOG": features, **control_features(pixels, table)}
    test = (table["split"] == "test").to_numpy()
    both = router.scores(pixels[test])
    alone = [{label: value for label, value in row.items() if label != FAMILIAR} for row in both]
    return {
        "view": {
            "router": view.auroc(ours),
            "HOG and logistic regression": view.auroc(theirs),
            "router - HOG": view.difference(ours, theirs),
            "router, within": {folder: view.auroc(ours, folders == folder) for folder in NIH},
            "named": view_calls(by_path.loc[table.loc[view.test, "path"]]),
        },
        "chest_or_hand": {
            "router": hand.auroc(by_path.loc[table.loc[hand.test, "path"], "score_chest"].to_numpy()),
            **{name: hand.auroc(hand.fitted(values)) for name, values in controls.items()},
        },
        "recall": {
            "router": recalls(table[test], alone, ["part", "folder"]),
            "router and detector": recalls(table[test], both, ["part", "folder"]),
        },
    }


def folded(scored: pd.DataFrame, resamples: int) -> dict[str, Any]:
    """Patient folds over all pictures: every patient is scored by a router that saw only others."""
    nih = scored[scored["PA"] != ""]
    target, score = nih["PA"].to_numpy(np.float64), nih["score_PA"].to_numpy()
    view = patient_bootstrap(target, score, nih["patient"].to_numpy(), resamples=resamples)
    chest = [{"chest": value} for value in scored["score_chest"]]
    return {"view": view.to_dict(), "named": view_calls(nih), "recall": recalls(scored, chest, ["part"])}


def _figure(value: dict[str, Any]) -> str:
    words = f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    return words if value["estimable"] else f"{words}, not estimable: {value['reason']}"


def _recall_table(title: str, rows: list[dict[str, Any]]) -> Table:
    names = ("images", "kept", "in doubt", "no chest", "patients", "all images right", "95 % (Wilson, patients)")
    table = Table("part", *names, title=title)
    for row in rows:
        name = ", ".join(str(row[key]) for key in ("part", "folder") if key in row)
        counts = [str(row[key]) for key in ("images", "kept", "doubt", "no chest", "patients", "patients_right")]
        table.add_row(name, *counts, f"{row['low']:.3f} to {row['high']:.3f}")
    return table


def _named(calls: dict[str, Any]) -> str:
    share = f"{calls['accuracy']:.3f}, {calls['low']:.3f} to {calls['high']:.3f} (Wilson, images)"
    return f"Views named at {REJECT_BELOW}: {calls['named']} of {calls['images']}, right {calls['right']} ({share})"


def show(result: dict[str, Any]) -> None:
    out = console()
    for title, key in (
        ("PA against AP, test patients of NIH: AUROC, 95 % by patient", "view"),
        ("Chest against hand, test patients: AUROC, 95 % by patient", "chest_or_hand"),
    ):
        table = Table("row", "AUROC", title=title)
        flat = {**result[key], **{f"router, within {k}": v for k, v in result[key].get("router, within", {}).items()}}
        for name, value in flat.items():
            if "value" in value:
                table.add_row(name, _figure(value))
        out.print(table)
    out.print(_named(result["view"]["named"]))
    for name, rows in result["recall"].items():
        out.print(_recall_table(f"Test patients, pixels alone: {name}", rows))
    if "folds" in result:
        out.print(f"Patient folds, PA against AP: {_figure(result['folds']['view'])}")
        out.print(_named(result["folds"]["named"]))
        out.print(_recall_table("Patient folds over all pictures: router", result["folds"]["recall"]))
    table = Table(
        "file", "part", "chest", "familiar", "kept by pixels", "kept", "reason", title="DICOM files as they are"
    )
    for row in result["dicom_as_delivered"]:
        flags = ["yes" if row[name] else "no" for name in ("familiar", "pixels", "kept")]
        table.add_row(row["file"], row["part"], f"{row['chest']:.4f}", *flags, row["reason"])
    out.print(table)


def work(given: Arguments) -> None:
    result = run(given)
    if given.out:
        write_json(given.out, result)
    show(result)


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "router", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
