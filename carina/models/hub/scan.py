"""What must not leave: identifiers, images, memories of patients. A folder is read byte by byte before it is published."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from carina.models.scorers import SCORERS

_MODEL = r"(README\.md|config\.json|carina\.json|model\.safetensors|scales\.safetensors)"
KNOWN = re.compile(
    rf"({_MODEL}|SHA256SUMS|recipe\.yaml|predictor\.json|model\.onnx|member-\d+\.safetensors|member-\d+/{_MODEL})"
)
TEXTS = (".json", ".md", ".yaml", "SHA256SUMS")

# What a file begins with, and for pictures what may hide anywhere in it (signatures too long to meet by chance).
BEGINNINGS = {
    "a picture": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"BM", b"\0\0\0\x0cjP  ", b"RIFF", b"%PDF"),
    "an archive": (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf"),
    "a pickle": (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    "a table": (b"PAR1", b"ARROW1", b"SQLite format 3", b"\x89HDF", b"\x93NUMPY"),
}
HIDDEN = {
    "a picture": (
        b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\0\x10JFIF\0", b"\0\0\0\x0cjP  \r\n\x87\n",
        b"data:image/", b"iVBORw0KGgo", b"/9j/4AAQSkZJRg",
    ),
    "a DICOM file": (b"DICM\x02\0\0\0UL", b"DICM\x02\0\x02\0UI", b"RElDTQIAAABVT"),
}  # fmt: skip
TRACES = {
    "an e-mail address": re.compile(r"[\w.+-]+@[\w-]+\.[A-Za-z]{2,}"),
    "a DICOM UID": re.compile(r"(?<![\d.])[0-2](?:\.(?:0|[1-9]\d*)){5,}(?![\d.])"),
    "a path of a machine": re.compile(
        r"(?<![\w/:.<>~])(?:/(?:[\w.@+-]+/)+[\w.@+-]*|~/[\w.@+-]+|[A-Za-z]:\\\\?\w)|file://"
    ),
    "the name of a picture": re.compile(r"[\w-]+\.(?:png|jpe?g|dcm|dicom|tiff?|bmp|jp2|nii|gif)\b", re.IGNORECASE),
    "a person's name as DICOM writes it": re.compile(r"\b[^\W\d_]{2,}\^[^\W\d_]{2,}"),
    "a record number": re.compile(r"\b(?:MRN|PatientID|patient[ _]?id|PAT|ACC)[\s:=#-]{0,3}\d{4,}", re.IGNORECASE),
}
HEX, PRINTABLE = b"0123456789abcdefABCDEF", bytes(range(32, 127))
WORDS = re.compile(rb"[\w.^-]{6,}")
PIECE = 1 << 22  # bytes that are looked at together, so that they stay in a CPU's cache


def findings(
    folder: Path, hashes: Iterable[str] = (), names: Iterable[str] = (), *, allow_memory: bool = False
) -> list[str]:
    """What must not be published, a sentence each without repeating it; empty where there is nothing.

    hashes: keyed hashes of patients and images that the run's manifest holds. names: identifiers in clear, such as the
    names of the owner's files, that no word of the folder may be.
    """
    wanted = {one.removeprefix("file-").lower().encode() for one in hashes if one}
    words = {one.encode() for one in names if len(one) >= 6 and any(c.isdigit() for c in one)}
    found: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found.append(f"{name} is a link, which may lead anywhere")
        elif path.is_file():
            found += [f"{name} {what}" for what in _file(path, name, wanted, words)]
        elif not re.fullmatch(r"member-\d+", name):
            found.append(f"{name} is no part of what is published")
    if not allow_memory:
        found += list(_memories(folder))
    return found


def _file(path: Path, name: str, hashes: set[bytes], words: set[bytes]) -> Iterator[str]:
    if not KNOWN.fullmatch(name):
        yield "is no part of what is published"
    if not path.stat().st_size:
        return
    with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for kind, beginnings in BEGINNINGS.items():
            if data[:16].startswith(beginnings) and not name.endswith(".safetensors"):
                yield f"is {kind}"
        if data[128:132] == b"DICM":
            yield "is a DICOM file"
        for kind, signatures in HIDDEN.items():
            if any(data.find(one) >= 0 for one in signatures):
                yield f"holds {kind}"
        if _holds_hash(data, hashes):
            yield "holds the hash of a patient or image of the training data"
        if name.endswith(TEXTS):
            yield from _text(data[:], words)
        elif name.endswith(".safetensors"):
            size = int.from_bytes(data[:8], "little")
            yield from _text(data[8 : 8 + size], words)
            yield from _beside(data, size)
        else:
            yield from _text(b"\n".join(_runs(data, PRINTABLE, 16)), words, names=False)


def _holds_hash(data: mmap.mmap, hashes: set[bytes]) -> bool:
    """Whether any of `hashes` stands in the data, also within a longer run of hexadecimal digits."""
    lengths = sorted({len(one) for one in hashes})
    return bool(lengths) and any(
        run[start : start + length].lower() in hashes
        for run in _runs(data, HEX, lengths[0])
        for length in lengths
        for start in range(len(run) - length + 1)
    )


def _runs(data: mmap.mmap, allowed: bytes, least: int) -> Iterator[bytes]:
    """Every run of at least `least` of the `allowed` bytes (of less than 1 KiB at the border of two pieces).

    A search for a long row of equal bytes skips most of what it searches: a pattern takes thirty times as long.
    """
    table = bytes(byte in allowed for byte in range(256))
    row = b"\1" * least
    for start in range(0, len(data), PIECE):
        piece = data[start : start + PIECE + 1024]
        kinds = piece.translate(table)
        place = kinds.find(row)
        while place >= 0:
            end = kinds.find(b"\0", place) % (len(kinds) + 1)  # where none follows, the end of the piece
            yield piece[place:end]
            place = kinds.find(row, end)


def _text(data: bytes, words: set[bytes], names: bool = True) -> Iterator[str]:
    if words and any(match[0] in words for match in WORDS.finditer(data)):
        yield "holds the name of one of the training files"
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        yield "is not the text that its name promises"
        return
    for kind, pattern in TRACES.items():
        if not names and kind != "a path of a machine" and kind != "an e-mail address":
            continue  # runs of letters in a graph's numbers look like much
        number = next((n for n, line in enumerate(lines, 1) if pattern.search(line)), None)
        if number is not None:
            yield f"holds {kind} (line {number})"


def _beside(data: mmap.mmap, size: int) -> Iterator[str]:
    """Bytes of a safetensors file that belong to no tensor."""
    try:
        header = json.loads(data[8 : 8 + size])
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError):
        yield "is not a whole safetensors file"
        return
    if len(data) != 8 + size + end:
        yield "holds bytes beside its tensors"


def _memories(folder: Path) -> Iterator[str]:
    try:
        info = json.loads((folder / "predictor.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    for number, member in enumerate(info["members"]):
        facts = member.get("scorer") or {}
        kind = SCORERS.get(facts.get("name"))
        if facts.get("memory") or (kind is not None and kind.memory):
            yield f"member-{number}.safetensors holds features of patients (the scorer {facts['name']} remembers them)"
