"""AnatPaste (Sato et al., iScience 2023): tell a radiograph from itself with a synthetic lesion in the lungs."""

from __future__ import annotations

from carina.models.backbones import Backbone
from carina.pretrain.pretexts import Corpus
from carina.pretrain.pretexts.pasting import Pasting, PastingPretextSettings


class AnatPasteSettings(PastingPretextSettings):
    pass


class AnatPaste(Pasting):
    def __init__(self, backbone: Backbone, settings: AnatPasteSettings, corpus: Corpus):
        super().__init__(backbone, settings, corpus, "anatpaste", "anatpaste")
