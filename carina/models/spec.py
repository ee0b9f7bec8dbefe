"""What must be known of a backbone to feed it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spec:
    """name: timm's model name. channels, size: of the network's input (pixels). mean, std: one value a channel, on images
    in [0, 1]. args: further arguments of timm.create_model. origin: where the weights come from, in words. checksum: of
    the file that was read, ``sha256:`` and 64 digits, empty where there was none or several.
    """

    name: str
    channels: int = 1
    size: int = 224
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    args: dict[str, Any] = field(default_factory=dict)
    origin: str = "random"
    license: str = ""
    checksum: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}
