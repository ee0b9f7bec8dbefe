"""Gray values against pydicom, polarity against written twins, geometry against points that are drawn."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRLittleEndian

from carina.errors import CarinaError
from carina.imaging.photometry import (
    Geometry,
    Photometry,
    Unreadable,
    collimated,
    develop,
    polarity_score,
    resize,
    resize_mask,
    window,
)

GREY = 1 / 255


def chest(side: int = 96) -> np.ndarray:
    """A crude chest: body on air, two dark lungs, a bright spine; [0, 1], not symmetric."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    picture = np.where(np.abs(x - 0.5) < 0.42 * np.clip(y * 3, 0.4, 1), 0.7, 0.02)
    for center, height in ((0.31, 0.3), (0.69, 0.26)):
        picture[((x - center) / 0.13) ** 2 + ((y - 0.5) / height) ** 2 < 1] = 0.25
    picture[(np.abs(x - 0.5) < 0.06)] += 0.2
    return np.clip(picture + 0.03 * np.sin(40 * x) * np.cos(31 * y), 0, 1)


def header(photometric: str = "MONOCHROME2", bits: int = 12, signed: bool = False, **elements) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.PhotometricInterpretation, ds.BitsStored, ds.PixelRepresentation = photometric, bits, int(signed)
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def table(first: int, entries: np.ndarray, bits: int, as_bytes: bool) -> list[Dataset]:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.add_new(
        "LUTData", "OW" if as_bytes else "US", entries.astype("<u2").tobytes() if as_bytes else entries.tolist()
    )
    return [item]


def by_pydicom(stored: np.ndarray, ds: Dataset) -> np.ndarray:
    """pydicom's modality and VOI stages, scaled by the range that the last stage can put out."""
    low, high = (-(2 ** (ds.BitsStored - 1)), 2 ** (ds.BitsStored - 1) - 1) if ds.PixelRepresentation else (0, 0)
    high = high or 2**ds.BitsStored - 1
    if ds.get("VOILUTSequence"):
        low, high = 0, 2 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif ds.get("ModalityLUTSequence"):
        low, high = 0, 2 ** ds.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    elif "RescaleSlope" in ds:
        low, high = low * ds.RescaleSlope + ds.RescaleIntercept, high * ds.RescaleSlope + ds.RescaleIntercept
    shown = apply_voi_lut(apply_modality_lut(stored, ds), ds).astype(np.float64)
    return (shown - low) / (high - low)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("signed, bits", [(False, 12), (True, 12), (False, 16), (True, 16)])
@pytest.mark.parametrize("rescale", [None, (2.5, -1024.0)])
def test_windows_agree_with_pydicom(function, signed, bits, rescale):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    stored = np.linspace(low, high, 64 * 64).round().astype(np.int16 if signed else np.uint16).reshape(64, 64)
    ds = header(bits=bits, signed=signed, WindowCenter=[(low + high) // 2 + 300, 40], WindowWidth=[900, 80])
    ds.VOILUTFunction = function
    if rescale:
        ds.RescaleSlope, ds.RescaleIntercept = rescale
    image, words, _ = develop(stored, ds, Photometry(), bits)
    assert image.dtype == np.float32 and "900" in words
    np.testing.assert_allclose(image, by_pydicom(stored, ds), atol=1e-4)


@pytest.mark.parametrize("as_bytes", [True, False])
@pytest.mark.parametrize("modality", [True, False])
def test_tables_agree_with_pydicom(as_bytes, modality):
    stored = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    curve = (1023 * np.linspace(0, 1, 3000) ** 0.7).astype(np.uint16)
    ds = header(WindowCenter=100, WindowWidth=10)
    if modality:
        ds.ModalityLUTSequence = table(200, np.linspace(0, 4000, 3500).astype(np.uint16), 16, as_bytes)
    ds.VOILUTSequence = table(700, curve, 10, as_bytes)
    image, words, _ = develop(stored, ds, Photometry(), 12)
    assert words == "header VOI LUT"  # it wins over the window
    np.testing.assert_allclose(image, by_pydicom(stored, ds), atol=1e-4)


def test_header_choice_without_a_window_is_the_full_stored_range():
    stored = (chest() * 1000).astype(np.int16) - 500
    image, words, _ = develop(stored, header(bits=12, signed=True), Photometry(window="header"), 12)
    np.testing.assert_allclose(image, (stored + 2048.0) / 4095, atol=1e-6)
    assert words == "full range"


def test_auto_takes_percentiles_above_8_bits_and_the_full_range_of_8():
    picture = chest()
    wide, _, _ = develop((picture * 800 + 1000).astype(np.uint16), header(), Photometry(), 12)
    assert wide.min() == 0 and wide.max() == 1
    narrow, _, _ = develop((picture * 100 + 50).astype(np.uint8), header(bits=8), Photometry(), 8)
    assert narrow.min() >= 50 / 255 - 1e-6 and narrow.max() <= 150 / 255 + 1e-6


def test_a_window_that_shows_nothing_gives_way_to_percentiles():
    stored = (chest() * 800 + 1000).astype(np.uint16)
    for elements in ({"WindowCenter": 4000, "WindowWidth": 10}, {"WindowCenter": 1400, "WindowWidth": 0}):
        image, words, _ = develop(stored, header(**elements), Photometry(), 12)
        assert words.startswith("percentile") and image.max() == 1


def test_invalid_windows_are_refused():
    for arguments in ((0.5, "LINEAR"), (0.0, "LINEAR_EXACT"), (-1.0, "SIGMOID"), (10.0, "CUBIC")):
        with pytest.raises(ValueError):
            window(np.zeros((2, 2)), 0.0, *arguments)


SHAPES = {"MONOCHROME2": ("", "IDENTITY", "INVERSE"), "MONOCHROME1": ("", "INVERSE", "IDENTITY")}


@pytest.mark.parametrize("choice", ["auto", "header", "percentile", "full"])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_twins_agree_whatever_the_polarity_is_called(choice, function):
    """One picture as MONOCHROME1 and MONOCHROME2, with every PresentationLUTShape: one gray level apart at most."""
    top = 4095
    stored = (chest() * 3000 + 500).astype(np.uint16)
    pictures = []
    for photometric, stored_as in (("MONOCHROME2", stored), ("MONOCHROME1", (top - stored).astype(np.uint16))):
        # LINEAR is centered half a value low, hence the 1.
        center = 1900 if photometric == "MONOCHROME2" else top - 1900 + (function == "LINEAR")
        for shape in SHAPES[photometric]:
            ds = header(photometric, WindowCenter=center, WindowWidth=2600, VOILUTFunction=function)
            if shape:
                ds.PresentationLUTShape = shape
            image, _, polarity = develop(stored_as, ds, Photometry(window=choice), 12)
            assert polarity == ("contradictory" if shape == SHAPES[photometric][2] else "ok")
            pictures.append(image)
    for one, other in itertools.combinations(pictures, 2):
        assert np.abs(one - other).max() <= GREY


def test_the_shape_decides_where_the_pixels_do_not():
    ramp = np.tile(np.arange(64, dtype=np.uint16) * 60, (64, 1))
    assert abs(polarity_score((ramp / 4095).astype(np.float32))) < 0.1
    plain, _, _ = develop(ramp, header("MONOCHROME2"), Photometry(window="full"), 12)
    turned, _, polarity = develop(ramp, header("MONOCHROME2", PresentationLUTShape="INVERSE"), Photometry("full"), 12)
    assert polarity == "contradictory"
    np.testing.assert_allclose(turned, 1 - plain, atol=1e-6)


def test_wrong_polarity_is_flagged_on_chests_only():
    stored = (chest() * 4000).astype(np.uint16)
    image, _, polarity = develop(stored, header("MONOCHROME1"), Photometry(), 12)
    assert polarity == "suspicious" and polarity_score(image) < -0.1
    assert develop(stored, header("MONOCHROME1", BodyPartExamined="HIP"), Photometry(), 12)[2] == "ok"


@pytest.mark.parametrize("value, limit, signed", [(0, None, False), (4090, 4095, False), (-2000, None, True)])
def test_padding_stays_out_of_percentiles_and_becomes_air(value, limit, signed):
    stored = (chest() * 1000 + 1500).astype(np.int16 if signed else np.uint16) - (1500 if signed else 0)
    expected, _, _ = develop(stored[:, 16:-16], header(signed=signed), Photometry(), 12)
    padded = stored.copy()
    padded[:, :16] = padded[:, -16:] = value
    ds = header(signed=signed)
    ds.add_new("PixelPaddingValue", "SS" if signed else "US", value)
    if limit:
        ds.add_new("PixelPaddingRangeLimit", "US", limit)
    image, _, _ = develop(padded, ds, Photometry(), 12)
    assert (image[:, :16] == 0).all() and (image[:, -16:] == 0).all()
    np.testing.assert_allclose(image[:, 16:-16], expected, atol=GREY)


def test_a_padding_value_inside_the_body_is_tissue():
    stored = (chest() * 1000 + 1000).astype(np.uint16)
    stored[40:50, 46:50] = 4095
    stored[:4] = 4095
    image, _, _ = develop(stored, header(PixelPaddingValue=4095), Photometry(), 12)
    assert (image[:4] == 0).all() and (image[40:50, 46:50] == 1).all()


def test_flat_margins_do_not_widen_the_robust_range():
    inner = (chest() * 1000 + 1000).astype(np.uint16)
    framed = np.full((140, 150), 4095, dtype=np.uint16)
    framed[20:116, 30:126] = inner
    assert collimated(framed) == (slice(20, 116), slice(30, 126))
    image, _, _ = develop(framed, header(), Photometry(), 12)
    np.testing.assert_allclose(image[20:116, 30:126], develop(inner, header(), Photometry(), 12)[0], atol=GREY)


def test_raw_data_is_refused_or_its_logarithm_is_taken():
    thickness = chest()
    counts = (60000 * np.exp(-4 * thickness)).astype(np.uint16)
    raw = {"PresentationIntentType": "FOR PROCESSING", "PixelIntensityRelationship": "LIN"}
    for elements in (raw, {"PixelIntensityRelationship": "LIN"}, {"PresentationIntentType": "FOR PROCESSING"}):
        with pytest.raises(Unreadable, match="for_processing=log"):
            develop(counts, header(bits=16, **elements), Photometry(), 16)
    ds = header(bits=16, PixelIntensityRelationshipSign=1, **raw)
    image, words, polarity = develop(counts, ds, Photometry(for_processing="log"), 16)
    assert polarity == "ok" and "logarithm" in words
    # Beer-Lambert: the logarithm is linear in thickness again.
    inside = (image > 0.02) & (image < 0.98)
    assert np.corrcoef(image[inside], thickness[inside])[0, 1] > 0.9999


def test_settings_round_trip_and_name_the_nearest_choice():
    photometry = Photometry(window="full", frames="first")
    assert Photometry.from_dict(photometry.to_dict()) == photometry
    assert Geometry.from_dict(Geometry("crop").to_dict()) == Geometry("crop")
    with pytest.raises(CarinaError, match="percentile"):
        Photometry(window="percentiles")
    with pytest.raises(CarinaError, match="did you mean 'fit'"):
        Geometry.from_dict({"fits": "pad"})


# --- geometry -----------------------------------------------------------------------------------------------------

SIDES = st.integers(32, 150)
FITS = st.sampled_from(["pad", "stretch", "crop"])
SPACINGS = st.one_of(st.none(), st.tuples(st.floats(0.1, 0.4), st.floats(0.1, 0.4)))


@dataclass
class Case:
    height: int
    width: int
    size: int
    geometry: Geometry
    spacing: tuple[float, float] | None


CASES = st.builds(Case, SIDES, SIDES, st.integers(16, 160), st.builds(Geometry, FITS), SPACINGS)


@settings(max_examples=80, deadline=None)
@given(CASES, st.floats(0.3, 0.7), st.floats(0.3, 0.7))
def test_a_point_lands_where_the_affine_says(case, u, v):
    """A blob's center of mass, drawn in the original, is found at the affine's place to half an original pixel."""
    y, x = np.mgrid[: case.height, : case.width] + 0.5
    px, py = u * case.width, v * case.height
    blob = np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 2.5**2)).astype(np.float32)
    image, (ax, bx, ay, by) = resize(blob, case.size, case.geometry, case.spacing)
    fx, fy = ax * px + bx, ay * py + by
    if not (0.2 < fx < 0.8 and 0.2 < fy < 0.8):
        return  # cropped away, wholly or in part
    rows, columns = np.mgrid[: case.size, : case.size] + 0.5
    found = np.array([(columns * image).sum(), (rows * image).sum()]) / image.sum() / case.size
    assert abs(found[0] - fx) <= max(0.5 * ax, 0.25 / case.size) and abs(found[1] - fy) <= max(
        0.5 * ay, 0.25 / case.size
    )


@settings(max_examples=80, deadline=None)
@given(CASES)
def test_corners_size_and_range(case):
    height, width, geometry = case.height, case.width, case.geometry
    image, (ax, bx, ay, by) = resize(np.ones((height, width), np.float32), case.size, geometry, case.spacing)
    assert image.shape == (case.size, case.size) and image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 1
    assert resize(np.ones((height, width), np.float32), 33, geometry, case.spacing)[1] == (ax, bx, ay, by)
    left, right, top, bottom = bx, ax * width + bx, by, ay * height + by
    if geometry.fit == "stretch":
        np.testing.assert_allclose([left, right, top, bottom], [0, 1, 0, 1], atol=1e-12)
    elif geometry.fit == "pad":
        assert -1e-9 <= left <= right <= 1 + 1e-9 and -1e-9 <= top <= bottom <= 1 + 1e-9
        # The picture's share of the frame is its area in the square, to the last bit of the filter.
        assert image.mean() == pytest.approx((right - left) * (bottom - top), abs=0.02)
        assert abs(left - (1 - right)) <= ax + 1e-9 and abs(top - (1 - bottom)) <= ay + 1e-9
    else:
        assert left <= 1e-9 and top <= 1e-9 and right >= 1 - 1e-9 and bottom >= 1 - 1e-9 and image.min() > 1 - 1e-5
    if geometry.fit != "stretch":
        row, column = case.spacing or (1.0, 1.0)
        assert (ax / column) / (ay / row) == pytest.approx(1, abs=1 / (2 * min(height, width) * 0.2))


def test_shrinking_is_the_mean_of_areas():
    image = np.random.default_rng(0).random((64, 96), dtype=np.float32)
    small, _ = resize(image, 32, Geometry("crop"))
    np.testing.assert_allclose(small, image[:, 16:80].reshape(32, 2, 32, 2).mean(axis=(1, 3)), atol=1e-6)
    padded, (ax, bx, ay, by) = resize(image, 24, Geometry())
    assert (ax, bx, ay, by) == (1 / 96, 0, 1 / 96, 16 / 96)
    np.testing.assert_allclose(padded[4:20], image.reshape(16, 4, 24, 4).mean(axis=(1, 3)), atol=1e-6)
    assert (padded[:4] == 0).all() and (padded[20:] == 0).all()


def test_masks_follow_the_picture():
    mask = np.zeros((90, 60), dtype=bool)
    mask[30:60, 11:41] = True
    small = resize_mask(mask, 45, Geometry())
    assert small.dtype == bool and small.sum() == 15 * 15
    rows, columns = np.nonzero(small)
    assert (rows.min(), rows.max()) == (15, 29) and columns.max() - columns.min() == 14
