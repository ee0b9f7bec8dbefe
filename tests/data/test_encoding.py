"""How pixels lie in a store: what is written comes back."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from carina.data.encoding import Encoding, encodings_for
from carina.errors import CarinaError

unit_images = arrays(np.float32, (24, 24), elements=st.floats(0, 1, width=32))


@given(unit_images, st.sampled_from(["raw", "png"]), st.sampled_from([8, 16]))
def test_lossless_forms_come_back_within_half_a_gray_level(image, form, bits):
    encoding = Encoding(form, bits)
    back = encoding.decode(encoding.encode(encoding.quantize(image)), 24)
    assert back.dtype == encoding.dtype
    np.testing.assert_allclose(back / (2.0**bits - 1), image, atol=0.5 / (2**bits - 1) + 1e-7)
    assert Encoding.from_metadata({k.encode(): v.encode() for k, v in encoding.to_metadata().items()}) == encoding


def test_jpeg_comes_back_nearly_and_smaller_with_less_quality():
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.random((64, 64), dtype=np.float32), (0, 0), 3)
    image = (image - image.min()) / np.ptp(image)
    sizes = []
    for quality in (60, 95):
        encoding = Encoding("jpeg", 8, quality)
        data = encoding.encode(encoding.quantize(image))
        sizes.append(len(data))
        assert np.abs(encoding.decode(data, 64) / 255 - image).mean() < 0.02
    assert sizes[0] < sizes[1] < 64 * 64


def test_a_mapping_names_scales_and_mistakes_are_sentences():
    found = encodings_for([64, 32], {64: "jpeg"}, {32: 16}, 90)
    assert found == {64: Encoding("jpeg", 8, 90), 32: Encoding("raw", 16, 90)}
    with pytest.raises(CarinaError, match="names scale 128"):
        encodings_for([64, 32], {128: "png"}, 8, 95)
    with pytest.raises(CarinaError, match="keeps 8 bits"):
        encodings_for([64], "jpeg", 16, 95)


def test_a_damaged_image_is_a_sentence():
    encoding = Encoding("png", 8)
    data = encoding.encode(np.zeros((32, 32), np.uint8))
    with pytest.raises(CarinaError, match="cannot be decoded"):
        encoding.decode(data[: len(data) // 2], 32)
    with pytest.raises(CarinaError, match="cannot be decoded"):
        encoding.decode(data, 64)
