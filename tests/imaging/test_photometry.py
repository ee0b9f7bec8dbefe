"""Gray values against pydicom, polarity against written twins."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRLittleEndian

from carina.errors import CarinaError
from carina.imaging import photometry
from carina.imaging.photometry import (
    Photometry,
    Unreadable,
    collimated,
    develop,
    is_raw,
    polarity_score,
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
    ds.VOILUTSequence = [*ds.VOILUTSequence, *table(0, curve[::-1], 10, as_bytes)]
    again, words, _ = develop(stored, ds, Photometry(), 12)
    assert words == "header VOI LUT (of 2)"
    np.testing.assert_array_equal(again, image)
    np.testing.assert_allclose(image, by_pydicom(stored, ds), atol=1e-4)


@pytest.mark.filterwarnings("ignore:Invalid value")
@pytest.mark.parametrize("first", [-1000, 65536 - 1000])
def test_tables_of_signed_values_begin_below_zero(first):
    """The descriptor is US or SS by the sign of the pixels, and writers take either; a length may then be negative."""
    stored = np.linspace(-2048, 2047, 4096).round().astype(np.int16).reshape(64, 64)
    curve = (1023 * np.linspace(0, 1, 40000) ** 0.5).astype(np.uint16)
    item = table(0, curve, 10, True)[0]
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [40000 - 65536 if first < 0 else 40000, first, 10])
    image, _, _ = develop(stored, header(signed=True, VOILUTSequence=[item]), Photometry(), 12)
    expected = curve[np.clip(stored.astype(int) + 1000, 0, 39999)] / 1023
    np.testing.assert_allclose(image, expected, atol=1e-6)


def test_the_first_valid_window_is_taken_and_counted():
    stored = (chest() * 3000 + 500).astype(np.uint16)
    ds = header(WindowCenter=[100, 2000, 1500], WindowWidth=[0, 3000, 10])
    image, words, _ = develop(stored, ds, Photometry(), 12)
    assert words == "header window 2000/3000 LINEAR (of 3)"
    np.testing.assert_allclose(image, window(stored, 2000, 3000), atol=1e-6)


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
        assert is_raw(header(**elements))
        with pytest.raises(Unreadable, match="for_processing=log"):
            develop(counts, header(bits=16, **elements), Photometry(), 16)
    ds = header(bits=16, PixelIntensityRelationshipSign=1, **raw)
    image, words, polarity = develop(counts, ds, Photometry(for_processing="log"), 16)
    assert polarity == "ok" and "logarithm" in words
    # Beer-Lambert: the logarithm is linear in thickness again.
    inside = (image > 0.02) & (image < 0.98)
    assert np.corrcoef(image[inside], thickness[inside])[0, 1] > 0.9999


def test_linear_in_intensity_but_for_presentation_is_shown_as_the_window_says():
    """PS3.3 C.8.11.3.1.2: the relationship describes the detector and prescribes nothing for the display."""
    stored = (chest() * 3000 + 500).astype(np.uint16)
    window = {"WindowCenter": 2000, "WindowWidth": 3000}
    linear = {"PixelIntensityRelationship": "LIN", "PresentationIntentType": "FOR PRESENTATION"}
    shown, _, _ = develop(stored, header(**window, **linear), Photometry(), 12)
    np.testing.assert_array_equal(shown, develop(stored, header(**window), Photometry(), 12)[0])


@pytest.mark.parametrize("bits, signed", [(8, False), (12, True), (16, False)])
def test_narrow_tables_and_wide_ones_give_one_picture(monkeypatch, bits, signed):
    """With and without a library that looks up 16-bit words."""
    low = -(2 ** (bits - 1)) if signed else 0
    kind = "uint8" if bits == 8 else "int16" if signed else "uint16"
    stored = (low + np.random.default_rng(0).integers(0, 2**bits, (150, 130))).astype(kind)
    ds = header(bits=bits, signed=signed, RescaleSlope=1.5, RescaleIntercept=-3)
    images = []
    for wide in (True, False):
        monkeypatch.setattr(photometry, "_WIDE_TABLES", wide and photometry._WIDE_TABLES)
        images.append(develop(stored, ds, Photometry("full"), bits)[0])
    np.testing.assert_array_equal(*images)
    np.testing.assert_allclose(images[0], by_pydicom(stored, ds), atol=1e-6)


def test_words_of_32_bits_are_developed_too():
    stored = (chest() * 2**31).astype(np.uint32)
    image, _, _ = develop(stored, header(bits=32), Photometry("full"), 32)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, stored / (2.0**32 - 1), atol=1e-6)


def test_equalization_flattens_the_histogram_and_keeps_padding_black():
    stored = (chest() ** 3 * 3000 + 500).astype(np.uint16)
    stored[:, :10] = 0
    ds = header(PixelPaddingValue=0)
    plain, _, _ = develop(stored, ds, Photometry(), 12)
    even, _, _ = develop(stored, ds, Photometry(equalize="clahe"), 12)
    assert even.dtype == np.float32 and even.min() >= 0 and even.max() <= 1 and (even[:, :10] == 0).all()

    def entropy(image: np.ndarray) -> float:
        share = np.histogram(image[:, 10:], 64, (0, 1))[0] / image[:, 10:].size
        return float(-(share[share > 0] * np.log2(share[share > 0])).sum())

    assert entropy(even) > entropy(plain) + 0.2
    # Locally the order of gray values is kept: it is a picture of the same chest.
    assert np.corrcoef(even.ravel(), plain.ravel())[0, 1] > 0.8


def test_settings_round_trip_and_name_the_nearest_choice():
    chosen = Photometry(window="full", frames="first", equalize="clahe")
    assert Photometry.from_dict(chosen.to_dict()) == chosen
    with pytest.raises(CarinaError, match="percentile"):
        Photometry(window="percentiles")
    with pytest.raises(CarinaError, match="did you mean 'window'"):
        Photometry.from_dict({"windows": "auto"})
