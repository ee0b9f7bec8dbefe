"""The verb doctor: what this machine can do, what is missing, and the mend. Reads, never writes, no network."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from carina import __version__
from carina.runs import PACKAGES, package_version

GIB = 2**30
LOW_DISK = 5 * GIB  # a small run with checkpoints and a store of some thousand images
LOW_MEMORY = 4 * GIB
FAISS_BUILDS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")

# Families of transfer syntaxes (PS3.5 section 10 and PS3.6 table A-1), and the plug-in that decodes each one
CODECS: dict[str, tuple[tuple[str, ...], str]] = {
    "JPEG baseline": (("1.2.840.10008.1.2.4.50",), "pylibjpeg-libjpeg"),
    "JPEG lossless": (("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"), "pylibjpeg-libjpeg"),
    "JPEG-LS": (("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"), "pylibjpeg-libjpeg"),
    "JPEG 2000": (("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"), "pylibjpeg-openjpeg"),
    "HTJ2K": (tuple(f"1.2.840.10008.1.2.4.{number}" for number in (201, 202, 203)), "pylibjpeg-openjpeg"),
}


@dataclass(frozen=True)
class Check:
    """One line. state: ok, warn (works, with a loss) or missing (does not work until mended)."""

    name: str
    state: Literal["ok", "warn", "missing"]
    about: str
    mend: str = ""


def doctor() -> dict[str, Any]:
    """{"carina": version, "ok": no line is missing, "checks": [{"name", "state", "about", "mend"}, ...]}.

    The token of the hub and the key are looked for, never read out.
    """
    checks = [
        _python(sys.version_info[:3]),
        Check("system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}"),
        _cores(),
        _memory(),
        _disk("disk here", Path.cwd()),
        _disk("disk for temporary files", Path(tempfile.gettempdir())),
        *_torch(),
        *_packages({name: package_version(name) for name in PACKAGES}),
        _faiss({name for name in FAISS_BUILDS if package_version(name)}),
        *_codecs(),
        _wandb(package_version("wandb")),
        _hub(),
        _key(),
    ]
    return {
        "carina": __version__,
        "ok": all(check.state != "missing" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def show(result: dict[str, Any]) -> Any:
    """The checks as a rich table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    colors = {"ok": "green", "warn": "yellow", "missing": "red"}
    table = Table(title=f"carina {result['carina']}")
    table.add_column("what", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("what it means", overflow="fold")
    for check in result["checks"]:
        text = Text(check["about"])
        if check["mend"]:
            text.append(f"\n-> {check['mend']}", style="bold")
        table.add_row(check["name"], Text(check["state"], style=colors[check["state"]]), text)
    return table


def _python(version: tuple[int, ...]) -> Check:
    text = ".".join(map(str, version))
    if version < (3, 11):
        return Check("python", "missing", f"{text}; 3.11 or newer is needed", "make an environment with a newer Python")
    return Check("python", "ok", text)


def _cores() -> Check:
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    held = f" of {total}" if usable < total else ""
    return Check("cores", "ok", f"{usable}{held}; prepare uses them all, workers= sets how many")


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    total, note = memory.total, ""
    limit = Path("/sys/fs/cgroup/memory.max")  # a container sees the host's memory but may use less
    if limit.is_file() and (text := limit.read_text().strip()).isdigit() and int(text) < total:
        total, note = int(text), " (the limit of this container)"
    about = f"{total / GIB:.1f} GiB{note}, {memory.available / GIB:.1f} GiB of the machine's free"
    if min(total, memory.available) < LOW_MEMORY:
        return Check("memory", "warn", about, "give a smaller batch_size or scale, and workers=1 in prepare")
    return Check("memory", "ok", about)


def _disk(name: str, folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    about = f"{free / GIB:.1f} GiB free"
    if free < LOW_DISK:
        mend = "free some space, or " + ("set TMPDIR" if "temporary" in name else "write elsewhere with out=")
        return Check(name, "warn", f"{about}; a store or a run's checkpoints may not fit", mend)
    return Check(name, "ok", about)


def _torch() -> list[Check]:
    try:
        import torch

        from carina.training.engine import best_precision, pick_device
    except ImportError as error:
        return [Check("torch", "missing", f"cannot be imported ({error}); nothing trains", "pip install carina-cxr")]
    device = pick_device()
    precision = best_precision(device, "auto")
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    checks = [_driver(f"{torch.__version__}, {build}", torch.cuda.is_available(), _nvidia_driver())]
    for number in range(torch.cuda.device_count() if device.type == "cuda" else 0):
        facts = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if facts.major >= 8 else "no bf16"  # compute capability of Ampere
        checks.append(Check(f"GPU {number}", "ok", f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, {bf16}"))
    where = "the first GPU" if device.type == "cuda" else "the CPU"
    reason = {
        ("cpu", "bf16"): "this CPU computes in bf16",
        ("cpu", "no"): "this CPU has no bf16 arithmetic, so full precision",
        ("cuda", "no"): "this GPU has no bf16, so full precision; precision=fp16 is faster",
    }.get((device.type, precision), "this GPU computes in bf16")
    checks.append(Check("training", "ok", f"runs on {where}; precision=auto gives {precision} ({reason})"))
    return checks


def _nvidia_driver() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").is_file()


def _driver(torch_text: str, usable: bool, driver: bool) -> Check:
    if driver and not usable and "CPU build" in torch_text:
        about = f"{torch_text}; this machine has an NVIDIA driver that a CPU build cannot use"
        return Check("torch", "warn", about, "install torch's CUDA build")
    if driver and not usable:
        about = f"{torch_text}; an NVIDIA driver is here, but torch sees no GPU"
        mend = "check CUDA_VISIBLE_DEVICES and nvidia-smi, or install a build for the driver's CUDA version"
        return Check("torch", "warn", about, mend)
    return Check("torch", "ok", torch_text + ("" if usable else "; no GPU, all runs on the CPU"))


def _packages(versions: dict[str, str | None]) -> list[Check]:
    absent = [name for name, version in versions.items() if version is None]
    here = ", ".join(f"{name} {version}" for name, version in versions.items() if version and name != "torch")
    checks = [Check("packages", "ok", f"{here}; stores are read in place, no cache of data sets is kept")]
    if absent:
        mend = f"pip install {' '.join(absent)}"
        checks.append(Check("packages absent", "missing", f"{', '.join(absent)}: carina depends on them", mend))
    return checks


def _faiss(builds: Collection[str]) -> Check:
    """builds: the faiss packages that are installed; all of them bring the same module `faiss`."""
    names = ", ".join(sorted(builds))
    if len(builds) > 1:
        about = f"{names} are both installed and overwrote each other's files, so either may crash or lack functions"
        keep = "faiss-gpu" if _nvidia_driver() else "faiss-cpu"
        return Check("faiss", "missing", about, f"pip uninstall -y {' '.join(sorted(builds))} && pip install {keep}")
    mend = "pip install 'carina-cxr[cpu]', or 'carina-cxr[gpu]' on a machine with a GPU"
    try:
        import faiss
    except ImportError as error:
        about = "not installed; the anomaly scorer knn cannot run (the default, gaussian, can)"
        if builds:
            return Check("faiss", "missing", f"{names} cannot be imported ({error})", f"reinstall it: {mend}")
        return Check("faiss", "warn", about, mend)
    return Check("faiss", "ok", f"{names or 'a build of your own'} {faiss.__version__}")


def _decodable(syntaxes: Iterable[str]) -> bool:
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    return all(get_decoder(UID(syntax)).is_available for syntax in syntaxes)


def _codecs() -> list[Check]:
    from pydicom.pixels import get_decoder
    from pydicom.uid import JPEGExtended12Bit

    checks = [Check("DICOM uncompressed", "ok", "read without plug-ins, as are deflated, big endian and RLE")]
    for name, (syntaxes, plugin) in CODECS.items():
        if _decodable(syntaxes):
            checks.append(Check(f"DICOM {name}", "ok", "can be decoded"))
            continue
        mend = "pip install 'carina-cxr[codecs]' (GPL-3.0)" if plugin.endswith("libjpeg") else f"pip install {plugin}"
        about = "cannot be decoded: prepare rejects such files, each with this reason"
        checks.append(Check(f"DICOM {name}", "warn", about, mend))
    # Pillow, which carina depends on, decodes 8 bits; libjpeg alone decodes 12.
    if "pylibjpeg" in get_decoder(JPEGExtended12Bit).available_plugins:
        return [*checks, Check("DICOM JPEG extended", "ok", "8 and 12 bits can be decoded")]
    about = "8 bits can be decoded; files with 12 bits are rejected with this reason"
    mend = "pip install 'carina-cxr[codecs]' (GPL-3.0)"
    return [*checks, Check("DICOM JPEG extended", "warn", about, mend)]


def _wandb(version: str | None) -> Check:
    if version is None:
        about = "not installed; metrics.jsonl holds the same numbers"
        return Check("wandb", "warn", about, "pip install wandb, or give wandb=off")
    return Check(
        "wandb", "ok", f"{version}; offline by default: nothing leaves this machine unless wandb=online is given"
    )


def _hub() -> Check:
    # huggingface_hub.get_token() may refresh a token over the network; whether one is there is all that is asked.
    from huggingface_hub import constants

    named = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"))
    file = Path(constants.HF_TOKEN_PATH)
    if named or (file.is_file() and file.stat().st_size > 0):
        return Check("hub token", "ok", "there is one; publish can upload")
    return Check("hub token", "warn", "none; publish --dry-run works, uploading does not", "hf auth login")


def _key() -> Check:
    from carina.intake.keys import settings_folder

    if os.environ.get("CARINA_KEY"):
        return Check("key", "ok", "CARINA_KEY is set and hashes identifiers")
    file = settings_folder() / "key"
    if not file.is_file():
        return Check("key", "ok", f"none yet; the first prepare makes one at {file}: back it up then")
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        about = f"{file} can be read by other users of this machine, who could then trace identifiers"
        return Check("key", "warn", about, f"chmod 600 {file}")
    return Check("key", "ok", f"{file}; back it up, without it stores cannot be joined or traced")
