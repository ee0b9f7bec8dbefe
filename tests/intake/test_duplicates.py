import hashlib

import cv2
import numpy as np
import pandas as pd
import pytest

from carina.data.descriptors import descriptor
from carina.draws import permutation
from carina.imaging.geometry import Geometry, resize
from carina.imaging.phantom import phantom
from carina.intake import duplicates
from carina.intake.duplicates import find_duplicates, likeness

SIDE = 128


def stored(picture: np.ndarray) -> np.ndarray:
    """A file's gray values (H, W) uint8 as a store would keep them."""
    return np.round(resize(picture.astype(np.float32) / 255, SIDE, Geometry())[0] * 255).astype(np.uint8)


def table_of(images: list[np.ndarray]) -> pd.DataFrame:
    contents = [hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in images]
    return pd.DataFrame(
        {
            "image_id": [hashlib.blake2b(str(i).encode(), digest_size=12).hexdigest() for i in range(len(images))],
            "content_hash": contents,
            "descriptor": [descriptor(image) for image in images],
        }
    )


def again(picture: np.ndarray, quality: int) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_GRAYSCALE)


def gamma(picture: np.ndarray, power: float) -> np.ndarray:
    return np.round(255 * (picture / 255) ** power).astype(np.uint8)


def to_size(picture: np.ndarray, change: int) -> np.ndarray:
    return cv2.resize(picture, (picture.shape[1] + change, picture.shape[0] + change), interpolation=cv2.INTER_LINEAR)


COPIES = {
    "JPEG 40": lambda picture: again(picture, 40),
    "JPEG 90": lambda picture: again(picture, 90),
    "gamma 0.95": lambda picture: gamma(picture, 0.95),
    "gamma 1.05": lambda picture: gamma(picture, 1.05),
    "window": lambda picture: np.clip(picture * 0.93 + 9, 0, 255).astype(np.uint8),
    "a row less": lambda picture: picture[1:],
    "a column less": lambda picture: picture[:, :-1],
    "a border less": lambda picture: picture[1:-1, 1:-1],
    "a pixel smaller": lambda picture: to_size(picture, -1),
    "all at once": lambda picture: again(gamma(to_size(picture[1:, 1:], 1), 1.05), 60),
}


@pytest.fixture(scope="module")
def originals() -> list[np.ndarray]:
    """Two synthetic films each of twelve patients."""
    return [np.uint8(255 * phantom(4, i // 2, image=i % 2, size=256).image) for i in range(24)]


@pytest.fixture(scope="module")
def planted(originals) -> tuple[pd.DataFrame, np.ndarray, list[int]]:
    """(table, stored images, the original of each): every film once, one copy of each kind, one exact copy."""
    images, truth = [stored(picture) for picture in originals], list(range(len(originals)))
    for number, change in enumerate(COPIES.values()):
        images.append(stored(change(originals[number])))
        truth.append(number)
    images.append(images[0])
    truth.append(0)
    return table_of(images), np.stack(images), truth


def expected(table: pd.DataFrame, truth: list) -> list[str]:
    """The least image_id of each original that stands there more than once, "" for the others."""
    ids = table["image_id"].groupby(pd.Series(truth)).agg(["min", "size"])
    return [ids.loc[t, "min"] if ids.loc[t, "size"] > 1 else "" for t in truth]


@pytest.mark.parametrize("closely", [True, False])
def test_copies_are_grouped_and_two_films_of_one_patient_are_not(planted, closely):
    table, images, truth = planted
    counts = []
    groups = find_duplicates(table, (lambda rows: images[rows]) if closely else None, progress=counts.append)
    assert groups.tolist() == expected(table, truth)
    assert sum(counts) == len(table)


def test_groups_do_not_depend_on_the_order_of_rows(planted):
    table, images, truth = planted
    order = permutation(len(table), "order")
    groups = find_duplicates(table.iloc[order], lambda rows: images[order[rows]].astype(np.uint16) * 257)
    assert groups.tolist() == [expected(table, truth)[i] for i in order]


def test_every_index_finds_the_same(planted, monkeypatch):
    table, _, _ = planted
    usual = find_duplicates(table).tolist()
    monkeypatch.setattr(duplicates, "EXACT_UP_TO", 0)
    assert find_duplicates(table).tolist() == usual
    monkeypatch.setattr(duplicates, "_index", lambda descriptors: duplicates._Plain())
    monkeypatch.setattr(duplicates, "_BLOCK", 5)
    assert find_duplicates(table).tolist() == usual


def test_flat_pictures_join_nobody_and_rows_without_descriptors_only_exact_copies():
    flat = [np.full((SIDE, SIDE), 7, np.uint8)] * 3
    assert find_duplicates(table_of(flat)).tolist() == ["", "", ""]
    table = table_of([stored(np.uint8(255 * phantom(4, i, size=96).image)) for i in (0, 0, 1)])
    table["descriptor"] = None
    groups = find_duplicates(table)
    assert groups[0] == groups[1] == min(table["image_id"][:2]) and groups[2] == ""
    assert find_duplicates(table[:0]).tolist() == []


def test_a_closer_look_can_say_no(planted):
    """The descriptors alone would join them; the pictures that are read are others. Equal pixels need no look."""
    table, images, truth = planted
    strangers = np.random.default_rng(0).integers(0, 255, images.shape).astype(np.uint8)
    groups = find_duplicates(table, lambda rows: strangers[rows])
    assert groups.tolist() == expected(table, table["content_hash"].tolist()) != expected(table, truth)


def test_likeness_sees_through_a_lost_border_but_not_through_a_new_film(originals):
    small = [
        cv2.resize(p.astype(np.float32), (64, 64), interpolation=cv2.INTER_AREA)
        for p in (originals[0], originals[0][3:, 3:], originals[1])
    ]
    assert likeness(small[0], small[0]) == pytest.approx(1)
    assert likeness(small[0], small[1]) > 0.97 > 0.9 > likeness(small[0], small[2])
    assert likeness(small[0], np.zeros((64, 64), np.float32)) == 0


@pytest.mark.real
def test_copies_of_real_radiographs_are_found_and_look_alikes_kept_apart(real_data):
    """Films of the patients that no bar was chosen on: 700 films, 280 planted copies, many follow-ups among them."""
    from carina.draws import hash64

    files = []
    for name in ("nih_cxr14", "kermany", "kermany_224"):
        rows = pd.read_csv(real_data / name / "labels.csv", dtype=str)
        odd = [path for path, patient in zip(rows["path"], rows["patient_id"]) if hash64("half", patient) % 2]
        files += [real_data / name / path for path in odd[: 350 if name == "nih_cxr14" else 175]]
    pictures = [cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) for file in files]
    images, truth = [stored(picture) for picture in pictures], list(range(len(pictures)))
    changes = list(COPIES.values())
    for number, original in enumerate(permutation(len(pictures), "copies")[:280]):
        images.append(stored(changes[number % len(changes)](pictures[original])))
        truth.append(int(original))
    table, pixels = table_of(images), np.stack(images)
    for read in (None, lambda rows: pixels[rows]):
        assert find_duplicates(table, read).tolist() == expected(table, truth)
