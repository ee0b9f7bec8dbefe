"""Contact sheets: what a store looks like at a glance, lung outlines included."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from carina.data.store import read_images, read_masks
from carina.draws import permutation
from carina.files import write_bytes

COLUMNS, ROWS, SIDE = 10, 6, 160
OUTLINE = (80, 200, 255)  # BGR amber: readable on black and on white


def contact_sheet(folder: Path, table: pd.DataFrame, scale: int) -> None:
    """Write contact.png: up to 60 images drawn evenly over the store, with the outline of their lung masks."""
    count = min(len(table), COLUMNS * ROWS)
    chosen = np.sort(permutation(len(table), "contact sheet")[:count])
    rows = -(-count // COLUMNS)
    sheet = np.zeros((rows * SIDE, COLUMNS * SIDE, 3), dtype=np.uint8)
    for place, position in enumerate(chosen):
        tile = cv2.cvtColor(
            cv2.resize(read_images(folder, table, [position], scale)[0], (SIDE, SIDE)), cv2.COLOR_GRAY2BGR
        )
        mask = read_masks(folder, table, [position], scale)[0].astype(np.uint8)
        mask = cv2.resize(mask, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
        outline, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(tile, outline, -1, OUTLINE, 1)
        y, x = divmod(place, COLUMNS)
        sheet[y * SIDE : (y + 1) * SIDE, x * SIDE : (x + 1) * SIDE] = tile
    done, data = cv2.imencode(".png", sheet)
    if not done:
        raise RuntimeError("the contact sheet could not be encoded")
    write_bytes(folder / "contact.png", data.tobytes())
