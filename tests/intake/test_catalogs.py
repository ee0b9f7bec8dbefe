"""Every catalog on small tables in the form in which its archive was published."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest

from carina.errors import CarinaError
from carina.imaging.dicom import read_radiograph
from carina.imaging.photometry import Photometry, Unreadable
from carina.imaging.routing import view_of
from carina.intake.catalogs import CATALOGS, find_catalog
from carina.intake.catalogs.padchest import parse_labels
from carina.intake.catalogs.readings import parse_reading
from carina.intake.masks import read_mask
from carina.intake.sources import find_items, find_provenance


def recipe(**given):
    """What find_items asks of a prepare recipe; the recipe's own tests check its defaults."""
    columns = ("patient", "patient_regex", "study", "view", "sex", "age", "year", "split", "mask", "boxes", "source")
    return SimpleNamespace(**{**dict.fromkeys(columns), "labels": [], "lesions": {}, "official_split": True, **given})


# Small tables in the published form


def write_png(path, seed=0, size=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    smooth = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(size, size)), (0, 0), 5)
    cv2.imwrite(str(path), np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth)))


def csv_of(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as handle:
        handle.write("\n".join(line.strip() for line in text.strip().splitlines()) + "\n")


@pytest.fixture
def nih(tmp_path):
    """Six pictures of four patients in the numbered folders, one of them missing on disk."""
    csv_of(
        tmp_path / "Data_Entry_2017.csv",
        """Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position
        00000001_000.png,Cardiomegaly|Effusion,0,1,057Y,M,PA
        00000001_001.png,No Finding,1,1,58,M,AP
        00000002_000.png,No Finding,0,2,006M,F,PA
        00000003_000.png,Hernia,0,3,414,F,PA
        00000004_000.png,Infiltration,0,4,30,M,AP
        00000004_001.png,Nodule,1,4,30,M,AP""",
    )
    csv_of(tmp_path / "train_val_list.txt", "00000001_000.png\n00000001_001.png\n00000002_000.png\n00000003_000.png")
    csv_of(tmp_path / "test_list.txt", "00000004_000.png\n00000004_001.png")
    csv_of(
        tmp_path / "BBox_List_2017.csv",
        """Image Index,Finding Label,Bbox [x,y,w,h],,,
        00000004_000.png,Infiltrate,256.0,512,128.0,64,,,""",
    )
    for i, name in enumerate(("00000001_000", "00000001_001", "00000002_000")):
        write_png(tmp_path / "images_001" / "images" / f"{name}.png", i)
    for i, name in enumerate(("00000003_000", "00000004_000")):
        write_png(tmp_path / "images_002" / "images" / f"{name}.png", 10 + i, 1024 if i else 64)
    return tmp_path


def test_nih_rows_become_items(nih):
    items = {item.relative: item for item in find_items(f"nih14:{nih}", recipe())}
    assert len(items) == 6 and items["00000001_000.png"].path.endswith("images_001/images/00000001_000.png")
    one = items["00000004_000.png"]
    assert {item.patients_of for item in items.values()} == {"nih14"}, "whatever the recipe calls its source"
    assert (one.patient, one.view, one.sex, one.age, one.split) == ("4", "AP", "M", 30.0, "test")
    assert one.boxes == [("Infiltration", 256.0, 512.0, 384.0, 576.0, "radiologist")] and one.box_frame == (1024, 1024)
    assert one.original_labels == "Infiltration" and one.labels["abnormal"] == 1
    assert items["00000002_000.png"].age == 0.5 and items["00000003_000.png"].age is None
    assert {items[f"00000001_00{i}.png"].split for i in (0, 1)} <= {"train", "val"}
    assert not find_items(f"nih14:{nih}", recipe(official_split=False))[0].split
    assert len({tuple(item.labels) for item in items.values()}) == 1
    flat = find_items(f"nih14:{nih}", recipe(labels=["Pleural_Thickening", "No Finding"]))
    assert list(flat[0].labels) == ["Pleural_Thickening", "No_Finding"]
    renamed = find_items(f"nih14:{nih}", recipe(labels={"Fluid": "Effusion"}))
    assert dict(renamed[0].labels) == {"Fluid": 1.0}


def test_mistakes_with_a_catalog_are_sentences(nih, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    bare = tmp_path_factory.mktemp("bare")
    (bare / "Data_Entry_2017.csv").write_bytes((nih / "Data_Entry_2017.csv").read_bytes())
    cut = tmp_path_factory.mktemp("cut")
    csv_of(cut / "Data_Entry_2017.csv", "Image Index,Labels\na.png,Mass")
    for source, given, message in (
        (f"nih15:{nih}", {}, "no catalog 'nih15' .did you mean 'nih14'.*choose one of nih14, chexpert"),
        (f"nih14:{empty}", {}, "Data_Entry_2017.*put it there .*nihcc.app.box.com"),
        (f"nih14:{nih / 'nowhere'}", {}, "is not a folder"),
        ("nih14:", {}, "needs the folder"),
        (f"nih14:{bare}", {}, "holds none of the pictures"),
        (f"nih14:{cut}", {}, "no column 'Finding Labels'.*published"),
        (f"nih14:{nih}", {"patient": "Patient ID"}, "patient= names a column"),
        (f"nih14:{nih}", {"labels": ["Efusion"]}, "no label 'Efusion' .did you mean 'Effusion'"),
        (f"kermany:{empty}", {}, "train/NORMAL"),
        (f"montgomery:{empty}", {}, "MCUCXR_0001_0.png"),
        (f"openi:{empty}", {}, "ecgen-radiology"),
        (f"cxrlt:{empty}", {}, "train_labeled.csv"),
        (f"mimic:{empty}", {}, "metadata.csv"),
    ):
        with pytest.raises(CarinaError, match=message):
            find_items(source, recipe(**given))


def test_patients_in_two_official_splits_are_refused(nih):
    csv_of(nih / "test_list.txt", "00000004_000.png\n00000001_001.png")
    csv_of(nih / "train_val_list.txt", "00000001_000.png\n00000002_000.png\n00000003_000.png\n00000004_001.png")
    with pytest.raises(CarinaError, match=r"more than one split .2 such.*official_split=false"):
        find_items(f"nih14:{nih}", recipe())


def test_prepare_takes_a_catalog(nih, tmp_path_factory):
    from carina.data.store import Store
    from carina.intake.prepare import prepare

    out = tmp_path_factory.mktemp("stores") / "nih"
    given = {"out": str(out), "scales": [32], "workers": 1, "lungs": False, "duplicates": False}
    info = prepare(f"nih14:{nih}", given, quiet=True)
    assert info["counts"]["images"] == 5 and info["counts"]["rejected"] == 1, "the missing file is counted"
    table = Store(out).table
    assert table["label.Cardiomegaly"].sum() == 1 and table["patient_id"].nunique() == 4
    assert (table["split"] == "test").sum() == 1 and set(table["source"]) == {"nih14"}
    boxes = [box for row in table["boxes"] for box in row]
    assert [box["label"] for box in boxes] == ["Infiltration"] and boxes[0]["x0"] == pytest.approx(0.25)


MIMIC_HEAD = "subject_id,study_id,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
MIMIC_HEAD += "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"


@pytest.fixture
def mimic(tmp_path):
    csv_of(
        tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz",
        """dicom_id,subject_id,study_id,ViewPosition,Rows,Columns,StudyDate,StudyTime
        aa-1,10000032,50414267,PA,3056,2544,21800506,213014.5
        aa-2,10000032,50414267,LATERAL,3056,2544,21800506,213014.5
        bb-1,19999987,55368167,AP,3056,2544,21451104,50000
        cc-1,11111111,51111111,LPO,3056,2544,21500101,1""",
    )
    csv_of(
        tmp_path / "mimic-cxr-2.0.0-split.csv.gz",
        "dicom_id,study_id,subject_id,split\naa-1,50414267,10000032,train\naa-2,50414267,10000032,train\n"
        "bb-1,55368167,19999987,validate\ncc-1,51111111,11111111,test",
    )
    csv_of(
        tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz",
        MIMIC_HEAD + "\n10000032,50414267,1.0,,,,,,,,,,0.0,,,1.0\n19999987,55368167,,,1.0,,,-1.0,,,,,,,,",
    )
    csv_of(
        tmp_path / "patients.csv",
        "subject_id,gender,anchor_age,anchor_year\n10000032,F,52,2178\n19999987,M,57,2145",
    )
    write_png(tmp_path / "files/p10/p10000032/s50414267/aa-1.jpg")
    return tmp_path


def test_mimic_joins_its_four_tables(mimic):
    items = {Path(item.relative).stem: item for item in find_items(f"mimic:{mimic}", recipe())}
    assert len(items) == 4 and items["aa-1"].relative == "p10/p10000032/s50414267/aa-1.jpg"
    assert Path(items["aa-1"].path).is_file()
    one, two, other, without = (items[name] for name in ("aa-1", "aa-2", "bb-1", "cc-1"))
    assert (one.view, two.view, other.view, without.view) == ("PA", "LATERAL", "AP", "LPO"), "the archive's words"
    assert view_of(without.view) == ("", False), "an oblique view is neither frontal nor lateral"
    assert (one.split, other.split, without.split) == ("train", "val", "test")
    assert one.labels["Fracture"] == 0 and one.labels["abnormal"] == 0 and one.labels["Support_Devices"] == 1
    assert other.labels["Edema"] == -1 and other.labels["abnormal"] == 1 and np.isnan(other.labels["Fracture"])
    assert np.isnan(list(without.labels.values())).all()
    assert (one.age, one.sex, other.age, other.sex, without.age) == (54.0, "F", 57.0, "M", None)
    assert one.year is None, "the years of MIMIC are shifted"
    assert other.original_labels == "Cardiomegaly=1;Edema=-1"


def test_cxrlt_labels_the_pictures_of_mimic(mimic):
    head = "dicom_id,subject_id,study_id,ViewPosition,fpath,Atelectasis,Normal,Round(ed) Atelectasis"
    row = "aa-1,10000032,50414267,PA,files/p10/p10000032/s50414267/aa-1.jpg"
    other = "bb-1,19999987,55368167,AP,files/p19/p19999987/s55368167/bb-1.jpg"
    csv_of(mimic / "cxr-lt-2024" / "train_labeled.csv", f"{head}\n{row},0,1,0")
    csv_of(mimic / "cxr-lt-2024" / "development_labeled_task1.csv", f"{head}\n{other},1,0,1")
    long, base = (
        {item.relative: item for item in find_items(f"{name}:{mimic}", recipe())} for name in ("cxrlt", "mimic")
    )
    assert set(long) < set(base)
    for name, item in long.items():
        assert (item.path, item.patient, item.source) == (base[name].path, base[name].patient, "mimic")
        assert item.patients_of == base[name].patients_of == "mimic"
    second = long["p19/p19999987/s55368167/bb-1.jpg"]
    assert second.split == "val" and second.labels["Round_Atelectasis"] == 1 and second.labels["abnormal"] == 1
    assert long["p10/p10000032/s50414267/aa-1.jpg"].labels["No_Finding"] == 1
    assert second.original_labels == "Atelectasis;Round(ed) Atelectasis"
    said = find_provenance(f"cxrlt:{mimic}", recipe())
    parent = find_provenance(f"mimic:{mimic}", recipe())
    assert said["name"] == "cxrlt" and parent.pop("others") == {} and said["others"] == {"mimic": parent}


def test_chexpert_valid_is_val_and_the_first_folder_does_not_matter(tmp_path):
    head = "Path,Sex,Age,Frontal/Lateral,AP/PA," + MIMIC_HEAD.split(",", 2)[2]
    blanks = "," * 11
    rows = {"train": f"Female,90,Frontal,LL,1.0,{blanks},", "valid": f"Male,0,Lateral,,,1.0{blanks},"}
    for number, (split, row) in enumerate(rows.items()):
        path = f"CheXpert-v1.0-small/{split}/patient0000{number}/study1/view1_frontal.jpg"
        csv_of(tmp_path / f"{split}.csv", f"{head}\n{path},{row}")
        write_png(tmp_path / "CheXpert-v1.0" / path.split("/", 1)[1])
    train, val = find_items(f"chexpert:{tmp_path}", recipe())
    assert (train.split, train.view, train.sex, train.labels["abnormal"]) == ("train", "FRONTAL", "F", 0)
    assert (val.split, val.view, val.relative) == ("val", "LATERAL", "valid/patient00001/study1/view1_frontal.jpg")
    assert Path(train.path).is_file() and Path(val.path).is_file()


def test_vindr_of_physionet_has_a_consensus_test_set(tmp_path):
    head = "No finding,Nodule/Mass,Pleural effusion"
    csv_of(
        tmp_path / "annotations" / "image_labels_train.csv",
        f"image_id,rad_ID,{head}\na,R1,0,1,0\na,R2,0,1,1\na,R3,0,0,0\nb,R1,1,0,0\nb,R2,1,0,0\nb,R3,1,0,0",
    )
    csv_of(tmp_path / "annotations" / "image_labels_test.csv", f"image_id,{head}\nc,0,0,1")
    csv_of(
        tmp_path / "annotations" / "annotations_train.csv",
        "image_id,rad_id,class_name,x_min,y_min,x_max,y_max\na,R2,Nodule/Mass,10.5,20,30,40.25\nb,R1,No finding,,,,",
    )
    csv_of(
        tmp_path / "annotations" / "annotations_test.csv",
        "image_id,class_name,x_min,y_min,x_max,y_max\nc,Pleural effusion,1,2,3,4",
    )
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.dicom").touch()
    a, b, c = find_items(f"vindr:{tmp_path}", recipe())
    assert dict(a.labels) == {"No_Finding": 0, "Nodule_Mass": 1, "Effusion": -1, "abnormal": 1}
    assert b.labels["abnormal"] == 0 and c.split == "test" and {a.split, b.split} <= {"train", "val"}
    assert a.boxes == [("Nodule_Mass", 10.5, 20.0, 30.0, 40.25, "R2")] and c.boxes[0][5] == "consensus" and not b.boxes
    assert a.original_labels == "Nodule/Mass=1;Pleural effusion=-1" and a.path.endswith("train/a.dicom")
    assert a.box_frame is None


def test_boxes_of_vindr_hold_for_resized_copies_only_where_their_size_is_known(tmp_path):
    csv_of(
        tmp_path / "train.csv",
        """image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max
        a,Cardiomegaly,3,R1,100,200,300,400
        b,Cardiomegaly,3,R1,10,20,30,40
        b,No finding,14,R2,,,,""",
    )
    write_png(tmp_path / "train" / "a.png")
    write_png(tmp_path / "train" / "b.png")
    assert [item.boxes for item in find_items(f"vindr:{tmp_path}", recipe())] == [(), ()]
    csv_of(tmp_path / "train_meta.csv", "image_id,dim0,dim1\na,3000,2000")
    a, b = find_items(f"vindr:{tmp_path}", recipe())
    assert a.boxes[0][1:5] == (100, 200, 300, 400) and a.box_frame == (2000, 3000) and not b.boxes
    (tmp_path / "train" / "a.dicom").touch()
    a, _ = find_items(f"vindr:{tmp_path}", recipe())
    assert a.boxes and a.box_frame is None, "the DICOM file knows its own size"


def write_dicom(path, pixels, patient):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.PatientID, data.Modality, data.BodyPartExamined, data.ViewPosition = patient, "CR", "CHEST", "AP"
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit = 7
    data.Rows, data.Columns = pixels.shape
    data.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, data)


def test_rsna_classes_boxes_and_the_patients_of_nih(tmp_path):
    csv_of(
        tmp_path / "stage_2_train_labels.csv",
        "patientId,x,y,width,height,Target\np1,,,,,0\np2,10,20,30,40,1\np2,500,20,30,40,1\np3,,,,,0",
    )
    csv_of(
        tmp_path / "stage_2_detailed_class_info.csv",
        "patientId,class\np1,Normal\np2,Lung Opacity\np2,Lung Opacity\np3,No Lung Opacity / Not Normal",
    )
    for i in (1, 2, 3):
        write_dicom(tmp_path / "stage_2_train_images" / f"p{i}.dcm", np.full((64, 64), i, np.uint8), f"p{i}")
    normal, opaque, other = find_items(f"rsna:{tmp_path}", recipe())
    assert dict(normal.labels) == {"Lung_Opacity": 0, "Other_Abnormality": 0, "No_Finding": 1, "abnormal": 0}
    assert dict(opaque.labels) == {"Lung_Opacity": 1, "Other_Abnormality": 0, "No_Finding": 0, "abnormal": 1}
    assert dict(other.labels) == {"Lung_Opacity": 0, "Other_Abnormality": 1, "No_Finding": 0, "abnormal": 1}
    assert [box[1:5] for box in opaque.boxes] == [(10, 20, 40, 60), (500, 20, 530, 60)] and not normal.boxes
    assert normal.patient is None and normal.patients_of == "rsna", "patientId numbers pictures"
    assert find_provenance(f"rsna:{tmp_path}", recipe())["patients"] == "picture"
    mapping = [{"subset_img_id": "p2", "img_id": "00000013_005.png", "SOPInstanceUID": "1.2"}]
    (tmp_path / "pneumonia-challenge-dataset-mappings_2018.json").write_text(json.dumps(mapping))
    assert [item.patient for item in find_items(f"rsna:{tmp_path}", recipe())] == [None, "13", None]
    assert find_items(f"rsna:{tmp_path}", recipe())[1].patients_of == "nih14"
    assert find_provenance(f"rsna:{tmp_path}", recipe())["patients"] == "table"


def test_prepare_takes_dicom_and_run_lengths_of_siim(tmp_path, tmp_path_factory):
    from carina.data.store import Store, read_masks
    from carina.intake.prepare import prepare

    column = 1024 * 256  # the mask is columns 256 to 511, rows 0 to 511
    runs = " ".join([f"{column} 512"] + ["512 512"] * 255)
    csv_of(tmp_path / "train-rle.csv", f"ImageId, EncodedPixels\n1.2.3.4,{runs}\n1.2.3.5, -1")
    rng = np.random.default_rng(0)
    for i, uid in enumerate(("1.2.3.4", "1.2.3.5")):
        smooth = cv2.GaussianBlur(rng.normal(size=(1024, 1024)), (0, 0), 40)
        pixels = np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))
        write_dicom(tmp_path / "dicom-images-train" / "9.8" / "7.6" / f"{uid}.dcm", pixels, f"who{i}")
    out = tmp_path_factory.mktemp("stores") / "siim"
    given = {"out": str(out), "scales": [64], "workers": 1, "lungs": False, "duplicates": False}
    prepare(f"siim:{tmp_path}", given, quiet=True)
    table = Store(out).table
    assert table["patient_id"].nunique() == 2 and set(table["label.Pneumothorax"]) == {0, 1}
    masks = read_masks(out, table, range(2), 64, "lesion.Pneumothorax")
    expected = np.zeros((64, 64), dtype=bool)
    expected[:32, 16:32] = True
    for mask, label in zip(masks, table["label.Pneumothorax"]):
        np.testing.assert_array_equal(mask, expected if label == 1 else np.zeros_like(expected))


def test_kermany_patients_are_numbered_apart_in_train_and_test(tmp_path):
    names = {
        "train/PNEUMONIA/person1_bacteria_1.jpeg": ("train/person1", "PNEUMONIA bacteria"),
        "train/PNEUMONIA/person1_bacteria_2.jpeg": ("train/person1", "PNEUMONIA bacteria"),
        "test/PNEUMONIA/person1_virus_6.jpeg": ("test/person1", "PNEUMONIA virus"),
        "val/PNEUMONIA/person1946_bacteria_4874.jpeg": ("train/person1946", "PNEUMONIA bacteria"),
        "train/NORMAL/IM-0115-0001.jpeg": ("train/im-0115", "NORMAL"),
        "train/NORMAL/NORMAL2-IM-0383-0001.jpeg": ("train/im-0383", "NORMAL"),
        "train/NORMAL/NORMAL2-IM-0383-0001-0002.jpeg": ("train/im-0383", "NORMAL"),
        "test/NORMAL/NORMAL-11419-0001.jpeg": ("test/normal-11419", "NORMAL"),
        "train/NORMAL/odd.jpeg": (None, "NORMAL"),
    }
    for name in names:
        write_png(tmp_path / "chest_xray" / name)
        write_png(tmp_path / "chest_xray" / "chest_xray" / name)
    items = {item.relative: item for item in find_items(f"kermany:{tmp_path}", recipe())}
    assert {name: (item.patient, item.original_labels) for name, item in items.items()} == names
    assert all(item.split == "test" for name, item in items.items() if name.startswith("test"))
    assert all(item.split in ("train", "val") for name, item in items.items() if not name.startswith("test"))
    virus, healthy = items["test/PNEUMONIA/person1_virus_6.jpeg"], items["train/NORMAL/odd.jpeg"]
    assert dict(virus.labels) == {"Pneumonia": 1, "Bacterial_Pneumonia": 0, "Viral_Pneumonia": 1, "abnormal": 1}
    assert set(healthy.labels.values()) == {0} and all(Path(item.path).is_file() for item in items.values())


def test_montgomery_and_shenzhen_bring_readings_and_lungs(tmp_path):
    root = tmp_path / "MontgomerySet"
    for name, text in (
        ("MCUCXR_0001_0", "Patient's Sex: F\nPatient's Age: 027Y\nnormal\n"),
        ("MCUCXR_0104_1", "Patient's Sex: M\nPatient's Age: 040Y\ncavitary infiltrate, right upper lobe\n"),
    ):
        write_png(root / "CXR_png" / f"{name}.png")
        (root / "ClinicalReadings").mkdir(exist_ok=True)
        (root / "ClinicalReadings" / f"{name}.txt").write_text(text)
        for side, columns in (("left", slice(36, 50)), ("right", slice(10, 24))):
            mask = np.zeros((32, 32) if name.endswith("1") else (64, 64), np.uint8)
            mask[:, slice(columns.start * len(mask) // 64, columns.stop * len(mask) // 64)] = 255
            (root / "ManualMask" / f"{side}Mask").mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / "ManualMask" / f"{side}Mask" / f"{name}.png"), mask)
    healthy, sick = find_items(f"montgomery:{tmp_path}", recipe())
    assert (healthy.sex, healthy.age, healthy.original_labels, healthy.view) == ("F", 27.0, "normal", "PA")
    assert dict(sick.labels) == {"Tuberculosis": 1, "abnormal": 1} and set(healthy.labels.values()) == {0}
    assert "cavitary" in sick.original_labels and "CXR_png" in sick.path
    for item in (healthy, sick):
        columns = read_mask(item.mask, (64, 64)).any(axis=0)
        assert columns[12] and columns[40] and not columns[30]
    china = tmp_path / "ChinaSet_AllFiles"
    write_png(china / "CXR_png" / "CHNCXR_0001_0.png")
    write_png(china / "mask" / "CHNCXR_0001_0_mask.png")
    (only,) = find_items(f"shenzhen:{china}", recipe())
    assert only.mask.endswith("CHNCXR_0001_0_mask.png") and only.path.endswith("CXR_png/CHNCXR_0001_0.png")


def test_forms_of_openi_agree(tmp_path):
    xml = """<eCitation><uId id="CXR{0}"/><MeSH>{1}</MeSH>{2}</eCitation>"""
    pictures = {
        "1": ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"],
        "10": ["CXR10_IM-0002-1001"],
        "11": ["CXR11_IM-0067-1001"],
    }
    terms = {"1": ["Opacity/lung/base/left", "Lung/hypoinflation"], "10": ["normal"], "11": ["No Indexing"]}
    (tmp_path / "xml" / "ecgen-radiology").mkdir(parents=True)
    for uid, found in terms.items():
        majors = "".join(f"<major>{term}</major>" for term in found)
        nodes = "".join(f'<parentImage id="{name}"/>' for name in pictures[uid])
        (tmp_path / "xml" / "ecgen-radiology" / f"{uid}.xml").write_text(xml.format(uid, majors, nodes))
    lines = [f"{uid},{';'.join(found)}" for uid, found in terms.items()]
    csv_of(tmp_path / "kaggle" / "indiana_reports.csv", "uid,MeSH\n" + "\n".join(lines))
    csv_of(
        tmp_path / "kaggle" / "indiana_projections.csv",
        """uid,filename,projection
        1,1_IM-0001-3001.dcm.png,Frontal
        1,1_IM-0001-4001.dcm.png,Lateral
        10,10_IM-0002-1001.dcm.png,Frontal
        11,11_IM-0067-1001.dcm.png,Frontal""",
    )
    write_png(tmp_path / "xml" / "NLMCXR_png" / "CXR1_1_IM-0001-4001.png")
    write_png(tmp_path / "kaggle" / "images" / "images_normalized" / "1_IM-0001-4001.dcm.png")
    forms = [
        {item.relative: item for item in find_items(f"openi:{tmp_path / form}", recipe())} for form in ("xml", "kaggle")
    ]
    assert set(forms[0]) == set(forms[1]) and len(forms[0]) == 4
    for relative, item in forms[0].items():
        other = forms[1][relative]
        assert (item.patient, item.study, item.original_labels) == (other.patient, other.study, other.original_labels)
        np.testing.assert_array_equal(list(item.labels.values()), list(other.labels.values()))
    sick, normal = forms[0]["CXR1_IM-0001-4001.png"], forms[0]["CXR10_IM-0002-1001.png"]
    assert dict(sick.labels) == {"Opacity": 1, "No_Finding": 0, "abnormal": 1}
    assert dict(normal.labels) == {"Opacity": 0, "No_Finding": 1, "abnormal": 0}
    assert np.isnan(list(forms[0]["CXR11_IM-0067-1001.png"].labels.values())).all()
    assert Path(sick.path).is_file() and Path(forms[1]["CXR1_IM-0001-4001.png"].path).is_file()
    assert (sick.view, forms[1]["CXR1_IM-0001-4001.png"].view) == ("", "Lateral")
    (tmp_path / "xml" / "ecgen-radiology" / "9.xml").write_text("<!DOCTYPE x [<!ENTITY a 'b'>]><x/>")
    with pytest.raises(CarinaError, match="declares XML entities"):
        find_items(f"openi:{tmp_path / 'xml'}", recipe())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("male 45yrs\nnormal\n", ("M", 45.0, "normal")),
        (
            "female , 2months\nsecondary PTB  in the right upper field\n",
            ("F", 2 / 12, "secondary PTB  in the right upper field"),
        ),
        ("Patient's Sex: F\r\nPatient's Age: 031Y\r\n2 mm nodule\r\n", ("F", 31.0, "2 mm nodule")),
        ("normal", ("", None, "normal")),
        ("", ("", None, "")),
    ],
)
def test_readings_are_parsed(text, expected):
    sex, age, findings = parse_reading(text)
    assert (sex, findings) == expected[::2] and age == (pytest.approx(expected[1]) if expected[1] else None)


def test_jsrt_reads_raw_pictures_nodules_and_scr_masks(tmp_path):
    csv_of(tmp_path / "CLNDAT_EN.txt", "JPCLN001.IMG\t5\t15\t53\tMale\t1634\t692\tmalignant\tl.upper lobe\tlung cancer")
    csv_of(tmp_path / "CNNDAT_EN.txt", "JPCNN001.IMG\t45\tFemale\tnon-nodule")
    words = np.full((2048, 2048), 4000, dtype=">u2")
    words[:, :1024] = 100  # dense tissue has low values
    words.tofile(tmp_path / "JPCLN001.IMG")
    write_png(tmp_path / "JPCNN001.png")
    for side, columns in (("left", slice(512, 900)), ("right", slice(100, 500))):
        from PIL import Image

        mask = np.zeros((1024, 1024), np.uint8)
        mask[200:800, columns] = 255
        place = tmp_path / "fold1" / "masks" / f"{side} lung"
        place.mkdir(parents=True)
        Image.fromarray(mask).save(place / "JPCLN001.gif")
    nodule, other = find_items(f"jsrt:{tmp_path}", recipe())
    assert dict(nodule.labels) == {"Nodule": 1, "Malignant_Nodule": 1, "abnormal": 1}
    assert other.labels["Nodule"] == 0 and np.isnan(other.labels["abnormal"]) and other.content is None
    (box,) = nodule.boxes
    assert (
        box[3] - box[1] == pytest.approx(15 / 0.175)
        and (box[1] + box[3]) / 2 == 1634
        and nodule.box_frame == (2048, 2048)
    )
    assert (nodule.sex, nodule.age, nodule.view) == ("M", 53.0, "PA")
    image = read_radiograph(nodule.path, Photometry()).image
    assert image.shape == (2048, 2048) and image[:, :1000].min() > 0.9 and image[:, 1100:].max() < 0.1
    whole = read_radiograph(nodule.path, Photometry(window="full")).image  # of 12 bits, not of 16
    assert whole[0, 0] == pytest.approx(1 - 100 / 4095, abs=1e-3)
    assert whole[0, -1] == pytest.approx(1 - 4000 / 4095, abs=1e-3)
    lungs = read_mask(nodule.mask, (2048, 2048))
    assert (
        lungs[800, 1400] and lungs[800, 600] and not lungs[100, 1400] and lungs.mean() == pytest.approx(0.45, abs=0.01)
    )
    (tmp_path / "JPCLN001.IMG").write_bytes(b"short")
    with pytest.raises(Unreadable, match="not an image"):
        read_radiograph(nodule.path, Photometry())


def test_padchest_lists_are_parsed_without_running_them(tmp_path):
    assert parse_labels("['normal', ' pacemaker', '']") == ["normal", "pacemaker"]
    assert (
        parse_labels('["d\'orsay", "x"]') == ["d'orsay", "x"] and parse_labels("[]") == [] and parse_labels("") is None
    )
    for wrong in ("__import__('os').system('true')", "['a'", "['a', 3]", "normal"):
        with pytest.raises(CarinaError, match="is not of the form"):
            parse_labels(wrong)
    csv_of(
        tmp_path / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv",
        """,ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,Projection,Labels
        0,a.png,0,20140915,s1,p1,1930.0,F,PA,['normal']
        1,b.png,3,20150101,s2,p2,1990,O,AP_horizontal,"['lobar atelectasis', ' pacemaker']"
        2,c.png,3,20150101,s2,p2,,M,L,['pacemaker']
        3,d.png,3,20150101,s3,p3,2015,M,COSTAL,['']""",
    )
    write_png(tmp_path / "3" / "b.png")
    a, b, c, d = find_items(f"padchest:{tmp_path}", recipe())
    assert (a.age, a.year, a.view, a.labels["abnormal"]) == (84.0, 2014, "PA", 0)
    assert (b.sex, b.view, b.path[-7:]) == ("", "AP_horizontal", "3/b.png")
    assert b.labels["Lobar_Atelectasis"] == 1 and b.labels["abnormal"] == 1
    assert np.isnan(c.labels["abnormal"]) and c.labels["Pacemaker"] == 1 and c.age is None
    assert np.isnan(list(d.labels.values())).all() and view_of(d.view) == ("", None)


# Splits on which anomaly detection is compared


def told(items):
    """(split, abnormal) by the name of the file."""
    return {Path(item.path).name: (item.split, item.labels["abnormal"]) for item in items}


@pytest.mark.parametrize("below", ["", "img/"])
def test_bmad_is_read_from_its_folders(tmp_path, below):
    for place in ("train/good/a", "valid/good/b", "valid/Ungood/c", "test/good/d", "test/Ungood/e"):
        folder, name = place.rsplit("/", 1)
        write_png(tmp_path / "RSNA" / folder / below / f"{name}.png")
    write_png(tmp_path / "RSNA" / "test" / "Ungood" / "label" / "e.png")  # masks of lesions, in BMAD's other archives
    items = find_items(f"bmad_rsna:{tmp_path}", recipe())
    want = {"a": ("train", 0), "b": ("val", 0), "c": ("val", 1), "d": ("test", 0), "e": ("test", 1)}
    assert told(items) == {f"{name}.png": value for name, value in want.items()}
    assert {item.labels["No_Finding"] for item in items if item.split == "test"} == {0, 1}
    inside = find_items(f"bmad_rsna:{tmp_path / 'RSNA'}", recipe())
    assert [item.relative for item in inside] == [item.relative for item in items], "whichever folder is given"


def test_squids_chexpert_is_read_from_its_folders(tmp_path):
    for place in ("train_256_pa/normal_256/a", "val_256_pa/abnormal_256/b", "our_test_256_pa/normal_256/c"):
        write_png(tmp_path / f"{place}.png")
    write_png(tmp_path / "our_test_256_pa" / "abnormal_256" / "d.jpg")
    found = told(find_items(f"squid_chexpert:{tmp_path}", recipe()))
    assert found == {"a.png": ("train", 0), "b.png": ("val", 1), "c.png": ("test", 0), "d.jpg": ("test", 1)}
    with pytest.raises(CarinaError, match=r"no pictures in folders of the form train/good and train/ungood; give"):
        find_items(f"bmad_rsna:{tmp_path}", recipe())


@pytest.mark.parametrize("name", ["medianomaly_rsna", "medianomaly_vindr"])
def test_medianomaly_is_read_from_its_list(tmp_path, name):
    lists = {
        "train": {"0": ["a.png", "b.png"], "unlabeled": {"0": ["c.png"], "1": ["d.png"]}},
        "test": {"0": ["e.png"], "1": ["f.png"]},
    }
    for one in "abcdefg":  # g is in no list
        write_png(tmp_path / "images" / f"{one}.png")
    path = tmp_path / "data.json"
    path.write_text(json.dumps(lists))
    want = {"a": ("train", 0), "b": ("train", 0), "c": ("val", 0), "d": ("val", 1), "e": ("test", 0), "f": ("test", 1)}
    assert told(find_items(f"{name}:{tmp_path}", recipe())) == {f"{one}.png": value for one, value in want.items()}
    del lists["train"]["unlabeled"]
    path.write_text(json.dumps(lists))
    assert len(find_items(f"{name}:{tmp_path}", recipe())) == 4
    for wrong in ([], {"train": ["a.png"], "test": {}}, {"train": {"0": ["a.png"]}}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(CarinaError, match="not a list of train and test by class; download it again"):
            find_items(f"{name}:{tmp_path}", recipe())
    path.unlink()
    with pytest.raises(CarinaError, match=rf"has no data.json, the list of {name}; put it there"):
        find_items(f"{name}:{tmp_path}", recipe())


def test_zhanglab_is_every_picture_of_kermanys_folders(tmp_path):
    """Train and val of the catalog together are the training folder, with what some copies keep in val."""
    for split, number in (("train", 30), ("val", 4), ("test", 6)):
        for i in range(number):
            place = tmp_path / split / "NORMAL" / f"IM-{i + 100 * len(split):04d}-0001.jpeg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
    items = find_items(f"kermany:{tmp_path}", recipe())
    assert sum(item.split in ("train", "val") for item in items) == 34 and sum(i.split == "test" for i in items) == 6


# Real names


@pytest.mark.real
def test_real_kermany_names_give_the_patients_that_were_worked_out_by_hand(real_data, tmp_path):
    truth = pd.concat([pd.read_csv(real_data / name / "labels.csv", dtype=str) for name in ("kermany", "kermany_224")])
    for label, path in zip(truth["label"], truth["path"]):
        place = tmp_path / "train" / label / path.split("/")[1]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    items = {Path(item.relative).name: item for item in find_items(f"kermany:{tmp_path}", recipe())}
    found = truth["path"].str.split("/").str[1].map(lambda name: items[name].patient)
    assert len(items) == len(truth) and found.notna().all()
    pairs = set(zip(found, truth["patient_id"]))
    apart = {who for who, _ in pairs}
    # Identical pictures were merged by hand too; what the names say must never split what the hand joined by name.
    assert len(pairs) == len(apart), "no patient of ours holds two of theirs"
    kinds = dict(zip(truth["path"].str.split("/").str[1], truth["pneumonia_type"]))
    for name, item in items.items():
        assert item.labels["Bacterial_Pneumonia"] == (kinds[name] == "bacteria")
        assert item.labels["Viral_Pneumonia"] == (kinds[name] == "virus")


# Provenance


def test_every_catalog_says_where_it_comes_from_and_what_is_allowed():
    for name, catalog in CATALOGS.items():
        said = catalog.provenance()
        assert json.loads(json.dumps(said)) == said and said["name"] == name == find_catalog(name).name
        assert set(said["lineage"]) <= set(CATALOGS) - {name}
        terms = said["terms"]
        assert {terms["redistribution"], terms["derived_weights"]} <= {"yes", "no", "ask"}
        assert all(terms[key] for key in ("license", "url", "clause", "citation")) and said["homepage"]
        assert said["official_split"] == bool(catalog.split) and catalog.layout
    of_nih = {"rsna", "siim", "bmad_rsna", "medianomaly_rsna"}
    assert {name for name, c in CATALOGS.items() if "nih14" in c.lineage} == of_nih
    assert CATALOGS["cxrlt"].lineage == ("mimic",) and CATALOGS["squid_chexpert"].lineage == ("chexpert",)
    credentialed = {"mimic", "cxrlt", "vindr", "medianomaly_vindr"}
    assert {n for n, c in CATALOGS.items() if c.terms.credentialed} == credentialed


def test_provenance_of_what_is_no_catalog_is_unknown():
    said = find_provenance("labels.csv", recipe(source="ward", patient="who"))
    assert said["name"] == "ward" and said["patients"] == "table" and said["terms"]["derived_weights"] == "ask"
    assert find_provenance("labels.csv", recipe())["name"] == "archive"
    assert set(said) == set(find_provenance("nih14:/data", recipe())) and set(said["terms"]) == set(
        vars(CATALOGS["nih14"].terms)
    )
    with pytest.raises(CarinaError, match="did you mean 'chexpert'"):
        find_provenance("chexpret:/data", recipe())


def test_the_page_of_catalogs_names_them_all():
    page = (Path(__file__).resolve().parents[2] / "docs" / "catalogs.md").read_text(encoding="utf-8")
    for name, catalog in CATALOGS.items():
        assert f"| `{name}` |" in page and catalog.title in page
