"""Sets of synthetic radiographs on disk: pictures as PNG or DICOM, truth as masks, one table."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from carina.draws import hash64
from carina.errors import CarinaError, nearest
from carina.files import atomic_folder
from carina.imaging.phantom import FINDINGS, Phantom, phantom
from carina.imaging.phantom_canvas import generator

FORMATS = ("png", "dicom", "mixed")

# 12-bit values of black and of white: a reader has to apply the window, and has room to be wrong in.
DARKEST, BRIGHTEST = 200, 3800
_TOP = 4095


def write_phantoms(
    folder: str | Path,
    *,
    patients: int,
    seed: int = 0,
    size: int = 256,
    file_format: str = "png",
    lateral: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write synthetic radiographs of `patients` patients and return the path of ``labels.csv``.

    Every patient has 1 to 3 studies of 1 or 2 images of `size` x `size` pixels (about 1.75 images in all).
    ``images/`` holds 8-bit PNG or 12-bit DICOM (DX; half of them MONOCHROME1), by `file_format`: "png", "dicom" or
    "mixed", which alternates. ``masks/`` holds the lung fields and ``lesions/`` every finding as 1-bit PNG.
    ``labels.csv`` has the columns path, patient_id, study_id, view, sex, age, one per finding (0/1), abnormal (0/1),
    lung_mask, mask_<Finding> (a path, or empty) and markers (JSON: [text, x0, y0, x1, y1], fractions of the frame);
    paths are relative to `folder`. lateral: also lateral views. progress: called with (patients done, patients).

    The same arguments write the same bytes. The folder appears when it is whole. Raises CarinaError when `folder`
    holds something, or for a format or number of patients that there is not.
    """
    folder = Path(folder)
    if file_format not in FORMATS:
        raise CarinaError(
            f"phantoms have no format {file_format!r}{nearest(str(file_format), FORMATS)}; choose png, dicom or mixed"
        )
    if patients < 1:
        raise CarinaError(f"phantoms of {patients} patients cannot be drawn; ask for at least 1")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CarinaError(f"{folder} is not empty; choose a new folder for the phantoms, or remove it first")

    columns = ["path", "patient_id", "study_id", "view", "sex", "age", *FINDINGS, "abnormal", "lung_mask"]
    columns += [*(f"mask_{name}" for name in FINDINGS), "markers"]
    with atomic_folder(folder) as temporary:
        for name in ("images", "masks", "lesions"):
            (temporary / name).mkdir()
        with open(temporary / "labels.csv", "w", newline="", encoding="utf-8") as handle:
            table = csv.DictWriter(handle, columns, lineterminator="\n", restval="")
            table.writeheader()
            number = 0
            for patient in range(patients):
                for study, image, view in _schedule(seed, patient, lateral):
                    drawn = phantom(seed, patient, study, image, size=size, view=view)
                    dicom = file_format == "dicom" or (file_format == "mixed" and number % 2 == 0)
                    inverted = number % (2 if file_format == "dicom" else 4) == 0
                    table.writerow(_write(temporary, drawn, (seed, patient, study, image), dicom, inverted))
                    number += 1
                if progress is not None:
                    progress(patient + 1, patients)
    return folder / "labels.csv"


def _schedule(seed: int, patient: int, lateral: bool) -> Iterator[tuple[int, int, str]]:
    """(study, image, view) of all the patient's images. One study is PA or AP throughout; a lateral comes second."""
    u = generator(seed, patient, "schedule").random(10)
    for study in range(1 + int(u[0] < 0.35) + int(u[0] < 0.1)):
        view = "PA" if u[1 + study] < 0.63 else "AP"
        yield study, 0, view
        if u[4 + study] < 0.2:
            yield study, 1, "LATERAL" if lateral and u[7 + study] < 0.5 else view


def _write(
    folder: Path, drawn: Phantom, key: tuple[int, int, int, int], dicom: bool, inverted: bool
) -> dict[str, object]:
    seed, patient, study, image = key
    patient_id = f"PH{seed}-{patient:05d}"
    study_id = f"{patient_id}-{study}"
    name = f"{study_id}-{image}"
    path = f"images/{name}.{'dcm' if dicom else 'png'}"
    if dicom:
        _save_dicom(folder / path, drawn, key, patient_id, inverted)
    else:
        Image.fromarray(np.round(drawn.image * 255).astype(np.uint8)).save(folder / path)
    row: dict[str, object] = {
        "path": path,
        "patient_id": patient_id,
        "study_id": study_id,
        "view": drawn.view,
        "sex": drawn.sex,
        "age": drawn.age,
        **drawn.labels,
        "abnormal": int(any(drawn.labels.values())),
        "lung_mask": f"masks/{name}_lungs.png",
        "markers": json.dumps([[text, *(round(edge, 6) for edge in box)] for text, *box in drawn.markers]),
    }
    Image.fromarray(drawn.lungs).save(folder / f"masks/{name}_lungs.png")
    for finding, mask in drawn.lesions.items():
        row[f"mask_{finding}"] = f"lesions/{name}_{finding}.png"
        Image.fromarray(mask).save(folder / f"lesions/{name}_{finding}.png")
    return row


def _save_dicom(path: Path, drawn: Phantom, key: tuple[int, int, int, int], patient_id: str, inverted: bool) -> None:
    """A Digital X-Ray image for presentation (DICOM PS3.3 A.26), explicit little endian, 12 bits stored in 16."""
    values = np.round(DARKEST + drawn.image * (BRIGHTEST - DARKEST)).astype(np.uint16)
    # The linear window function (PS3.3 C.11.2.1.2) is 0 at center - 0.5 - (width - 1) / 2.
    center = (DARKEST + BRIGHTEST) / 2 + 0.5
    if inverted:
        values, center = _TOP - values, _TOP - center + 1
    uid = {level: f"2.25.{hash64('phantom', level, *key[:upto])}" for level, upto in _LEVELS.items()}

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = uid["instance"]
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, uid["instance"]
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uid["study"], uid["series"]
    ds.Modality, ds.BodyPartExamined, ds.PresentationIntentType = "DX", "CHEST", "FOR PRESENTATION"
    ds.Manufacturer = "carina phantom"
    ds.PatientID, ds.PatientSex, ds.PatientAge = patient_id, drawn.sex, f"{drawn.age:03d}Y"
    ds.ViewPosition = "LL" if drawn.view == "LATERAL" else drawn.view
    ds.InstanceNumber = key[3] + 1
    # A side marker does not identify anyone, which is what this element speaks of (PS3.3 C.7.6.1.1).
    ds.BurnedInAnnotation = "NO"
    ds.SamplesPerPixel, ds.PixelRepresentation = 1, 0
    ds.Rows, ds.Columns = values.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    ds.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"
    ds.WindowCenter, ds.WindowWidth = center, BRIGHTEST - DARKEST + 1
    ds.PixelData = values.astype("<u2").tobytes()
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


# How much of (seed, patient, study, image) each identifier depends on.
_LEVELS = {"study": 3, "series": 4, "instance": 4}
