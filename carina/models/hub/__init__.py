"""What is published: the card, the folder, what must not be in it, the test that it loads, and the upload."""

from carina.models.hub.card import Told, backbone_card, predictor_card
from carina.models.hub.clauses import Clause, clauses_of, earlier_origins, pretraining_facts
from carina.models.hub.folder import SUMS, assemble, verify
from carina.models.hub.loadback import load_back
from carina.models.hub.scan import findings
from carina.models.hub.upload import upload

__all__ = [
    "SUMS",
    "Clause",
    "Told",
    "assemble",
    "backbone_card",
    "clauses_of",
    "earlier_origins",
    "findings",
    "load_back",
    "predictor_card",
    "pretraining_facts",
    "upload",
    "verify",
]
