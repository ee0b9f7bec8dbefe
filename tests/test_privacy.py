"""Nothing that names a patient may be found in any byte that carina writes (outside the private table)."""

import io
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from carina.imaging.phantom import phantom

NAME, NUMBER, BIRTH, ACCESSION = "Zyxwvut^Qponmlk", "PAT-84215937", "19470203", "ACC-5550123"
HIDDEN = {
    "InstitutionName": "Saint Hidden Hospital",
    "ReferringPhysicianName": "Doctor^Secretive",
    "StudyDate": "20210917",
}


def write(path: Path, number: int) -> list[str]:
    image = phantom(5, number // 2, image=number % 2, size=96).image
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.PatientName, ds.PatientID = f"{NAME}{number // 2}", f"{NUMBER}-{number // 2}"
    ds.PatientBirthDate, ds.AccessionNumber = BIRTH, f"{ACCESSION}-{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    ds.SOPInstanceUID, ds.SOPClassUID = meta.MediaStorageSOPInstanceUID, meta.MediaStorageSOPClassUID
    for keyword, value in HIDDEN.items():
        setattr(ds, keyword, value)
    ds.add_new(0x00110010, "LO", "PRIVATE CREATOR")
    ds.add_new(0x00111001, "LO", f"private {NAME}")
    ds.Modality, ds.ViewPosition, ds.PatientSex, ds.PatientAge = "DX", "PA", "F", "074Y"
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 96, 96, 16, 12, 11
    ds.PixelRepresentation, ds.SamplesPerPixel, ds.PhotometricInterpretation = 0, 1, "MONOCHROME2"
    ds.PixelData = np.round(image * 4095).astype(np.uint16).tobytes()
    ds.save_as(path, enforce_file_format=True)
    uids = [ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID]
    return [NAME, NUMBER, BIRTH, ACCESSION, *HIDDEN.values(), *map(str, uids)]


@pytest.fixture(scope="module")
def secrets_and_output(tmp_path_factory, carina):
    folder, out = tmp_path_factory.mktemp("archive"), tmp_path_factory.mktemp("output")
    secrets = {"Zyxwvut", "Qponmlk", "84215937"}
    rows = []
    for number in range(80):
        name = f"Zyxwvut_Qponmlk_{number:03d}.dcm"
        secrets |= set(write(folder / name, number))
        rows.append({"path": name, "abnormal": number // 2 % 2, "patient": f"{NUMBER}-{number // 2}"})
    (folder / "Zyxwvut_broken.dcm").write_bytes((folder / "Zyxwvut_Qponmlk_000.dcm").read_bytes()[:900])
    rows.append({"path": "Zyxwvut_broken.dcm", "abnormal": 0, "patient": f"{NUMBER}-0"})
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    log = io.StringIO()

    def run(*words):
        done = carina(*words)
        log.write(done.stdout + done.stderr)

    store, pre = out / "store", out / "pre"
    run("prepare", folder / "labels.csv", f"out={store}", "scales=[32]", "patient=patient", "labels=[abnormal]")
    small = ("steps=3", "batch_size=8", "threads=1", "wandb=offline")
    run("pretrain", "debug/moco_anatpaste", f"store={store}", f"out={pre}", "scales=[32]", *small)
    run(
        "finetune",
        "classify",
        f"backbone={pre}",
        f"store={store}",
        f"out={out / 'c'}",
        "labels=[abnormal]",
        "mode=full",
        *small,
    )
    run("finetune", "anomaly", f"backbone={pre}", f"store={store}", f"out={out / 'a'}", "threads=1")
    for name in "ca":
        run("evaluate", out / name, f"store={store}", "split=val+test", "resamples=100", "examples=2")
        run("publish", out / name, "repo=org/name", f"out={out / ('published-' + name)}", "--dry-run")
    run("publish", pre, "repo=org/name", f"out={out / 'published'}", "--dry-run")
    run("embed", pre, store, f"out={out / 'features.parquet'}")
    run("inspect", store)
    (out / "terminal.txt").write_text(log.getvalue())
    return sorted(secrets), out


def readable(path: Path) -> bytes:
    """The file's bytes, and for Parquet, whose pages are compressed, every value in it."""
    data = path.read_bytes()
    if path.suffix == ".parquet":
        data += pd.read_parquet(path).to_csv().encode()
    return data


def test_no_planted_identifier_in_any_byte(secrets_and_output):
    secrets, out = secrets_and_output
    files = [p for p in out.rglob("*") if p.is_file()]
    kinds = {p.suffix for p in files}
    assert {".parquet", ".arrow", ".json", ".jsonl", ".txt", ".html", ".md", ".wandb", ".safetensors", ".yaml"} <= kinds
    found = [(p.relative_to(out).as_posix(), s) for p in files for s in secrets if s.encode() in readable(p)]
    assert not found
    assert not [p for p in out.rglob("*") if any(s in p.name for s in secrets)]


def test_the_search_would_find_them(secrets_and_output, tmp_path):
    """The check itself can fail: a table with a name in it is noticed, and the private table holds the paths."""
    secrets, _ = secrets_and_output
    pd.DataFrame({"x": [secrets[-1]] * 50}).to_parquet(tmp_path / "x.parquet")
    assert secrets[-1].encode() in readable(tmp_path / "x.parquet")
    tables = (Path(os.environ["XDG_CONFIG_HOME"]) / "carina" / "paths").glob("*.parquet")
    assert any("Zyxwvut" in pd.read_parquet(t).to_csv() for t in tables)


def test_age_sex_and_view_are_kept(secrets_and_output):
    _, out = secrets_and_output
    table = pd.read_parquet(out / "store" / "table.parquet")
    assert (table["age"] == 74).all() and set(table["sex"]) == {"F"} and set(table["view"]) == {"PA"}
    assert table["patient_id"].nunique() == 40
    assert pydicom.__version__
