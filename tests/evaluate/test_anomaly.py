"""What evaluate and predict say of anomaly predictors: maps, localization, regions, control rows, below chance."""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console

from carina.data.store import select
from carina.errors import CarinaError
from carina.evaluate import anomaly
from carina.evaluate.explain import heat_maps
from carina.evaluate.predict import predict
from carina.evaluate.score import evaluate
from carina.evaluate.terminal import terminal_table
from carina.finetune.run import finetune
from carina.metrics.localization import aupro, pixel_auroc
from carina.models.predictor import load_predictor, map_span

PADIM = {"name": "padim", "layers": [1, 2], "dimensions": 16}
FAST = {"resamples": 200, "examples": 4, "split": "val+test"}


@pytest.fixture(scope="module")
def made(phantom_store, tmp_path_factory):
    """A run for the settings that are asked for, each made once."""
    folder, runs = tmp_path_factory.mktemp("anomaly"), {}

    def make(**settings):
        name = json.dumps(settings)
        if name not in runs:
            given = {"store": str(phantom_store), "backbone": "random:test_resnet", "scale": 64, "wandb": "off"}
            out = folder / str(len(runs))
            finetune("anomaly", {**given, "threads": 1, **settings, "out": str(out)}, quiet=True)
            runs[name] = out
        return runs[name]

    return make


@pytest.fixture(scope="module")
def mapped(made, phantom_store):
    """A predictor with maps, evaluated where the store holds masks of opacities and nodules."""
    run = made(scorer=PADIM)
    return run, evaluate(str(run), {**FAST, "store": str(phantom_store)}, quiet=True)


def shown(result):
    out = io.StringIO()
    Console(file=out, width=250).print(terminal_table(result))
    return out.getvalue()


def test_localization_is_of_marked_lesions_and_normals(mapped, phantom_store):
    run, result = mapped
    found, predictor = result["localization"], load_predictor(run)
    rows = select(str(phantom_store)).split("val", "test")
    target = rows.targets(["abnormal"])[:, 0]
    masks = sum(rows.masks(range(len(rows)), 64, f"lesion.{name}").astype(int) for name in ("Opacity", "Nodule")) > 0
    marked = masks.any(axis=(1, 2))
    use = (target == 0) | marked
    assert 0 < marked.sum() < (target == 1).sum()  # some phantoms have findings that nobody marked
    assert (found["images"], found["images_with_lesions"]) == (use.sum(), marked.sum())
    assert found["left_out"] == ((target == 1) & ~marked).sum() and found["lesions_from"] == "masks"
    pixels = torch.from_numpy(rows.images(range(len(rows)), 64))[:, None].float() / 255
    with torch.no_grad():
        maps = predictor.members[0].maps(pixels).numpy()[use]
    assert found["aupro"]["value"] == pytest.approx(aupro(maps, masks[use]), abs=1e-4)
    assert found["pixel_auroc"]["value"] == pytest.approx(pixel_auroc(maps, masks[use]), abs=1e-4)
    assert found["pixel_auroc"]["num_patients"] == rows.where(use).table["patient_id"].nunique()
    page, text = (run / "evaluations" / "val-test" / "report.html").read_text(), shown(result)
    assert "Where the anomaly maps point" in page and "marked by masks" in page
    assert all(word in text for word in ("AUPRO", "pointing game", "left out", "FPR at 95 % TPR", "pretext saw"))


def test_boxes_stand_where_there_is_no_mask():
    """Boxes of an archive join masks; boxes around masks count only where the mask is lost."""

    class Rows:
        stores = ()

        def __len__(self):
            return 4

    def box(x0, origin):
        return {"label": "Nodule", "x0": x0, "y0": 0.0, "x1": x0 + 0.25, "y1": 0.5, "origin": origin}

    rows = Rows()
    boxes = [[box(0, "reader"), box(0.5, "mask")], [box(0.25, "mask")], [], None]
    rows.table = pd.DataFrame({"boxes": boxes})
    masks, origin = anomaly.lesion_truth(rows, 8)
    assert origin.tolist() == ["boxes", "boxes", "", ""]
    expected = np.zeros((4, 8, 8), dtype=bool)
    expected[0, :4, :2] = expected[1, :4, 2:4] = True
    np.testing.assert_array_equal(masks, expected)


def test_control_rows_are_fitted_on_the_same_normals(mapped, made, phantom_store, tmp_path):
    _, result = mapped
    rows = {(row["control"], row["method"]): row for row in result["controls"]}
    assert len(rows) == 15 and rows["file size", "gaussian, standardized"]["missing"] == "the same for every image"
    hog = rows["HOG", "gaussian"]
    assert 0 < hog["auroc"]["value"] < 1 and hog["auroc"]["low"] is not None and 0 <= hog["fpr95"] <= 1
    assert "HOG, mask silhouette" in shown(result) and result["words"] == []
    run = made(scorer=PADIM)
    given = {**FAST, "store": str(phantom_store), "examples": 0, "out": str(tmp_path / "without")}
    assert evaluate(str(run), {**given, "controls": False}, quiet=True)["controls"] == []
    normals = anomaly.training_normals(load_predictor(run), str(phantom_store))
    train = select(str(phantom_store)).split("train")
    assert set(normals.table["image_id"]) == set(train.table["image_id"][train.targets(["abnormal"])[:, 0] == 0])


def test_without_their_normals_there_are_no_control_rows(made, phantom_folder, phantom_store, tmp_path):
    from carina.intake.prepare import prepare

    labels = {"labels": ["abnormal"], "patient": "patient_id", "workers": 1, "mask": "lung_mask"}
    prepare(str(phantom_folder / "labels.csv"), {"out": str(tmp_path / "s"), "scales": [64], **labels}, quiet=True)
    run = made(scorer={"name": "gaussian"})
    given = {**FAST, "store": str(tmp_path / "s"), "split": "all", "examples": 0, "out": str(tmp_path / "e")}
    result = evaluate(str(run), given, quiet=True)
    assert result["controls"] == [] and "this is another store" in result["words"][0]
    assert "this is another store" in shown(result) and result["localization"] is None


def test_folds_have_the_normals_of_their_own_fold(phantom_store, tmp_path):
    common = {"store": str(phantom_store), "backbone": "random:test_resnet", "scale": 64, "folds": 2, "threads": 1}
    for fold in range(2):
        finetune("anomaly", {**common, "fold": fold, "out": str(tmp_path / str(fold))}, quiet=True)
    runs = f"{tmp_path / '0'},{tmp_path / '1'}"
    given = {"store": str(phantom_store), "split": "fold", "resamples": 100, "examples": 0, "out": str(tmp_path / "p")}
    result = evaluate(runs, given, quiet=True)
    hog = next(row for row in result["controls"] if row["control"] == "HOG")
    assert hog["auroc"]["num_positives"] + hog["auroc"]["num_negatives"] == result["images"]
    patients = [
        set(anomaly.training_normals(load_predictor(tmp_path / str(fold)), str(phantom_store)).table["patient_id"])
        for fold in range(2)
    ]
    assert patients[0] and patients[1] and not patients[0] & patients[1]


@pytest.mark.parametrize("region", ["lungs", "background"])
def test_a_region_sees_nothing_else(made, phantom_store, phantom_folder, tmp_path, region):
    """Scores do not change with what lies outside; predict finds the lungs itself."""
    run = made(region=region, scorer={"name": "gaussian"})
    given = {**FAST, "store": str(phantom_store), "controls": False, "out": str(tmp_path / "e"), "examples": 2}
    result = evaluate(str(run), given, quiet=True)
    assert result["region"] == region and f"gaussian, {region}" in shown(result)
    frame = pd.read_parquet(tmp_path / "e" / "predictions.parquet")
    rows = select(str(phantom_store)).split("val", "test")
    assert rows.table["image_id"].tolist() == frame["image_id"].tolist()
    images = torch.from_numpy(rows.images(range(8), 64))[:, None].float() / 255
    lungs = torch.from_numpy(rows.masks(range(8), 64))[:, None]
    seen = lungs if region == "lungs" else ~lungs
    noisy = torch.where(seen, images, torch.rand(images.shape))
    member = load_predictor(run).members[0]
    with torch.no_grad():
        np.testing.assert_allclose(member.scores(noisy, lungs)[:, 0], frame["score"][:8], atol=1e-4)
    files = [str(path) for path in sorted((phantom_folder / "images").iterdir())[:3]]
    told = predict(str(run), files, maps=str(tmp_path / "maps"), quiet=True)
    assert len(told["predictions"]) == 3 and len(list((tmp_path / "maps").iterdir())) == 3


def test_normal_maps_stay_dark_and_bright_ones_are_bright(mapped, phantom_store):
    run, _ = mapped
    predictor = load_predictor(run)
    member, rows = predictor.members[0], select(str(phantom_store)).split("val", "test")
    normal = rows.where(rows.targets(["abnormal"])[:, 0] == 0)
    span = anomaly.display_span(predictor, rows)
    maps = anomaly.anomaly_maps(member, normal)
    assert span == tuple(predictor.info["map_span"])
    del predictor.info["map_span"]  # made by an older carina: the normal rows at hand say it
    span = anomaly.display_span(predictor, rows)
    assert span == pytest.approx(map_span(maps[: anomaly.SPAN_IMAGES]))
    pixels = torch.from_numpy(normal.images(range(len(normal)), 64))[:, None].float() / 255
    heat = heat_maps(member, pixels, 0, span=span)
    assert (heat > 0).mean() <= 0.06 and (heat > 0.55).mean() <= 0.002
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    struck = pixels[:1].clone()
    struck[0, 0][torch.from_numpy((x - 20) ** 2 + (y - 36) ** 2 < 64)] = 1.0
    with torch.no_grad():
        assert heat_maps(member, struck, 0, span=span)[0].max() > heat[0].max()


def test_grad_cam_reads_the_stages_and_sizes_that_the_scorer_reads(made):
    run = made(scorer={"name": "gaussian", "layers": [1, 3], "sizes": [48, 64]})
    heat = heat_maps(load_predictor(run).members[0], torch.rand(2, 1, 64, 64), 0)
    assert heat.shape == (2, 64, 64) and heat.min() >= 0 and 0.99 < heat.max() <= 1


def test_predict_draws_anomaly_maps(mapped, phantom_folder, tmp_path):
    files = [str(path) for path in sorted((phantom_folder / "images").iterdir())[:2]]
    predict(str(mapped[0]), files, maps=str(tmp_path), quiet=True)
    pictures = [np.asarray(Image.open(path)) for path in tmp_path.iterdir()]
    assert len(pictures) == 2 and all(picture.shape[1] > picture.shape[0] for picture in pictures)


def test_below_chance_is_said_in_words(tmp_path):
    """Most normal images of the test rows look as abnormal ones do in training, and the other way round."""
    from carina.intake.prepare import prepare

    noise, rows = np.random.default_rng(0), []
    for number in range(120):
        split, abnormal = ("train", "test")[number % 2], number // 2 % 2
        pixels = noise.integers(100, 130, (64, 64)).astype(np.uint8)
        usual = ((abnormal == 0) == (split == "train")) ^ (number % 20 > 17)
        side = slice(0, 20) if usual else slice(44, 64)
        pixels[:, side] = 20
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append({"path": f"{number}.png", "patient": f"p{number}", "split": split, "abnormal": abnormal})
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    given = {"out": str(tmp_path / "s"), "scales": [64], "labels": ["abnormal"], "patient": "patient", "split": "split"}
    prepare(str(tmp_path / "labels.csv"), {**given, "workers": 1, "duplicates": False}, quiet=True)
    common = {"store": str(tmp_path / "s"), "backbone": "random:test_resnet", "scale": 64, "threshold_rows": None}
    finetune("anomaly", {**common, "threads": 1, "out": str(tmp_path / "r")}, quiet=True)
    given = {"store": str(tmp_path / "s"), "resamples": 200, "examples": 0}
    result = evaluate(str(tmp_path / "r"), given, quiet=True)
    assert result["table"][0]["auroc"]["high"] < 0.5
    assert result["words"][0].startswith("Below chance (this predictor, raw pixels")
    page = (tmp_path / "r" / "evaluations" / "test" / "report.html").read_text()
    assert all("nearer to the training normals" in text for text in (result["words"][0], shown(result), page))


def test_a_region_without_lungs_is_refused(made, phantom_folder, tmp_path):
    from carina.intake.prepare import prepare

    given = {"out": str(tmp_path / "s"), "scales": [64], "labels": ["abnormal"], "workers": 1, "lungs": False}
    prepare(str(phantom_folder / "labels.csv"), given, quiet=True)
    run = made(region="lungs", scorer={"name": "gaussian"})
    with pytest.raises(CarinaError, match="lung masks"):
        evaluate(
            str(run), {**FAST, "split": "all", "store": str(tmp_path / "s"), "out": str(tmp_path / "e")}, quiet=True
        )
