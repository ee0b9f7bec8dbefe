"""Neighbors by brute force, votes by counting, maps that hold no identifier."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carina.errors import CarinaError
from carina.evaluate.neighbors import look, nearest_rows, plane


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_nearest_rows_against_brute_force(seed, k):
    rng = np.random.default_rng(seed)
    features, patients = rng.normal(size=(40, 6)) + 3, rng.integers(0, 15, 40)
    rows, distances = nearest_rows(features.astype(np.float32), 7, patients, k)
    centered = features - features.mean(axis=0)
    cosine = centered @ centered[7] / np.linalg.norm(centered, axis=1) / np.linalg.norm(centered[7])
    expected = [row for row in np.argsort(-cosine, kind="stable") if patients[row] != patients[7]][:k]
    np.testing.assert_allclose(distances, 1 - cosine[expected], atol=1e-5)
    assert set(rows) == set(expected)


def test_fewer_neighbors_than_asked_and_none():
    features = np.eye(4, dtype=np.float32)
    assert len(nearest_rows(features, 0, [0, 0, 1, 2], 10)[0]) == 2
    assert len(nearest_rows(features, 0, [0, 0, 0, 0], 3)[0]) == 0


def test_planes():
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(60, 2)) * (5, 2)
    features = latent @ np.linalg.qr(rng.normal(size=(10, 10)))[0][:2] + 0.01 * rng.normal(size=(60, 10))
    points, variance = plane(features)
    away = np.linalg.norm(latent[:, None] - latent[None], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(points[:, None] - points[None], axis=-1), away, atol=0.15)
    assert variance.sum() > 0.999 and variance[0] > variance[1]
    groups = np.repeat([0, 20], 30)
    points, variance = plane(rng.normal(size=(60, 8)) + groups[:, None], "tsne")
    assert variance is None and points.shape == (60, 2)
    nearest = np.argsort(np.linalg.norm(points[:, None] - points[None], axis=-1), axis=1)[:, 1]
    assert (groups == groups[nearest]).all()
    with pytest.raises(CarinaError, match="at least 3"):
        plane(np.zeros((2, 4)))


@pytest.fixture(scope="module")
def embedded(pretrained, phantom_store, tmp_path_factory):
    from carina.evaluate.predict import embed

    out = tmp_path_factory.mktemp("embedded") / "features.parquet"
    embed(str(pretrained), [str(phantom_store)], {"out": str(out)}, quiet=True)
    return out


def test_inspect_finds_neighbors_and_their_labels(embedded, phantom_store, capsys):
    from carina.cli import main

    frame = pd.read_parquet(embedded)
    case = frame["image_id"][5]
    words = ["inspect", str(embedded), f"nearest={case}", "k=7", f"store={phantom_store}", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    table = pd.read_parquet(phantom_store / "table.parquet").set_index("image_id")
    names = [row["image_id"] for row in told["neighbors"]]
    assert len(names) == 7 and case not in names
    people = {table.loc[name, "patient_id"] for name in names}
    assert table.loc[case, "patient_id"] not in people and not people & set(json.dumps(told).split('"'))
    distances = [row["distance"] for row in told["neighbors"]]
    assert distances == sorted(distances) and 0 <= distances[0] <= distances[-1] <= 2
    for label, vote in told["vote"].items():
        assert vote["share"] == pytest.approx(table.loc[names, f"label.{label}"].mean())
        assert [row[label] for row in told["neighbors"]] == table.loc[names, f"label.{label}"].tolist()
    assert set(told["vote"]) >= {"Opacity", "abnormal"}
    assert main(["inspect", str(embedded), f"nearest={case}", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert [row["image_id"] for row in alone["neighbors"]][:7] == names and alone["vote"] == {}


@pytest.mark.parametrize(("color", "method"), [("split", "pca"), ("view", "tsne"), ("Opacity", "pca"), ("age", "pca")])
def test_maps_are_pictures_without_identifiers(embedded, phantom_store, tmp_path, color, method):
    from PIL import Image

    out = tmp_path / "map.png"
    given = {"map": str(out), "color": color, "method": method, "store": str(phantom_store)}
    told = look(str(embedded), given)
    again = tmp_path / "again.png"
    look(str(embedded), {**given, "map": str(again)})
    assert out.read_bytes() == again.read_bytes()
    picture = Image.open(out)
    assert not picture.info.keys() - {"dpi"}
    colors = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
    assert told["images_drawn"] == len(pd.read_parquet(embedded)) and len(colors) > 20


def test_mistakes_are_sentences(embedded, phantom_store, tmp_path):
    image = pd.read_parquet(embedded)["image_id"][0]
    for asked, said in (
        ({}, "nothing is asked"),
        ({"nearest": "0" * 32}, "no image has the image_id"),
        ({"map": "m.png", "color": "view"}, "give the store"),
        ({"map": "m.png", "color": "views", "store": str(phantom_store)}, "did you mean 'view'"),
        ({"nearest": image, "k": 0}, "k"),
        ({"nearst": image}, "did you mean"),
    ):
        with pytest.raises(CarinaError, match=said):
            look(str(embedded), asked)
    pd.DataFrame({"path": ["a.png"], "features": [[1.0]]}).to_parquet(tmp_path / "files.parquet")
    with pytest.raises(CarinaError, match="no features of a store"):
        look(str(tmp_path / "files.parquet"), {"nearest": image})
