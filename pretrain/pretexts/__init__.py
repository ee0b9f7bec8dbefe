"""Pretexts: one file per method, each read top to bottom. This one holds what they share and lists them."""

from __future__ import annotations

from dataclasses import dataclass

from carina.imaging.views import ViewSettings


@dataclass(frozen=True)
class Corpus:
    """What a pretext may know of the run before it starts.

    count: images. batch_size: of one optimizer step over all ranks; micro_batch: of one forward pass on one rank.
    scales: sides read from the store; size: what enters the network (None: the scale).
    """

    count: int
    batch_size: int
    micro_batch: int
    scales: tuple[int, ...]
    size: int | None
    views: ViewSettings
    seed: int

    def size_of(self, scale: int) -> int:
        return self.size or scale


def methods() -> dict[str, type]:
    """Name in the recipe -> class. Imported here and not above, because each file imports `Corpus`."""
    from carina.pretrain.pretexts.anatpaste import AnatPaste
    from carina.pretrain.pretexts.moco import MoCo

    return {"moco": MoCo, "anatpaste": AnatPaste}
