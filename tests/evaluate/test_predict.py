"""A raw file through predict, and the same file through prepare and evaluate."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

LABELS = ["Opacity", "Effusion"]
COLUMNS = {"patient": "patient_id", "view": "view", "labels": [*LABELS, "abnormal"], "synthetic": True}
KEPT = {"keep": "all", "burned_in": "keep", "workers": 1, "duplicates": False}
# small scales made from large ones, 16 bits and losses: predict must go the same way
FORMS = {
    "plain": {"scales": [32, 64], "lungs": True},
    "encoded": {"scales": [48, 64, 96], "encoding": {48: "jpeg", 64: "png"}, "bits": {64: 16}, "jpeg_quality": 60,
                "fit": "crop"},
    "markers": {"scales": [32, 64, 128], "markers": "inpaint", "encoding": "png", "window": "percentile"},
}  # fmt: skip


def prepared(source, out, form, **given):
    from carina.intake.prepare import prepare

    return prepare(str(source), {"out": str(out), **KEPT, **FORMS[form], **given}, quiet=True)


def written(out, store_paths):
    """Scores by path and label, from what evaluate wrote."""
    paths = pq.read_table(store_paths).to_pandas().set_index("image_id")["path"]
    frame = pd.read_parquet(Path(out) / "predictions.parquet")
    assert set(frame["image_id"]) <= set(paths.index)
    return {(paths[i], label): score for i, label, score in zip(frame["image_id"], frame["label"], frame["score"])}


def differences(evaluated, result):
    """How far the scores of predict lie from those of evaluate: probabilities absolutely, distances relatively."""
    told = {(str(Path(row["path"]).resolve()), label): score
            for row in result["predictions"] for label, score in row["scores"].items()}  # fmt: skip
    assert set(evaluated) <= set(told) and len(evaluated)
    far = [abs(told[key] - score) / (1 if result["score"] == "probability" else abs(score))
           for key, score in evaluated.items()]  # fmt: skip
    return np.array(far)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Synthetic radiographs of 20 patients, DICOM and PNG, with their table labels.csv."""
    from carina.data.phantoms import write_phantoms

    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, patients=16, seed=4, size=128, file_format="mixed")
    return folder


@pytest.fixture(scope="module", params=["plain", "encoded", pytest.param("markers", marks=pytest.mark.slow)])
def trained(request, phantoms, tmp_path_factory):
    """(form, folder, {task: run}) of predictors on phantoms prepared in that form."""
    from carina.finetune.run import finetune

    form, folder = request.param, tmp_path_factory.mktemp(request.param)
    prepared(phantoms / "labels.csv", folder / "store", form, **COLUMNS)
    given = {"store": str(folder / "store"), "architecture": "resnet10t", "threads": 1, "wandb": "off"}
    tasks = ["classify", "anomaly"] + ["lungs"] * (form == "plain")
    runs = {task: folder / task for task in tasks}
    scales = FORMS[form]["scales"]
    finetune("classify", {**given, "labels": LABELS, "scales": scales[:2], "out": str(runs["classify"])}, quiet=True)
    finetune("anomaly", {**given, "scale": scales[-1], "out": str(runs["anomaly"])}, quiet=True)
    if "lungs" in runs:
        finetune("anomaly", {**given, "scale": scales[0], "region": "lungs", "out": str(runs["lungs"])}, quiet=True)
    return form, folder, runs


@pytest.fixture
def one_process(monkeypatch):
    """Files decoded here: starting another process takes longer than the rest; the slow test does start it."""
    from carina.evaluate import predict

    monkeypatch.setattr(predict, "isolated", lambda reader, paths: ((reader(path), "") for path in paths))


def test_files_get_the_scores_of_their_rows(trained, phantoms, one_process, tmp_path):
    from carina.evaluate.predict import predict
    from carina.evaluate.score import evaluate

    form, _, runs = trained
    table = pd.read_csv(phantoms / "labels.csv", dtype=str)
    some = table.iloc[::4].copy()
    some["path"] = [str((phantoms / path).resolve()) for path in some["path"]]
    some.to_csv(tmp_path / "some.csv", index=False)
    facts = prepared(tmp_path / "some.csv", tmp_path / "store", form, **COLUMNS)
    for task, run in runs.items():
        info = json.loads((run / "predictor" / "predictor.json").read_text())
        assert set(info["encoding"]) == {str(scale) for scale in FORMS[form]["scales"]}
        out = tmp_path / f"evaluated-{task}"
        given = {"store": str(tmp_path / "store"), "split": "all", "out": str(out), "resamples": 100, "examples": 0}
        evaluate(str(run), {**given, "controls": False}, quiet=True)
        evaluated = written(out, facts["paths"])
        assert len(evaluated) == len(some) * len(info["labels"])
        result = predict(str(run), some["path"].tolist(), quiet=True)
        assert differences(evaluated, result).max() < 1e-5


def test_eight_bits_instead_of_what_was_stored_would_be_seen(trained, phantoms, one_process):
    """The comparison above would notice a forgotten encoding."""
    from carina.data.encoding import Encoding
    from carina.evaluate.predict import read_files
    from carina.imaging.geometry import Geometry
    from carina.imaging.photometry import Photometry
    from carina.models.predictor import load_predictor

    form, _, runs = trained
    info = load_predictor(runs["classify"]).info
    settings = (Photometry.from_dict(info["photometry"]), Geometry.from_dict(info["geometry"]))
    paths = [str(p) for p in sorted(phantoms.rglob("*.dcm"))[:3]]
    scales = FORMS[form]["scales"][:2]
    right = {int(s): Encoding(e["format"], int(e["bits"]), int(e["quality"])) for s, e in info["encoding"].items()}
    ((_, plain, _, _),) = read_files(paths, scales, *settings)
    ((_, exact, _, _),) = read_files(paths, scales, *settings, encodings=right)
    same = [bool((plain[scale] == exact[scale]).all()) for scale in scales]
    assert not any(same) if form == "encoded" else all(same)


def test_csv_maps_and_rejected_files(trained, phantoms, one_process, capsys, tmp_path):
    from carina.cli import main

    form, _, runs = trained
    paths = sorted(str(p) for p in phantoms.rglob("*.png") if "mask" not in str(p).lower())[:2]
    if form != "plain":
        pytest.skip("once is enough")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    flags = ["--csv", tmp_path / "scores.csv", "--maps", tmp_path / "maps", "--json"]
    words = ["predict", runs["classify"], *paths, tmp_path / "broken.png", *flags]
    assert main([str(word) for word in words]) == 0
    result = json.loads(capsys.readouterr().out)
    frame = pd.read_csv(tmp_path / "scores.csv")
    columns = [column for label in LABELS for column in (label, f"{label}_above_threshold")]
    assert list(frame.columns) == ["path", *columns, "reason"]
    assert frame["path"].tolist() == [*paths, str(tmp_path / "broken.png")]
    for row, told in zip(frame.to_dict("records"), result["predictions"]):
        for label in LABELS:
            assert row[label] == pytest.approx(told["scores"][label], abs=1e-12)
            assert row[f"{label}_above_threshold"] == told["above_threshold"][label]
    assert frame["reason"].isna().tolist() == [True, True, False] and frame[columns].isna().iloc[2].all()
    assert {p.name for p in (tmp_path / "maps").iterdir()} == {
        f"{Path(path).stem}-{label}.png" for path in paths for label in LABELS
    }
    assert main(["predict", str(runs["classify"]), paths[0], "scale=64"]) == 2
    assert "takes no overrides" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.real
def test_every_decodable_file_and_fifty_radiographs(trained, real_data, carina, tmp_path):
    form, _, runs = trained
    pictures = (
        sorted((real_data / "kermany").rglob("*.jp*g"))[:25] + sorted((real_data / "nih_cxr14").rglob("*.jp*g"))[:25]
    )
    files = [*sorted((real_data / "dicom").glob("*.dcm")), *pictures]
    table = pd.DataFrame({"path": [str(f.resolve()) for f in files], "who": [f"p{i}" for i in range(len(files))]})
    for number, label in enumerate([*LABELS, "abnormal"]):
        table[label] = [(i >> number) & 1 for i in range(len(files))]
    table.to_csv(tmp_path / "files.csv", index=False)
    settings = {**KEPT, **FORMS[form], "patient": "who", "labels": [*LABELS, "abnormal"]}
    words = [f"{key}={json.dumps(value)}".replace('"', "") for key, value in settings.items()]
    facts = json.loads(carina("prepare", tmp_path / "files.csv", f"out={tmp_path / 'store'}", *words, "--json").stdout)
    for task, run in runs.items():
        out = tmp_path / task
        given = [
            f"store={tmp_path / 'store'}",
            "split=all",
            f"out={out}",
            "resamples=100",
            "examples=0",
            "controls=false",
        ]
        carina("evaluate", run, *given)
        evaluated = written(out, facts["paths"])
        images = {path for path, _ in evaluated}
        result = json.loads(carina("predict", run, *table["path"], "--json").stdout)
        far = differences(evaluated, result)
        print(f"{form} {task}: {len(images)} files, {len(far)} scores, largest difference {far.max():.2e}")
        assert sum(path.endswith(".dcm") for path in images) >= 20 and len(images) >= 70
        assert {str(Path(row["path"]).resolve()) for row in result["predictions"]} == images
        assert far.max() < 1e-5
