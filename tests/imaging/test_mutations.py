"""Damaged files of every transfer syntax: a picture or a reason, soon, in little memory, without a word."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pydicom
import pydicom.data
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from carina.imaging.dicom import Photometry, Unreadable, read_radiograph
from carina.isolation import isolated

SECONDS = 10
MEMORY = 2 * 2**30
SHIPPED = (  # with pydicom: what nothing here can encode
    "JPGExtended.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jls_lossy_line.dcm", "SC_rgb_jpeg_gdcm.dcm",
    "J2K_pixelrep_mismatch.dcm", "examples_palette.dcm", "SC_ybr_full_422_uncompressed.dcm", "image_dfl.dcm",
    "SC_rgb_rle_16bit_2frame.dcm", "liver_1frame.dcm",
)  # fmt: skip
# What a mutation may put in place of a number in the header: the ends of every width, and what overflows products.
WORDS = (0, 1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 255, 256, 4095, 4096, 32767, 32768, 40000, 65534, 65535)


def picture(rng: np.random.Generator, rows: int = 112, columns: int = 96) -> np.ndarray:
    ramp = np.linspace(300, 3000, rows)[:, None] + 700 * (np.arange(columns) > columns // 3)[None, :]
    return (ramp + rng.normal(0, 40, (rows, columns))).clip(0, 4095).astype(np.uint16)


def data_set(stored: np.ndarray, syntax: str) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.826.0.1.3680043.8.498.5"
    ds.PatientID, ds.PatientAge, ds.Modality, ds.BodyPartExamined = "DOE4711", "045Y", "DX", "CHEST"
    ds.PixelSpacing, ds.ViewPosition, ds.AcquisitionDate = [0.2, 0.2], "PA", "20200101"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *stored.shape, 1, "MONOCHROME2"
    ds.BitsAllocated = 8 * stored.dtype.itemsize
    ds.BitsStored = 12 if ds.BitsAllocated == 16 else 8
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, 0
    ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth = 1, 0, [2000, 1000], [3000, 500]
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    ds.add_new("PixelData", "OW", stored.astype(stored.dtype.newbyteorder(order)).tobytes())
    return ds


def originals() -> list[bytes]:
    """One whole file of every form that is known."""
    stored = picture(np.random.default_rng(5))
    made = []
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian):
        made.append(data_set(stored, syntax))
    for syntax, options in ((RLELossless, {}), (JPEG2000Lossless, {}), (JPEG2000, {"j2k_cr": [8]})):
        made.append(data_set(stored, ExplicitVRLittleEndian))
        made[-1].compress(syntax, **options)
    eight = (stored >> 4).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(eight).save(buffer, "JPEG")
    made.append(data_set(eight, JPEGBaseline8Bit))
    made[-1].add_new("PixelData", "OB", encapsulate([buffer.getvalue()]))
    item = Dataset()
    item.LUTDescriptor = [4096, 0, 12]
    item.add_new("LUTData", "OW", np.arange(4096, dtype="<u2")[::-1].tobytes())
    made.append(data_set(stored, ExplicitVRLittleEndian))
    made[-1].VOILUTSequence = [item]
    files = []
    for ds in made:
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
        files.append(buffer.getvalue())
    folder = Path(pydicom.data.__file__).parent / "test_files"
    files += [(folder / name).read_bytes() for name in SHIPPED]
    for name in ("PNG", "JPEG", "TIFF", "BMP"):
        buffer = io.BytesIO()
        Image.fromarray(eight).save(buffer, name)
        files.append(buffer.getvalue())
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "PNG")
    files.append(buffer.getvalue())
    buffer = io.BytesIO()
    np.save(buffer, stored)
    files.append(buffer.getvalue())
    return files


def _elements(data: bytes) -> list[tuple[int, int]]:
    """(start, end) of the elements of the data set as explicit VR, little endian, as far as it can be read so."""
    place, found = 132, []
    while place + 12 <= len(data) and data[place + 4 : place + 6].isalpha():
        long = data[place + 4 : place + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT")
        length = struct.unpack_from("<I" if long else "<H", data, place + (8 if long else 6))[0]
        end = place + (12 if long else 8) + length
        found.append((place, min(end, len(data))))
        place = end
    return found


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """The file after one to three damages."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if len(changed) < 200:
            break
        kind = rng.integers(0, 9)
        head = 132 + int(rng.integers(0, min(900, len(changed) - 132)))
        anywhere = int(rng.integers(0, len(changed)))
        if kind == 0:  # truncated
            del changed[anywhere:]
        elif kind == 1:  # bits flipped in the header
            for place in rng.integers(0, min(1200, len(changed)), rng.integers(1, 9)):
                changed[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 2:  # bits flipped in the pixels
            for place in rng.integers(len(changed) // 4, len(changed), rng.integers(1, 30)):
                changed[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 3:  # huge, tiny or odd dimensions, frames, samples, bits
            tag = [b"\x28\0\x10\0", b"\x28\0\x11\0", b"\x28\0\x02\0", b"\x28\0\0\1", b"\x28\0\1\1", b"\x28\0\2\1"]
            place = changed.find(tag[rng.integers(0, len(tag))])
            if place >= 0 and place + 10 <= len(changed):
                struct.pack_into("<H", changed, place + 8, int(rng.choice(WORDS)))
        elif kind == 4:  # an element is absent
            elements = _elements(bytes(changed))
            if elements:
                start, end = elements[rng.integers(0, len(elements))]
                del changed[start:end]
        elif kind == 5:  # a length or a number becomes an extreme one
            struct.pack_into("<H", changed, min(head, len(changed) - 2), int(rng.choice(WORDS)))
        elif kind == 6:  # markers of code streams: their sizes, their tables
            place = max(changed.find(m) for m in (b"\xff\x51", b"\xff\x52", b"\xff\xc0", b"\xff\xc3", b"\xff\xf7"))
            if place >= 0:
                place += int(rng.integers(2, 60))
                changed[place : place + 1] = bytes([int(rng.integers(0, 256))])
        elif kind == 7:  # bytes lost or doubled
            span = int(rng.integers(1, 40))
            changed[anywhere : anywhere + span] = changed[anywhere : anywhere + span] * int(rng.integers(0, 3))
        else:  # a stretch of zeros or ones
            span = int(rng.integers(1, 3000))
            changed[anywhere : anywhere + span] = bytes([int(rng.choice((0, 255)))]) * len(
                changed[anywhere : anywhere + span]
            )
    return bytes(changed)


def large() -> list[bytes]:
    """Files of the usual size of a radiograph, and small ones whose pictures are as large as any may be."""
    stored = picture(np.random.default_rng(6), 2500, 2048)
    blank = np.zeros((8192, 8192), np.uint16)
    blank[:100, :100] = 4095
    made = [data_set(stored, ExplicitVRLittleEndian), data_set(blank, DeflatedExplicitVRLittleEndian)]
    for pixels, syntax in ((stored, RLELossless), (stored, JPEG2000Lossless), (blank, RLELossless)):
        made.append(data_set(pixels, ExplicitVRLittleEndian))
        made[-1].compress(syntax)
    files = []
    for ds in made:
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
        files.append(buffer.getvalue())
    buffer = io.BytesIO()
    Image.fromarray((blank >> 4).astype(np.uint8)).save(buffer, "PNG")
    return [*files, buffer.getvalue()]


def mutants(count: int) -> list[bytes]:
    files = originals()
    return [mutate(files[number % len(files)], np.random.default_rng([11, number])) for number in range(count)]


def test_the_undamaged_files_are_pictures():
    for data in originals():
        assert read_radiograph(data, Photometry(frames="first")).image.ndim == 2


def test_damaged_files_are_pictures_or_reasons(capfd):
    """In this very process: a decoder that dies takes the test with it."""
    read = 0
    for data in mutants(150):
        start = time.perf_counter()
        try:
            radiograph = read_radiograph(data, Photometry(frames="first"))
        except Unreadable as error:
            assert "DOE4711" not in str(error)
        else:
            image = radiograph.image
            assert image.dtype == np.float32 and 0 <= image.min() < image.max() <= 1
            read += 1
        assert time.perf_counter() - start < SECONDS
    assert 15 < read < 135  # the damages are neither all fatal nor all harmless
    assert capfd.readouterr() == ("", "")


def _seconds(path: str) -> float:
    """How long one file takes, whatever comes of it."""
    start = time.perf_counter()
    with contextlib.suppress(Unreadable):
        read_radiograph(path, Photometry(frames="first"))
    return time.perf_counter() - start


def _resident(process: psutil.Process) -> int:
    """Bytes in memory of a process and all that it has started."""
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


@pytest.mark.slow
def test_two_thousand_damaged_files_never_end_prepare(tmp_path):
    """Whole command: its counts add up, its memory stays small; and read one by one, no file takes ten seconds."""
    folder = tmp_path / "files"
    folder.mkdir()
    for number, data in enumerate(mutants(1950)):
        (folder / f"small-{number:05d}").write_bytes(data)
    originals = large()
    for number in range(50):
        data = originals[number % len(originals)]
        changed = data if number < len(originals) else mutate(data, np.random.default_rng([13, number]))
        (folder / f"large-{number:05d}").write_bytes(changed)

    words = ["prepare", folder, f"out={tmp_path / 'store'}", "scales=[64,32]", "frames=first", "keep=all", "workers=2"]
    with open(tmp_path / "messages.txt", "w+") as messages:
        command = [sys.executable, "-m", "carina", *map(str, words), "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True)
        peak, watched = 0, psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _resident(watched))
            time.sleep(0.05)
        messages.seek(0)
        said = messages.read()
    assert process.returncode == 0, said
    assert "Traceback" not in said and "panicked" not in said and "DOE4711" not in said
    counts = json.loads(process.stdout.read())["counts"]
    assert counts["images"] + counts["rejected"] == 2000 and counts["images"] > 400 and counts["rejected"] > 400
    assert sum(counts["reasons"].values()) == counts["rejected"]
    assert peak < MEMORY, f"{peak / 2**20:.0f} MiB"

    took = list(isolated(_seconds, [str(file) for file in sorted(folder.iterdir())], 2 * SECONDS))
    assert len(took) == 2000 and all(reason != "its decoder hung" for _, reason in took)
    slowest = max(seconds for seconds, _ in took if seconds is not None)
    crashes = sum(seconds is None for seconds, _ in took)
    print(f"{counts['images']} images, {crashes} crashes, {peak / 2**20:.0f} MiB at most, slowest file {slowest:.2f} s")
    assert slowest < SECONDS
