"""How many synthetic radiographs a second one core draws.

    python benchmarks/phantom.py [--size 256] [--count 200] [--out phantom.json]

Prints a table and writes it as JSON. CPU seconds are counted, so other work on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import time

import cv2

from carina.files import write_json
from carina.imaging.phantom import phantom


def rate(size: int, count: int, view: str | None) -> float:
    """Images per CPU second, two images a patient, findings as drawn."""
    phantom(0, 0, size=size, view=view)
    start = time.process_time()
    for number in range(count):
        phantom(1, number // 2, image=number % 2, size=size, view=view)
    return count / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", help="a JSON file for the table")
    given = parser.parse_args()
    cv2.setNumThreads(1)
    rows = []
    print(f"{'size':>6} {'view':>8} {'images/s':>9}")
    for size in given.size:
        for view in (None, "LATERAL"):
            rows.append(
                {"size": size, "view": view or "any", "images_per_second": round(rate(size, given.count, view), 1)}
            )
            print(f"{size:>6} {rows[-1]['view']:>8} {rows[-1]['images_per_second']:>9}")
    if given.out:
        write_json(given.out, {"benchmark": "phantom", "synthetic": True, "threads": 1, "rows": rows})


if __name__ == "__main__":
    main()
