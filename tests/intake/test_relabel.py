"""Labels added or corrected later: `carina prepare STORE labels=new.csv`."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from carina.data.store import Store
from carina.errors import CarinaError


@pytest.fixture()
def store(phantom_store, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(phantom_store, folder)
    return folder


def write(file, **columns):
    pd.DataFrame(columns).to_csv(file, index=False)
    return file


def test_labels_are_added_and_corrected_and_every_version_is_kept(store, tmp_path, carina):
    before = Store(store)
    ids = before.table["image_id"]
    new = write(
        tmp_path / "new.csv",
        image_id=[ids[0], ids[1], ids[2], "not-there"],
        Nodule=["1", "", "unknown", "1"],
        Fracture=["-1", "1", "0", "1"],
    )
    result = json.loads(carina("prepare", store, f"labels={new}", "--json").stdout)
    assert result["version"] == 2 and result["added"] == ["Fracture"] and result["not_in_store"] == 1
    after = Store(store)
    assert after.labels == [*before.labels, "Fracture"]
    assert after.table["label.Nodule"][0] == 1 and np.isnan(after.table["label.Nodule"][2])
    np.testing.assert_array_equal(after.table["label.Nodule"][3:], before.table["label.Nodule"][3:])
    assert after.table["label.Nodule"][1] == before.table["label.Nodule"][1]
    np.testing.assert_array_equal(after.table["label.Fracture"][:4], [-1, 1, 0, np.nan])
    assert after.info["store_hash"] == before.info["store_hash"]
    assert after.info["labels_hash"] != before.info["labels_hash"]
    assert after.info["counts"]["positive"]["Fracture"] == 1
    first = pd.read_parquet(store / "labels" / "0001.parquet")
    np.testing.assert_array_equal(first["label.Nodule"], before.table["label.Nodule"])
    pd.testing.assert_frame_equal(
        pd.read_parquet(store / "labels" / "0002.parquet").drop(columns="image_id"),
        after.table[[f"label.{name}" for name in after.labels]],
    )
    again = json.loads(carina("prepare", store, f"labels={new}", "--json").stdout)
    assert not again["added"] and not again["changed"]
    assert [v["version"] for v in Store(store).info["labels_versions"]] == [1, 2]


def test_rows_can_be_named_by_path_under_the_same_key(phantom_folder, store, tmp_path, carina):
    source = pd.read_csv(phantom_folder / "labels.csv", dtype=str)
    new = write(tmp_path / "new.csv", path=source["path"][:5], Hernia=["1", "0", "1", "0", "1"])
    carina("prepare", store, f"labels={new}")
    table = Store(store).table
    assert (table["label.Hernia"] == 1).sum() == 3 and (table["label.Hernia"] == 0).sum() == 2
    (tmp_path / "key").write_text("another secret, long enough")
    assert "another key" in carina("prepare", store, f"labels={new}", f"key={tmp_path / 'key'}", code=2).stderr


def test_stopped_half_way_it_says_so_and_the_same_command_mends_it(store, tmp_path, monkeypatch):
    from carina.intake import relabel as module

    before = Store(store)
    new = write(tmp_path / "new.csv", image_id=before.table["image_id"][:3], Nodule=["1", "1", "0"])
    real = module.write_json

    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", stops)
    with pytest.raises(KeyboardInterrupt):
        module.relabel(store, {"labels": str(new)})
    with pytest.raises(CarinaError, match="stopped half way"):
        Store(store)
    monkeypatch.setattr(module, "write_json", real)
    assert module.relabel(store, {"labels": str(new)})["version"] == 2
    np.testing.assert_array_equal(Store(store).table["label.Nodule"][:3], [1, 1, 0])


def test_a_dry_run_tells_and_changes_nothing(store, tmp_path):
    from carina.intake.relabel import relabel

    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    new = write(tmp_path / "new.csv", image_id=Store(store).table["image_id"][:2], Hernia=["1", "0"])
    assert relabel(store, {"labels": str(new)}, dry_run=True)["changed"] == {"Hernia": 2}
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before


def test_abnormal_follows_the_findings_until_it_is_stated(tmp_path, phantom_folder):
    from carina.intake.prepare import prepare
    from carina.intake.relabel import relabel

    table = pd.read_csv(phantom_folder / "labels.csv", dtype=str)[:12]
    table["path"] = [str(phantom_folder / name) for name in table["path"]]
    table["No_Finding"], table["Edema"] = "1", "0"
    table.to_csv(tmp_path / "source.csv", index=False)
    out = tmp_path / "own"
    prepare(
        str(tmp_path / "source.csv"), {"out": str(out), "scales": [32], "labels": ["No_Finding", "Edema"]}, quiet=True
    )
    ids = Store(out).table["image_id"]
    assert (Store(out).table["label.abnormal"] == 0).all()
    change = {"image_id": ids[:1], "No_Finding": ["0"], "Edema": ["1"]}
    relabel(out, {"labels": str(write(tmp_path / "a.csv", **change))})
    assert Store(out).table["label.abnormal"].tolist() == [1] + [0] * (len(ids) - 1)
    relabel(out, {"labels": str(write(tmp_path / "b.csv", image_id=ids[1:2], Abnormal=["1"]))})
    assert Store(out).table["label.abnormal"].tolist()[:3] == [1, 1, 0]
    relabel(out, {"labels": str(write(tmp_path / "c.csv", image_id=ids[2:3], Edema=["1"]))})
    assert Store(out).table["label.abnormal"].tolist()[:3] == [1, 1, 0]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"name": ["x"], "Mass": ["1"]}, "neither a column 'image_id' nor 'path'"),
        ({"image_id": ["x"], "Mass": ["1"]}, "names no image of this store"),
        ({"image_id": ["x", "x"], "Mass": ["1", "0"]}, "twice"),
        ({"image_id": ["x"]}, "holds no labels"),
    ],
)
def test_mistakes_are_sentences(store, tmp_path, columns, sentence):
    from carina.intake.relabel import relabel

    with pytest.raises(CarinaError, match=sentence):
        relabel(store, {"labels": str(write(tmp_path / "new.csv", **columns))})


def test_a_value_that_is_no_label_is_a_sentence(store, tmp_path):
    from carina.intake.relabel import relabel

    ids = Store(store).table["image_id"]
    with pytest.raises(CarinaError, match="column 'Mass' holds '2'"):
        relabel(store, {"labels": str(write(tmp_path / "new.csv", image_id=[ids[0]], Mass=["2"]))})
    with pytest.raises(CarinaError, match="is a store already"):
        relabel(store, {"scales": [64]})
