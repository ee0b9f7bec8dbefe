"""NSA (Schlueter et al., arXiv 2109.15222): tell a radiograph from itself with pieces of another blended seamlessly into the
lungs, or say where they are. `fpi` blends one piece by one factor instead (Tan et al., arXiv 2011.04197).

Both papers regress the map of the change (`target: map`).
"""

from __future__ import annotations

from typing import Literal

from carina.models.backbones import Backbone
from carina.pretrain.pretexts import Corpus
from carina.pretrain.pretexts.pasting import Pasting, PastingPretextSettings


class NSASettings(PastingPretextSettings):
    kind: Literal["nsa", "fpi"]


class NSA(Pasting):
    def __init__(self, backbone: Backbone, settings: NSASettings, corpus: Corpus):
        super().__init__(backbone, settings, corpus, "nsa", settings.kind)
        self.needs_images(2, "nsa takes its patches from another image of the batch")
