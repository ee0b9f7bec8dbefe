"""Catalogs on the label tables that were published, beside a naive reading of the same files, row by row."""

from __future__ import annotations

import ast
import importlib.util
import random
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from carina.data.labels import harmonize
from carina.intake.catalogs import CATALOGS, base
from carina.intake.masks import read_mask
from carina.intake.sources import find_items

# File in the wheel of torchxrayvision: the name under which the archive publishes it
PUBLISHED = {
    "nih14": {f"{name}.csv.gz": f"{name}.csv.gz" for name in ("Data_Entry_2017_v2020", "BBox_List_2017")},
    "chexpert": {"chexpert_train.csv.gz": "train.csv.gz"},
    "padchest": dict.fromkeys(["PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"]),
    "vindr": {"vinbigdata-train.csv.gz": "train.csv.gz"},
    "rsna": {"kaggle_stage_2_train_labels.csv.zip": "stage_2_train_labels.csv.zip"},
    "siim": {"siim-pneumothorax-train-rle.csv.gz": "train-rle.csv.gz"},
    "openi": {"NLMCXR_reports.tgz": "NLMCXR_reports.tgz"},
}


def first(name):
    return next(iter(PUBLISHED[name]))


def recipe(**given):
    """What find_items asks of a prepare recipe; the recipe's own tests check its defaults."""
    columns = ("patient", "patient_regex", "study", "view", "sex", "age", "year", "split", "mask", "boxes", "source")
    return SimpleNamespace(**{**dict.fromkeys(columns), "labels": [], "lesions": {}, "official_split": True, **given})


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None:
        pytest.skip("torchxrayvision, whose wheel holds the published tables, is not installed")
    return Path(spec.submodule_search_locations[0]) / "data"


@pytest.fixture(scope="module")
def published(tables, tmp_path_factory):
    """Records of a catalog read from its published table, each once."""
    done = {}

    def read(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            for file, own in PUBLISHED[name].items():
                (folder / (own or file)).symlink_to(tables / file)
            done[name] = CATALOGS[name].read(folder)
        return done[name]

    return read


def counts(records, value=1):
    return {name: int((records.labels.column(name) == value).sum()) for name in records.labels.names}


# The published tables


def test_nih_counts(published):
    records = published("nih14")
    assert len(records.table) == 112_120 and records.table["patient"].nunique() == 30_805
    found = counts(records)
    assert (found["Infiltration"], found["Hernia"], found["No_Finding"]) == (19_894, 227, 60_361)
    assert counts(records, 0)["abnormal"] == 60_361 and found["abnormal"] == 112_120 - 60_361
    boxes = [box for row in records.boxes.values() for box in row]
    assert len(boxes) == 984 and len(records.boxes) == 880 and {"Infiltration"} <= {box[0] for box in boxes}
    assert all(0 <= x0 < x1 <= 1024.5 and 0 <= y0 < y1 <= 1024.5 for _, x0, y0, x1, y1, _ in boxes)


def test_chexpert_counts(published):
    records = published("chexpert")
    assert len(records.table) == 223_414 and (records.table["view"] == "LATERAL").sum() == 223_414 - 191_027
    uncertain = counts(records, -1)
    expected = {"Atelectasis": 33_739, "Consolidation": 27_742, "Edema": 12_984, "Effusion": 11_628}
    assert {**expected, "Cardiomegaly": 8_087}.items() <= uncertain.items()
    assert counts(records, 0)["abnormal"] == counts(records)["No_Finding"] == 22_381


def test_padchest_counts(published, tables):
    records = published("padchest")
    assert len(records.table) == 160_861 and records.table["patient"].nunique() == 67_625
    texts = set(pd.read_csv(tables / first("padchest"), usecols=["Labels"], dtype=str)["Labels"].dropna())
    names = {name.strip() for text in texts for name in ast.literal_eval(text)}
    assert len(names) == 194 and "" in names, "193 findings, and the blank that some lists hold"
    assert set(records.labels.original) == names - {""} | {"abnormal"}
    assert counts(records)["COPD_Signs"] == 23_280 and counts(records)["Air_Trapping"] == 6_147


def test_vindr_counts(published):
    records = published("vindr")
    assert len(records.table) == 15_000 and counts(records)["No_Finding"] == 31_818 / 3
    boxes = [box for row in records.boxes.values() for box in row]
    assert len(boxes) == 67_914 - 31_818 and {box[5] for box in boxes} <= {f"R{i}" for i in range(1, 18)}


def test_rsna_siim_and_openi_counts(published):
    rsna, siim, openi = published("rsna"), published("siim"), published("openi")
    assert (
        len(rsna.table) == 26_684
        and sum(map(len, rsna.boxes.values())) == 9_555
        and counts(rsna, 1)["abnormal"] == 6_012
    )
    assert len(siim.table) == 12_047 and len(siim.lesions) == counts(siim)["Pneumothorax"] == 12_047 - 9_378
    assert len(openi.table) == 7_470 and openi.table["patient"].nunique() == 3_851


# No picture gets another's labels: every catalog beside a naive reading, and after its rows were shuffled


def naive_nih14(row):
    found = set(row["Finding Labels"].split("|"))
    yield row["Image Index"], {harmonize(name): 1.0 for name in found}, set()


def naive_chexpert(row):
    stated = {harmonize(name): float(row[name]) for name in list(row)[5:] if row[name]}
    yield row["Path"].split("/", 1)[1], stated, set()


def naive_padchest(row):
    found = [name.strip() for name in ast.literal_eval(row["Labels"])] if row["Labels"] != "nan" else []
    yield row["ImageID"], {harmonize(name): 1.0 for name in found if name}, set()


def naive_rsna(row):
    yield row["patientId"] + ".dcm", {"Lung_Opacity": float(row["Target"])}, set()


def naive_siim(row):
    yield row["ImageId"] + ".dcm", {"Pneumothorax": float(row[" EncodedPixels"].strip() != "-1")}, set()


NAIVE = {"nih14": naive_nih14, "chexpert": naive_chexpert, "padchest": naive_padchest, "rsna": naive_rsna}
NAIVE["siim"] = naive_siim


@pytest.mark.parametrize("name", sorted(NAIVE))
def test_rows_agree_with_a_naive_reading_in_any_order(name, published, tables, tmp_path):
    records = published(name)
    place = {relative: row for row, relative in enumerate(records.table["relative"])}
    unused = ("Report", "labelCUIS", "LocalizationsCUIS", "LabelsLocalizationsBySentence")
    lines = pd.read_csv(tables / first(name), dtype=str, keep_default_na=False, usecols=lambda c: c not in unused)
    lines = lines.sample(400, random_state=7)
    lines.to_csv(tmp_path / (PUBLISHED[name][first(name)] or first(name)).replace(".zip", ".gz"), index=False)
    chosen = lines.to_dict("records")
    shuffled = CATALOGS[name].read(tmp_path)
    at = {relative: row for row, relative in enumerate(shuffled.table["relative"])}
    rows, again = records.labels.rows(), shuffled.labels.rows()
    positives = 0
    for line in chosen:
        for relative, stated, _ in NAIVE[name](line):
            labels, mixed = rows[place[relative]], again[at[relative]]
            for label, value in stated.items():
                assert labels[label] == value and mixed[label] == value, (relative, label)
            positives += sum(value == 1 for value in stated.values())
            if name == "nih14":
                assert sum(v == 1 for k, v in labels.items() if k != "abnormal") == len(stated)
            if name == "chexpert":
                said = {k: v for k, v in labels.items() if k != "abnormal" and v == v}
                extra = set(said) - set(stated)
                assert not extra or (labels["No_Finding"] == 1 and all(said[k] == 0 for k in extra))
            columns = [c for c in ("patient", "study", "view", "sex", "original") if c in records.table]
            a, b = records.table.iloc[place[relative]], shuffled.table.iloc[at[relative]]
            assert a[columns].tolist() == b[columns].tolist()
    assert positives > 50, "the sample can tell a mistake"


def test_vindr_votes_and_boxes_agree_with_a_naive_reading(published, tables):
    records = published("vindr")
    table = pd.read_csv(tables / first("vindr"))
    place = {relative: row for row, relative in enumerate(records.table["relative"])}
    rows = records.labels.rows()
    findings = set(table["class_name"])
    groups = dict(list(table.groupby("image_id")))
    for image in random.Random(3).sample(sorted(set(table.loc[table["x_min"].notna(), "image_id"])), 150):
        own, row = groups[image], place[image + ".dicom"]
        for finding in findings:
            readers = len({reader for name, reader in zip(own["class_name"], own["rad_id"]) if name == finding})
            assert rows[row][harmonize(finding)] == {0: 0, 1: -1, 2: 1, 3: 1}[readers]
        drawn = own.dropna(subset="x_min")
        expected = sorted((r.x_min, r.y_min, r.x_max, r.y_max, r.rad_id) for r in drawn.itertuples())
        assert sorted(box[1:] for box in records.boxes[row]) == expected


def test_masks_of_siim_are_what_the_run_lengths_say(published, tables):
    """Pixels switched on one by one from the definition, down the columns."""
    table = pd.read_csv(tables / first("siim"))
    records = published("siim")
    place = {relative: row for row, relative in enumerate(records.table["relative"])}
    several = table[table.duplicated("ImageId", keep=False) & (table.iloc[:, 1].str.strip() != "-1")]
    for image in [several["ImageId"].iloc[0], table["ImageId"][table.iloc[:, 1].str.strip() != "-1"].iloc[5]]:
        expected = np.zeros((1024, 1024), dtype=bool)
        for text in table.loc[table["ImageId"] == image].iloc[:, 1]:
            numbers, position = [int(word) for word in text.split()], 0
            for gap, run in zip(numbers[::2], numbers[1::2]):
                position += gap
                for pixel in range(position, position + run):
                    expected[pixel % 1024, pixel // 1024] = True
                position += run
        reference = records.lesions[place[image + ".dcm"]]["Pneumothorax"]
        mask = read_mask(reference, (1024, 1024))
        np.testing.assert_array_equal(mask, expected)
        half = read_mask(reference, (512, 512))
        assert abs(half.mean() - mask.mean()) < 0.01 and half.any()


def test_openi_reports_agree_with_a_naive_reading(published, tables):
    records = published("openi")
    rows = dict(zip(records.table["relative"], records.labels.rows()))
    with tarfile.open(tables / first("openi")) as tar:
        members = [m for m in tar if m.name.endswith(".xml")]
        for member in random.Random(5).sample(members, 120):
            text = tar.extractfile(member).read().decode()
            majors = [part.split("</major>")[0] for part in text.split("<major>")[1:]]
            for part in text.split('<parentImage id="')[1:]:
                labels = rows[part.split('"')[0].replace("CXR1_1_", "CXR1_") + ".png"]
                assert (labels["No_Finding"] == 1) == ("normal" in majors)
                assert (labels["Cardiomegaly"] == 1) == any(m.startswith("Cardiomegaly") for m in majors)
                assert np.isnan(labels["Cardiomegaly"]) == (
                    set(majors) <= {"No Indexing"} or labels["abnormal"] != labels["abnormal"]
                )


def test_a_million_items_fit_into_memory(published):
    """PadChest has the longest names and the most labels: about 1 KB an item, all told."""
    import tracemalloc

    whole = published("padchest")
    labels = whole.labels.take(np.arange(20_000))
    records = base.Records(whole.table[:20_000], labels, "")
    places = records.table["relative"].tolist()
    tracemalloc.start()
    try:
        items = base._items(Path("padchest"), records, places)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(items) == 20_000 and (used + labels.codes.nbytes) / len(items) < 1100


# Real pictures below a published table


@pytest.mark.real
def test_real_nih_pictures_meet_their_rows(real_data, tables, tmp_path):
    """854 real pictures below the whole published table, beside labels that were collected with the pictures."""
    for file in PUBLISHED["nih14"]:
        (tmp_path / file).symlink_to(tables / file)
    (tmp_path / "images").mkdir()
    truth = pd.read_csv(real_data / "nih_cxr14" / "labels.csv", dtype={"patient_id": str})
    for name in truth["path"].str.split("/").str[1]:
        (tmp_path / "images" / name).symlink_to(real_data / "nih_cxr14" / "images512" / name)
    items = {item.relative: item for item in find_items(f"nih14:{tmp_path}", recipe())}
    there = {name for name, item in items.items() if Path(item.path).is_file()}
    assert there == set(truth["image_index"]) and len(items) == 112_120
    names = [name for name in items["00000001_000.png"].labels if name != "abnormal"]
    for row in truth.to_dict("records"):
        item = items[row["image_index"]]
        assert [item.labels[name] for name in names] == [row[name] for name in names]
        assert (item.patient, item.view, item.age, item.sex) == (
            row["patient_id"].lstrip("0"),
            row["view"],
            row["age"],
            row["sex"],
        )
    boxes = pd.read_csv(real_data / "nih_cxr14" / "finding_boxes.csv")
    assert len(boxes) > 5
    for row in boxes.to_dict("records"):
        box = (harmonize(row["finding"]), row["x"], row["y"], row["x"] + row["w"], row["y"] + row["h"])
        found = [one for one in items[row["image_index"]].boxes if one[0] == box[0]]
        assert any(np.allclose(box[1:], one[1:5]) for one in found)
