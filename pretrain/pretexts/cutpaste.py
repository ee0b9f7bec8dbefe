"""CutPaste (Li et al., arXiv 2104.04015): tell a radiograph from itself with a piece of it pasted elsewhere.

It needs no lungs. `3way` tells upright rectangles and thin scars apart as well, the paper's best.
"""

from __future__ import annotations

from typing import Literal

from carina.models.backbones import Backbone
from carina.pretrain.pretexts import Corpus
from carina.pretrain.pretexts.pasting import Pasting, PastingPretextSettings


class CutPasteSettings(PastingPretextSettings):
    kind: Literal["normal", "scar", "union", "3way"]


class CutPaste(Pasting):
    def __init__(self, backbone: Backbone, settings: CutPasteSettings, corpus: Corpus):
        paste = "cutpaste" if settings.kind == "normal" else f"cutpaste_{settings.kind}"
        super().__init__(backbone, settings, corpus, "cutpaste", paste)
