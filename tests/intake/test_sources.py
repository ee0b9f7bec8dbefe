from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from carina.errors import CarinaError
from carina.imaging.photometry import Unreadable
from carina.intake.items import Labels
from carina.intake.masks import read_mask, run_lengths
from carina.intake.sources import find_items


def recipe(**given):
    columns = ("patient", "patient_regex", "study", "view", "sex", "age", "year", "split", "mask", "boxes", "source")
    return SimpleNamespace(**{**dict.fromkeys(columns), "labels": [], "lesions": {}, "official_split": True, **given})


def write(file, **columns):
    pd.DataFrame(columns).to_csv(file, index=False)
    return str(file)


# CSV


def test_a_csv_brings_years_and_boxes(tmp_path):
    source = write(
        tmp_path / "labels.csv",
        path=["a.png", "b.png", "c.png"],
        when=["2016", "2017-05-04", ""],
        Mass=["1", "-1", ""],
    )
    boxes = write(
        tmp_path / "boxes.csv",
        path=["a.png", "a.png"],
        label=["Mass", "Nodule"],
        x0=["1", "10.5"],
        y0=[2, 20],
        x1=[3, 30],
        y1=[4, 40],
        origin=["R1", "R2"],
    )
    a, b, c = find_items(source, recipe(year="when", labels=["Mass"], boxes=boxes))
    assert (a.year, b.year, c.year) == (2016, 2017, None)
    assert a.boxes == [("Mass", 1, 2, 3, 4, "R1"), ("Nodule", 10.5, 20, 30, 40, "R2")] and not b.boxes
    assert (a.labels["Mass"], b.labels["Mass"]) == (1, -1) and np.isnan(c.labels["Mass"])


def test_one_file_has_one_name_however_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    whole = str(tmp_path / "x" / "c.png")
    source = write(
        tmp_path / "x" / "labels.csv", path=["./a.png", "b/../b.png", whole, "../y/d.png"], lungs=["m.png"] * 4
    )
    box = {"label": ["Pleural Effusion"] * 2, "x0": [1] * 2, "y0": [2] * 2, "x1": [3] * 2, "y1": [4] * 2}
    boxes = write(tmp_path / "boxes.csv", path=[str(tmp_path / "x" / "a.png"), "c.png"], **box)
    found = find_items(source, recipe(boxes=boxes, mask="lungs"))
    assert [item.relative for item in found] == ["../y/d.png", "a.png", "b.png", "c.png"]
    assert [len(item.boxes) for item in found] == [0, 1, 0, 1] and found[1].boxes[0][0] == "Effusion"
    assert found[3].path == whole and found[0].path == str(tmp_path / "y" / "d.png")
    assert {item.mask for item in found} == {str(tmp_path / "x" / "m.png")}
    monkeypatch.chdir(tmp_path)
    assert find_items("x/labels.csv", recipe(boxes=boxes, mask="lungs")) == found
    for twice in (["i0.png", "./i0.png"], ["i0.png", "a/../i0.png"], ["i0.png", whole.replace("c.png", "i0.png")]):
        with pytest.raises(CarinaError, match="lists 1 paths twice; keep one row a file"):
            find_items(write(tmp_path / "x" / "twice.csv", path=twice), recipe())


def test_every_way_to_type_a_folder_gives_the_same_items(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.png").touch()
    monkeypatch.chdir(tmp_path / "a")
    ways = [find_items(way, recipe()) for way in (str(tmp_path / "a"), ".", "../a", "../a/b/..")]
    assert [item.relative for item in ways[0]] == ["b/x.png"] and ways[0][0].path == str(tmp_path / "a" / "b" / "x.png")
    assert all(way == ways[0] for way in ways)


def test_views_keep_their_word_and_ages_are_human(tmp_path):
    words = ["LAT", "Left lateral", "RAO", "posteroanterior", "AP LLD", ""]
    ages = ["57", "057Y", "006M", "414", "-3", "nan"]
    source = write(tmp_path / "labels.csv", path=[f"{i}.png" for i in range(6)], side=words, old=ages)
    items = find_items(source, recipe(view="side", age="old"))
    assert [item.view for item in items] == words
    assert [item.age for item in items] == [57, 57, 0.5, None, None, None]
    with pytest.raises(CarinaError, match="holds 'young', which is not a number"):
        find_items(write(tmp_path / "bad.csv", path=["a.png"], old=["young"]), recipe(age="old"))


def test_labels_of_a_list_have_the_names_of_the_house(tmp_path):
    columns = {"No Finding": ["1", "0"], "Pleural Effusion": ["0", "1"], "edema": ["-1", "1"], "chest": ["1", "1"]}
    source = write(tmp_path / "labels.csv", path=["a.png", "b.png"], Effusion=["", ""], **columns)
    a, b = find_items(source, recipe(labels=list(columns)))
    assert dict(a.labels) == {"No_Finding": 1, "Effusion": 0, "Edema": -1, "chest": 1}
    assert b.original_labels == "Pleural Effusion;edema;chest" and a.original_labels == "No Finding;chest"
    (a, _) = find_items(source, recipe(labels={"fluid": "Pleural Effusion"}))
    assert dict(a.labels) == {"fluid": 0}, "a mapping keeps its names"
    with pytest.raises(CarinaError, match="labels=Effusion and labels=Pleural Effusion both mean Effusion"):
        find_items(source, recipe(labels=["Effusion", "Pleural Effusion"]))


def test_rows_without_a_split_follow_their_patient(tmp_path):
    table = {"path": ["p1_a.png", "p1_b.png", "p2_a.png"], "who": ["1", "1", "2"]}
    source = write(tmp_path / "labels.csv", **table, fold=["test", "", ""])
    assert [item.split for item in find_items(source, recipe(patient="who", split="fold"))] == ["test", "test", ""]
    source = write(tmp_path / "labels.csv", **table, fold=["test", "train", ""])
    for known, mend in (({"patient": "who"}, "leave split= out$"), ({"patient_regex": r"(p\d)_"}, "tells them apart$")):
        with pytest.raises(CarinaError, match=f"more than one split .1 such.*{mend}"):
            find_items(source, recipe(split="fold", **known))


def test_mistakes_in_a_csv_are_sentences(tmp_path):
    source = write(tmp_path / "labels.csv", path=["a.png"], when=["20"], word=["May"])
    corners = {"x0": [1], "y0": [2], "x1": [3], "y1": [4]}
    strange = write(tmp_path / "strange.csv", path=["z.png"], label=["Mass"], **corners)
    empty = write(tmp_path / "empty.csv", path=["a.png"], label=["Mass"], **{**corners, "x1": [1]})
    bare = write(tmp_path / "bare.csv", path=["a.png"], label=["Mass"], x0=[1], y0=[1], x1=[2], Y1=[2])
    for keys, message in (
        ({"year": "when"}, "holds 20, which is not a year"),
        ({"year": "word"}, "holds 'May', which is not a number"),
        ({"year": "whan"}, "no column 'whan' .year=whan.*did you mean 'when'"),
        ({"boxes": strange}, "a box for 'z.png'"),
        ({"boxes": empty}, "the box in row 2 is empty"),
        ({"boxes": bare}, "has no column 'y1'"),
        ({"boxes": str(tmp_path / "gone.csv")}, "is not there"),
    ):
        with pytest.raises(CarinaError, match=message):
            find_items(source, recipe(**keys))


def test_a_folder_may_have_a_colon_in_its_name(tmp_path):
    folder = tmp_path / "ward:7"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), np.zeros((40, 40), np.uint8))
    for source in (str(folder), str(folder / "*.png")):
        assert [item.relative for item in find_items(source, recipe())] == ["a.png"]
    with pytest.raises(CarinaError, match="year= names a column of a CSV"):
        find_items(str(folder), recipe(year="when"))


# Labels


@given(
    arrays(np.float32, st.tuples(st.integers(1, 20), st.integers(1, 5)), elements=st.sampled_from([0, 1, -1, np.nan]))
)
@settings(max_examples=50, deadline=None)
def test_a_row_of_labels_is_what_went_in(values):
    names = [f"L{i}" for i in range(values.shape[1])]
    labels = Labels(names, values)
    for row, expected in zip(labels.rows(), values):
        assert list(row) == names and len(row) == len(names)
        np.testing.assert_array_equal(list(row.values()), expected)
    for i, name in enumerate(names):
        np.testing.assert_array_equal(labels.column(name), values[:, i])


# Masks


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
@settings(max_examples=100, deadline=None)
def test_run_lengths_are_read_back(mask):
    """Encoded here from the definition: gaps and runs in turn, down the columns."""
    words, position = [], 0
    flat = mask.T.ravel()
    starts = np.flatnonzero(np.diff(np.concatenate([[0], flat.astype(int)])) == 1)
    ends = np.flatnonzero(np.diff(np.concatenate([flat.astype(int), [0]])) == -1) + 1
    for start, end in zip(starts, ends):
        words += [start - position, end - start]
        position = end
    reference = run_lengths(*mask.shape, [" ".join(map(str, words))])
    np.testing.assert_array_equal(read_mask(reference, mask.shape), mask)


def disk(size, centre, radius):
    ys, xs = np.mgrid[:size, :size] + 0.5
    return ((xs - centre[0]) ** 2 + (ys - centre[1]) ** 2 < radius**2).astype(np.uint8) * 255


def test_a_mask_of_another_size_covers_the_same_part(tmp_path):
    cv2.imwrite(str(tmp_path / "large.png"), disk(400, (100, 220), 60))
    for side in (400, 200, 100, 800):
        mask, factor = read_mask(str(tmp_path / "large.png"), (side, side)), side / 400
        assert mask.shape == (side, side) and mask.mean() == pytest.approx(np.pi * 60**2 / 400**2, rel=0.02)
        ys, xs = np.nonzero(mask)
        assert xs.mean() + 0.5 == pytest.approx(100 * factor, abs=1) and ys.mean() + 0.5 == pytest.approx(
            220 * factor, abs=1
        )


def test_masks_come_in_many_forms(tmp_path):
    from PIL import Image

    truth = disk(64, (30, 20), 12) > 0
    cv2.imwrite(str(tmp_path / "white.png"), np.uint8(truth) * 255)
    cv2.imwrite(str(tmp_path / "ones.png"), np.uint8(truth))
    cv2.imwrite(str(tmp_path / "deep.png"), np.uint16(truth) * 65535)
    cv2.imwrite(str(tmp_path / "shallow.png"), np.uint16(truth) * 255)
    cv2.imwrite(str(tmp_path / "color.png"), np.dstack([np.uint8(truth) * 255] * 3))
    cv2.imwrite(str(tmp_path / "lossy.jpg"), np.uint8(truth) * 255, [cv2.IMWRITE_JPEG_QUALITY, 95])
    Image.fromarray(np.uint8(truth) * 255).convert("1").save(tmp_path / "bits.png")
    Image.fromarray(np.uint8(truth) * 255).save(tmp_path / "scr.gif")
    for name in ("white.png", "ones.png", "deep.png", "shallow.png", "color.png", "bits.png", "scr.gif"):
        np.testing.assert_array_equal(read_mask(str(tmp_path / name), (64, 64)), truth, err_msg=name)
    assert (read_mask(str(tmp_path / "lossy.jpg"), (64, 64)) ^ truth).mean() < 0.01
    cv2.imwrite(str(tmp_path / "other.png"), disk(64, (50, 50), 8))
    both = read_mask([str(tmp_path / "white.png"), str(tmp_path / "other.png")], (64, 64))
    np.testing.assert_array_equal(both, truth | (disk(64, (50, 50), 8) > 0))


def test_every_number_of_a_label_map_is_set_and_black_stays_empty(tmp_path):
    truth = np.zeros((32, 32), np.uint8)
    truth[4:20, 4:10], truth[4:20, 20:26] = 1, 2
    for name, pixels in (("map.png", truth), ("deep.png", np.uint16(truth * 5))):
        cv2.imwrite(str(tmp_path / name), pixels)
        np.testing.assert_array_equal(read_mask(str(tmp_path / name), (32, 32)), truth > 0, err_msg=name)
    cv2.imwrite(str(tmp_path / "black.png"), truth * 0)
    cv2.imwrite(str(tmp_path / "dark.jpg"), truth, [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert not read_mask(str(tmp_path / "black.png"), (32, 32)).any()
    assert not read_mask(str(tmp_path / "dark.jpg"), (32, 32)).any(), "noise of the compression is no label"


def test_masks_that_cannot_be_used_are_refused_without_their_path(tmp_path):
    cv2.imwrite(str(tmp_path / "wide.png"), np.zeros((64, 96), np.uint8))
    (tmp_path / "words.png").write_text("no picture")
    for reference, message in (
        (str(tmp_path / "wide.png"), "96 x 64 pixels, another aspect than the image's 64 x 64"),
        (str(tmp_path / "words.png"), "cannot be read"),
        (str(tmp_path / "gone.png"), "not there"),
        ([], "empty"),
        ("rle:4x4:0 17", "do not fit"),
        ("rle:4x4:0", "do not fit"),
        ("rle:4x4:a b", "cannot be read"),
        ("rle:99999x99999:0 1", "too many"),
    ):
        with pytest.raises(Unreadable, match=message) as caught:
            read_mask(reference, (64, 64))
        assert str(tmp_path) not in str(caught.value)
