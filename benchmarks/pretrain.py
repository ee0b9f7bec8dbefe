"""How fast pretraining is: the whole loop beside its bare step, the views beside lightly's, SimCLR beside two peers.

    python benchmarks/pretrain.py store=STORE [parts=[loop,views,peers]] [out=FILE.json] [repeats=5]
                                  [lightly_train=PYTHON] [stable_pretraining=PYTHON] [size=128] [batch_size=64]
                                  [steps=12] [warm=3] [curve_steps=60] [workers=2] [threads=N] [work=FOLDER]

loop: ResNet-18, SimCLR, `carina pretrain`'s own engine on the store, against the same step on one batch that stays in
memory, images a second in the fastest precision of the machine. views: reading and two views of every image, on one
core and one thread, against lightly's SimCLRTransform on the same stored bytes (PIL; crop, rotation, blur, a jitter of
brightness and contrast where carina has gamma and shift). peers: SimCLR, ResNet-18, the same images (as PNG files for
the peers), each program's own training loop in a process of its own, in float32 and bf16; `lightly_train` and
`stable_pretraining` are Python interpreters of environments that hold lightly-train 0.18 and stable-pretraining 0.1.8.
Their losses stand beside ours in FILE.png. gpu (not by default): the same on a GPU in bf16, with the share of time that
carina waited for data; `gpu_batch_size=256`, `gpu_steps=80`. Sides take turns, the order changes with every repeat, and
the figures are medians. Parts that FILE.json holds already are kept where they are not measured again.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from common import console, script
from matplotlib.figure import Figure
from PIL import Image
from pydantic import Field
from rich.console import Console
from rich.table import Table

from carina.data.batches import Batches, Plan
from carina.data.store import Selection, select
from carina.errors import CarinaError
from carina.files import read_json, write_json
from carina.imaging.views import make_view
from carina.pretrain.recipe import PretrainRecipe
from carina.pretrain.run import build_task
from carina.recipes import Section, build
from carina.runs import Run
from carina.training.engine import Engine, best_precision, pick_device, resolved

LOOP = Path(__file__).with_name("simclr_loop.py")
BARS = {"loop": 0.90, "views": 3.0, "fastest precision": 1.4, "float32": 1.1, "gpu": 1.0, "data wait": 0.05}


class Arguments(Section):
    parts: list[Literal["loop", "views", "peers", "gpu"]]
    store: str
    out: str | None
    work: str | None
    repeats: Annotated[int, Field(ge=1)]
    size: Annotated[int, Field(ge=32)]
    batch_size: Annotated[int, Field(ge=8)]
    steps: Annotated[int, Field(ge=2)]
    warm: Annotated[int, Field(ge=1)]
    curve_steps: Annotated[int, Field(ge=0)]
    gpu_batch_size: Annotated[int, Field(ge=8)]
    gpu_steps: Annotated[int, Field(ge=2)]
    workers: Annotated[int, Field(ge=0)]
    threads: Annotated[int, Field(ge=1)]
    lightly_train: str | None
    stable_pretraining: str | None


DEFAULTS = {
    "parts": ["loop", "views", "peers"],
    "out": None,
    "work": None,
    "repeats": 5,
    "size": 128,
    "batch_size": 64,
    "steps": 12,
    "warm": 3,
    "curve_steps": 60,
    "gpu_batch_size": 256,
    "gpu_steps": 80,
    "workers": 2,
    "threads": len(os.sched_getaffinity(0)),
    "lightly_train": None,
    "stable_pretraining": None,
}


def recipe_of(arguments: Arguments, out: Path) -> PretrainRecipe:
    given = {
        "store": arguments.store,
        "rows": "all",
        "scales": [arguments.size],
        "pretexts": {"simclr": {"weight": 1.0}},
        "epochs": None,
        "steps": arguments.warm + arguments.steps,
        "batch_size": arguments.batch_size,
        "workers": arguments.workers,
        "threads": arguments.threads,
        "wandb": "off",
        "out": str(out),
    }
    return resolved(build("pretrain", PretrainRecipe, "default", given), None, False)


def in_turn(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Every side once a repeat; who begins changes."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        names = list(sides)[:: 1 if repeat % 2 == 0 else -1]
        for name in names:
            found[name].append(sides[name]())
    return found


# --- the loop against its own step ----------------------------------------------------------------------------------


def loop(arguments: Arguments, folder: Path) -> dict[str, Any]:
    selection = select(arguments.store, scales=[arguments.size])
    runs = iter(range(10**6))

    def engine() -> Engine:
        recipe = recipe_of(arguments, folder / f"run-{next(runs)}")
        task = build_task(recipe, selection, 1)
        return Engine(task, selection, recipe, scales=recipe.scales, name="pretrain", quiet=True)

    def rate(times: Sequence[float]) -> float:
        return arguments.batch_size * arguments.steps / (times[-1] - times[arguments.warm - 1])

    def whole() -> float:
        times: list[float] = []

        def observe(_step: int, _means: dict[str, float]) -> dict[str, Any]:
            times.append(time.perf_counter())
            return {}

        built = engine()
        built.fit(Run.start(built.settings.out, "pretrain", built.settings, quiet=True), observe=observe)
        return rate(times)

    def in_memory() -> float:
        built, times = engine(), []
        _, pieces = next(built.batches.from_step(0))
        for step in range(arguments.warm + arguments.steps):
            built.step(step, pieces)
            times.append(time.perf_counter())
        return rate(times)

    found = in_turn({"whole": whole, "in memory": in_memory}, arguments.repeats)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "precision": recipe_of(arguments, folder).precision,
        "images_per_second": {name: round(value, 2) for name, value in medians.items()},
        "runs": {name: [round(value, 2) for value in values] for name, values in found.items()},
        "ratio": round(medians["whole"] / medians["in memory"], 3),
        "bar": BARS["loop"],
    }


# --- loader and views -------------------------------------------------------------------------------------------------


def views(arguments: Arguments, folder: Path) -> dict[str, Any]:
    from lightly.transforms import SimCLRTransform

    selection = select(arguments.store, scales=[arguments.size])
    settings = recipe_of(arguments, folder).views
    count = min(8, len(selection) // arguments.batch_size)
    plan = Plan(len(selection), arguments.batch_size, 1, 1, 0, (arguments.size,), 0, count)
    peer = SimCLRTransform(
        input_size=arguments.size, cj_prob=1.0, cj_bright=0.2, cj_contrast=0.2, cj_sat=0.0, cj_hue=0.0, min_scale=0.5,
        random_gray_scale=0.0, gaussian_blur=1.0, sigmas=(0.1, settings.blur * arguments.size), hf_prob=0.0,
        rr_prob=1.0, rr_degrees=settings.rotation, normalize=None,
    )  # fmt: skip

    batches = Batches(selection, plan, device=torch.device("cpu"))

    def ours() -> None:
        for _, (batch,) in batches.from_step(0):
            for name in ("first", "second"):
                make_view(batch.images, batch.draws.part(name), settings, arguments.size)

    def theirs() -> None:
        for number in range(count):
            pixels = selection.images(plan.rows(number), arguments.size)
            pairs = [peer(Image.fromarray(image)) for image in pixels]
            for view in range(2):
                torch.stack([pair[view] for pair in pairs])

    def timed(function: Callable[[], None]) -> Callable[[], float]:
        def run() -> float:
            began, cpu = time.perf_counter(), time.process_time()
            function()
            seconds.setdefault(function.__name__, []).append(time.process_time() - cpu)
            return 2 * count * arguments.batch_size / (time.perf_counter() - began)

        return run

    cores, threads, seconds = os.sched_getaffinity(0), torch.get_num_threads(), {}
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        sides = {"carina": timed(ours), "lightly": timed(theirs)}
        in_turn(sides, 1)
        seconds.clear()
        found = in_turn(sides, arguments.repeats)
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "size": arguments.size,
        "views_per_second_and_core": {name: round(value, 1) for name, value in medians.items()},
        "runs": {name: [round(value, 1) for value in values] for name, values in found.items()},
        "ratio": round(medians["carina"] / medians["lightly"], 2),
        "ratio_cpu": round(statistics.median(seconds["theirs"]) / statistics.median(seconds["ours"]), 2),
        "bar": BARS["views"],
    }


# --- peers ------------------------------------------------------------------------------------------------------------


def interpreters(arguments: Arguments) -> dict[str, str]:
    peers = {"lightly-train": arguments.lightly_train, "stable-pretraining": arguments.stable_pretraining}
    return {"carina": sys.executable, **{name: python for name, python in peers.items() if python}}


def export(selection: Selection, size: int, folder: Path) -> Path:
    """The stored pixels as PNG files, which is what the peers read."""
    folder.mkdir()
    for start in range(0, len(selection), 256):
        rows = range(start, min(start + 256, len(selection)))
        for row, pixels in zip(rows, selection.images(rows, size)):
            Image.fromarray(pixels).save(folder / f"{row:07d}.png")
    return folder


def side_runner(arguments: Arguments, folder: Path, **common: Any) -> Callable[..., dict[str, Any]]:
    images = export(select(arguments.store, scales=[arguments.size]), arguments.size, folder / "images")
    pythons, runs = interpreters(arguments), iter(range(10**6))

    def run(side: str, steps: int, precision: str) -> dict[str, Any]:
        place = folder / f"{next(runs):03d}-{side}"
        place.mkdir()
        job = {
            "side": side, "store": str(Path(arguments.store).resolve()), "images": str(images.resolve()),
            "folder": str((place / "run").resolve()), "out": str((place / "result.json").resolve()),
            "size": arguments.size, "warm": arguments.warm, "steps": arguments.warm + steps, "precision": precision,
            "threads": arguments.threads, "workers": arguments.workers, "tf32": True, **common,
        }  # fmt: skip
        write_json(place / "job.json", job)
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        with open(place / "messages.txt", "w+b") as messages:
            command = [pythons[side], str(LOOP), str(place / "job.json")]
            code = subprocess.run(command, stdout=messages, stderr=messages, env=environment, check=False).returncode
            if code != 0:
                messages.seek(0)
                raise CarinaError(f"{side} ended with {code}: {messages.read().decode(errors='replace')[-1500:]}")
        return read_json(place / "result.json")

    return run


def compare(run: Callable[..., dict[str, Any]], arguments: Arguments, precision: str, steps: int) -> dict[str, Any]:
    facts: dict[str, dict[str, Any]] = {}

    def side(name: str) -> Callable[[], float]:
        def measure() -> float:
            result = run(name, steps, precision)
            fact = facts.setdefault(name, {key: result[key] for key in ("channels", "packages")})
            for key in ("data_wait", "images_per_processor_second"):
                if key in result:
                    fact.setdefault(key, []).append(result[key])
            return result["images_per_second"]

        return measure

    found = in_turn({name: side(name) for name in interpreters(arguments)}, arguments.repeats)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "images_per_second": medians,
        "runs": found,
        "ratio": {name: round(medians["carina"] / value, 2) for name, value in medians.items() if name != "carina"},
        "sides": {
            name: {key: statistics.median(value) if isinstance(value, list) else value for key, value in fact.items()}
            for name, fact in facts.items()
        },
    }


def peers(arguments: Arguments, folder: Path) -> dict[str, Any]:
    run = side_runner(arguments, folder, device="cpu", batch_size=arguments.batch_size)
    result: dict[str, Any] = {name: compare(run, arguments, name, arguments.steps) for name in ("float32", "bf16")}
    fastest = {
        name: max(result[precision]["images_per_second"][name] for precision in ("float32", "bf16"))
        for name in interpreters(arguments)
    }
    result["fastest"] = {
        "images_per_second": fastest,
        "ratio": {name: round(fastest["carina"] / value, 2) for name, value in fastest.items() if name != "carina"},
        "bar": BARS["fastest precision"],
    }
    result["float32"]["bar"] = BARS["float32"]
    if arguments.curve_steps:
        best = "bf16" if result["bf16"]["images_per_second"]["carina"] == fastest["carina"] else "float32"
        curves = {name: run(name, arguments.curve_steps, best)["losses"] for name in interpreters(arguments)}
        result["curves"] = {"precision": best, "loss": curves}
    return result


def draw_curves(path: Path, curves: dict[str, list[float]]) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, losses in curves.items():
        axes.plot(range(1, len(losses) + 1), losses, label=name)
    axes.set(xlabel="step", ylabel="loss (NT-Xent)")
    axes.legend()
    figure.savefig(path, dpi=120)


def gpu(arguments: Arguments, folder: Path) -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise CarinaError("part gpu needs a GPU; leave it out of parts= here")
    run = side_runner(arguments, folder, device="gpu", batch_size=arguments.gpu_batch_size)
    result = compare(run, arguments, "bf16", arguments.gpu_steps)
    name = torch.cuda.get_device_name()
    return {"gpu": name, **result, "bar": BARS["gpu"], "bar_data_wait": BARS["data wait"]}


# --- the script -------------------------------------------------------------------------------------------------------


def machine(arguments: Arguments) -> dict[str, Any]:
    model = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": arguments.threads,
        "workers": arguments.workers,
        "fastest_precision": best_precision(pick_device(), "auto"),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "packages": {name: version(name) for name in ("carina-cxr", "torch", "timm", "lightly", "pillow", "numpy")},
    }


def shown(result: dict[str, Any], console: Console) -> None:
    if "loop" in result:
        found = result["loop"]
        rates = found["images_per_second"]
        console.print(
            f"whole loop {rates['whole']} images/s, the same step on a batch in memory {rates['in memory']}, ratio "
            f"{found['ratio']} (bar {found['bar']})"
        )
    if "views" in result:
        found = result["views"]
        rates = found["views_per_second_and_core"]
        console.print(
            f"reading and views on one core: carina {rates['carina']} views/s, lightly {rates['lightly']}, ratio "
            f"{found['ratio']}, of CPU time {found['ratio_cpu']} (bar {found['bar']})"
        )
    rows = {name: result.get("peers", {}).get(name) for name in ("float32", "bf16", "fastest")}
    rows["gpu"] = result.get("gpu")
    if any(rows.values()):
        table = Table(title="SimCLR, ResNet-18: images/s, median", title_justify="left")
        for head in ("", "images/s", "carina is faster by", "bar"):
            table.add_column(head)
        for name, row in rows.items():
            if row:
                rates = ", ".join(f"{side} {rate}" for side, rate in row["images_per_second"].items())
                ratios = ", ".join(f"{side} {ratio}" for side, ratio in row["ratio"].items())
                table.add_row(name, rates, ratios, str(row.get("bar", "")))
        console.print(table)
    if "gpu" in result:
        found = result["gpu"]
        wait = found["sides"]["carina"]["data_wait"]
        console.print(
            f"{found['gpu']}: carina waited for data {wait:.1%} of the time (bar {found['bar_data_wait']:.0%})"
        )


def work(given: Arguments) -> None:
    parts = {"loop": loop, "views": views, "peers": peers, "gpu": gpu}
    result: dict[str, Any] = {}
    for part in given.parts:
        facts = machine(given)
        with tempfile.TemporaryDirectory(dir=given.work) as folder:
            result[part] = {"machine": facts, **parts[part](given, Path(folder))}
        if given.out:  # after every part, because they take long
            known = read_json(given.out) if Path(given.out).is_file() else {}
            write_json(given.out, {"benchmark": "pretrain", **known, **result})
            if part == "peers" and "curves" in result[part]:
                draw_curves(Path(given.out).with_suffix(".png"), result[part]["curves"]["loss"])
    shown(result, console())


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "pretrain", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
