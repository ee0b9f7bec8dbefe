"""Phantom sets on disk: table, masks and DICOM agree with what was drawn; the bytes are the same every time."""

import csv
import hashlib
import json

import cv2
import numpy as np
import pydicom
import pytest
from PIL import Image

from carina.data.phantoms import BRIGHTEST, DARKEST, write_phantoms
from carina.errors import CarinaError
from carina.imaging.phantom import FINDINGS, phantom


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    calls = []
    folder = tmp_path_factory.mktemp("set") / "phantoms"
    table = write_phantoms(
        folder, patients=14, seed=6, size=48, file_format="mixed", lateral=True, progress=lambda *at: calls.append(at)
    )
    with open(table, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert table == folder / "labels.csv" and calls == [(number, 14) for number in range(1, 15)]
    return folder, rows


def drawn(row: dict):
    """What the library draws for a row: the identifiers hold the numbers."""
    patient, study, image = (int(part) for part in row["path"].split("/")[1].split(".")[0].split("-")[1:])
    return phantom(6, patient, study, image, size=48, view=row["view"])


def test_the_table_tells_what_was_drawn(written):
    folder, rows = written
    listed = {"labels.csv"}
    for row in rows:
        truth = drawn(row)
        assert (row["sex"], int(row["age"])) == (truth.sex, truth.age)
        assert {name: int(row[name]) for name in FINDINGS} == truth.labels
        assert int(row["abnormal"]) == max(truth.labels.values())
        assert row["study_id"].startswith(row["patient_id"])
        with Image.open(folder / row["lung_mask"]) as mask:
            assert mask.mode == "1" and np.array_equal(np.array(mask), truth.lungs)
        listed |= {row["path"], row["lung_mask"]}
        for name in FINDINGS:
            assert bool(row[f"mask_{name}"]) == bool(truth.labels[name])
            if truth.labels[name]:
                with Image.open(folder / row[f"mask_{name}"]) as mask:
                    assert mask.mode == "1" and np.array_equal(np.array(mask), truth.lesions[name])
                listed.add(row[f"mask_{name}"])
        boxes = [(text, *box) for text, *box in json.loads(row["markers"])]
        assert [box[0] for box in boxes] == [marker[0] for marker in truth.markers]
        np.testing.assert_allclose([b[1:] for b in boxes], [m[1:] for m in truth.markers], atol=1e-6)
    assert listed == {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert len({row["patient_id"] for row in rows}) == 14 < len({row["study_id"] for row in rows}) <= len(rows)
    assert {row["view"] for row in rows} == {"PA", "AP", "LATERAL"}


def test_png_and_dicom_hold_the_picture(written):
    folder, rows = written
    photometric = []
    for row in rows:
        truth = drawn(row)
        if row["path"].endswith(".png"):
            stored = cv2.imread(str(folder / row["path"]), cv2.IMREAD_UNCHANGED)
            assert stored.dtype == np.uint8 and np.abs(stored / 255 - truth.image).max() <= 0.5 / 255 + 1e-6
            continue
        ds = pydicom.dcmread(folder / row["path"])
        assert (ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit) == (48, 48, 16, 12, 11)
        assert (ds.Modality, ds.BodyPartExamined, ds.Manufacturer) == ("DX", "CHEST", "carina phantom")
        assert (ds.PatientID, ds.PatientSex, ds.PatientAge) == (row["patient_id"], truth.sex, f"{truth.age:03d}Y")
        assert ds.ViewPosition == {"LATERAL": "LL"}.get(row["view"], row["view"])
        values = ds.pixel_array.astype(np.float64)
        assert values.max() <= 4095
        # The linear window of PS3.3 C.11.2.1.2.1, then the inversion that MONOCHROME1 asks for.
        shown = np.clip((values - (ds.WindowCenter - 0.5)) / (ds.WindowWidth - 1) + 0.5, 0, 1)
        shown = 1 - shown if ds.PhotometricInterpretation == "MONOCHROME1" else shown
        assert np.abs(shown - truth.image).max() <= 0.5 / (BRIGHTEST - DARKEST) + 1e-6
        photometric.append(ds.PhotometricInterpretation)
    assert abs(photometric.count("MONOCHROME1") - photometric.count("MONOCHROME2")) <= 1
    assert 0 < len(photometric) < len(rows)


def test_one_study_uid_for_one_study(written):
    folder, rows = written
    uids: dict[str, set] = {}
    instances = []
    for row in rows:
        if row["path"].endswith(".dcm"):
            ds = pydicom.dcmread(folder / row["path"], stop_before_pixels=True)
            uids.setdefault(row["study_id"], set()).add(ds.StudyInstanceUID)
            instances.append(ds.SOPInstanceUID)
    assert all(len(values) == 1 for values in uids.values())
    assert len(set(instances)) == len(instances) and len({uid for values in uids.values() for uid in values}) == len(
        uids
    )


def test_the_same_bytes_and_other_ones_for_another_seed(tmp_path):
    def digests(name: str, seed: int) -> dict[str, str]:
        write_phantoms(tmp_path / name, patients=4, seed=seed, size=32, file_format="mixed")
        files = sorted(file for file in (tmp_path / name).rglob("*") if file.is_file())
        return {str(f.relative_to(tmp_path / name)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

    first = digests("a", 1)
    assert first == digests("b", 1)
    assert not set(first.values()) & set(digests("c", 2).values())


@pytest.mark.parametrize(
    "given, words",
    [({"file_format": "dcm"}, "png, dicom or mixed"), ({"patients": 0}, "at least 1"), ({"size": 4}, "16 to 4096")],
)
def test_mistakes_end_in_a_sentence_and_leave_nothing(tmp_path, given, words):
    with pytest.raises(CarinaError, match=words):
        write_phantoms(tmp_path / "set", **{"patients": 1, "size": 32, **given})
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(CarinaError, match="not empty"):
        write_phantoms(tmp_path, patients=1)
    assert (tmp_path / "mine.txt").read_text() == "kept"
