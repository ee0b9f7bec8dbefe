"""Everyday picture formats: every mode and depth, and reasons instead of errors."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from carina.imaging import header
from carina.imaging.dicom import Photometry, Unreadable, read_radiograph

FULL = Photometry(window="full")


def picture(rows: int = 40, columns: int = 50, top: int = 4095) -> np.ndarray:
    """A ramp down with a step to the right: no symmetry that a turn or a flip could hide."""
    ramp = np.linspace(0.1, 0.8, rows)[:, None] + 0.2 * (np.arange(columns) > columns // 3)[None, :]
    return (ramp * top).astype(np.uint8 if top < 256 else np.uint16)


def refused(path: Path) -> str:
    with pytest.raises(Unreadable) as caught:
        read_radiograph(path)
    message = str(caught.value)
    assert "DOE" not in message and str(path) not in message
    return message


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
    np.save(tmp_path / "object.npy", np.full((40, 40), {"DOE": 1}, dtype=object), allow_pickle=True)
    assert "array of numbers" in refused(tmp_path / "object.npy")
    np.save(tmp_path / "three.npy", np.zeros((3, 40, 40)))
    assert "one (H, W) array" in refused(tmp_path / "three.npy")
    np.save(tmp_path / "cut.npy", picture())
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-1])
    assert "truncated" in refused(tmp_path / "cut.npy")
    np.save(tmp_path / "nan.npy", np.full((40, 40), np.nan))
    assert "finite" in refused(tmp_path / "nan.npy")
    source.save(tmp_path / "two.tif", save_all=True, append_images=[source])
    assert "frames=first" in refused(tmp_path / "two.tif")
    monkeypatch.setattr(header, "MAX_PIXELS", 10_000)
    assert "more than 10000" in refused(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert "Pillow" in refused(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["<f8", ">f8", "<f4", "F"])
def test_float_arrays_keep_a_unit_range(tmp_path, kind):
    unit = picture() / 8190
    np.save(tmp_path / "a.npy", np.asfortranarray(unit) if kind == "F" else unit.astype(kind))
    np.testing.assert_allclose(read_radiograph(tmp_path / "a.npy").image, unit, atol=1e-6)


def test_bytes_are_read_like_files(tmp_path):
    """A picture inside a data set has no file of its own."""
    Image.fromarray(picture(top=255)).save(tmp_path / "a.png")
    from_file, from_bytes = read_radiograph(tmp_path / "a.png"), read_radiograph((tmp_path / "a.png").read_bytes())
    np.testing.assert_array_equal(from_file.image, from_bytes.image)
    assert from_file.facts == from_bytes.facts


def test_raw_files_of_jsrt(tmp_path):
    film = np.tile(np.linspace(300, 3900, 2048).astype(np.uint16), (2048, 1))
    film.astype(">u2").tofile(tmp_path / "JPCLN001.IMG")
    radiograph = read_radiograph(tmp_path / "JPCLN001.IMG", FULL)
    # A high value is dark film, so it is turned once, and the left is the bright side.
    np.testing.assert_allclose(radiograph.image, 1 - film / 4095, atol=1e-6)
    facts = radiograph.facts
    assert (facts["bits"], facts["spacing"], facts["transfer_syntax"]) == (12, (0.175, 0.175), "JSRT")
    (tmp_path / "a.raw").write_bytes((tmp_path / "JPCLN001.IMG").read_bytes())
    assert "not an image" in refused(tmp_path / "a.raw")
    (film + 1000).astype(">u2").tofile(tmp_path / "b.img")
    assert "more than 12 bits" in refused(tmp_path / "b.img")


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(tmp_path / "pipe")
    assert "not a regular file" in refused(tmp_path)
    assert "cannot be opened" in refused(tmp_path / "a\0b")
