"""Elements of a DICOM header, read without trust: whatever stands there, a plain value comes out, or none."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from pydicom.datadict import tag_for_keyword

from carina.errors import CarinaError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MIN_SIDE = 32
MAX_PIXELS = 2**26  # a film of 35 x 43 cm scanned at 50 micrometers has 60 million pixels
MAX_ASPECT = 16


class Unreadable(Exception):
    """Why ONE file cannot become a picture. The message holds neither the path nor any text of the header."""


@contextlib.contextmanager
def reason(sentence: str) -> Iterator[None]:
    """Turn whatever a reader raises into Unreadable; the error's own text may quote the header, so its class must do.

    Decoders written in Rust end in a PanicException, which is no Exception.
    """
    try:
        yield
    except (Unreadable, CarinaError):
        raise
    except MemoryError:
        raise Unreadable(f"{sentence} (it would need more memory than there is)") from None
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise Unreadable(f"{sentence} ({type(error).__name__})") from None


def check_size(rows: int, columns: int) -> None:
    """Raise Unreadable for sizes that no radiograph has, before anything of that size is made."""
    if rows * columns > MAX_PIXELS:
        raise Unreadable(f"the picture would have more than {MAX_PIXELS} pixels")
    if min(rows, columns) < MIN_SIDE:
        raise Unreadable(f"the picture has a side of fewer than {MIN_SIDE} pixels")
    if max(rows, columns) > MAX_ASPECT * min(rows, columns):
        raise Unreadable(f"one side of the picture is more than {MAX_ASPECT} times the other")


def value(header: Dataset, keyword: str) -> Any:
    """The value of an element, None when it is absent: Dataset.get, of which absent elements take most of the time."""
    tag = tag_for_keyword(keyword)
    return header[tag].value if tag in header else None


def numbers(header: Dataset, keyword: str) -> list[float]:
    """The finite numbers of a numeric element, in order; what is no number is left out."""
    found = value(header, keyword)
    if found is None or isinstance(found, (str, bytes)):
        return []
    result = []
    for part in found if hasattr(found, "__iter__") else [found]:
        try:
            number = float(part)
        except (TypeError, ValueError):
            continue
        if np.isfinite(number):
            result.append(number)
    return result


def number(header: Dataset, keyword: str, default: float | None = None) -> float | None:
    """The first finite number of an element, or `default`."""
    return next(iter(numbers(header, keyword)), default)


def text(header: Dataset, keyword: str) -> str:
    """An element as stripped text, its first value when it has several, empty when absent."""
    found = value(header, keyword)
    if found is not None and not isinstance(found, str) and hasattr(found, "__iter__"):
        found = next(iter(found), "")
    return " ".join(str(found).split()) if found is not None else ""


def code(header: Dataset, keyword: str) -> str:
    """A code string: upper case without accents, letters, digits, space and underscore, 32 at most."""
    plain = unicodedata.normalize("NFKD", text(header, keyword)).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Z0-9_]+", " ", plain.upper()).strip()[:32]


def stored_range(bits: int, signed: bool) -> tuple[int, int]:
    """Least and greatest value that `bits` stored bits can hold."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
