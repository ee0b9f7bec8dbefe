"""Scores of places in the lungs alone, through fitting, thresholds, evaluation and prediction."""

import numpy as np
import pandas as pd
import pytest
import torch

from carina.data.store import select
from carina.errors import CarinaError
from carina.evaluate.predict import predict
from carina.evaluate.score import evaluate
from carina.files import read_json, write_json
from carina.finetune.run import finetune
from carina.models.predictor import load_predictor

SCORER = {"name": "padim", "layers": [1], "dimensions": 4, "places": "lungs", "focal": True}


def given(store, out, **changes):
    return {
        "store": str(store),
        "backbone": "random:test_resnet",
        "scale": 64,
        "threads": 1,
        "out": str(out),
        **changes,
    }


@pytest.fixture(scope="module")
def run(phantom_store, tmp_path_factory):
    out = tmp_path_factory.mktemp("places") / "run"
    finetune("anomaly", given(phantom_store, out, scorer=SCORER), quiet=True)
    return out


def test_evaluate_and_predict_judge_the_lungs_as_the_fit_did(run, phantom_store, phantom_folder, tmp_path):
    how = {"store": str(phantom_store), "split": "val", "controls": False, "resamples": 100, "examples": 0}
    evaluate(str(run), {**how, "out": str(tmp_path / "e")}, quiet=True)
    frame = pd.read_parquet(tmp_path / "e" / "predictions.parquet")
    predictor, rows = load_predictor(run), select(str(phantom_store)).split("val")
    images = torch.from_numpy(rows.images(range(len(rows)), 64))[:, None].float() / 255
    lungs = torch.from_numpy(rows.masks(range(len(rows)), 64))[:, None]
    member = predictor.members[0]
    with torch.no_grad():
        maps = member.scorer.maps(member.scorer.read(member.backbone, images, member.scorer.settings, lungs)).numpy()
    side = 64 // maps.shape[1]
    inside = lungs.numpy().reshape(len(maps), maps.shape[1], side, -1, side).mean(axis=(2, 4)) >= 0.5
    expected = [m[i].max() - np.percentile(m[i], 50, method="lower") for m, i in zip(maps, inside)]
    np.testing.assert_allclose(frame["score"], expected, rtol=1e-4)
    normal = frame["target"].to_numpy() == 0
    threshold = predictor.info["thresholds"]["abnormal"]  # of these very normals
    assert threshold == pytest.approx(np.quantile(frame["score"][normal], 0.95), rel=1e-5)
    assert member.needs_lungs
    files = [str(path) for path in sorted((phantom_folder / "images").glob("*.png"))[:2]]
    told = predict(str(run), files, maps=str(tmp_path / "maps"), quiet=True)
    assert not told["rejected"], told["rejected"]
    assert len(told["predictions"]) == 2 and len(list((tmp_path / "maps").iterdir())) == 2


def test_a_predictor_from_before_there_were_places_judges_all(run, tmp_path):
    info = read_json(run / "predictor" / "predictor.json")
    for key in ("places", "focal"):
        del info["members"][0]["scorer"][key]
    folder = tmp_path / "predictor"
    folder.mkdir()
    for part in (run / "predictor").iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "predictor.json").unlink()
    write_json(folder / "predictor.json", info)
    member = load_predictor(folder).members[0]
    assert (member.scorer.settings.places, member.scorer.settings.focal) == ("all", False) and not member.needs_lungs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scorer": {"name": "gaussian", "places": "lungs"}}, "scorer.name=gaussian reads none; give memory"),
        ({"scorer": {"name": "head", "places": "lungs"}, "mode": "full"}, "scorer.name=head reads none"),
        ({"scorer": SCORER, "region": "background"}, "which region=background leaves out"),
    ],
)
def test_places_where_there_are_none_are_refused_at_once(changes, words, phantom_store, tmp_path):
    with pytest.raises(CarinaError, match=words):
        finetune("anomaly", given(phantom_store, tmp_path / "run", **changes), quiet=True)
    assert not (tmp_path / "run").exists()
