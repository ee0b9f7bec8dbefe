"""What the owners of the pictures ask for before weights that come from them are published."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

UNKNOWN = "Upstream terms are not known to carina; the publisher must check them."
KEPT = ("data", "pretexts", "init", "scales", "synthetic", "labels_used", "store_hashes", "training", "earlier_origins")


@dataclass(frozen=True)
class Clause:
    """id: what `confirm=` takes; it changes with the words, so that a confirmation is of these. allowed: derived weights,
    yes | no | ask. text: in carina's words, the owner's own decide."""

    id: str
    source: str
    title: str
    license: str
    allowed: str
    credentialed: bool
    text: str

    def sentence(self) -> str:
        begins = f"{self.source} ({self.title}" + (f", {self.license})" if self.license else ")")
        kind = "is credentialed" if self.credentialed else "has terms on derived weights"
        kind = "does not allow derived weights to be published" if self.allowed == "no" else kind
        return f"{begins} {kind}: “{self.text}”"


def earlier_origins(record: Mapping[str, Any]) -> dict[str, Any]:
    """The sources of all that a backbone with this carina.json was trained on."""
    return {**record.get("earlier_origins", {}), **record.get("data", {}).get("origins", {})}


def pretraining_facts(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a predictor keeps of its backbone's carina.json, for its card; None where the backbone has none."""
    if "data" not in record:
        return record.get("pretraining")  # a member of a predictor hands on what it kept
    facts = {name: record[name] for name in KEPT if name in record}
    facts["training"] = {name: value for name, value in record["training"].items() if name != "recipe"}
    return facts


def origins_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Every source behind a backbone (carina.json) or predictor (predictor.json): name -> provenance, {} where unknown."""
    return {**earlier_origins(record.get("pretraining") or {}), **earlier_origins(record)}


def clauses_of(record: Mapping[str, Any]) -> list[Clause]:
    """What must be confirmed before `record`'s weights leave: sources that are credentialed, or whose terms on derived
    weights are not a plain yes. Corpora of synthetic images alone ask for nothing."""
    origins = origins_of(record)
    if record["synthetic"] and _synthetic_alone(record, origins):
        return []
    if not origins and not record["synthetic"]:
        origins = {"the training data": {}}
    found = (_clause(name, origin) for name, origin in sorted(origins.items()))
    return [clause for clause in found if clause.allowed != "yes" or clause.credentialed]


def _synthetic_alone(record: Mapping[str, Any], origins: Mapping[str, Any]) -> bool:
    """A joined corpus counts as synthetic as soon as one store is: a source with stated terms is not."""
    earlier = record.get("pretraining") or {"synthetic": True}
    stated = (origin.get("terms", {}).get("license") for origin in origins.values())
    return earlier.get("synthetic", False) and not any(stated) and len(origins) <= 1


def _clause(name: str, origin: Mapping[str, Any]) -> Clause:
    terms = origin.get("terms") or {}
    text = terms.get("clause") or UNKNOWN
    allowed, credentialed = terms.get("derived_weights", "ask"), bool(terms.get("credentialed", False))
    said = "\x1f".join((name, terms.get("license", ""), allowed, str(credentialed), text))
    slug = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split()) or "source"
    number = hashlib.blake2b(said.encode(), digest_size=3).hexdigest()
    title = origin.get("title") or name
    return Clause(f"{slug}-{number}", name, title, terms.get("license", ""), allowed, credentialed, text)


def unconfirmed(clauses: Iterable[Clause], confirmed: Iterable[str]) -> list[Clause]:
    given = set(confirmed)
    return [clause for clause in clauses if clause.id not in given]
