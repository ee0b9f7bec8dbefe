"""Files of every kind become a picture or a reason; nothing personal comes along."""

from __future__ import annotations

import io
import logging
import struct
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from carina.imaging import dataset, pixeldata
from carina.imaging.dicom import Photometry, Unreadable, read_radiograph

SECRETS = ("DOE", "JANE", "MRN778899", "19470317", "ACC4711", "1.2.826.0.1.3680043.8.498.1", "HOUSE")
FACTS = {
    "view", "sex", "age", "rows", "columns", "spacing", "bits", "photometric", "manufacturer", "modality", "body_part",
    "transfer_syntax", "polarity", "window", "year", "burned_in",
}  # fmt: skip
FULL = Photometry(window="full")


def picture(rows: int = 40, columns: int = 50, top: int = 4095) -> np.ndarray:
    """A ramp down with a step to the right: no symmetry that a turn or a flip could hide."""
    ramp = np.linspace(0.1, 0.8, rows)[:, None] + 0.2 * (np.arange(columns) > columns // 3)[None, :]
    return (ramp * top).astype(np.uint8 if top < 256 else np.uint16)


def data_set(stored: np.ndarray, syntax=ExplicitVRLittleEndian, **elements) -> Dataset:
    """A DX image of a patient whose every identifier is among SECRETS."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", SECRETS[5] + ".3"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = "DOE^JANE", "MRN778899", "19470317"
    ds.AccessionNumber, ds.StudyInstanceUID, ds.ReferringPhysicianName = "ACC4711", SECRETS[5] + ".2", "HOUSE^G"
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = "DX", "Acme", "Ray 9"
    ds.PatientSex, ds.PatientAge, ds.ViewPosition, ds.BodyPartExamined = "F", "079Y", "PA", "CHEST"
    ds.PixelSpacing = [0.2, 0.1]
    ds.Rows, ds.Columns, ds.SamplesPerPixel = stored.shape[0], stored.shape[1], 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated = 8 * stored.dtype.itemsize
    ds.BitsStored = 12 if ds.BitsAllocated == 16 else 8
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(stored.dtype.kind == "i")
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    ds.add_new("PixelData", "OW", stored.astype(stored.dtype.newbyteorder(order)).tobytes())
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def save(path: Path, ds: Dataset) -> Path:
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


def refused(path: Path, photometry: Photometry = Photometry()) -> str:  # noqa: B008
    with pytest.raises(Unreadable) as caught:
        read_radiograph(path, photometry)
    message = str(caught.value)
    assert not any(secret in message for secret in SECRETS) and str(path) not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


# --- real files ---------------------------------------------------------------------------------------------------


def real_dicoms(folder: Path) -> list[Path]:
    return sorted((folder / "dicom").glob("*.dcm"))


@pytest.mark.real
def test_every_real_file_is_read_or_refused_with_a_reason(real_data, capfd):
    ours = Path(pydicom.data.__file__).parent / "test_files"
    files = real_dicoms(real_data) + sorted(path for path in ours.rglob("*") if path.is_file())
    read, refusals = [], {}
    for path in files:
        try:
            radiograph = read_radiograph(path)
        except Unreadable as error:
            refusals[path.name] = str(error)
            continue
        read.append(path.name)
        image, facts = radiograph.image, radiograph.facts
        assert image.dtype == np.float32 and image.ndim == 2 and image.flags.c_contiguous
        assert 0 <= image.min() < image.max() <= 1 and set(facts) == FACTS
        assert (facts["rows"], facts["columns"]) == image.shape
        assert not radiograph.patient or radiograph.patient not in repr(radiograph)
    assert {path.name for path in real_dicoms(real_data)} <= set(read)
    assert len(read) >= 60 and all(len(reason) > 10 for reason in refusals.values())
    assert capfd.readouterr() == ("", "")


def by_pydicom(ds: Dataset) -> np.ndarray:
    """pydicom's modality and VOI stages, scaled by what the last of them can put out; inverted last, where due."""
    shown = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds).astype(np.float64)
    low, high = (-(2 ** (ds.BitsStored - 1)), 2 ** (ds.BitsStored - 1) - 1) if ds.PixelRepresentation else (0, 0)
    high = high or 2**ds.BitsStored - 1
    if ds.get("VOILUTSequence"):
        low, high = 0, 2 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif ds.get("ModalityLUTSequence"):
        low, high = 0, 2 ** ds.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    elif "RescaleSlope" in ds:
        low, high = low * ds.RescaleSlope + ds.RescaleIntercept, high * ds.RescaleSlope + ds.RescaleIntercept
    unit = (shown - low) / (high - low)
    invert = ds.get("PresentationLUTShape", "") == "INVERSE" or ds.PhotometricInterpretation == "MONOCHROME1"
    return 1 - unit if invert else unit


@pytest.mark.real
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_linear_photometry_and_tables_agree_with_pydicom_on_every_file(real_data):
    """The shared files and those of pydicom's wheel: gray, of one frame, and decoded by pydicom too."""
    shipped = Path(pydicom.data.__file__).parent / "test_files"
    compared = set()
    for path in real_dicoms(real_data) + sorted(shipped.glob("*.dcm")):
        ds = pydicom.dcmread(path, force=True)
        gray = str(ds.get("PhotometricInterpretation", "")).startswith("MONOCHROME")
        if not gray or "TransferSyntaxUID" not in ds.file_meta or path.name in ("RG2_JPLY.dcm", "JPEG-lossy.dcm"):
            continue  # these two end their spectral band at 0, which pydicom's decoders refuse
        try:
            image = read_radiograph(path, Photometry(window="header")).image
        except Unreadable:
            continue
        kept = slice(None) if "PixelPaddingValue" not in ds else ds.pixel_array != ds.PixelPaddingValue
        np.testing.assert_allclose(image[kept], by_pydicom(ds)[kept], atol=1e-4, err_msg=path.name)
        compared.add(path.name)
    assert {"DX_chest_966_J2KR.dcm", "CR_teeth_ModalityLUT_JPLL.dcm", "RG1_JLSN.dcm", "MR_small_RLE.dcm"} <= compared
    assert len(compared) >= 25


@pytest.mark.real
def test_one_acquisition_is_one_picture_in_every_syntax(real_data):
    folder = real_data / "dicom"
    lossless = [read_radiograph(folder / f"RG2_{name}.dcm").image for name in ("J2KR", "JLSL", "JPLL", "RLE")]
    for other in lossless[1:]:
        np.testing.assert_array_equal(lossless[0], other)
    with_meta, bare = (read_radiograph(folder / f"CR-MONO1-10-chest_{n}.dcm") for n in ("implicit", "nopreamble"))
    np.testing.assert_array_equal(with_meta.image, bare.image)


@pytest.mark.real
def test_twelve_bit_extended_jpeg_with_its_known_slip(real_data):
    """The lossy file of the same acquisition ends its spectral band at 0; decoded, it is close to the lossless one."""
    lossless, lossy = (read_radiograph(real_data / "dicom" / f"RG2_{name}.dcm").image for name in ("J2KR", "JPLY"))
    assert np.abs(lossless - lossy).mean() < 1 / 255 and np.corrcoef(lossless.ravel(), lossy.ravel())[0, 1] > 0.999


@pytest.mark.real
def test_a_false_monochrome1_is_suspected(real_data):
    folder = real_data / "dicom"
    true, false = (read_radiograph(folder / f"SIIM_chest_jpegbaseline{n}.dcm") for n in ("", "_FAKE_MONOCHROME1"))
    assert (true.facts["polarity"], false.facts["polarity"]) == ("ok", "suspicious")
    np.testing.assert_allclose(false.image, 1 - true.image, atol=1e-6)  # as its tag says


@pytest.mark.real
def test_truncated_real_files_are_refused(real_data, tmp_path):
    for path in real_dicoms(real_data):
        data = path.read_bytes()
        for share in (0.02, 0.5, 0.97):
            cut = tmp_path / "cut.dcm"
            cut.write_bytes(data[: int(share * len(data))])
            assert refused(cut)


# --- synthetic DICOM ----------------------------------------------------------------------------------------------


SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


@pytest.mark.parametrize("syntax", [*SYNTAXES, RLELossless], ids=lambda uid: uid.name)
@pytest.mark.parametrize("signed", [False, True])
def test_syntaxes_and_signs(tmp_path, syntax, signed):
    stored = picture().astype(np.int16) - 2048 if signed else picture()
    ds = data_set(stored, ExplicitVRLittleEndian if syntax == RLELossless else syntax)
    if syntax == RLELossless:
        ds.compress(RLELossless)
    image = read_radiograph(save(tmp_path / "a.dcm", ds), FULL).image
    np.testing.assert_allclose(image, picture() / 4095, atol=1e-6)


def test_without_preamble_or_file_meta(tmp_path):
    for name, implicit in (("implicit", True), ("explicit", False)):
        ds = data_set(picture(), ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian)
        del ds.file_meta
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, ds, implicit_vr=implicit, little_endian=True)
        (tmp_path / name).write_bytes(buffer.getvalue())
        image = read_radiograph(tmp_path / name, FULL).image
        np.testing.assert_allclose(image, picture() / 4095, atol=1e-6)


@pytest.mark.parametrize("samples, bits", [(1, 8), (1, 16), (3, 8), (3, 16)])
def test_run_lengths_are_decoded_as_by_pydicom(tmp_path, samples, bits):
    rng = np.random.default_rng(bits)
    stored = np.repeat(rng.integers(0, 2**bits, (40, 5, samples), dtype=f"u{bits // 8}"), 10, axis=1)
    stored[::2] = rng.integers(0, 2**bits, (20, 50, samples), dtype=stored.dtype)  # literals beside runs
    form = {"PhotometricInterpretation": "RGB", "PlanarConfiguration": 0} if samples == 3 else {}
    ds = data_set(stored[..., 0], BitsStored=bits, HighBit=bits - 1, SamplesPerPixel=samples, **form)
    ds.PixelData = stored.tobytes()
    ds.compress(RLELossless, encoding_plugin="pydicom")
    file = dataset.read_file(memoryview(save(tmp_path / "a.dcm", ds).read_bytes()))
    found, _ = pixeldata.decode(file, dataset.Layout.of(file.header))
    np.testing.assert_array_equal(found, stored if samples == 3 else stored[..., 0])


def test_ten_bits_in_sixteen_with_litter_above_and_below(tmp_path):
    """Overlay bits above the stored ones are no pixels, and a high bit of 15 puts the pixels at the top of the word."""
    ten = (picture() >> 2).astype(np.uint16)
    littered = save(tmp_path / "a.dcm", data_set(ten | np.uint16(0x8400), BitsStored=10, HighBit=9))
    shifted = save(tmp_path / "b.dcm", data_set((ten << 6) | np.uint16(0x15), BitsStored=10, HighBit=15))
    for path in (littered, shifted):
        radiograph = read_radiograph(path, FULL)
        assert radiograph.facts["bits"] == 10
        np.testing.assert_allclose(radiograph.image, ten / 1023, atol=1e-6)


def test_color_secondary_captures_become_gray(tmp_path):
    gray = picture(top=255)
    rgb = np.stack([gray, gray, gray], axis=-1)
    for planar in (0, 1):
        ds = data_set(gray, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=planar)
        ds.PixelData = (rgb.transpose(2, 0, 1) if planar else rgb).tobytes()
        image = read_radiograph(save(tmp_path / "rgb.dcm", ds)).image
        np.testing.assert_allclose(image, gray / 255, atol=1e-6)


def palette(segmented: bool) -> Dataset:
    """Gray values by a palette, of which red, green and blue are the same falling ramp."""
    ds = data_set(picture(top=255), PhotometricInterpretation="PALETTE COLOR")
    for color in ("Red", "Green", "Blue"):
        setattr(ds, f"{color}PaletteColorLookupTableDescriptor", [256, 0, 16])
        ramp = (np.arange(256, dtype="<u2")[::-1] * 257).tobytes()
        setattr(ds, f"{'Segmented' * segmented}{color}PaletteColorLookupTableData", ramp)
    return ds


def test_palettes_become_gray(tmp_path):
    image = read_radiograph(save(tmp_path / "a.dcm", palette(False))).image
    np.testing.assert_allclose(image, 1 - picture(top=255) / 255, atol=1e-6)
    assert "segmented" in refused(save(tmp_path / "b.dcm", palette(True)))


def test_facts_hold_the_allow_list_and_nothing_personal(tmp_path, caplog, capfd):
    ds = data_set(picture(), AcquisitionDate="20190817", StudyDate="20180817", BurnedInAnnotation="NO")
    ds.add_new((0x0009, 0x0010), "LO", "HOUSE PRIVATE")
    radiograph = read_radiograph(save(tmp_path / "a.dcm", ds))
    assert radiograph.facts == {
        "view": "PA", "sex": "F", "age": 79.0, "rows": 40, "columns": 50, "spacing": (0.2, 0.1), "bits": 12,
        "photometric": "MONOCHROME2", "manufacturer": "Acme Ray 9", "modality": "DX", "body_part": "CHEST",
        "transfer_syntax": "Explicit VR Little Endian", "polarity": radiograph.facts["polarity"],
        "window": "percentile 0.5-99.5", "year": 2019, "burned_in": "NO",
    }  # fmt: skip
    assert radiograph.patient == "MRN778899" and radiograph.study == SECRETS[5] + ".2"
    assert not any(secret in repr(radiograph) for secret in SECRETS)
    # Values that break their own rules make pydicom quote them in warnings: nothing of that may be seen.
    data = (tmp_path / "a.dcm").read_bytes().replace(b"079Y", b"DOE^").replace(b"0.2\\0.1", b"JANE^DO")
    (tmp_path / "b.dcm").write_bytes(data.replace(b"19470317", b"MRN77889"))
    facts = read_radiograph(tmp_path / "b.dcm").facts
    assert facts["age"] is None and facts["spacing"] is None
    assert caplog.text == "" and capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:Invalid value for VR AS")
@pytest.mark.parametrize(
    "text, years",
    [
        ("079Y", 79),
        ("097Y", 90),
        ("006M", 0.5),
        ("026W", 0.4983),
        ("073D", 0.19986),
        ("62", 62),
        ("", None),
        ("411Y", None),
    ],
)
def test_ages_in_every_unit(tmp_path, text, years):
    age = read_radiograph(save(tmp_path / "a.dcm", data_set(picture(), PatientAge=text))).facts["age"]
    assert age == (None if years is None else pytest.approx(years, abs=1e-3))


@pytest.mark.parametrize(
    "spacing, imager, expected",
    [(["0", "0"], ["0.1", "0.2"], (0.1, 0.2)), (["5", "0.1"], None, None), (None, ["0.16", "0.16"], (0.16, 0.16))],
)
def test_spacing_must_be_usable(tmp_path, spacing, imager, expected):
    ds = data_set(picture(), PixelSpacing=spacing, ImagerPixelSpacing=imager)
    assert read_radiograph(save(tmp_path / "a.dcm", ds)).facts["spacing"] == expected


@pytest.mark.parametrize(
    "ratio, spacing, expected",
    [(["4", "3"], None, (4.0, 3.0)), (["1", "1"], None, None), (["4", "3"], ["0.2", "0.2"], (0.2, 0.2))],
)
def test_an_aspect_ratio_counts_where_no_spacing_is_there(tmp_path, ratio, spacing, expected):
    ds = data_set(picture(), PixelSpacing=spacing, PixelAspectRatio=ratio)
    assert read_radiograph(save(tmp_path / "a.dcm", ds)).facts["spacing"] == expected


@pytest.mark.filterwarnings("ignore:Invalid value for VR DA")
@pytest.mark.parametrize(
    "dates, year",
    [
        ({"StudyDate": "20180817"}, 2018),
        ({"AcquisitionDate": "", "ContentDate": "2180.05.06", "StudyDate": "20180817"}, 2180),
        ({"AcquisitionDate": "19870101", "StudyDate": "20180817"}, 1987),
        ({"PatientBirthDate": "19470317"}, None),
        ({"StudyDate": "00000000"}, None),
    ],
)
def test_of_dates_the_year_is_kept(tmp_path, dates, year):
    ds = data_set(picture(), **dates)
    assert read_radiograph(save(tmp_path / "a.dcm", ds)).facts["year"] == year


def test_a_broken_element_that_no_picture_hangs_on_is_as_good_as_absent(tmp_path):
    data = save(tmp_path / "a.dcm", data_set(picture())).read_bytes()
    assert data.count(b"AS\x04\x00079Y") == 1
    (tmp_path / "a.dcm").write_bytes(data.replace(b"AS\x04\x00079Y", b"AR\x04\x00079Y"))
    facts = read_radiograph(tmp_path / "a.dcm").facts
    assert facts["age"] is None and facts["sex"] == "F"


def test_a_deflated_bomb_is_not_blown_up(tmp_path, monkeypatch):
    path = save(tmp_path / "a.dcm", data_set(np.zeros((2000, 2000), np.uint16), DeflatedExplicitVRLittleEndian))
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(dataset, "MAX_INFLATED", 1_000_000)
    assert "more than 1000000 bytes" in refused(path)


def test_a_code_stream_of_another_size_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    def decode(*_, **__):
        raise AssertionError("it was decoded")

    ds = data_set(picture())
    ds.compress(JPEG2000Lossless)
    data = save(tmp_path / "a.dcm", ds).read_bytes()
    size = struct.pack(">4I", 50, 40, 0, 0)  # SIZ: the right and lower ends, then the origin
    monkeypatch.setattr(pydicom.pixels.decoders.base.Decoder, "as_array", decode)
    for right, lower in ((50, 41), (2**31, 2**31)):
        (tmp_path / "b.dcm").write_bytes(data.replace(size, struct.pack(">4I", right, lower, 0, 0), 1))
        assert "another size" in refused(tmp_path / "b.dcm")
    tiles = data.index(size) + 16
    (tmp_path / "b.dcm").write_bytes(data[:tiles] + struct.pack(">2I", 1, 1) + data[tiles + 8 :])
    monkeypatch.setattr("carina.imaging.codestreams.MAX_TILES", 1000)
    assert "more than 1000 tiles" in refused(tmp_path / "b.dcm")


def test_a_header_without_end_is_given_up_soon(tmp_path):
    """Zeros read as elements without length, eight bytes each, inside a sequence that has no end."""
    data = save(tmp_path / "a.dcm", data_set(picture())).read_bytes()
    at = data.index(b"\x28\x00\x02\x00US")
    sequence = b"\x09\x00\x10\x10SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    (tmp_path / "a.dcm").write_bytes(data[:at] + sequence + bytes(16_000_000))
    start = time.perf_counter()
    assert "does not come to an end" in refused(tmp_path / "a.dcm")
    assert time.perf_counter() - start < 5


def test_threads_restore_what_they_silence(tmp_path):
    path = save(tmp_path / "a.dcm", data_set(picture()))
    filters, level = list(warnings.filters), logging.getLogger("pydicom").level
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda _: read_radiograph(path).image, range(40)))
    assert warnings.filters == filters and logging.getLogger("pydicom").level == level
    assert all((image == images[0]).all() for image in images)


def test_several_frames_are_refused_or_the_first_is_taken(tmp_path):
    ds = data_set(picture(), NumberOfFrames=2)
    ds.PixelData = picture().tobytes() + picture()[::-1].tobytes()
    path = save(tmp_path / "a.dcm", ds)
    assert "frames=first" in refused(path)
    first = read_radiograph(path, Photometry(window="full", frames="first")).image
    np.testing.assert_allclose(first, picture() / 4095, atol=1e-6)


def test_reasons_of_dicom_files(tmp_path):
    def reason(**elements) -> str:
        return refused(save(tmp_path / "a.dcm", data_set(picture(), **elements)))

    assert "for_processing=log" in reason(PresentationIntentType="FOR PROCESSING")
    assert "more than" in reason(Rows=65535, Columns=65535)
    assert "fewer than 32" in reason(Rows=20)
    assert "fewer bytes" in reason(Columns=60)
    assert "unknown form" in reason(BitsStored=20)
    assert "16 times" in reason(Rows=32, Columns=600)
    assert "slope" in reason(RescaleSlope=0, RescaleIntercept=1)
    constant = np.full((40, 50), 7, dtype=np.uint16)
    assert "same value" in refused(save(tmp_path / "a.dcm", data_set(constant)))
    data = save(tmp_path / "a.dcm", data_set(picture())).read_bytes()
    (tmp_path / "a.dcm").write_bytes(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.113619.5.2\0\0"))
    assert "private or unknown" in refused(tmp_path / "a.dcm")
    ds = data_set(picture())
    del ds.BitsAllocated
    assert "does not say BitsAllocated" in refused(save(tmp_path / "a.dcm", ds))
    ds = data_set(picture())
    del ds.PixelData
    assert "not all there" in refused(save(tmp_path / "a.dcm", ds))
    del ds.Rows
    assert "without pixels" in refused(save(tmp_path / "a.dcm", ds))


def test_a_missing_decoder_and_a_video_are_named(tmp_path, monkeypatch):
    ds = data_set(picture())
    ds.compress(JPEG2000Lossless)
    path = save(tmp_path / "a.dcm", ds)
    monkeypatch.setattr(pydicom.pixels.decoders.base.Decoder, "is_available", False)
    assert "needs a decoder: pip install pylibjpeg-openjpeg" in refused(path)
    monkeypatch.undo()
    data = path.read_bytes()
    assert len(JPEG2000Lossless) - len(ExplicitVRLittleEndian) == 3
    (tmp_path / "b.dcm").write_bytes(
        data.replace(JPEG2000Lossless.encode(), ExplicitVRLittleEndian.encode() + b"\0\0\0")
    )
    assert "as if compressed" in refused(tmp_path / "b.dcm")
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
    assert "still pictures" in refused(save(tmp_path / "a.dcm", ds))


def test_a_panicking_decoder_is_a_reason_and_an_interrupt_is_not(tmp_path, monkeypatch):
    class PanicException(BaseException):  # what Rust decoders raise, by name
        pass

    ds = data_set(picture())
    ds.compress(JPEG2000Lossless)
    path = save(tmp_path / "a.dcm", ds)
    for error, expected in ((PanicException("DOE"), Unreadable), (KeyboardInterrupt(), KeyboardInterrupt)):

        def decode(self, *_, error=error, **__):
            raise error

        monkeypatch.setattr(pydicom.pixels.decoders.base.Decoder, "as_array", decode)
        with pytest.raises(expected) as caught:
            read_radiograph(path)
        assert "DOE" not in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12), st.booleans()
)
def test_damaged_files_never_raise_anything_else(tmp_path, changes, in_header):
    buffer = io.BytesIO()
    ds = data_set(picture(), WindowCenter=2000, WindowWidth=3000)
    ds.compress(RLELossless)
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    data = bytearray(buffer.getvalue())
    for where, value in changes:
        data[132 + int(where * (700 if in_header else len(data) - 132))] = value
    (tmp_path / "a.dcm").write_bytes(data)
    try:
        image = read_radiograph(tmp_path / "a.dcm").image
    except Unreadable:
        return
    assert image.min() >= 0 and image.max() <= 1
