import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from carina.data.encoding import Encoding
from carina.data.splits import LEFT_OUT
from carina.imaging.phantom import phantom
from carina.intake import looks
from carina.intake.looks import contact_sheet, intensities, tile
from carina.intake.sheet import write_sheet

NEW = ["year", "view_source", "view_confidence", "chest", "route", "markers", "descriptor", "duplicates"]
LABELS = [f"Label{i:02d}" for i in range(14)]


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """(24, 128, 128) float32 images in [0, 1] and their lungs, bool."""
    found = [phantom(8, i, size=128) for i in range(24)]
    return np.stack([p.image for p in found]), np.stack([p.lungs for p in found])


def write_shards(folder: Path, images: np.ndarray, lungs: np.ndarray, encoding: Encoding) -> None:
    """One shard at 64 and 128 px, written here anew rather than by prepare."""
    for scale in (64, 128):
        small = [cv2.resize(image, (scale, scale), interpolation=cv2.INTER_AREA) for image in images]
        masks = [cv2.resize(m.astype(np.uint8), (scale, scale), interpolation=cv2.INTER_NEAREST) for m in lungs]
        columns = {
            "images": {"image": pa.array([encoding.encode(encoding.quantize(s)) for s in small], pa.large_binary())},
            "masks": {"lungs": pa.array([np.packbits(m).tobytes() for m in masks], pa.large_binary())},
        }
        for kind, column in columns.items():
            table = pa.table(column).replace_schema_metadata(encoding.to_metadata())
            (folder / kind / str(scale)).mkdir(parents=True)
            with pa.ipc.new_stream(str(folder / kind / str(scale) / "00000.arrow"), table.schema) as writer:
                writer.write_table(table)


def rows(count: int) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    i = np.arange(count)
    table = pd.DataFrame(
        {
            "image_id": [f"{k:024x}" for k in i],
            "patient_id": [f"patient{k // 2}" for k in i],
            "view": np.where(i % 4 == 0, "", np.where(i % 3 == 0, "AP", "PA")),
            "sex": np.where(i % 5 == 0, "", np.where(i % 2 == 0, "F", "M")),
            "age": np.where(i % 7 == 0, np.nan, 20 + i % 60).astype(np.float32),
            "year": pd.array([2011 + k % 3 if k % 8 else None for k in i], dtype="Int16"),
            "manufacturer": np.where(i % 2 == 0, "<b>ACME</b> & Sons", ""),
            "split": np.array(["train", "train", "val", "test"])[(i // 2) % 4],
            "source": np.where(i < count // 3, "north", "south"),
            "photometric": "MONOCHROME2",
            "window": "header",
            "bits": 12,
            "polarity": np.where(i == 5, "suspicious", "ok"),
            "view_source": np.where(i % 4 == 0, "", "table"),
            "view_confidence": np.nan,
            "chest": np.linspace(0.2, 1, count),
            "route": np.where(i % 4 == 0, "unknown", "frontal by the table"),
            "markers": [None if k % 3 == 0 else [{"label": "R"}] * (k % 3 - 1) for k in i],
            "lungs_source": "file",
            "lungs_plausible": i != 3,
            "content_hash": [f"c{k if k != 9 else 8}" for k in i],
            "descriptor": [bytes(256)] * count,
            "duplicates": ["group" if k in (8, 9, 20) else "" for k in i],
            "shard": 0,
            "row": i % 24,
        }
    )
    for label in LABELS:
        table[f"label.{label}"] = rng.choice([1.0, 0.0, -1.0, np.nan], count).astype(np.float32)
    table.loc[table["patient_id"] == "patient4", "split"] = LEFT_OUT
    return table


INFO = {
    "sources": ["north", "south"],
    "scales": [128, 64],
    "synthetic": True,
    "carina": "1.2.3",
    "photometry": {"window": "auto"},
    "geometry": {"fit": "pad"},
    "store_hash": "feed",
    "duplicates": {"searched": True, "groups": 1, "moved": 6},
}
REJECTED = pd.DataFrame({"image_id": list("abc"), "reason": ["it is a CT", "it is a CT", "its pixels <end> early"]})


@pytest.fixture(scope="module")
def store(pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_shards(folder, *pictures, Encoding())
    return folder


class Page(HTMLParser):
    """Headings without their small print, cells of tables by row, pictures by the heading above them."""

    def __init__(self, file: Path):
        super().__init__()
        self.text, self.tags = file.read_text(), set()
        self.headings: list[str] = []
        self.pictures: dict[str, list[dict]] = {}
        self.rows: list[list[str]] = []
        self.place = ""
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.place = "cell"
        elif tag in ("h2", "h3"):
            self.headings.append("")
            self.place = "heading"
        elif tag == "small" and self.place == "heading":
            self.place = "small print"
        elif tag == "img":
            self.pictures.setdefault(self.headings[-1].strip(), []).append(dict(attributes))

    def handle_endtag(self, tag):
        if tag in ("td", "th", "h2", "h3"):
            self.place = ""

    def handle_data(self, data):
        if self.place == "cell":
            self.rows[-1][-1] += data
        elif self.place == "heading":
            self.headings[-1] += data

    def row(self, name: str) -> list[str]:
        found = [row for row in self.rows if row and row[0].strip() == name]
        assert found, f"no row {name}"
        return [cell.strip() for cell in found[0]]


@pytest.fixture(scope="module")
def page(store) -> Page:
    write_sheet(store, INFO, rows(24), REJECTED)
    return Page(store / "sheet.html")


def test_it_is_one_file_that_runs_and_loads_nothing_and_says_it_is_private(page, store):
    assert not page.tags & {"script", "link", "iframe", "object", "form", "a"}
    assert "://" not in page.text and not re.search(r"\son\w+=", page.text)
    assert all(a["src"].startswith("data:image/jpeg;base64,") for found in page.pictures.values() for a in found)
    assert "private: it shows radiographs and exact counts" in page.text and "synthetic" in page.text
    assert "&lt;b&gt;ACME&lt;/b&gt; &amp; Sons" in page.text and "pixels &lt;end&gt; early" in page.text
    write_sheet(store, INFO, rows(24), REJECTED)
    assert (store / "sheet.html").read_text() == page.text


def test_its_numbers_are_those_of_the_table(page):
    table = rows(24)
    views, sexes = ["AP", "PA", "view unknown"], ["female", "male", "sex unknown"]
    assert page.row("")[1:] == ["Images", "Patients", "Per patient", *views, *sexes, "Age, median (quartiles)"]
    for split in ("train", "val", "test", LEFT_OUT):
        part = table[table["split"] == split]
        ages = part["age"].quantile([0.5, 0.25, 0.75])
        want = [len(part), part["patient_id"].nunique(), f"{len(part) / part['patient_id'].nunique():.2f}"]
        want += [(part["view"] == view).sum() for view in ("AP", "PA", "")]
        want += [(part["sex"] == sex).sum() for sex in ("F", "M", "")]
        assert page.row(split)[1:] == [*map(str, want), "{:.0f} ({:.0f}–{:.0f})".format(*ages)]
    assert page.row("all")[1:3] == ["24", "12"] and page.row("south")[1] == "16"
    assert page.row("it is a CT")[1] == "2" and page.row("2012")[1] == str((table["year"] == 2012).sum())
    for label in LABELS:
        values = table[f"label.{label}"]
        patients = table.loc[values == 1, "patient_id"].nunique()
        assert page.row(label)[1:3] == [str((values == 1).sum()), str(patients)]
        train = values[table["split"] == "train"]
        counts = [(train == state).sum() for state in (1, 0, -1)] + [train.isna().sum()]
        assert page.row(label)[3].endswith(" · ".join(map(str, counts)))
    assert page.row("R")[1] == "8" and page.row("none found")[1] == "8" and page.row("not looked for")[1] == "8"
    assert page.row("file, implausible")[1] == "1" and page.row("suspicious")[1] == "1"
    assert page.row("2")[1] == "12"  # images per patient
    text = " ".join(page.text.split())
    assert "3 images stand in 1 group of exact or near copies; 2 of them have the very pixels of another" in text
    assert "In 1 group the patient numbers differ. To stand with their copies, 6 images changed the split" in text
    assert "2 images in no split" in text and "Of 1 lung mask the shape is implausible" in text


def test_pictures_are_of_the_rows_that_they_stand_under(page, store, pictures):
    table = rows(24)
    for label in sorted(LABELS, key=lambda name: -(table[f"label.{name}"] == 1).sum())[:12]:
        positive = set(table.loc[table[f"label.{label}"] == 1, "image_id"])
        shown = [a["title"] for a in page.pictures[label]]
        assert set(shown) <= positive and len(shown) == min(len(positive), 20) == len(set(shown))
    assert "Not shown: " in page.text and sum(label in page.pictures for label in LABELS) == 12
    assert [a["title"] for a in page.pictures["May be inverted"]] == [table["image_id"][5]]
    assert [a["title"] for a in page.pictures["group"]] == table["image_id"][[8, 9, 20]].tolist()
    shown = page.pictures["group"][0]
    data = base64.b64decode(shown["src"].split(",")[1])
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    image, lungs = pictures[0][8], pictures[1][8]
    eroded = cv2.erode(lungs.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    away = eroded | (cv2.dilate(lungs.astype(np.uint8), np.ones((7, 7), np.uint8)) == 0)
    assert picture.shape == (128, 128, 3) and abs(picture.mean(axis=2) - 255 * image)[away].mean() < 3
    exact = tile(store, table, 8, 128, 128)
    amber = (exact == looks.OUTLINE).all(axis=2)
    assert amber.sum() > 100 and not amber[away].any()


def test_columns_of_later_schemas_may_be_absent(store):
    table = rows(24).drop(columns=NEW)
    write_sheet(store, {**INFO, "synthetic": False}, table, REJECTED[:0])
    page = Page(store / "sheet.html")
    headings = {heading.strip() for heading in page.headings}
    assert not {"Copies", "Year", "Side markers and text", "Why it was kept", "Rejected"} & headings
    assert {"Lung masks", "Manufacturer", "Labels", "Age"} <= headings
    assert "synthetic</span>" not in page.text and page.row("train")[1] == str((table["split"] == "train").sum())
    bare = table.drop(columns=[c for c in table.columns if c.startswith("label.")]).assign(age=np.nan, sex="", view="")
    write_sheet(store, INFO, bare, REJECTED)
    assert "Age" not in Page(store / "sheet.html").headings


def test_a_large_store_is_sampled(store, monkeypatch):
    read = []

    def counted(folder, table, positions, scale):
        read.extend(positions)
        return original(folder, table, positions, scale)

    original = looks.read_images
    monkeypatch.setattr(looks, "read_images", counted)
    write_sheet(store, INFO, rows(6000), REJECTED)
    assert 200 < len(read) < 600 and max(read) > 5000
    assert "6\u202f000" in (store / "sheet.html").read_text()


def test_sixteen_bits_look_like_eight(pictures, store, tmp_path):
    write_shards(tmp_path, *pictures, Encoding("png", 16))
    table = rows(24)
    for position in (0, 7):
        deep, plain = (tile(f, table, position, 128, 160).astype(int) for f in (tmp_path, store))
        assert abs(deep - plain).max() <= 1
    found = intensities(tmp_path, table, np.arange(24), 128)
    want = np.histogram(np.round(pictures[0] * 65535) / 65535, bins=64, range=(0, 1))[0]
    assert found.sum() == pytest.approx(1) and abs(found - want / want.sum()).max() < 1e-3
    contact_sheet(tmp_path, table, 128)
    assert cv2.imread(str(tmp_path / "contact.png")).shape == (3 * 160, 1600, 3)
