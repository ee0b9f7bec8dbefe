"""What the cards of backbones and predictors share: their sections, as lines of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from carina import __version__
from carina.models.hub.clauses import Clause
from carina.models.hub.few import FEW, counted
from carina.models.hub.words import METHODS, labeled, methods

NOT_A_DEVICE = (
    "This is research software output, **not a medical device**. It has not been cleared by any authority and must not "
    "be used to diagnose, triage or treat."
)
NO_LICENSE = "Not chosen yet: the owner of the data and weights must choose one before anything is uploaded."
WEIGHTS = {"yes": "may be published", "no": "may not be published", "ask": "only with the owners' consent"}
WATTS = {"cpu": 100, "cuda": 400}  # a busy desktop processor; a data-center GPU with its share of the machine
HUB_LICENSES = {
    "apache-2.0", "mit", "openrail", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0",
    "unlicense", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0", "other",
}  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What the moment of publication adds to a record.

    results: Markdown tables of evaluations. audits: entries of their `audits` (name, sentence). formats: file or package ->
    what it gives. confirmed: clauses that the publisher confirmed. environment: of the run. backbone: what a predictor
    began with, where its name is public. rows_chosen: by a condition. watts: of one process, None for the usual figure
    of its device.
    """

    license: str | None = None
    repo: str = "ORG/NAME"
    results: Sequence[str] = ()
    audits: Sequence[Mapping[str, Any]] = ()
    formats: Mapping[str, str] = field(default_factory=dict)
    confirmed: Sequence[Clause] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    backbone: str = "BACKBONE"
    rows_chosen: bool = False
    watts: float | None = None


NOTHING_MORE = Told()


def front_matter(library: str, tags: list[str], told: Told, task: str | None = None) -> list[str]:
    """What the hub reads: task is one of its own names, where the weights do what it means by that."""
    head: dict[str, Any] = {"library_name": library, "tags": [*tags, "chest-x-ray", "carina"]}
    head |= {"pipeline_tag": task} if task else {}
    head |= {"base_model": told.backbone.removeprefix("hub:")} if told.backbone.startswith("hub:") else {}
    if told.license:
        known = told.license.lower() in HUB_LICENSES
        own = {"license": "other", "license_name": told.license}
        head |= {"license": told.license.lower()} if known else own
    return ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---"]


def warnings_of(record: Mapping[str, Any]) -> list[str]:
    warnings = []
    if record["synthetic"]:
        warnings.append("The corpus is **synthetic**: phantoms drawn from a seed. It says nothing about patients.")
    if record["transductive"]:
        warnings.append(
            "**Transductive**: rows outside the training split were read, so later tests are not independent."
        )
    if "pretexts" in record and record["labels_used"] != "none":
        warnings.append(f"Labels were used {record['labels_used']}.")
    return [line for warning in warnings for line in (f"> {warning}", "")]


def repeat(spec: Any) -> str:
    return f".repeat(1, {spec.channels}, 1, 1)" if spec.channels > 1 else ""


def normalized(spec: Any) -> str:
    mean, std = spec.mean[0], spec.std[0]
    if len(set(spec.mean)) > 1 or len(set(spec.std)) > 1:
        mean, std = (f"torch.tensor({list(v)}).view(-1, 1, 1)" for v in (spec.mean, spec.std))
    return f"(x - {mean}) / {std}"


def numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values))


def other_uses(told: Told, carina: str) -> list[str]:
    if not told.formats:
        return []
    rows = [f"| {name} | {what} |" for name, what in told.formats.items()]
    return ["| by | what it gives |", "| --- | --- |", *rows, f"| carina | `{carina}` |", ""]


def purpose(intended: str) -> list[str]:
    return [
        "## Intended and out-of-scope use",
        "",
        f"Intended: {intended}.",
        "",
        "Out of scope: clinical use of any kind, decisions about a person, other body parts, lateral views and age groups "
        "unless the data below hold them, images prepared otherwise, the re-identification of persons, and claims about a "
        "hospital whose own images were not measured.",
        "",
    ]


def source_table(data: Mapping[str, Any]) -> list[str]:
    """A row a source, or what an earlier carina recorded of all together."""
    rows = data.get("by_source") or ({counts(data["source"]): data} if "view" in data else {})
    return [
        "| source | images | patients | views | sex | age (years) |",
        "| --- | ---: | ---: | --- | --- | --- |",
        *(
            f"| {name} | {row['images']:,} | {row['patients']:,} | {counts(row['view'])} | {counts(row['sex'])} | "
            f"{_age(row)} |"
            if len(rows) == 1 or row["patients"] >= FEW
            else f"| {name} | {counted(None)} | {counted(None)} | | | |"
            for name, row in rows.items()
        ),
    ] if rows else ["Sources and persons were not recorded."]  # fmt: skip


def counts(values: Mapping[str, int | None]) -> str:
    return ", ".join(f"{name} {counted(number)}" for name, number in values.items()) or "unknown"


def _age(row: Mapping[str, Any]) -> str:
    """An earlier carina kept the youngest and the oldest, which are not told."""
    if row["age_median"] is None or row["patients"] < FEW:
        return "unknown or too few"
    low, high = row.get("age_percentiles") or (None, None)
    between = "" if low is None else f", 5th to 95th percentile {low:.0f} to {high:.0f}"
    return f"median {row['age_median']:.0f}{between}"


def label_table(data: Mapping[str, Any]) -> list[str]:
    """Counts of labels and how they came about; what their readers or text miners missed is missing in them too."""
    if not data.get("labels"):
        return []
    return [
        "### Labels",
        "",
        "As the owners of the sources published them; what their readers or text miners missed is missing here:",
        "",
        *labeled(data.get("origins", {}), data["source"]),
        "",
        "| label | positive | negative | uncertain | unknown |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(f"| {name} | " + " | ".join(f"{n:,}" for n in row.values()) + " |" for name, row in data["labels"].items()),
        "",
    ]


def pretraining(facts: Mapping[str, Any]) -> list[str]:
    """What the backbone of a predictor was pretrained on, and how."""
    data, training = facts["data"], facts.get("training", {})
    steps = (
        f"{training['steps']:,} steps, {training['images_seen']:,} images seen, " if "images_seen" in training else ""
    )
    return [
        "### Pretraining of the backbone",
        "",
        f"{data['images']:,} images of {data['patients']:,} patients; method: "
        f"{methods(facts.get('pretexts', {})) or 'not recorded'}; began with: {facts.get('init', 'not recorded')}; labels "
        f"used: {facts.get('labels_used', 'not recorded')}; {steps}{training.get('hours', 0):.2f} hours on "
        f"{training.get('world_size', 1)} process(es).",
        "",
        *source_table(data),
        "",
    ]


def terms(origins: Mapping[str, Any], confirmed: Sequence[Clause]) -> list[str]:
    lines = [terms_line(name, origin, confirmed) for name, origin in origins.items()]
    return ["### Terms of the sources", "", "As carina knows them; the owner's own text decides.", "",
            *(lines or ["* Not recorded."]), ""]  # fmt: skip


def stores(record: Mapping[str, Any]) -> list[str]:
    hashes = ", ".join(record.get("store_hashes") or []) or "not recorded"
    shown = "pixels of the largest scale and settings; `carina inspect STORE` shows them"
    return [f"Fingerprints of the stores ({shown}): {hashes}.", ""]


def terms_line(name: str, origin: Mapping[str, Any], confirmed: Sequence[Clause] = ()) -> str:
    """What the owners of a source allow, a line of a list."""
    said = next((f" The publisher confirmed clause {c.id}." for c in confirmed if c.source == name), "")
    terms = origin.get("terms") or {}
    if not terms.get("license"):
        return f"* {name}: upstream terms are not known to carina; the publisher must check them.{said}"
    parents = f"; drawn from {', '.join(origin['lineage'])}" if origin.get("lineage") else ""
    access = "; credentialed access" if terms.get("credentialed") else ""
    cited = f" Cite: {terms['citation']}." if terms.get("citation") else ""
    return (
        f"* {name}: {origin['title']}{parents}; license: {terms['license']}{access}; derived weights: "
        f"{WEIGHTS[terms['derived_weights']]}. {terms['clause']}{said}{cited}"
    )


def which_weights(weights: str) -> str:
    return {"last": "last step", "ema": "average over the steps (EMA)", "teacher": "teacher at the last step"}[weights]


def effort(training: Mapping[str, Any], told: Told) -> str:
    hours, world = training.get("hours", 0.0), training.get("world_size", 1)
    device = str(told.environment.get("device", "cpu")).split(":")[0]
    watts = told.watts or WATTS.get(device, WATTS["cuda"])
    source = "the publisher's figure" if told.watts else "a usual figure"
    energy = hours * world * watts / 1000
    shown = f"about {energy:.2g} kWh" if energy >= 0.001 else "under 0.001 kWh"
    took = f"{hours:.2f} hours" if hours >= 0.01 else "under 0.01 hours"
    return (
        f"{took} on {world} process(es) ({device}); energy {shown}, an estimate from hours x {watts:g} W a "
        f"process ({source}), not measured"
    )


def watched(watch: Mapping[str, Any] | None) -> list[str]:
    if not watch:
        return []
    names = (("knn_auroc", "macro AUROC of neighbors"), ("probe_auroc", "macro AUROC of a probe"), ("rankme", "RankMe"))
    figures = [f"{words} {watch[name]:.3g}" for name, words in names if watch.get(name) is not None]
    return [f"* Watched while it trained: {watch['verdict']}" + "".join(f", {figure}" for figure in figures)]


def results(told: Told, of_what: str = "") -> list[str]:
    lines = ["## Results", "", *([of_what, ""] if of_what and told.results else [])]
    for table in told.results or ["Not evaluated yet: nothing is known here of what these weights are worth."]:
        lines += [table, ""]
    lines += ["## Audits and known shortcuts", ""]
    if told.audits:
        lines += [f"* {audit['name']}: {audit['sentence']}" for audit in told.audits]
    else:
        lines += ["Not audited: whether it reads the disease or something that goes with it (view, machine, markers, the "
                  "frame of the picture) is unknown."]  # fmt: skip
    return [*lines, ""]


def limits(record: Mapping[str, Any]) -> list[str]:
    kept = "Queues, prototypes, decoders and every memory of features stay with the owner"
    if remembers(record):
        kept = "Beyond that, the scorer holds features of single patients"
    return [
        "## Limits",
        "",
        "* Memorization: networks trained on patients' images can memorize parts of them, and whoever holds the weights may "
        f"learn whether a given image was among them. {kept}; nothing here was tested against such attacks.",
        "* Performance differs between hospitals, machines, views and groups of patients; measure it on your own.",
        *(["* Figures on synthetic images say nothing about patients."] if record["synthetic"] else []),
        "",
    ]


def remembers(record: Mapping[str, Any]) -> bool:
    return any(member.get("scorer", {}).get("memory") for member in record.get("members", ()))


def citing(pretexts: Mapping[str, float]) -> list[str]:
    lines = [
        f"* carina {__version__}: self-supervised pretraining, few-label fine-tuning and honest evaluation for chest X-rays",
        "* the sources above, by the citation at each",
        *(f"* {METHODS[name]}" for name in pretexts if name in METHODS),
    ]
    return ["## How to cite", "", *lines, ""]


def license_section(license: str | None, upstream: str) -> list[str]:
    began = f" The weights that training began with are under: {upstream}." if upstream else ""
    return ["## License", "", f"{license or NO_LICENSE}{began}", ""]


def stack_lines(info: Mapping[str, Any]) -> list[str]:
    """Of a stack: its members and how much each counts, by finding."""
    scales = [member["scale"] for member in info["members"]]
    if len(scales) == 1:
        return []
    return [
        f"* A stack of {len(scales)} scales, the weighted mean of their probabilities; weights come from "
        f"{info['stack_from']}",
        "",
        "| finding | " + " | ".join(f"{scale} px" for scale in scales) + " |",
        "| --- |" + " ---: |" * len(scales),
        *(f"| {label} | " + " | ".join(f"{w:.2f}" for w in row) + " |" for label, row in info["stack"].items()),
    ]
