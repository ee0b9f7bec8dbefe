"""CLAIM 2024 and TRIPOD+AI, answered where the run knows: item numbers are the guidelines', words are ours.

Tejani et al., Checklist for Artificial Intelligence in Medical Imaging: 2024 update, Radiology: Artificial Intelligence
2024. Collins et al., TRIPOD+AI statement, BMJ 2024. Whoever submits a paper takes the wording from the originals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carina import __version__
from carina.evaluate.report import provenance
from carina.evaluate.report.document import Column, Section, Table, Text, told
from carina.evaluate.report.groups import origin_title
from carina.models.hub.few import counted

OPEN = "not known to carina: fill in"

# (number, what it asks, which answer it takes; empty: only the authors can know)
CLAIM: tuple[tuple[str, str, str], ...] = (
    ("1", "Title says that AI is studied, and of which kind", "kind"),
    ("2", "Structured abstract", ""),
    ("3", "Background, intended use and clinical role", "use"),
    ("4", "Aims and hypotheses", ""),
    ("5", "Prospective or retrospective", ""),
    ("6", "Goal of the study", ""),
    ("7", "Sources of the data", "sources"),
    ("8", "Which cases were let in and which were kept out", "eligibility"),
    ("9", "Preprocessing", "preprocessing"),
    ("10", "Subsets that were chosen", "subset"),
    ("11", "De-identification", "deidentification"),
    ("12", "Missing values", "missing"),
    ("13", "How images were acquired", "acquisition"),
    ("14", "Reference standard: definition", "reference"),
    ("15", "Reference standard: why this one", ""),
    ("16", "Reference standard: who annotated", ""),
    ("17", "Annotation of the test set", ""),
    ("18", "Agreement among and within annotators", ""),
    ("19", "How cases were dealt to the partitions", "partitions"),
    ("20", "At which level partitions are disjoint", "disjoint"),
    ("21", "Planned size of the test set", ""),
    ("22", "The model in detail", "model"),
    ("23", "Software with versions", "software"),
    ("24", "What the parameters began with", "initialization"),
    ("25", "Training in detail", "training"),
    ("26", "How the final model was chosen", "selection"),
    ("27", "Ensembles", "ensemble"),
    ("28", "Measures of performance", "measures"),
    ("29", "Uncertainty and significance", "uncertainty"),
    ("30", "Robustness and sensitivity", "robustness"),
    ("31", "Explanations", "explanations"),
    ("32", "Test on internal data", "internal"),
    ("33", "Test on external data", "external"),
    ("34", "Registration of a clinical trial", ""),
    ("35", "Numbers included and excluded", "flow"),
    ("36", "Who is in each partition", "people"),
    ("37", "Performance on all partitions and subgroups", "performance"),
    ("38", "Diagnostic accuracy with its precision", "accuracy"),
    ("39", "Analysis of failures", "failures"),
    ("40", "Limitations", ""),
    ("41", "Meaning for practice", ""),
    ("42", "Where protocol and further detail are found", "detail"),
    ("43", "Availability of software, model and data", "code"),
    ("44", "Funding and the funders' role", ""),
)
TRIPOD: tuple[tuple[str, str, str], ...] = (
    ("1", "Title names development or evaluation, population and outcome", "kind"),
    ("2", "Abstract after TRIPOD+AI for Abstracts", ""),
    ("3a", "Healthcare context and rationale", ""),
    ("3b", "Whom the model is for and who uses it", "use"),
    ("3c", "Known inequalities in health", ""),
    ("4", "Objectives", ""),
    ("5a", "Sources of data, for development and for evaluation", "sources"),
    ("5b", "Dates between which data were collected", ""),
    ("6a", "Setting and centers", ""),
    ("6b", "Eligibility", "eligibility"),
    ("6c", "Treatments", ""),
    ("7", "Preparation and quality control of the data", "preprocessing"),
    ("8a", "Outcome: definition", "reference"),
    ("8b", "Outcome: who judged it", ""),
    ("8c", "Outcome: blinding", ""),
    ("9a", "Predictors: choice", "predictors"),
    ("9b", "Predictors: definition", "preprocessing"),
    ("9c", "Predictors: who judged them", "judged"),
    ("10", "Sample size and its justification", ""),
    ("11", "Missing data", "missing"),
    ("12a", "How the data were used and divided", "partitions"),
    ("12b", "How predictors entered the model", "predictors"),
    ("12c", "Kind of model, its building and tuning", "training"),
    ("12d", "Differences between centers or clusters", "clusters"),
    ("12e", "Measures and plots of performance", "measures"),
    ("12f", "Updating of the model, such as recalibration", "updating"),
    ("12g", "How predictions were computed", "predictions"),
    ("13", "Class imbalance", "imbalance"),
    ("14", "Fairness: approach", "fairness"),
    ("15", "Output and thresholds", "output"),
    ("16", "How development and evaluation data differ", "differences"),
    ("17", "Ethics approval and consent", ""),
    ("18a", "Funding", ""),
    ("18b", "Conflicts of interest", ""),
    ("18c", "Protocol", ""),
    ("18d", "Registration", ""),
    ("18e", "Sharing of data", ""),
    ("18f", "Sharing of code", "code"),
    ("19", "Involvement of patients and public", ""),
    ("20a", "Flow of participants", "flow"),
    ("20b", "Who the participants are", "people"),
    ("20c", "Evaluation data beside development data", "differences"),
    ("21", "Participants and outcome events in each analysis", "events"),
    ("22", "The full model, and how to get it", "detail"),
    ("23a", "Performance with intervals, also of subgroups", "performance"),
    ("23b", "Performance across clusters", "clusters_found"),
    ("24", "Results of updating", "updated"),
    ("25", "Interpretation", ""),
    ("26", "Limitations", ""),
    ("27a", "Poor or missing input when the model is used", "input"),
    ("27b", "What users must do and know", ""),
    ("27c", "Next steps of research", ""),
)


def section(c: Mapping[str, Any]) -> Section:
    found = answers(c)
    parts, blocks = [], []
    for name, items in (("CLAIM 2024", CLAIM), ("TRIPOD+AI", TRIPOD)):
        rows = [[number, words, found.get(key) or OPEN] for number, words, key in items]
        known = sum(row[2] != OPEN for row in rows)
        parts.append(f"{name}: {known} of {len(rows)} answered from the run, {len(rows) - known} to be filled in")
        quiet = frozenset(number for number, row in enumerate(rows) if row[2] == OPEN)
        columns = [Column("Item"), Column("Asks"), Column("Answer")]
        blocks.append(Table(name, f"{name}, as far as the run knows", columns, rows, quiet=quiet))
    words = (
        "Item numbers are those of the guidelines, the wording is carina's: take theirs for a submission, and read every "
        "answer before you sign it."
    )
    return Section("Reporting checklists", [Text([". ".join(parts) + ".", words]), *blocks], figures=False)


def answers(c: Mapping[str, Any]) -> dict[str, str]:
    """What the run can say to the items; a key without a value is left out or empty."""
    r = c["result"]
    table, first = r["table"], r["table"][0] if r["table"] else None
    names = ", ".join(label.replace("_", " ") for label in r["labels"])
    people = dict(c["people"])
    test, train = people.get("Test"), people.get("Training")
    audited = [found["name"] for found in r.get("audits") or []]
    probability = r["score"] == "probability"
    origin = r.get("external") or {}
    kind = origin.get("kind")
    shift = r["kind"] == "classify" and bool(origin.get("shift"))
    groups = {row["variable"] for row in r.get("subgroups") or []}
    task = f"detection of findings ({names})" if r["kind"] == "classify" else "one-class anomaly detection"
    measures = ["AUROC", "average precision"]
    measures += ["sensitivity and specificity at fixed thresholds"] * any(row.get("sensitivity") for row in table)
    measures += ["Brier score, ECE and calibration lines"] * any(row.get("brier") for row in table)
    measures += ["decision curves"] * bool(r.get("decision_curves"))
    preparation = ", ".join(f"{key} {value}" for key, value in c["preparation"].items())
    found = {
        "kind": f"Deep learning on chest radiographs: {task}; this page evaluates, on split {r['split']}.",
        "use": "Research only, not a medical device; the clinical role is for the authors to state.",
        "sources": _sources(people),
        "eligibility": f"{_accepted(c['preparation'])} that carina prepare accepted; rows of split {r['split']}"
        + (f" that meet {r['where']}." if r["where"] else "."),
        "preprocessing": f"{preparation}; {c['input']}." if preparation else "",
        "subset": f"Rows were narrowed by: {r['where']}." if r["where"] else "No subset was chosen beyond the split.",
        "deidentification": "Identifiers were replaced by keyed hashes in preparation; this page holds none"
        + (", but shows images." if c["examples"] else " and no image."),
        "missing": f"{provenance.left_out(c)} {_uncertain(c['recipe'])}",
        "acquisition": _acquisition(test),
        "reference": "Labels as their sources published them; who found them, and how, is for the authors to add.",
        "partitions": f"{_dealt(r)} Labels used: {r['labels_used']}.",
        "disjoint": _disjoint(r),
        "model": c["model"],
        "software": ", ".join(f"{name} {version}" for name, version in c["versions"].items()),
        "initialization": f"{r['backbone']}; its pretext saw {r['pretext_saw']}.",
        "training": f"Mode {r['mode']}; every value stands under Recipe." if c["recipe"] else f"Mode {r['mode']}.",
        "selection": f"Weights: {c['recipe'].get('select', 'last')} step; thresholds from {r['thresholds_from']}.",
        "ensemble": f"A stack of {len(r['scales']['scales'])} scales, by finding; weights from {r['scales']['from']}."
        if r.get("scales")
        else "None.",
        "measures": f"{_and(measures)}; ROC and precision-recall curves.",
        "uncertainty": f"95 % intervals by {r['resamples']:,} resamples of patients; labels with few positives are marked.",
        "robustness": f"Audits: {_and(audited)}; see Audits." if {"robustness", "shortcut"} & set(audited) else "",
        "explanations": "Heat maps with lung outlines; see Examples." if c["examples"] else "",
        "internal": f"Yes: split {r['split']}, {r['patients']:,} patients." if kind == "internal" else "",
        "external": _external(kind, r),
        "flow": f"{r['images']:,} images of {r['patients']:,} patients were scored; steps and counts stand under Data.",
        "people": "Age, sex, view and source of training and test images stand under Data." if test and train else "",
        "performance": "Tables by label" + (f" and by {_and(sorted(groups))}." if groups else "; no subgroups."),
        "accuracy": f"{'Mean AUROC' if first['label'] == 'macro' else 'AUROC'} {told(first['auroc'])}; all labels under "
        "Discrimination."
        if first
        else "",
        "failures": "Missed findings and false alarms stand under Examples." if c["examples"] else "",
        "detail": "Recipe and environment on this page; the predictor is a folder that carina publish can share.",
        "code": f"carina {__version__}, Apache-2.0; whether model and data are shared is for the authors to add.",
        "predictors": "The image alone: pixels of the prepared radiograph; no clinical variable enters.",
        "judged": "Nobody: the input is the image itself.",
        "clusters": f"Figures within each {_and(sorted(groups & {'source', 'manufacturer'}))}; nothing in the model adapts "
        "to a site."
        if groups & {"source", "manufacturer"}
        else "",
        "clusters_found": "Under Subgroups, by source or manufacturer." if groups & {"source", "manufacturer"} else "",
        "updating": "Temperature and shift, fitted on half of these patients and judged on the other half."
        if origin.get("recalibration")
        else "None on these patients.",
        "updated": f"Before and after recalibration, under {origin_title(origin)}."
        if origin.get("recalibration")
        else "",
        "predictions": "By carina evaluate with the saved predictor; scores stand in predictions.parquet.",
        "imbalance": _imbalance(c["recipe"]),
        "fairness": f"Figures by {_and(sorted(groups))}{', the weakest group named' * bool(r['worst'])}; no constraint in "
        "training."
        if {"sex", "age"} & groups
        else "",
        "output": f"{'Probabilities' if probability else 'Distances; higher is worse'}; thresholds from "
        f"{r['thresholds_from']}.",
        "differences": "Share of positives in training and here; ages, sex, views and sources side by side under Data."
        if shift and test and train
        else "Ages, sex, views and sources of both side by side under Data."
        if test and train
        else "",
        "events": f"{c['units'].capitalize()} and positives by label under Discrimination; patients of whom a label is "
        "known under Data.",
        "input": "carina predict leaves out files that it cannot read or prepare, and says why.",
    }
    return {key: value for key, value in found.items() if value}


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _sources(people: Mapping[str, Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{name.lower()}: {', '.join(facts.get('source') or {}) or 'not recorded'}" for name, facts in people.items()
    )


def _accepted(preparation: Mapping[str, Any]) -> str:
    kept = {"frontal": "Frontal chest images", "chest": "Chest images of any view", "all": "Images of any kind"}
    return kept.get(preparation.get("keep", ""), "Images")


def _uncertain(recipe: Mapping[str, Any]) -> str:
    """What -1 counted as in training, for all labels or by label."""
    policy = recipe.get("uncertain")
    if policy is None:
        return "What uncertain labels counted as in training is not recorded."
    policies = policy if isinstance(policy, Mapping) else {"all labels": policy}
    if set(policies.values()) <= {"ignore"}:
        return "Nothing was imputed."
    listed = ", ".join(f"{label.replace('_', ' ')}: {value}" for label, value in policies.items())
    return f"In training uncertain labels were given a value ({listed}); in this test they were left out."


def _shared(r: Mapping[str, Any]) -> bool | None:
    """Whether a test patient or image was seen before; None where nobody knows."""
    found = r["overlap"]
    if not found or not found["known"]:
        return None
    return any(any(counts.values()) for counts in found["stages"].values())


def _dealt(r: Mapping[str, Any]) -> str:
    scored = "All rows were scored, whatever their partition" if r["split"] == "all" else f"Scored here: {r['split']}"
    if _shared(r) is False and not r["overlap"]["doubts"]:
        return f"{scored}; by patient: none of these was seen in training or for thresholds."
    return f"{scored}; whether by patient and before training is for the authors to state."


def _disjoint(r: Mapping[str, Any]) -> str:
    shared = _shared(r)
    if shared is None:
        return f"Not known. {r['overlap_sentence']}"
    if shared:
        return f"Not disjoint. {r['overlap_sentence']}"
    return f"{'In doubt' if r['overlap']['doubts'] else 'Patient'}. {r['overlap_sentence']}"


def _acquisition(test: Mapping[str, Any] | None) -> str:
    if not test or not test.get("view"):
        return ""
    views = ", ".join(f"{name} {counted(number)}" for name, number in test["view"].items())
    return f"Views: {views}; machines and exposure are for the authors to add."


def _external(kind: str | None, r: Mapping[str, Any]) -> str:
    if kind == "external":
        return f"Yes: {r['external']['sentence']}"
    return "No: these rows come from where the training rows come from." if kind == "internal" else ""


def _imbalance(recipe: Mapping[str, Any]) -> str:
    loss = recipe.get("loss")
    name = loss.get("name") if isinstance(loss, Mapping) else loss
    return (
        f"Loss in training: {name}; probabilities were calibrated afterwards where validation allowed." if name else ""
    )
