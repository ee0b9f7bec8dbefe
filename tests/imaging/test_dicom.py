"""Files of every kind become a picture or a reason; nothing personal comes along."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pydicom.data
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from carina.errors import CarinaError
from carina.imaging import dicom
from carina.imaging.dicom import Photometry, Unreadable, list_files, read_radiograph

SECRETS = ("DOE", "JANE", "MRN778899", "19470317", "ACC4711", "1.2.826.0.1.3680043.8.498.1", "HOUSE")
FACTS = {
    "view", "sex", "age", "rows", "columns", "spacing", "bits", "photometric", "manufacturer", "modality", "body_part",
    "transfer_syntax", "polarity", "window",
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
def test_every_real_file_is_read_or_refused_with_a_reason(real_data):
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
    # One of ours is 12-bit JPEG Extended; all the rest must be read.
    assert [path.name for path in real_dicoms(real_data) if path.name not in read] == ["RG2_JPLY.dcm"]
    assert "12-bit JPEG Extended" in refusals["RG2_JPLY.dcm"]
    assert len(read) >= 60 and all(len(reason) > 10 for reason in refusals.values())


@pytest.mark.real
def test_linear_photometry_agrees_with_pydicom_on_real_files(real_data):
    compared = 0
    for path in real_dicoms(real_data):
        ds = pydicom.dcmread(path, force=True)
        if "WindowCenter" not in ds or not getattr(ds.file_meta, "TransferSyntaxUID", "") or "JPLY" in path.name:
            continue
        shown = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds) / (2.0**ds.BitsStored - 1)
        expected = 1 - shown if ds.PhotometricInterpretation == "MONOCHROME1" else shown
        np.testing.assert_allclose(read_radiograph(path).image, expected, atol=1e-4)
        compared += 1
    assert compared >= 8


@pytest.mark.real
def test_one_acquisition_is_one_picture_in_every_syntax(real_data):
    folder = real_data / "dicom"
    lossless = [read_radiograph(folder / f"RG2_{name}.dcm").image for name in ("J2KR", "JLSL", "JPLL", "RLE")]
    for other in lossless[1:]:
        np.testing.assert_array_equal(lossless[0], other)
    with_meta, bare = (read_radiograph(folder / f"CR-MONO1-10-chest_{n}.dcm") for n in ("implicit", "nopreamble"))
    np.testing.assert_array_equal(with_meta.image, bare.image)


@pytest.mark.real
def test_a_false_monochrome1_is_suspected(real_data):
    folder = real_data / "dicom"
    true, false = (read_radiograph(folder / f"SIIM_chest_jpegbaseline{n}.dcm") for n in ("", "_FAKE_MONOCHROME1"))
    assert (true.facts["polarity"], false.facts["polarity"]) == ("ok", "suspicious")


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


def test_facts_hold_the_allow_list_and_nothing_personal(tmp_path, caplog, capfd):
    ds = data_set(picture())
    ds.add_new((0x0009, 0x0010), "LO", "HOUSE PRIVATE")
    radiograph = read_radiograph(save(tmp_path / "a.dcm", ds))
    assert radiograph.facts == {
        "view": "PA", "sex": "F", "age": 79.0, "rows": 40, "columns": 50, "spacing": (0.2, 0.1), "bits": 12,
        "photometric": "MONOCHROME2", "manufacturer": "Acme Ray 9", "modality": "DX", "body_part": "CHEST",
        "transfer_syntax": "Explicit VR Little Endian", "polarity": radiograph.facts["polarity"],
        "window": "percentile 0.5-99.5",
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
    [("079Y", 79), ("006M", 0.5), ("026W", 0.4983), ("073D", 0.19986), ("62", 62), ("", None), ("411Y", None)],
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
    ds = data_set(picture())
    del ds.PixelData
    assert "not all there" in refused(save(tmp_path / "a.dcm", ds))
    del ds.Rows
    assert "without pixels" in refused(save(tmp_path / "a.dcm", ds))


def test_a_missing_decoder_and_a_video_are_named(tmp_path, monkeypatch):
    ds = data_set(picture())
    ds.compress(RLELossless)
    path = save(tmp_path / "a.dcm", ds)
    monkeypatch.setattr(pydicom.pixels.decoders.base.Decoder, "is_available", False)
    assert "RLE Lossless needs a decoder: pip install" in refused(path)
    monkeypatch.undo()
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"
    assert "still pictures" in refused(save(tmp_path / "a.dcm", ds))


def test_a_panicking_decoder_is_a_reason_and_an_interrupt_is_not(tmp_path, monkeypatch):
    class PanicException(BaseException):  # what Rust decoders raise, by name
        pass

    path = save(tmp_path / "a.dcm", data_set(picture()))
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


# --- everyday pictures --------------------------------------------------------------------------------------------


def test_eight_bits_in_every_format_and_mode(tmp_path):
    gray = picture(top=255)
    source = Image.fromarray(gray)
    palette = Image.fromarray(255 - gray, mode="L").convert("P")
    palette.putpalette([level for value in range(255, -1, -1) for level in (value, value, value)])
    variants = {
        "l.png": source, "rgb.png": source.convert("RGB"), "p.png": palette, "la.png": source.convert("LA"),
        "rgba.png": source.convert("RGBA"), "l.bmp": source, "l.tif": source, "p.tif": palette, "no_suffix": source,
    }  # fmt: skip
    for name, variant in variants.items():
        variant.save(tmp_path / name, format=None if "." in name else "PNG")
        radiograph = read_radiograph(tmp_path / name)
        np.testing.assert_allclose(radiograph.image, gray / 255, atol=1e-6, err_msg=name)
        assert radiograph.facts["bits"] == 8 and radiograph.patient is None
    source.save(tmp_path / "l.jpg", quality=95)
    assert np.abs(read_radiograph(tmp_path / "l.jpg").image - gray / 255).max() < 0.05


def test_sixteen_bits_keep_their_depth(tmp_path):
    deep = picture(top=65535)
    deep[0, :2] = (256, 257)  # told apart only when all bits are kept
    Image.fromarray(deep).save(tmp_path / "a.png")
    Image.fromarray(deep).save(tmp_path / "a.tif")
    cv2.imwrite(str(tmp_path / "rgb.png"), np.stack([deep] * 3, axis=-1))
    cv2.imwrite(str(tmp_path / "rgb.tif"), np.stack([deep] * 3, axis=-1))
    np.save(tmp_path / "a.npy", deep)
    for name in ("a.png", "a.tif", "rgb.png", "rgb.tif", "a.npy"):
        radiograph = read_radiograph(tmp_path / name, FULL)
        np.testing.assert_allclose(radiograph.image, deep / 65535, atol=1e-7, err_msg=name)
        assert radiograph.facts["bits"] == 16
        assert read_radiograph(tmp_path / name).facts["window"].startswith("percentile")


def test_white_is_zero_in_deep_tiff(tmp_path):
    deep = picture(top=65535)
    Image.fromarray(deep).save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    entry = b"\x06\x01\x03\x00\x01\x00\x00\x00\x01\x00"  # tag 262, SHORT, one value: BlackIsZero
    assert data.count(entry) == 1
    (tmp_path / "b.tif").write_bytes(data.replace(entry, entry[:8] + b"\0\0"))
    np.testing.assert_allclose(read_radiograph(tmp_path / "b.tif", FULL).image, 1 - deep / 65535, atol=1e-6)


def test_transparent_pixels_are_air(tmp_path):
    gray = picture(top=255)
    alpha = np.where(np.arange(50) < 10, 0, 255).astype(np.uint8) + np.zeros((40, 1), np.uint8)
    Image.fromarray(np.stack([gray, gray, gray, alpha], axis=-1)).save(tmp_path / "a.png")
    image = read_radiograph(tmp_path / "a.png").image
    assert (image[:, :10] == 0).all()
    np.testing.assert_allclose(image[:, 10:], gray[:, 10:] / 255, atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(top=255)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    radiograph = read_radiograph(tmp_path / "a.png")
    np.testing.assert_allclose(radiograph.image, expected / 255, atol=1e-6)
    assert (radiograph.facts["rows"], radiograph.facts["columns"]) == expected.shape


def test_reasons_of_pictures(tmp_path, monkeypatch):
    source = Image.fromarray(picture(200, 200, top=255))
    for name in ("a.png", "a.jpg", "a.tif", "a.bmp"):
        source.save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        for share in (0.05, 0.5, 0.9):
            (tmp_path / "cut").write_bytes(data[: int(share * len(data))])
            assert "damaged or truncated" in refused(tmp_path / "cut")
    (tmp_path / "text.png").write_text("DOE JANE was here, and this is no picture")
    assert "not an image" in refused(tmp_path / "text.png")
    (tmp_path / "empty.dcm").write_bytes(b"")
    assert "empty" in refused(tmp_path / "empty.dcm")
    assert "cannot be opened" in refused(tmp_path / "absent.dcm")
    np.save(tmp_path / "object.npy", np.array([{"DOE": 1}], dtype=object), allow_pickle=True)
    assert "objects" in refused(tmp_path / "object.npy")
    np.save(tmp_path / "nan.npy", np.full((40, 40), np.nan))
    assert "finite" in refused(tmp_path / "nan.npy")
    source.save(tmp_path / "two.tif", save_all=True, append_images=[source])
    assert "frames=first" in refused(tmp_path / "two.tif")
    monkeypatch.setattr(dicom, "MAX_PIXELS", 10_000)
    assert "more than 10000" in refused(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert "Pillow" in refused(tmp_path / "a.png")


def test_float_arrays_keep_a_unit_range(tmp_path):
    unit = (picture() / 8190).astype(np.float64)
    np.save(tmp_path / "a.npy", unit)
    np.testing.assert_allclose(read_radiograph(tmp_path / "a.npy").image, unit, atol=1e-6)


# --- which files --------------------------------------------------------------------------------------------------


def test_list_files(tmp_path):
    names = [
        "b/2.dcm",
        "b/10.dcm",
        "a.PNG",
        "c/no_suffix",
        "c/labels.csv",
        "notes.TXT",
        "DICOMDIR",
        ".x.png",
        ".h/1.dcm",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)

    def found(source) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in list_files(source)]

    assert found(tmp_path) == ["a.PNG", "b/10.dcm", "b/2.dcm", "c/no_suffix"]
    assert found(f"{tmp_path}/b/*.dcm") == ["b/10.dcm", "b/2.dcm"]
    assert found(f"{tmp_path}/**/*s*") == ["c/no_suffix"]
    assert found(tmp_path / "notes.TXT") == ["notes.TXT"]  # named outright, so it is for the reader to refuse
    for source in (tmp_path / "absent", f"{tmp_path}/*.tif"):
        with pytest.raises(CarinaError, match=r"\.$|path|folder"):
            list_files(source)
