"""How fast radiographs are read, beside pydicom with Pillow; two workers beside one; memory of 2,000 files beside 200.

    python benchmarks/intake.py [parts=[reading,workers,memory]] [out=FILE.json] [files=4] [repeats=15]
                                [dicom=FOLDER] [work=FOLDER] [workers_files=1500] [memory_files=[200,2000]]

reading: 12-bit files of 2500 x 2048 pixels (synthetic radiographs with noise) to scales 512 and 256 in raw 8 bits, on
one core and one thread, both sides in turn in this process. The peer reads with pydicom, applies apply_modality_lut and
apply_voi_lut, scales to [0, 1] (inverted where due), makes 8 bits, shrinks twice with Pillow's box filter, which is
its fastest area filter, onto a black square, and writes the same bytes. JPEG lossless and JPEG-LS, for which no
encoder is installed, are files named RG2_JPLL.dcm and RG2_JLSL.dcm (10 bits, 2140 x 1760) in the folder `dicom`, where
it is given. workers: `carina prepare` on 12-bit files of 1250 x 1024 pixels with one and with two processes, start
included. memory: the largest resident set of all processes of `carina prepare` on small files. Parts that FILE.json
holds already are kept where they are not measured again.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import psutil
import pydicom
from common import console, script
from PIL import Image
from pydantic import Field
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from rich.console import Console
from rich.table import Table

from carina.data.encoding import Encoding
from carina.errors import CarinaError
from carina.files import read_json, write_json
from carina.imaging.dicom import read_radiograph
from carina.imaging.geometry import Geometry, resize_scales
from carina.imaging.phantom import phantom
from carina.recipes import Section

SCALES = (512, 256)
ROWS, COLUMNS = 2500, 2048
RAW = Encoding("raw", 8)
BAR_SPEED, BAR_WORKERS, BAR_MEMORY = 5.0, 1.6, 1.2


class Arguments(Section):
    parts: list[Literal["reading", "workers", "memory"]]
    out: str | None
    files: Annotated[int, Field(ge=1)]
    repeats: Annotated[int, Field(ge=3)]
    dicom: str | None
    work: str | None
    workers_files: Annotated[int, Field(ge=32)]
    memory_files: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]


DEFAULTS = {
    "parts": ["reading", "workers", "memory"],
    "out": None,
    "files": 4,
    "repeats": 15,
    "dicom": None,
    "work": None,
    "workers_files": 1500,
    "memory_files": [200, 2000],
}


def write_file(path: Path, number: int, rows: int, columns: int, syntax: str = ExplicitVRLittleEndian) -> Path:
    """A synthetic chest as DX, 12 bits with quantum noise, with a rescale and a window; every other one MONOCHROME1."""
    inverted = number % 2 == 1
    rng = np.random.default_rng(number)
    drawn = cv2.resize(phantom(7, number, size=256).image, (columns, rows), interpolation=cv2.INTER_LINEAR)
    stored = np.clip(200 + 3600 * drawn + rng.normal(0, 8, drawn.shape), 0, 4095).astype(np.uint16)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", f"1.2.826.0.1.3680043.8.498.{number + 1}"
    ds.PatientID, ds.Modality, ds.BodyPartExamined, ds.ViewPosition = f"P{number}", "DX", "CHEST", "PA"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PixelRepresentation = rows, columns, 1, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    ds.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, 0, "US"
    ds.WindowCenter, ds.WindowWidth = 2047.5 + 0.5, 3601
    ds.PixelData = (4095 - stored if inverted else stored).tobytes()
    if syntax != ExplicitVRLittleEndian:
        ds.compress(syntax)
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
    return path


# --- reading ------------------------------------------------------------------------------------------------------


def by_carina(path: Path, sinks: Sequence[Any]) -> None:
    radiograph = read_radiograph(path)
    frames, _ = resize_scales(radiograph.image, SCALES, Geometry(), radiograph.facts["spacing"])
    for scale, sink in zip(SCALES, sinks):
        sink.write(RAW.encode(RAW.quantize(frames[scale])))


def by_pydicom(path: Path, sinks: Sequence[Any]) -> None:
    ds = pydicom.dcmread(path)
    values = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)
    unit = values / (2.0**ds.BitsStored - 1)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        unit = 1.0 - unit
    picture = Image.fromarray((unit * 255 + 0.5).astype(np.uint8))
    side = max(picture.size)
    for scale, sink in zip(SCALES, sinks):
        width, height = (round(scale * length / side) for length in picture.size)
        square = Image.new("L", (scale, scale))
        shrunk = picture.resize((width, height), Image.Resampling.BOX)
        square.paste(shrunk, ((scale - width) // 2, (scale - height) // 2))
        sink.write(square.tobytes())


def timed(function: Callable[[Path, Sequence[Any]], None], path: Path, folder: Path) -> tuple[float, float]:
    """(wall, CPU) seconds of one file, its bytes handed to the operating system."""
    names = [folder / f"{function.__name__}-{scale}.raw" for scale in SCALES]
    start, cpu = time.perf_counter(), time.process_time()
    with contextlib.ExitStack() as stack:
        function(path, [stack.enter_context(open(name, "ab")) for name in names])
    return time.perf_counter() - start, time.process_time() - cpu


def largest_difference(folder: Path) -> float:
    """Mean absolute difference, in gray levels, between what the two sides have written."""
    means = []
    for scale in SCALES:
        ours, theirs = (np.fromfile(folder / f"{f.__name__}-{scale}.raw", np.uint8) for f in (by_carina, by_pydicom))
        means.append(float(np.abs(ours.astype(np.int16) - theirs).mean()))
    return max(means)


def compare(name: str, paths: Sequence[Path], repeats: int, folder: Path) -> dict[str, Any]:
    """Both sides in turn on every file, the order changing with every repeat; the first round is not counted."""
    seconds: dict[str, list[tuple[float, float]]] = {"by_carina": [], "by_pydicom": []}
    for repeat in range(repeats + 1):
        for path in paths:
            for function in (by_carina, by_pydicom)[:: 1 if repeat % 2 else -1]:
                took = timed(function, path, folder)
                if repeat:
                    seconds[function.__name__].append(took)
    difference = largest_difference(folder)
    for file in folder.glob("*.raw"):
        file.unlink()
    wall = {side: statistics.median(took[0] for took in found) for side, found in seconds.items()}
    cpu = {side: statistics.median(took[1] for took in found) for side, found in seconds.items()}
    pairs = [theirs[0] / ours[0] for ours, theirs in zip(seconds["by_carina"], seconds["by_pydicom"])]
    return {
        "files": name,
        "timed_each": len(pairs),
        "carina_ms": round(1000 * wall["by_carina"], 2),
        "peer_ms": round(1000 * wall["by_pydicom"], 2),
        "ratio": round(wall["by_pydicom"] / wall["by_carina"], 2),
        "ratio_cpu": round(cpu["by_pydicom"] / cpu["by_carina"], 2),
        "ratio_quartiles": [round(float(q), 2) for q in np.percentile(pairs, (25, 75))],
        "mean_difference_gray_levels": round(difference, 3),
    }


def reading(arguments: Arguments, folder: Path) -> dict[str, Any]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    rows = []
    try:
        for name, syntax in (
            ("uncompressed", ExplicitVRLittleEndian),
            ("RLE", RLELossless),
            ("JPEG 2000 lossless", JPEG2000Lossless),
        ):
            plain = syntax == ExplicitVRLittleEndian
            count = arguments.files if plain else 2
            paths = [write_file(folder / f"{name}-{i}.dcm", i, ROWS, COLUMNS, syntax) for i in range(count)]
            rows.append(compare(name, paths, arguments.repeats if plain else 5, folder))
        for name, file in (("JPEG lossless, 2140 x 1760", "RG2_JPLL.dcm"), ("JPEG-LS, 2140 x 1760", "RG2_JLSL.dcm")):
            if arguments.dicom:
                rows.append(compare(name, [Path(arguments.dicom) / file], 5, folder))
    finally:
        os.sched_setaffinity(0, cores)
    return {"pixels": [ROWS, COLUMNS], "scales": list(SCALES), "rows": rows, "bar_uncompressed": BAR_SPEED}


# --- the verb -----------------------------------------------------------------------------------------------------


def prepare(source: Path, out: Path, scales: Sequence[int], workers: int) -> tuple[float, int]:
    """Run `carina prepare`; (seconds, largest resident set of its process tree in bytes, sampled 20 times a second)."""
    words = ["prepare", source, f"out={out}", f"scales=[{','.join(map(str, scales))}]", f"workers={workers}", "--quiet"]
    environment = {**os.environ, "XDG_CONFIG_HOME": str(out.parent / "settings")}
    start, peak = time.perf_counter(), 0
    with open(out.parent / "messages.txt", "w+b") as messages:
        command = [sys.executable, "-m", "carina", *map(str, words)]
        process = subprocess.Popen(command, stdout=messages, stderr=messages, env=environment)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for member in [root, *_children(root)]:
                try:
                    total += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, total)
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        messages.seek(0)
        if process.returncode != 0:
            raise CarinaError(f"carina prepare ended with {process.returncode}: {messages.read().decode()[-500:]}")
    shutil.rmtree(out)
    return seconds, peak


def _children(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def workers(arguments: Arguments, folder: Path) -> dict[str, Any]:
    source = folder / "many"
    source.mkdir()
    for number in range(arguments.workers_files):
        write_file(source / f"{number:05d}.dcm", number, ROWS // 2, COLUMNS // 2)
    few = folder / "few"
    few.mkdir()
    write_file(few / "0.dcm", 0, ROWS // 2, COLUMNS // 2)
    prepare(few, folder / "store", SCALES, 1)  # the programs come into the disk cache
    start = prepare(few, folder / "store", SCALES, 1)[0]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for count in (1, 2, 2, 1):
        seconds[count].append(prepare(source, folder / "store", SCALES, count)[0])
    one, two = (statistics.mean(seconds[count]) for count in (1, 2))
    return {
        "files": arguments.workers_files,
        "pixels": [ROWS // 2, COLUMNS // 2],
        "one_s": round(one, 2),
        "two_s": round(two, 2),
        "one_file_s": round(start, 2),
        "ratio": round(one / two, 2),
        "runs_s": {str(count): [round(s, 2) for s in found] for count, found in seconds.items()},
        "bar": BAR_WORKERS,
    }


def memory(arguments: Arguments, folder: Path) -> dict[str, Any]:
    rows = []
    for count in arguments.memory_files:
        source = folder / f"small-{count}"
        source.mkdir()
        for number in range(count):
            write_file(source / f"{number:05d}.dcm", number, 320, 256)
        seconds, peak = prepare(source, folder / "store", (128, 64), 2)
        rows.append({"files": count, "peak_mib": round(peak / 2**20, 1), "seconds": round(seconds, 1)})
        shutil.rmtree(source)
    ratio = rows[1]["peak_mib"] / rows[0]["peak_mib"]
    return {"pixels": [320, 256], "workers": 2, "rows": rows, "ratio": round(ratio, 3), "bar": BAR_MEMORY}


# --- the script ---------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    model = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    packages = ("carina-cxr", "pydicom", "pylibjpeg-openjpeg", "pillow", "numpy", "scipy", "opencv-python-headless")
    return {
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "threads": 1,
        "packages": {name: version(name) for name in packages},
    }


def shown(result: dict[str, Any], console: Console) -> None:
    if "reading" in result:
        table = Table(title="one file, one core", title_justify="left")
        for head in ("files", "carina ms", "peer ms", "ratio", "ratio of CPU time", "quartiles", "mean difference"):
            table.add_column(head)
        for row in result["reading"]["rows"]:
            quartiles = "-".join(map(str, row["ratio_quartiles"]))
            figures = (row["carina_ms"], row["peer_ms"], row["ratio"], row["ratio_cpu"], quartiles)
            table.add_row(row["files"], *map(str, figures), f"{row['mean_difference_gray_levels']} gray levels")
        console.print(table)
    if "workers" in result:
        found = result["workers"]
        console.print(
            f"{found['files']} files: one worker {found['one_s']} s, two {found['two_s']} s, ratio {found['ratio']} "
            f"(start included; one file alone takes {found['one_file_s']} s)"
        )
    if "memory" in result:
        found = result["memory"]
        peaks = ", ".join(f"{row['files']} files {row['peak_mib']} MiB" for row in found["rows"])
        console.print(f"largest resident set of prepare: {peaks}, ratio {found['ratio']}")


def work(given: Arguments) -> None:
    cv2.setNumThreads(1)  # nothing else here has threads, and the processes of prepare set their own
    parts = {"reading": reading, "workers": workers, "memory": memory}
    result: dict[str, Any] = {}
    for part in given.parts:
        facts = machine()
        with tempfile.TemporaryDirectory(dir=given.work) as folder:
            result[part] = {"machine": facts, **parts[part](given, Path(folder))}
    if given.out:
        known = read_json(given.out) if Path(given.out).is_file() else {}
        write_json(given.out, {"benchmark": "intake", "synthetic": True, **known, **result})
    shown(result, console())


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "intake", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
