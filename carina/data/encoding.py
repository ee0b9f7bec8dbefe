"""How the pixels of one scale lie in a store: raw bytes, PNG or JPEG, 8 or 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from carina.errors import CarinaError

FORMATS = ("raw", "png", "jpeg")
_PNG_LEVEL = 4  # on radiographs higher levels cost several times the time for a few percent


@dataclass(frozen=True)
class Encoding:
    """format: raw (little-endian), png or jpeg (8 bits; `quality` 1 to 100). bits: 8 or 16."""

    format: str = "raw"
    bits: int = 8
    quality: int = 95

    def __post_init__(self) -> None:
        if self.format not in FORMATS or self.bits not in (8, 16):
            raise CarinaError(f"pixels can be kept as {', '.join(FORMATS)} of 8 or 16 bits, not as {self}")
        if self.format == "jpeg" and self.bits != 8:
            raise CarinaError("encoding=jpeg keeps 8 bits; give bits=8, or encoding=png for 16")

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.bits == 16 else "u1")

    def quantize(self, image: np.ndarray) -> np.ndarray:
        """(S, S) float32 in [0, 1] -> (S, S) unsigned integers over the whole range of the bits."""
        return np.rint(image * np.float32(2**self.bits - 1)).astype(self.dtype)

    def encode(self, pixels: np.ndarray) -> bytes:
        """Unsigned integers (S, S) -> bytes."""
        if self.format == "raw":
            return pixels.tobytes()
        if self.format == "png":
            done, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL])
        else:
            done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, self.quality])
        if not done:
            raise RuntimeError(f"an image could not be encoded as {self.format}")
        return data.tobytes()

    def decode(self, data: Any, scale: int) -> np.ndarray:
        """Bytes (or a buffer) -> (S, S) unsigned integers."""
        flat = np.frombuffer(data, dtype=self.dtype if self.format == "raw" else np.uint8)
        if self.format == "raw":
            return flat.reshape(scale, scale)
        pixels = cv2.imdecode(flat, cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.shape != (scale, scale) or pixels.dtype != self.dtype:
            raise CarinaError(f"an image of scale {scale} in the store cannot be decoded; prepare the store again")
        return pixels

    def to_metadata(self) -> dict[str, str]:
        return {"format": self.format, "bits": str(self.bits), "quality": str(self.quality)}

    @classmethod
    def from_metadata(cls, values: Mapping[bytes, bytes] | None) -> Encoding:
        """From the metadata of an Arrow schema; raw 8-bit pixels where it says nothing."""
        found = {key.decode(): value.decode() for key, value in (values or {}).items()}
        if "format" not in found:
            return cls()
        return cls(found["format"], int(found["bits"]), int(found["quality"]))


def encodings_for(
    scales: list[int], format: str | Mapping[int, str], bits: int | Mapping[int, int], quality: int
) -> dict[int, Encoding]:
    """One encoding a scale. A mapping names scales; those it leaves out are raw, of 8 bits."""
    for name, value in (("encoding", format), ("bits", bits)):
        unknown = sorted(set(value) - set(scales)) if isinstance(value, Mapping) else []
        if unknown:
            raise CarinaError(f"{name} names scale {unknown[0]}, which is not one of scales={list(scales)}")
    return {
        scale: Encoding(
            format.get(scale, "raw") if isinstance(format, Mapping) else format,
            bits.get(scale, 8) if isinstance(bits, Mapping) else bits,
            quality,
        )
        for scale in scales
    }
