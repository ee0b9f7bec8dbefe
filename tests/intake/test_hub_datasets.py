"""Datasets written by the library `datasets` itself, read back as items and as pixels."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Sequence, Value

from carina.errors import CarinaError
from carina.imaging.dicom import read_radiograph
from carina.imaging.photometry import Photometry, Unreadable
from carina.intake import picture_tables
from carina.intake.hub_datasets import read_content
from carina.intake.sources import find_items

FINDINGS = ["Cardiomegaly", "Pleural Effusion", "Mass"]
FEATURES = Features(
    {
        "image": Image(),
        "class": ClassLabel(names=["NORMAL", "PNEUMONIA"]),
        "findings": Sequence(ClassLabel(names=FINDINGS)),
        "who": Value("int64"),
        "sex": Value("string"),
        "age": Value("float32"),
        "fold": Value("string"),
        "Nodule": Value("float32"),
    }
)


def recipe(**given):
    columns = ("patient", "patient_regex", "study", "view", "sex", "age", "year", "split", "mask", "boxes", "source")
    return SimpleNamespace(**{**dict.fromkeys(columns), "labels": [], "lesions": {}, "official_split": True, **given})


def pixels(seed):
    smooth = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(48, 40)), (0, 0), 4)
    return np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))


def png(seed):
    return cv2.imencode(".png", pixels(seed))[1].tobytes()


def rows(start, count):
    for i in range(start, start + count):
        yield {
            "image": {"bytes": png(i), "path": f"p{i // 2}_{i}.png"},
            "class": i % 2 if i % 5 else -1,
            "findings": [[], [0], [1, 2], [2]][i % 4],
            "who": i // 2,
            "sex": "FM"[i % 2],
            "age": float(30 + i) if i % 3 else None,
            "fold": ["train", "validation", "test"][(i // 2) % 3],
            "Nodule": [1.0, 0.0, -1.0, None][i % 4],
        }


def dataset(start=0, count=8):
    return Dataset.from_list(list(rows(start, count)), features=FEATURES)


@pytest.fixture(params=["saved", "dict", "parquet", "parquet folder"])
def stored(request, tmp_path):
    """(source, the split that its place says for the first rows)"""
    place = tmp_path / "data"
    if request.param == "saved":
        dataset().save_to_disk(str(place))
    elif request.param == "dict":
        DatasetDict({"train": dataset(0, 6), "validation": dataset(6, 2)}).save_to_disk(str(place))
    elif request.param == "parquet":
        place = tmp_path / "data.parquet"
        dataset().to_parquet(str(place), batch_size=3)
        assert pq.ParquetFile(place).num_row_groups == 3
        return str(place), ""
    else:
        place.mkdir()
        dataset(0, 6).to_parquet(str(place / "train-00000-of-00001.parquet"))
        dataset(6, 2).to_parquet(str(place / "validation-00000-of-00001.parquet"))
    return f"hf:{place}", "" if request.param == "saved" else "train"


def test_every_row_comes_back_with_its_own_labels_and_pixels(stored):
    source, split = stored
    items = find_items(source, recipe(patient="who", sex="sex", age="age"))
    assert [Path(item.relative).name for item in items] == [f"p{i // 2}_{i}.png" for i in range(8)]
    for item in items:
        i = int(item.relative.split("_")[1].split(".")[0])
        truth = next(rows(i, 1))
        assert (item.patient, item.sex, item.age) == (str(truth["who"]), truth["sex"], truth["age"])
        unknown = truth["class"] == -1
        for name, code in (("No_Finding", 0), ("Pneumonia", 1)):
            assert np.isnan(item.labels[name]) if unknown else item.labels[name] == (truth["class"] == code)
        for code, name in enumerate(("Cardiomegaly", "Effusion", "Mass")):
            assert item.labels[name] == (code in truth["findings"])
        said = [] if unknown else [FEATURES["class"].names[truth["class"]]]
        assert item.original_labels == ";".join(filter(None, [*said, "|".join(FINDINGS[c] for c in truth["findings"])]))
        assert item.split == ("val" if split and i >= 6 else split)
        image = read_radiograph(read_content(item), Photometry(window="full")).image
        np.testing.assert_array_equal(np.round(image * 255).astype(np.uint8), pixels(i))
    assert find_items(source, recipe(patient_regex=r"(p\d+)_"))[0].patient_in_name == "p0"


def test_columns_and_classes_may_be_picked_and_renamed(stored):
    source, _ = stored
    items = find_items(source, recipe(labels={"Fluid": "Pleural Effusion", "Spot": "Nodule"}, split="fold"))
    for item in items:
        truth = next(rows(int(item.relative.split("_")[1].split(".")[0]), 1))
        assert list(item.labels) == ["Fluid", "Spot"] and item.labels["Fluid"] == (1 in truth["findings"])
        spot = truth["Nodule"]
        assert np.isnan(item.labels["Spot"]) if spot is None else item.labels["Spot"] == spot
        assert item.split == {"validation": "val"}.get(truth["fold"], truth["fold"])
    assert list(find_items(source, recipe(labels=["Effusion", "NORMAL"]))[0].labels) == ["Effusion", "No_Finding"]


def test_patients_stand_in_one_split(tmp_path):
    place = tmp_path / "data"
    DatasetDict({"train": dataset(0, 5), "test": dataset(5, 3)}).save_to_disk(str(place))  # rows 4 and 5: one patient
    assert len(find_items(f"hf:{place}", recipe())) == 8, "unknown patients cannot be checked"
    for given in ({"patient": "who"}, {"patient_regex": r"(p\d+)_"}):
        with pytest.raises(CarinaError, match=r"more than one split .1 such.*give official_split=false"):
            find_items(f"hf:{place}", recipe(**given))
        items = find_items(f"hf:{place}", recipe(**given, official_split=False))
        assert {item.split for item in items} == {""} and len(items) == 8
    with pytest.raises(CarinaError, match="leave split= out"):
        find_items(f"hf:{place}", recipe(patient="sex", split="fold"))


def test_the_words_of_a_table_are_kept_and_its_ages_are_human(tmp_path):
    table = {"image": [png(0), png(1), png(2)], "side": ["Left lateral", "LAO", "PA"], "old": [57.0, 414.0, -1.0]}
    pd.DataFrame({**table, "Pleural effusion": [1, 0, -1]}).to_parquet(tmp_path / "data.parquet")
    items = find_items(str(tmp_path / "data.parquet"), recipe(view="side", age="old", labels=["Pleural effusion"]))
    assert [item.view for item in items] == table["side"] and [item.age for item in items] == [57.0, None, None]
    assert [item.labels["Effusion"] for item in items] == [1, 0, -1]
    assert [item.original_labels for item in items] == ["Pleural effusion", "", ""]


def test_labels_survive_the_way_into_a_worker(stored):
    item = find_items(stored[0], recipe())[0]
    for other in (pickle.loads(pickle.dumps(item)), copy.deepcopy(item)):
        assert type(other.labels) is dict and list(other.labels) == list(item.labels)
        np.testing.assert_array_equal(list(other.labels.values()), list(item.labels.values()))
    assert len(pickle.dumps(item)) < 1500, "an item does not carry the labels of all others"


def test_prepare_takes_a_parquet_table(tmp_path):
    from carina.data.store import Store, read_images
    from carina.intake.prepare import prepare

    dataset().to_parquet(str(tmp_path / "data.parquet"))
    out = tmp_path / "store"
    given = {"out": str(out), "scales": [32], "workers": 1, "lungs": False, "patient": "who", "window": "full"}
    prepare(str(tmp_path / "data.parquet"), {**given, "fit": "stretch", "duplicates": False}, quiet=True)
    table = Store(out).table
    assert len(table) == 8 and table["patient_id"].nunique() == 4 and table["label.Effusion"].sum() == 2
    stored = {images.tobytes() for images in read_images(out, table, range(8), 32)}
    assert len(stored) == 8


def test_bytes_paths_and_nothing(tmp_path):
    """Plain tables: a binary column, a column of paths, rows whose picture is missing."""
    pd.DataFrame({"picture": [png(1), png(2)], "who": ["a", "b"]}).to_parquet(tmp_path / "binary.parquet")
    first, second = find_items(str(tmp_path / "binary.parquet"), recipe(patient="who"))
    assert (first.relative, first.patient) == ("00000/000000000", "a") and read_content(second) == png(2)
    (tmp_path / "x.png").write_bytes(png(3))
    pd.DataFrame({"path": ["x.png", "sub/y.png"], "year": [2016, None]}).to_parquet(tmp_path / "paths.parquet")
    there, missing = find_items(str(tmp_path / "paths.parquet"), recipe(year="year"))
    assert (
        there.content is None and there.path == str(tmp_path / "x.png") and (there.year, missing.year) == (2016, None)
    )
    data = Dataset.from_list(
        [{"image": {"bytes": png(4), "path": None}}, {"image": {"bytes": None, "path": str(tmp_path / "x.png")}}],
        features=Features({"image": Image()}),
    )
    for place in ("mixed", "mixed.parquet"):
        if place == "mixed":
            table = data.data.table  # save_to_disk would embed the file
            (tmp_path / place).mkdir()
            import pyarrow as pa

            with (
                pa.OSFile(str(tmp_path / place / "data.arrow"), "wb") as sink,
                pa.ipc.new_stream(sink, table.schema) as w,
            ):
                w.write_table(table)
            (tmp_path / place / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
            source = f"hf:{tmp_path / place}"
        else:
            pq.write_table(data.data.table, tmp_path / place)
            source = str(tmp_path / place)
        inside, outside = find_items(source, recipe())
        assert read_content(inside) == png(4) and outside.content is None and outside.path == str(tmp_path / "x.png")
    inside.content = (str(tmp_path / "gone.parquet"), 0)
    with pytest.raises(Unreadable, match="cannot be read"):
        read_content(inside)


def test_classes_of_two_columns_may_share_a_name(tmp_path):
    features = Features(
        {"image": Image(), "lungs": ClassLabel(names=["normal", "sick"]), "heart": ClassLabel(names=["normal"])}
    )
    data = [{"image": {"bytes": png(0), "path": "a.png"}, "lungs": 1, "heart": 0}]
    Dataset.from_list(data, features=features).to_parquet(str(tmp_path / "data.parquet"))
    (item,) = find_items(str(tmp_path / "data.parquet"), recipe())
    assert dict(item.labels) == {"No_Finding": 0, "Sick": 1, "Heart_Normal": 1}


def test_mistakes_are_sentences(tmp_path, monkeypatch):
    dataset().to_parquet(str(tmp_path / "data.parquet"))
    pd.DataFrame({"who": ["a"]}).to_parquet(tmp_path / "bare.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("data", "bare"):
        (tmp_path / "two" / f"{name}.parquet").write_bytes((tmp_path / f"{name}.parquet").read_bytes())
    dataset(0, 2).to_parquet(str(tmp_path / "two" / "a.parquet"))
    dataset().select([1, 0]).save_to_disk(str(tmp_path / "picked"))
    for source, given, message in (
        (tmp_path / "data.parquet", {"patient": "whom"}, "no column 'whom'.*did you mean 'who'"),
        (tmp_path / "data.parquet", {"labels": ["Cardiomegali"]}, "did you mean 'Cardiomegaly'.*NORMAL, PNEUMONIA"),
        (tmp_path / "data.parquet", {"labels": ["who"]}, "labels are 1, 0, blank or -1"),
        (tmp_path / "data.parquet", {"split": "sex"}, "use train, val or test"),
        (tmp_path / "data.parquet", {"age": "sex"}, "not a number"),
        (tmp_path / "data.parquet", {"mask": "lungs"}, "mask= is not read from datasets"),
        (tmp_path / "bare.parquet", {}, "no column of pictures among who"),
        (tmp_path / "broken.parquet", {}, "cannot be read as Arrow or Parquet"),
        (tmp_path / "gone.parquet", {}, "is not there"),
        (f"hf:{tmp_path / 'two'}", {}, "bare.parquet has other columns than"),
        (f"hf:{tmp_path / 'empty'}", {}, "holds no dataset"),
        (f"hf:{tmp_path / 'nowhere'}", {}, "is not there"),
    ):
        with pytest.raises(CarinaError, match=message):
            find_items(str(source), recipe(**given))

    def fails(name):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", fails)
    with pytest.raises(
        CarinaError, match=r"org/name cannot be had from the hub .Couldn't reach 'org/name' on the Hub."
    ):
        find_items("hf:org/name", recipe())


def test_a_hub_id_is_read_from_the_cache_that_datasets_made(tmp_path, monkeypatch):
    dataset(0, 4).to_parquet(str(tmp_path / "train.parquet"))
    dataset(4, 2).to_parquet(str(tmp_path / "test.parquet"))
    from datasets import load_dataset

    def cached(name):
        files = {"train": str(tmp_path / "train.parquet"), "test": str(tmp_path / "test.parquet")}
        return load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))

    cached_once = cached("org/name")
    monkeypatch.setattr("datasets.load_dataset", lambda name: cached_once)
    items = find_items("hf:org/name", recipe())
    assert [item.split for item in items] == ["train"] * 4 + ["test"] * 2
    assert [read_content(item) for item in items] == [png(i) for i in range(6)]
    assert all(str(tmp_path / "cache") in item.path for item in items)


def test_pictures_come_in_the_order_of_the_rows_whatever_their_names(tmp_path):
    """Else a group of rows, which may hold a gigabyte, would be read again for every picture."""
    data = Dataset.from_list(list(reversed(list(rows(0, 8)))), features=FEATURES)
    data.to_parquet(str(tmp_path / "data.parquet"), batch_size=2)
    items = find_items(str(tmp_path / "data.parquet"), recipe())
    assert [item.content[1] for item in items] == list(range(8))
    assert items[0].relative == "00000/000000000/p3_7.png"
    picture_tables._group.cache_clear()
    for item in items:
        read_content(item)
    seen = picture_tables._group.cache_info()
    assert (seen.misses, seen.hits, seen.currsize) == (4, 4, 1)
