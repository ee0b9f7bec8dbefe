"""Batches: which images at which scale, who the partner of an image is, and what is said when reading fails."""

import shutil
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from carina.data.batches import Batches, Partners, Plan
from carina.data.store import Selection, select
from carina.draws import hash64, sample_codes
from carina.errors import CarinaError

CPU = torch.device("cpu")
COUNT = 48


class Pictures(Selection):
    """Images of one gray value, their row's number; reading row `slow` takes four seconds."""

    def __init__(self, slow: int = -1):
        numbers = np.arange(COUNT)
        super().__init__(
            [],
            pd.DataFrame(
                {
                    "image_id": [f"{hash64('image', number):016x}" for number in numbers],
                    "study_id": [f"s{number // 2}" for number in numbers],
                    "patient_id": ["alone" if number == 0 else f"p{number // 5}" for number in numbers],
                }
            ),
        )
        self.slow = slow
        self.read = 0

    def images(self, rows, scale):
        self.read += len(rows)
        if self.slow in list(rows):
            time.sleep(4)
        return np.broadcast_to(np.asarray(rows, dtype=np.uint8)[:, None, None], (len(rows), scale, scale)).copy()


def plan(**changes):
    values = dict(count=COUNT, batch_size=16, accumulate=1, world=1, rank=0, scales=(8,), seed=5, steps=9)
    return Plan(**{**values, **changes})


def rows_of(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def pairs(first=0, workers=0, positives="patient", **changes) -> dict[tuple[int, int], int]:
    """(step, row) -> row of the partner, read off the pixels."""
    found = {}
    batches = Batches(Pictures(), plan(**changes), device=CPU, workers=workers, positives=positives)
    for step, pieces in batches.from_step(first):
        for piece in pieces:
            found |= {(step, row): other for row, other in zip(rows_of(piece.images), rows_of(piece.others))}
    return found


def test_mixed_scales_take_turns_by_step_and_micro_batches_of_a_step_share_one():
    mixed = plan(scales=(8, 16, 32), accumulate=2)
    assert [mixed.scale(number) for number in range(12)] == [8, 8, 16, 16, 32, 32] * 2
    shapes = [
        {piece.images.shape[-1] for piece in pieces}
        for _, pieces in Batches(Pictures(), mixed, device=CPU).from_step(7)
    ]
    assert shapes == [{16}, {32}]


def test_growing_scales_take_their_share_of_the_steps():
    def scales(**changes):
        grown = plan(scales=(8, 16, 32), scale_plan="growing", **changes)
        return [grown.scale(step * grown.accumulate) for step in range(grown.steps)]

    assert scales() == [8] * 3 + [16] * 3 + [32] * 3
    assert scales(steps=10) == [8] * 3 + [16] * 4 + [32] * 3
    assert scales(accumulate=2) == scales(world=2, rank=1) == scales()
    assert [plan(scales=(8, 16), scale_plan="growing", accumulate=2, steps=4).scale(n) for n in (3, 4)] == [8, 16]
    with pytest.raises(CarinaError, match=r"scales \[8, 16, 32\]"):
        plan(scales=(8, 16, 32), scale_plan="growing", steps=2)


def test_a_partner_is_another_image_of_the_group_and_the_image_itself_when_alone():
    table = Pictures().table
    for name in ("study", "patient"):
        owners = table[f"{name}_id"].tolist()
        found = pairs(positives=name, steps=60)
        assert len(found) == 60 * 16
        for (_, row), other in found.items():
            assert owners[row] == owners[other]
            assert (row == other) == (owners.count(owners[row]) == 1)
    drawn = {row: {other for (_, r), other in found.items() if r == row} for row in range(COUNT)}
    assert drawn[0] == {0} and drawn[7] == {5, 6, 8, 9}, "in time every image of the patient is a partner"


def test_partners_do_not_depend_on_workers_ranks_resume_or_the_order_of_the_table():
    whole = pairs()
    assert whole == pairs(workers=2)
    assert whole == pairs(world=2, rank=0) | pairs(world=2, rank=1)
    assert whole == pairs(accumulate=4)
    assert {key: other for key, other in whole.items() if key[0] >= 4} == pairs(first=4)
    table = Pictures().table
    order = np.random.default_rng(0).permutation(COUNT)
    groups = table["patient_id"].map(hash64).to_numpy(np.uint64).astype(np.int64)
    codes = sample_codes(table["image_id"])
    plain = Partners(groups, codes)(np.arange(COUNT), 5, 0)
    shuffled = Partners(groups[order], codes[order])(np.arange(COUNT), 5, 0)
    assert (order[shuffled] == plain[order]).all()


def test_nothing_more_is_read_than_what_is_used():
    for positives, expected in (("image", 48), ("patient", 95)):  # all have a partner but the image that is alone
        pictures = Pictures()
        for _, (piece,) in Batches(pictures, plan(steps=3), device=CPU, positives=positives).from_step(0):
            assert (piece.others is piece.images) == (positives == "image")
        assert pictures.read == expected


def test_a_stalled_loader_names_the_images(monkeypatch):
    monkeypatch.setenv("CARINA_LOADER_PATIENCE", "1.5")
    schedule = plan()
    batches = Batches(Pictures(slow=int(schedule.rows(2)[11])), schedule, device=CPU, workers=2)
    names = batches.selection.table["image_id"].to_numpy()[schedule.rows(2)[:3]]
    seen = []
    with pytest.raises(CarinaError, match=f"{', '.join(names)}, ... at scale 8 did not arrive within 1.5 s"):
        for step, _ in batches.from_step(0):
            seen.append(step)
    assert seen == [0, 1]


def test_patience_must_be_a_number_of_seconds(monkeypatch):
    monkeypatch.setenv("CARINA_LOADER_PATIENCE", "long")
    with pytest.raises(CarinaError, match="CARINA_LOADER_PATIENCE=long"):
        Batches(Pictures(), plan(), device=CPU)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_names_the_image(workers, phantom_store, tmp_path):
    store = shutil.copytree(phantom_store, tmp_path / "store")
    path = store / "images" / "32" / "00000.arrow"
    with pa.memory_map(str(path)) as source:
        shard = pa.ipc.open_stream(source).read_all()
        schema, columns = shard.schema, shard.to_pydict()
    columns["image"][3] = columns["image"][3][:100]
    path.unlink()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.table(columns, schema=schema))
    selection = select(store, scales=[32])
    schedule = plan(count=len(selection), batch_size=len(selection), scales=(32,), steps=1)
    with pytest.raises(CarinaError, match=f"image {columns['image_id'][3]} cannot be read at scale 32"):
        list(Batches(selection, schedule, device=CPU, workers=workers).from_step(0))
