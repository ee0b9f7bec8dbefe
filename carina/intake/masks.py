"""Masks as archives publish them: a picture, several pictures that belong together, or run lengths."""

from __future__ import annotations

import re

import cv2
import numpy as np
from PIL import Image

from carina.imaging.header import MAX_PIXELS
from carina.imaging.photometry import Unreadable

_RUNS = re.compile(r"rle:([1-9]\d{0,4})x([1-9]\d{0,4}):([\d ;]*)")
_NUMBERS = 16  # the brightest value of a file of label numbers; black and white ones lie far above
_ASPECT = 0.01  # two sizes of one picture differ by a rounding of a pixel a side


def run_lengths(height: int, width: int, runs: list[str]) -> str:
    """The reference of a mask given as relative run lengths (SIIM-ACR): ``rle:HEIGHTxWIDTH:gap run gap run ...``.

    Pixels count down the columns; each gap is the distance from the end of the run before it. Several masks of one
    picture are separated by semicolons and mean their union.
    """
    return f"rle:{height}x{width}:{';'.join(' '.join(text.split()) for text in runs)}"


def read_mask(reference: str | list[str], shape: tuple[int, int]) -> np.ndarray:
    """(H, W) bool from a file, several files (their union) or run lengths.

    Of a file whose values are small numbers (0, 1, 2 ... 16, as label maps have) every number but 0 is set, else what is
    brighter than half; a file without any is an empty mask.
    A mask of another size but the aspect of the picture is resized: a pixel is set when at least half of its area
    is. Raises Unreadable, which names no path, for one of another aspect and for one that cannot be read.
    """
    if not isinstance(reference, str):
        if not reference:
            raise Unreadable("its list of masks is empty")
        return np.logical_or.reduce([read_mask(part, shape) for part in reference])
    mask = _from_runs(reference) if reference.startswith("rle:") else _from_file(reference)
    if mask.shape == shape:
        return mask
    (height, width), (rows, columns) = shape, mask.shape
    if abs(columns * height - width * rows) > _ASPECT * width * rows + max(width, height, rows, columns):
        raise Unreadable(f"its mask has {columns} x {rows} pixels, another aspect than the image's {width} x {height}")
    return cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) >= 0.5


def _from_file(path: str) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Unreadable(f"its mask has {picture.width} x {picture.height} pixels, too many")
            data = cv2.imread(path, cv2.IMREAD_UNCHANGED)
            lossy = picture.format == "JPEG"
            if data is None:  # GIF in older builds, as in the SCR masks of JSRT
                data = np.asarray(picture.convert("L"))
    except FileNotFoundError:
        raise Unreadable("the file of its mask is not there") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise Unreadable("its mask cannot be read") from None
    if data.ndim == 3:
        data = data[..., :3].max(axis=2)
    brightest = data.max(initial=0)
    if brightest <= _NUMBERS and not lossy:  # no numbers survive JPEG, only its noise around black
        return data > 0
    # 16 bits may hold 0 and 255 too.
    deep = np.iinfo(data.dtype).max if np.issubdtype(data.dtype, np.integer) else brightest
    return data > (127 if brightest <= 255 else deep // 2)


def _from_runs(reference: str) -> np.ndarray:
    match = _RUNS.fullmatch(reference)
    if not match:
        raise Unreadable("the run lengths of its mask cannot be read")
    height, width = int(match[1]), int(match[2])
    if height * width > MAX_PIXELS:
        raise Unreadable(f"its mask has {width} x {height} pixels, too many")
    flat = np.zeros(height * width, dtype=bool)
    for text in match[3].split(";"):
        numbers = np.array(text.split(), dtype=np.int64)
        ends = np.cumsum(numbers)
        if len(numbers) % 2 or (len(ends) and ends[-1] > flat.size):
            raise Unreadable("the run lengths of its mask do not fit its size")
        for start, end in zip(ends[::2], ends[1::2]):
            flat[start:end] = True
    return flat.reshape(width, height).T
