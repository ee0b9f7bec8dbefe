"""Nothing that names a patient may be found in any byte that carina writes (outside the private table)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from carina.imaging.phantom import phantom
from carina.intake.keys import load_key

NAME, NUMBER = "Zyxwvut^Qponmlk", "PAT-84215937"
OLDEST, YEAR = 97, 2021

# What a header may say of a person, a place or a day (DICOM PS3.15 Annex E, table E.1-1). Every value is unlike any
# other text, so that a hit names the element. None may be kept, neither whole nor in part.
ELEMENTS = {
    "PatientBirthDate": "19240203",
    "PatientBirthTime": "031759.25",
    "PatientBirthName": "Qxbirthname^Zf",
    "PatientMotherBirthName": "Qxmother^Zf",
    "OtherPatientIDs": "QXOTHER-7741903",
    "OtherPatientNames": "Qxothername^Zf",
    "IssuerOfPatientID": "QXISSUER",
    "MedicalRecordLocator": "QXLOCATOR-66120",
    "PatientAddress": "17 Qxhidden Lane",
    "PatientTelephoneNumbers": "+49-555-7781234",
    "CountryOfResidence": "Qxcountryland",
    "RegionOfResidence": "Qxregionshire",
    "PatientInstitutionResidence": "Qxnursinghome",
    "EthnicGroup": "QXETHNIC",
    "Occupation": "Qxglassblower",
    "MilitaryRank": "Qxcolonel",
    "BranchOfService": "Qxnavy",
    "PatientReligiousPreference": "Qxreligion",
    "ResponsiblePerson": "Qxguardian^Zf",
    "PatientComments": "Qxcomment about the sister",
    "AdditionalPatientHistory": "Qxhistory of travel",
    "InstitutionName": "Saint Qxhidden Hospital",
    "InstitutionAddress": "99 Qxhospital Road",
    "InstitutionalDepartmentName": "Qxdepartment",
    "StationName": "QXSTATION7",
    "DeviceSerialNumber": "QXSERIAL-33187",
    "DetectorID": "QXDETECTOR-118",
    "PlateID": "QXPLATE-4471",
    "ReferringPhysicianName": "Qxreferring^Secretive",
    "ReferringPhysicianTelephoneNumbers": "+49-555-9912345",
    "PerformingPhysicianName": "Qxperforming^Secretive",
    "PhysiciansOfRecord": "Qxofrecord^Secretive",
    "NameOfPhysiciansReadingStudy": "Qxreading^Secretive",
    "OperatorsName": "Qxoperator^Secretive",
    "RequestingPhysician": "Qxrequesting^Secretive",
    "RequestingService": "Qxservice",
    "AdmissionID": "QXADMISSION-901",
    "CurrentPatientLocation": "Qxward 12",
    "StudyID": "QXSTUDY-5590",
    "RequestedProcedureID": "QXREQUEST-4410",
    "PerformedProcedureStepID": "QXSTEP-2203",
    "StudyDescription": "Qxstudydescription",
    "SeriesDescription": "Qxseriesdescription",
    "ProtocolName": "Qxprotocol",
    "RequestedProcedureDescription": "Qxrequested exam",
    "PerformedProcedureStepDescription": "Qxperformed exam",
    "ImageComments": "Qximagecomment",
    "WindowCenterWidthExplanation": "QXWINDOW",
    "StudyDate": f"{YEAR}0917",
    "SeriesDate": f"{YEAR}0918",
    "AcquisitionDate": f"{YEAR}0919",
    "ContentDate": f"{YEAR}0921",
    "StudyTime": "213947.318",
    "AcquisitionTime": "214358.907",
    "FrameOfReferenceUID": "2.25.84215937.77001",
    "DeviceUID": "2.25.84215937.77002",
}
# Elements that carina reads, filled with what does not belong there.
MISUSED = {
    "ViewPosition": "QXVIEW",
    "PatientSex": "QXSEX",
    "BodyPartExamined": "QXBODYPART",
    "PhotometricInterpretation": "QXPHOTOMETRIC",
}
NUMBERED = {
    "AccessionNumber": "ACC-5550123",
    "StudyInstanceUID": "2.25.84215937.1",
    "SeriesInstanceUID": "2.25.84215937.2",
}
FOLDER, INSTANCE = "Qxfamily_Zyxwvut", "2.25.84215937.3"
PRIVATE, NESTED, BURNED, FOREIGN = "Qxprivate", "Qxnested", "Qxburned", "Żółćąęśź^Ңқһ"
SECRETS = [
    *("Zyxwvut", "Qponmlk", "84215937", FOLDER, PRIVATE, NESTED, BURNED, *FOREIGN.split("^")),
    *ELEMENTS.values(),
    *MISUSED.values(),
    *NUMBERED.values(),
]


def header(path: Path, number: int, side: int = 96) -> FileDataset:
    """A radiograph whose header says everything that a header can say of a patient."""
    image = phantom(5, number // 2, image=number % 2, size=side).image
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = f"{INSTANCE}.{number}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.SourceApplicationEntityTitle, meta.PrivateInformationCreatorUID = "QXSTATION7", f"{INSTANCE}.9"
    meta.PrivateInformation = PRIVATE.encode()
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SpecificCharacterSet = "ISO_IR 192"
    for keyword, value in ELEMENTS.items():
        setattr(ds, keyword, value)
    for keyword, value in NUMBERED.items():
        setattr(ds, keyword, f"{value}.{number // 2}" if keyword.endswith("UID") else f"{value}-{number}")
    ds.PatientName = FOREIGN if number % 7 == 3 else f"{NAME}{number // 2}"
    ds.PatientID = f"{NUMBER}-{number // 2}"
    ds.SOPInstanceUID, ds.SOPClassUID = meta.MediaStorageSOPInstanceUID, meta.MediaStorageSOPClassUID
    inner = Dataset()
    inner.PatientID, inner.ScheduledProcedureStepDescription = f"{NUMBER}-x", NESTED
    inner.RequestedProcedureID, inner.ReferencedSOPInstanceUID = NESTED.upper(), f"{INSTANCE}.8"
    inner.CodeValue, inner.CodeMeaning = NESTED.upper(), f"{NESTED} of {NAME}"
    outer = Dataset()
    outer.RequestAttributesSequence = Sequence([inner])
    outer.ReferencedSOPInstanceUID, outer.CodeMeaning = f"{INSTANCE}.7", f"{NESTED} {NAME}"
    for keyword in ("ReferencedStudySequence", "RequestAttributesSequence", "OtherPatientIDsSequence",
                    "OriginalAttributesSequence", "ViewCodeSequence", "AnatomicRegionSequence"):  # fmt: skip
        setattr(ds, keyword, Sequence([outer]))
    block = ds.private_block(0x0011, PRIVATE, create=True)
    block.add_new(0x01, "LO", f"{PRIVATE} {NAME}")
    block.add_new(0x02, "SQ", Sequence([inner]))
    block.add_new(0x03, "OB", f"{PRIVATE}{NUMBER}".encode())
    ds.Modality, ds.ViewPosition, ds.PatientSex, ds.PatientAge = "DX", "PA", "F", "074Y"
    ds.Manufacturer, ds.ManufacturerModelName, ds.BurnedInAnnotation = "Maker", "Model 5", "NO"
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = side, side, 16, 12, 11
    ds.WindowCenter, ds.WindowWidth = 2048, 4096
    ds.PixelRepresentation, ds.SamplesPerPixel, ds.PhotometricInterpretation = 0, 1, "MONOCHROME2"
    ds.PixelData = np.round(image * 4095).astype(np.uint16).tobytes()
    return ds


def write_archive(folder: Path) -> None:
    """80 radiographs of 40 patients, and files that are left out for one reason or another."""
    (folder / FOLDER).mkdir(parents=True)
    rows = []

    def write(name: str, ds: FileDataset, number: int) -> None:
        ds.save_as(folder / FOLDER / name, enforce_file_format=True)
        add(name, number)

    def add(name: str, number: int) -> None:
        rows.append({"path": f"{FOLDER}/{name}", "abnormal": number // 2 % 2, "patient": f"{NUMBER}-{number // 2}"})
        rows[-1] |= {"name": NAME, "remark": ELEMENTS["PatientComments"]}

    for number in range(80):
        name = f"Zyxwvut_Qponmlk_{number:03d}.dcm"
        ds = header(folder / name, number)
        if number == 0:
            ds.PatientAge = f"{OLDEST:03d}Y"
        if number == 2:  # free text in elements that are read
            ds.ViewPosition, ds.PatientSex, ds.BodyPartExamined = [
                MISUSED[k] for k in ("ViewPosition", "PatientSex", "BodyPartExamined")
            ]
        write(name, ds, number)
    ds = header(folder, 80)
    ds.BurnedInAnnotation, ds.PatientComments = "YES", BURNED
    write(f"{BURNED}.dcm", ds, 80)
    ds = header(folder, 81)
    ds.BodyPartExamined = f"{MISUSED['BodyPartExamined']} HAND"
    write("Zyxwvut_hand.dcm", ds, 81)
    ds = header(folder, 82)
    ds.PhotometricInterpretation = MISUSED["PhotometricInterpretation"]
    write("Zyxwvut_colors.dcm", ds, 82)
    whole = (folder / FOLDER / "Zyxwvut_Qponmlk_000.dcm").read_bytes()
    (folder / FOLDER / "Zyxwvut_broken.dcm").write_bytes(whole[:900])
    (folder / FOLDER / "Zyxwvut_cut.dcm").write_bytes(whole[:-4000])
    # A number in which there is a name: readers quote it in their errors.
    ds = header(folder, 0)
    ds.NumberOfFrames = "12345678"
    odd = folder / FOLDER / "Zyxwvut_odd.dcm"
    ds.save_as(odd, enforce_file_format=True)
    odd.write_bytes(odd.read_bytes().replace(b"12345678", b"Qponmlk "))
    for name in ("Zyxwvut_broken.dcm", "Zyxwvut_cut.dcm", "Zyxwvut_odd.dcm", "Zyxwvut_absent.dcm"):
        add(name, 0)
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)


# All commands in one new process, which spares importing torch for each. The graph and the test that a folder loads are
# made of one publication: of the others they hold nothing else.
COMMANDS = """
import json, sys
from carina.cli import main
import carina.models.hub
for words, code in json.load(sys.stdin):
    found = main(words)
    if found != code:
        sys.exit(f"{words}: exit {found}, not {code}")
    if words[0] == "publish":
        carina.models.hub.load_back = lambda *_: {}
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """All that every verb writes of that archive, what the terminal showed included."""
    folder, out = tmp_path_factory.mktemp("archive"), tmp_path_factory.mktemp("output")
    write_archive(folder)
    commands: list[tuple[list[str], int]] = []

    def run(*words: object, code: int = 0) -> None:
        commands.append(([str(word) for word in words], code))

    columns = ("scales=[32]", "patient=patient", "labels=[abnormal]")
    store, pre = out / "store", out / "pre"
    run("prepare", folder / "labels.csv", f"out={store}", *columns)
    run("prepare", folder / "labels.csv", f"out={store}", "scales=[48]", code=2)
    small = ("steps=3", "batch_size=8", "threads=1", "wandb=offline")
    run("pretrain", "debug/moco_anatpaste", f"store={store}", f"out={pre}", "scales=[32]", *small)
    given = (f"backbone={pre}", f"store={store}")
    run("finetune", "classify", *given, f"out={out / 'c'}", "labels=[abnormal]", "mode=full", *small)
    run("finetune", "anomaly", *given, f"out={out / 'a'}", "threads=1")
    for name in "ca":
        run("evaluate", out / name, f"store={store}", "split=val+test", "resamples=100", "examples=2")
        graph = f"onnx={'null' if name == 'c' else 'false'}"
        run("publish", out / name, "repo=org/name", f"out={out / ('published-' + name)}", graph, "--dry-run")
    run("publish", pre, "repo=org/name", f"out={out / 'published'}", "onnx=false", "--dry-run")
    run("embed", pre, store, f"out={out / 'features.parquet'}")
    run("inspect", store)
    done = subprocess.run([sys.executable, "-c", COMMANDS], input=json.dumps(commands), capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    (out / "terminal.txt").write_text(done.stdout + done.stderr)
    return out


def contents(path: Path) -> Iterator[bytes]:
    """The file's bytes, every compressed stream inside it, and for Parquet, whose pages are compressed, every value."""
    data = path.read_bytes()
    yield data
    for start in (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda", b"\x1f\x8b\x08"):
        place = data.find(start)
        while place >= 0:
            with contextlib.suppress(zlib.error):  # two bytes that begin no stream
                yield zlib.decompressobj(47).decompress(memoryview(data)[place:], 2**24)
            place = data.find(start, place + 1)
    if path.suffix == ".parquet":
        yield pd.read_parquet(path).to_csv().encode()


def needles(secrets: Iterable[str]) -> list[tuple[str, bytes]]:
    """Every way a text may lie in a file: UTF-8, UTF-16, and as JSON, YAML and HTML escape it; ASCII in lower case."""
    found = []
    for secret in secrets:
        forms: set[bytes] = set()
        for text in (secret, secret.lower()):
            forms |= {text.encode(), text.encode("utf-16-le"), text.encode("utf-16-be")}
            forms |= {ascii(text)[1:-1].encode(), json.dumps(text)[1:-1].encode()}
            forms.add(text.encode("ascii", "xmlcharrefreplace"))
        found += [(secret, form) for form in {form.lower() for form in forms}]
    return found


def leaks(path: Path, looked_for: list[tuple[str, bytes]]) -> set[str]:
    lowered = (data.lower() for data in contents(path))
    return {secret for data in lowered for secret, needle in looked_for if needle in data}


def test_no_planted_identifier_in_any_byte(output):
    files = [p for p in output.rglob("*") if p.is_file()]
    kinds = {p.suffix for p in files}
    assert {".parquet", ".arrow", ".json", ".jsonl", ".txt", ".html", ".md", ".wandb", ".safetensors", ".yaml"} <= kinds
    looked_for = needles(SECRETS)
    assert not [(p.relative_to(output).as_posix(), found) for p in files if (found := leaks(p, looked_for))]
    names = [p.relative_to(output).as_posix().lower() for p in output.rglob("*")]
    assert not [name for name in names for secret in SECRETS if secret.lower() in name]


def test_the_search_would_find_them(output, tmp_path):
    """The check itself can fail: in a table, a compressed stream, another encoding or an escape a name is noticed."""
    pd.DataFrame({"x": [FOREIGN] * 50}).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.bin").write_bytes(b"\x78\x9c\0" + zlib.compress(f"of {FOREIGN}".encode()))
    (tmp_path / "x.utf16").write_bytes(FOREIGN.encode("utf-16"))
    (tmp_path / "x.json").write_text(pd.Series([FOREIGN]).to_json())
    for path in tmp_path.iterdir():
        assert leaks(path, needles([FOREIGN.split("^")[0]])), path.name
    assert not leaks(tmp_path / "x.json", needles(["Qponmlk"]))
    tables = (Path(os.environ["XDG_CONFIG_HOME"]) / "carina" / "paths").glob("*.parquet")
    assert any("Zyxwvut" in pd.read_parquet(t).to_csv() for t in tables)


def test_what_is_left_out_and_what_is_kept(output):
    table = pd.read_parquet(output / "store" / "table.parquet")
    rejected = pd.read_parquet(output / "store" / "rejected.parquet")
    assert set(table["photometric"]) <= {"MONOCHROME2", ""}  # terms of the standard only
    table = table[table["photometric"] == "MONOCHROME2"]
    assert len(table) == 80 and table["patient_id"].nunique() == 40
    assert sum("burned" in reason for reason in rejected["reason"]) == 1
    assert sum("body part" in reason for reason in rejected["reason"]) == 1
    assert len(rejected) >= 6
    # A single age above 89 identifies; the year of the examination does not (45 CFR 164.514(b)(2)).
    assert sorted(set(table["age"])) == [74, 90] and set(table["year"]) == {YEAR}
    assert set(table["sex"]) == {"F", ""} and set(table["view"]) == {"PA", ""}
    assert set(table["manufacturer"]) == {"Maker Model 5"}


def test_burned_in_text_is_kept_only_when_asked_for(carina, tmp_path):
    ds = header(tmp_path, 0)
    ds.BurnedInAnnotation = "YES"
    (tmp_path / "archive").mkdir()
    ds.save_as(tmp_path / "archive" / "a.dcm", enforce_file_format=True)
    refused = carina("prepare", tmp_path / "archive", f"out={tmp_path / 'refused'}", "scales=[32]", code=2)
    assert "burned into" in refused.stderr and "burned_in=keep" in refused.stderr
    carina("prepare", tmp_path / "archive", f"out={tmp_path / 'kept'}", "scales=[32]", "burned_in=keep")
    assert len(pd.read_parquet(tmp_path / "kept" / "table.parquet")) == 1


Digest = Callable[[bytes], str]


def unkeyed() -> dict[str, Digest]:
    """Every way to hash without the key that comes to mind; hexadecimal, 24 digits, as many as the store keeps."""
    ways: dict[str, Digest] = {}
    for make in (hashlib.md5, hashlib.sha1, hashlib.sha256, hashlib.blake2s):
        ways[make.__name__] = lambda data, make=make: make(data).hexdigest()[:24]
    hashed = {name: hashlib.sha256(secret).digest() for name, secret in (("empty", b""), ("carina", b"carina"))}
    for name, key in {
        "none": b"",
        "zero": bytes(32),
        **hashed,
        "zero hashed": hashlib.sha256(bytes(32)).digest(),
    }.items():
        ways[f"blake2b 12, key {name}"] = lambda data, key=key: hashlib.blake2b(
            data, key=key, digest_size=12
        ).hexdigest()
    ways["blake2b 64"] = lambda data: hashlib.blake2b(data).hexdigest()[:24]
    return ways


def test_without_the_key_a_dictionary_of_plausible_numbers_matches_nothing(carina, tmp_path):
    """NIH's patients are 8 digits, hospitals' record numbers 7 or so: whoever guesses them all must learn nothing."""
    numbers = [f"{number:08d}" for number in range(100_000)]
    records = [f"MRN{number:07d}" for number in range(1_234_000, 1_235_000)]
    patients = [numbers[11], numbers[30_805], numbers[99_999], records[567]]
    for i, patient in enumerate(patients):
        image = np.round(phantom(9, i, size=64).image * 65535).astype(np.uint16)
        np.save(tmp_path / f"{patient}_000.npy", image)
    rows = [{"path": f"{patient}_000.npy", "patient": patient, "study": f"{patient}-1"} for patient in patients]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    words = ("patient=patient", "study=study", "source=nih14", "scales=[32]")
    carina("prepare", tmp_path / "t.csv", f"out={tmp_path / 'store'}", *words)
    table = pd.read_parquet(tmp_path / "store" / "table.parquet")
    kept = set(table[["patient_id", "study_id", "image_id"]].to_numpy().ravel())
    assert len(kept) == 12 and all(len(one) == 24 for one in kept)

    guesses = {
        "number": [*numbers, *records],
        "integer": [str(int(number)) for number in numbers],
        "kind and source": [f"patient\x1fnih14\x1f{one}" for one in [*numbers, *records]],
        "source": [f"nih14{one}" for one in patients],
        "file": [f"{one}_000.npy" for one in patients],
        "image": [f"image\x1fnih14\x1f{one}_000.npy\x1f0" for one in patients],
        "study": [f"study\x1fnih14\x1f{one}\x1f{one}-1" for one in patients],
    }
    for form, texts in guesses.items():
        data = [text.encode() for text in texts]
        for way, digest in unkeyed().items():
            assert kept.isdisjoint(map(digest, data)), f"{way} of the {form} tells patients"

    # The same dictionary with the key finds every patient, so the search could have failed.
    key, _ = load_key(None)
    found = {one for one in [*numbers, *records] if key.hash("patient", "nih14", one) in kept}
    assert found == set(patients)


def test_facts_of_a_corpus_give_no_age_and_no_count_of_a_few_patients():
    from carina.data.provenance import corpus_facts
    from carina.data.store import Selection

    ages = np.r_[np.arange(20, 79), np.full(39, 60), 8, 93].astype(float)  # the youngest and the oldest stand out
    images = np.r_[np.ones(98, int), 40, 40]  # also by their many images
    table = pd.DataFrame({"patient_id": [f"p{i}" for i in range(100)], "age": ages, "source": "a", "view": "PA"})
    table["sex"] = np.where(np.arange(100) < 85, "F", "M")
    table.loc[:18, ["source", "view"]] = "b", ""
    table = table.loc[np.repeat(table.index, images)]
    facts = corpus_facts(Selection([], table))
    assert facts["age_percentiles"] == np.percentile(ages.clip(max=89), (5, 95)).tolist()
    assert facts["age_median"] == 60 and not {8.0, 93.0} & set(facts["age_percentiles"])
    assert facts["sex"] == {"F": 85, "M": None}  # 93 images of 15 patients
    assert facts["view"] == {"unknown": None, "PA": 159} and facts["source"] == {"a": 159, "b": None}
    assert facts["by_source"]["b"]["age_median"] is None and facts["by_source"]["b"]["age_percentiles"] is None
    old = corpus_facts(Selection([], table.assign(age=95.0)))
    assert old["age_median"] == 89 and old["age_percentiles"] == [89, 89]
    unknown = table.assign(age=np.where(table["patient_id"].isin([f"p{i}" for i in range(19)]), 50.0, np.nan))
    assert corpus_facts(Selection([], unknown))["age_median"] is None
