"""How well side markers are found and painted over: markers stamped into real radiographs, phantoms, boxes by hand.

    python benchmarks/markers.py data=FOLDER [side=512] [count=400] [phantoms=200] [half=report|tune] [out=FILE.json]

FOLDER holds nih_cxr14, kermany and markers.csv. Patients are divided by a hash into two halves: constants of the
detector were chosen on `tune` alone, figures are those of `report`. Stamps (see `stamps.py`) lie near the border,
outside the lungs, where the picture is not white already; 10, 50 and 90 are percentiles.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import cv2
import numpy as np
import pandas as pd
from common import console, script
from pydantic import Field
from rich.table import Table
from stamps import KINDS, Picture, Stamp, half_of, place_of, read_boxes, read_picture, read_table, stamp

from carina.draws import hash64
from carina.files import write_json
from carina.imaging.markers import Marker, find_markers, inpaint
from carina.imaging.phantom import phantom
from carina.recipes import Section

OVERLAP = 0.5
# Pictures whose place for the stamp was seen to bear a mark already, when every window was looked at.
_SEEN = """
00001573_000 00001865_000 00001895_000 00002262_010 00002484_003 00002711_000 00002817_010 00002980_000
00003028_050 00003080_000 00003158_002 00003190_015 00003447_001 00003535_020 00003741_002 00003750_003
00005228_002 00005567_025 00007992_006 00008154_000 00010165_007 00011925_032 person1071_bacteria_3005
person1102_virus_1822 person1389_bacteria_3531 person1605_bacteria_4226 person1814_bacteria_4669
person360_virus_739 person849_bacteria_2770 person884_virus_1534
"""
NOT_FREE = frozenset(_SEEN.split())


@dataclass(frozen=True)
class Site:
    """A picture and a stamp on it. free: no mark was seen at the place when its window was looked at."""

    picture: Picture
    stamp: Stamp
    place: tuple[float, float]
    free: bool


def site(picture: Picture, free: bool = True) -> Site | None:
    """The one stamp of a picture, drawn from its name; None where there is no place for it."""
    rng = np.random.default_rng(hash64("site", picture.name))
    size, letter = float(rng.uniform(0.03, 0.08)), "LR"[rng.integers(2)]
    kind = KINDS[rng.choice(3, p=(0.5, 0.25, 0.25))]
    place = place_of(picture, size, "site")
    if place is None:
        return None
    return Site(picture, stamp(picture.image, letter, kind, place, size, picture.name), place, free)


def pictures(folder: Path, half: str, count: int, side: int) -> Iterator[Picture]:
    """`count` pictures of one half, as many of each source, in an order that depends on their names alone."""
    table, boxes = read_table(folder), read_boxes(folder)
    table = table[[half_of(patient) == half for patient in table.patient]]
    for source in ("nih_cxr14", "kermany"):
        rows = table[table.path.str.startswith(source)]
        order = np.argsort([hash64("benchmark", path) for path in rows.path])
        for row in rows.iloc[order[: count // 2]].itertuples():
            yield read_picture(folder, row, boxes.get(row.path, ()), side)


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return 0.0
    return wide * high / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - wide * high)


def box_of(marker: Marker) -> tuple[int, int, int, int]:
    return marker.x0, marker.y0, marker.x1, marker.y1


def best_of(markers: Sequence[Marker], box: Sequence[float]) -> tuple[float, Marker | None]:
    return max(((overlap(box_of(m), box), m) for m in markers), key=lambda pair: pair[0], default=(0.0, None))


def psnr(image: np.ndarray, truth: np.ndarray, box: tuple[int, int, int, int]) -> float:
    """dB inside a box, for values in [0, 1]; at most 100."""
    window = (slice(box[1], box[3]), slice(box[0], box[2]))
    return float(-10 * np.log10(max(np.square(image[window] - truth[window], dtype=float).mean(), 1e-10)))


def share(hits: Sequence[bool]) -> dict[str, float | int]:
    """Hits of all, with Wilson's 95 % interval."""
    count, found, z = len(hits), int(sum(hits)), 1.96
    if not count:
        return {"of": 0}
    rate = found / count
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return {"value": rate, "low": float(middle - half), "high": float(middle + half), "found": found, "of": count}


def stamped(sites: Sequence[Site]) -> dict:
    """Recall on stamps, what painting over them brings, and false alarms where the same places bear no stamp."""
    hits, letters, known, found, outside, alarms = [], [], [], [], 0, 0
    searching = painting = 0.0
    for one in sites:
        image, truth, box = one.stamp.image, one.picture.image, one.stamp.box
        start = time.process_time()
        markers = find_markers(image, one.picture.lungs)
        searching += time.process_time() - start
        covered, marker = best_of(markers, box)
        hits.append(covered >= OVERLAP)
        exact = [Marker(one.stamp.letter, *box, 1.0)]
        start = time.process_time()
        filled = inpaint(image, exact, one.picture.lungs)
        painting += time.process_time() - start
        known.append(psnr(filled, truth, box) - psnr(image, truth, box))
        outside += changed_outside(image, filled, exact)
        if hits[-1]:
            letters.append(marker.label == one.stamp.letter)
            filled = inpaint(image, [marker], one.picture.lungs)
            found.append(psnr(filled, truth, box) - psnr(image, truth, box))
            outside += changed_outside(image, filled, [marker])
        alarms += sum(overlap(box_of(m), box) > 0 for m in find_markers(truth, one.picture.lungs))
    kinds, sizes = [one.stamp.kind for one in sites], [one.stamp.size for one in sites]
    area = float(
        np.mean([(b[2] - b[0]) * (b[3] - b[1]) / one.picture.image.size for one in sites for b in [one.stamp.box]])
    )
    quantiles = (10, 50, 90)
    return {
        "recall": share(hits),
        "recall_by_kind": {kind: share([h for h, k in zip(hits, kinds) if k == kind]) for kind in KINDS},
        "recall_by_size": {
            f"{low:.3f}-{high:.3f}": share([h for h, s in zip(hits, sizes) if low <= s < high])
            for low, high in ((0.03, 0.045), (0.045, 0.06), (0.06, 0.08))
        },
        "right_letter": share(letters),
        "decibels_known_box": dict(zip(map(str, quantiles), np.percentile(known, quantiles).tolist())),
        "decibels_found_box": dict(zip(map(str, quantiles), np.percentile(found, quantiles).tolist())),
        "pixels_changed_outside": outside,
        "false_alarms_in_free_places": {"alarms": alarms, "places": len(sites), "mean_share_of_the_frame": area},
        "milliseconds": {"find": 1000 * searching / len(sites), "inpaint": 1000 * painting / len(sites)},
    }


def changed_outside(image: np.ndarray, filled: np.ndarray, markers: Sequence[Marker]) -> int:
    changed = image != filled
    for one in markers:
        changed[one.y0 : one.y1, one.x0 : one.x1] = False
    return int(changed.sum())


def on_phantoms(count: int, side: int, seed: int) -> dict:
    """Synthetic: false alarms where no marker was drawn, and recall where one was, with the phantoms' own lungs."""
    alarms, pictured, hits = 0, 0, []
    for number in range(count):
        bare = phantom(seed, number, size=side, marker=False)
        found = find_markers(bare.image, bare.lungs)
        alarms, pictured = alarms + len(found), pictured + bool(found)
        drawn = phantom(seed, number, size=side, marker=True)
        found = find_markers(drawn.image, drawn.lungs)
        boxes = [[side * v for v in box] for text, *box in drawn.markers if text in ("L", "R")]
        hits += [best_of(found, box)[0] >= OVERLAP for box in boxes]
    return {
        "false_alarms_per_image": alarms / count,
        "images_with_one": pictured,
        "images": count,
        "recall": share(hits),
    }


def on_boxes(folder: Path, side: int) -> dict:
    """Recall on boxes drawn by hand around real marks, by half, source and label."""
    table, boxes = read_table(folder).set_index("path"), read_boxes(folder)
    results: dict[str, dict[str, list[tuple[bool, bool]]]] = {"report": {}, "tune": {}}
    for path, drawn in sorted(boxes.items()):
        row = table.loc[path]
        row = pd.Series({"path": path, "patient": row.patient, "mask": row["mask"]})
        picture = read_picture(folder, row, drawn, side)
        markers = find_markers(picture.image, picture.lungs)
        for label, *box in picture.boxes:
            covered, marker = best_of(markers, box)
            group = results[half_of(row.patient)].setdefault(f"{path.split('/')[0]} {label}", [])
            group.append((covered >= OVERLAP, marker is not None and marker.label == label))
    return {
        half: {
            "all": share([hit for group in groups.values() for hit, _ in group]),
            **{name: share([hit for hit, _ in group]) for name, group in sorted(groups.items())},
            "right_letter": share(
                [right for name, group in groups.items() for hit, right in group if hit and name[-2:] in (" L", " R")]
            ),
        }
        for half, groups in results.items()
    }


class Arguments(Section):
    data: str
    side: Annotated[int, Field(ge=128)]
    count: Annotated[int, Field(ge=2)]
    phantoms: Annotated[int, Field(ge=1)]
    half: Literal["report", "tune"]
    out: str | None


DEFAULTS = {"side": 512, "count": 400, "phantoms": 200, "half": "report", "out": None}


def run(given: Arguments) -> dict:
    folder = Path(given.data)
    sites = [
        one
        for picture in pictures(folder, given.half, given.count, given.side)
        if Path(picture.name).stem not in NOT_FREE and (one := site(picture)) is not None
    ]
    return {
        "benchmark": "markers",
        "arguments": given.model_dump(exclude={"data", "out"}),
        "stamps": stamped(sites),
        "phantoms, synthetic": on_phantoms(given.phantoms, given.side, 12 if given.half == "report" else 11),
        "boxes drawn by hand": on_boxes(folder, given.side),
    }


def _figure(value: dict) -> str:
    if not value["of"]:
        return "none"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}], {value['found']} of {value['of']}"


def shown(result: dict) -> Table:
    table = Table(title=f"side markers, {result['arguments']['half']} half, {result['arguments']['side']} px")
    table.add_column("measured")
    table.add_column("figure")
    stamps, synthetic = result["stamps"], result["phantoms, synthetic"]
    table.add_row("stamps found, IoU >= 0.5", _figure(stamps["recall"]))
    for part in ("recall_by_kind", "recall_by_size"):
        for name, value in stamps[part].items():
            table.add_row(f"  {name}", _figure(value))
    table.add_row("letter right", _figure(stamps["right_letter"]))
    for name in ("known", "found"):
        low, middle, high = stamps[f"decibels_{name}_box"].values()
        table.add_row(f"inpainted, {name} box: dB gained", f"median {middle:.1f}, 10 % {low:.1f}, 90 % {high:.1f}")
    table.add_row("pixels changed outside boxes", str(stamps["pixels_changed_outside"]))
    free = stamps["false_alarms_in_free_places"]
    table.add_row("false alarms in places without a mark", f"{free['alarms']} in {free['places']}")
    for name, value in stamps["milliseconds"].items():
        table.add_row(f"CPU milliseconds to {name}", f"{value:.1f}")
    table.add_row("synthetic: false alarms an image", f"{synthetic['false_alarms_per_image']:.3f}")
    table.add_row("synthetic: letters found", _figure(synthetic["recall"]))
    for half, groups in result["boxes drawn by hand"].items():
        for name, value in groups.items():
            table.add_row(f"by hand, {half}: {name}", _figure(value))
    return table


def work(given: Arguments) -> None:
    cv2.setNumThreads(1)
    result = run(given)
    if given.out:
        write_json(given.out, result)
    console(120).print(shown(result))


def main(words: Sequence[str] | None = None) -> int:
    return script(words, "markers", __doc__, Arguments, DEFAULTS, work)


if __name__ == "__main__":
    sys.exit(main())
