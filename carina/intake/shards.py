"""The shards of a store, written as their files are done: memory holds a few images, not a shard."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from carina.data.encoding import Encoding
from carina.files import atomic_path
from carina.intake.images import Prepared

_BATCH = 16  # images a record batch: fixed, so that the bytes are the same under any back end and number of workers


def mask_names(lesions: Sequence[str]) -> tuple[str, ...]:
    return ("lungs", *(f"lesion.{label}" for label in lesions))


class ShardWriter:
    """Image and mask streams of every scale of one shard; `add` in order, whole under their names only at the end."""

    def __init__(self, out: Path, shard: int, encodings: Mapping[int, Encoding], lesions: Sequence[str]):
        self.out, self.shard, self.encodings, self.masks = out, shard, encodings, mask_names(lesions)
        self.waiting: list[tuple[str, Prepared]] = []
        self.written = 0

    def __enter__(self) -> ShardWriter:
        self.stack = contextlib.ExitStack()
        self.writers: dict[tuple[str, int], tuple[pa.Schema, pa.ipc.RecordBatchStreamWriter]] = {}
        try:
            for scale, encoding in self.encodings.items():
                pixels = pa.schema([("image_id", pa.string()), ("image", pa.large_binary())], encoding.to_metadata())
                masks = pa.schema([("image_id", pa.string()), *((name, pa.large_binary()) for name in self.masks)])
                for kind, schema in (("images", pixels), ("masks", masks)):
                    path = self.out / kind / str(scale) / f"{self.shard:05d}.arrow"
                    self.writers[kind, scale] = schema, self.stack.enter_context(_stream(path, schema))
        except BaseException:
            self.stack.close()
            raise
        return self

    def add(self, image_id: str, prepared: Prepared) -> int:
        """Take the images and masks of a row; returns its place in the shard."""
        self.waiting.append((image_id, prepared))
        if len(self.waiting) == _BATCH:
            self._flush()
        return self.written + len(self.waiting) - 1

    def _flush(self) -> None:
        ids = pa.array([image_id for image_id, _ in self.waiting], pa.string())
        kept = [prepared for _, prepared in self.waiting]
        for (kind, scale), (schema, writer) in self.writers.items():
            if kind == "images":
                columns = [[result.images[scale] for result in kept]]
            else:
                columns = [[result.masks[scale].get(name) for result in kept] for name in self.masks]
            arrays = [pa.array(column, pa.large_binary()) for column in columns]
            writer.write_batch(pa.record_batch([ids, *arrays], schema=schema))
        self.written += len(self.waiting)
        self.waiting = []

    def __exit__(self, *error: object) -> bool | None:
        try:
            if error[0] is None and self.waiting:
                self._flush()
        except BaseException as failure:
            self.stack.__exit__(type(failure), failure, failure.__traceback__)
            raise
        return self.stack.__exit__(*error)


@contextlib.contextmanager
def _stream(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchStreamWriter]:
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        yield writer
