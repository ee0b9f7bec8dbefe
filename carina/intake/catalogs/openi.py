"""Open-I, the chest X-rays of Indiana University (Demner-Fushman et al., JAMIA 2016): 7,470 pictures, 3,955 reports.

ecgen-radiology/<n>.xml (or NLMCXR_reports.tgz as it comes) holds a report with its pictures and the MeSH headings that
readers gave it; the copy on Kaggle has indiana_reports.csv and indiana_projections.csv instead, which also says what is
lateral. The labels are the headings' first parts ("Opacity/lung/base" is Opacity), but for those that only name a
place. "normal" is No_Finding. A report without index terms ("No Indexing") is unknown throughout. One report is one
patient. Forms of the archive spell one picture CXR10_IM-0002-1001.png, 10_IM-0002-1001.dcm or ...dcm.png.
"""

from __future__ import annotations

import re
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from carina.data.labels import ABNORMAL, NO_FINDING, harmonize
from carina.errors import CarinaError
from carina.intake.catalogs.base import Catalog, Records, Terms
from carina.intake.catalogs.places import nothing_found
from carina.intake.catalogs.tables import add_label, find_table, one_hot, read_csv
from carina.intake.items import Labels

HOME = "https://openi.nlm.nih.gov/"
Report = tuple[str, list[str], list[tuple[str, str]]]  # number, MeSH headings, (picture, view)
NORMAL, UNREAD, POOR = "normal", "no indexing", "technical quality of image unsatisfactory"
# Number of the report, of the picture, and the ending of a file; one report repeats its number.
_PICTURE = re.compile(r"(?:CXR)?(\d+)_(?:\d+_)?(IM-[\w-]+)(?:\.dcm)?(\.(?:png|dcm|jpe?g))?", re.IGNORECASE)
PLACES = frozenset(
    (
        *("abdomen", "adipose tissue", "aorta", "aorta, thoracic", "blood vessels", "bone and bones", "cardiac shadow"),
        *("cervical vertebrae", "costophrenic angle", "diaphragm", "epicardial fat", "heart", "heart atria"),
        *("heart ventricles", "humerus", "lumbar vertebrae", "lung", "lymph nodes", "mediastinum", "pleura"),
        *("pulmonary artery", "ribs", "shoulder", "spine", "sulcus", "thoracic vertebrae", "thorax", "trachea"),
        *("trachea, carina",),
    )
)


def read(folder: Path) -> Records:
    kaggle = find_table(folder, "indiana_reports.csv")
    reports = _kaggle(kaggle, folder) if kaggle else (_parse(*report) for report in _reports(folder))
    rows, heads = [], []
    for uid, terms, pictures in reports:
        for picture, view in pictures:
            match = _PICTURE.fullmatch(picture)
            if match is None:
                raise CarinaError(f"{folder}: the picture '{picture}' of report {uid} is not named as in Open-I")
            rows.append((f"CXR{match[1]}_{match[2]}.png", uid, uid, view, ";".join(terms)))
            heads.append(sorted({" ".join(term.split("/")[0].split()).lower() for term in terms}))
    table = pd.DataFrame(rows, columns=["relative", "patient", "study", "view", "original"])
    return Records(table, _labels(heads), "its reports")


def locate(folder: Path, names: list[str]) -> list[str]:
    places: dict[str, str] = {}
    for path in sorted(folder.rglob("*IM-*")):
        match = _PICTURE.fullmatch(path.name)
        if match and match[3]:
            places.setdefault(f"CXR{match[1]}_{match[2]}.png", path.relative_to(folder).as_posix())
    if names and not any(name in places for name in names):
        raise nothing_found(folder, names[0])
    return [places.get(name, name) for name in names]


def _kaggle(path: Path, folder: Path) -> Iterator[Report]:
    headings = read_csv(path, ("uid", "MeSH"))
    projections = find_table(folder, "indiana_projections.csv")
    if projections is None:
        raise CarinaError(f"{folder} has indiana_reports.csv but no indiana_projections.csv; put it beside the other")
    pictures: dict[str, list[tuple[str, str]]] = {}
    table = read_csv(projections, ("uid", "filename", "projection"))
    for uid, name, projection in zip(table["uid"], table["filename"], table["projection"]):
        pictures.setdefault(uid, []).append((name, projection.strip()))
    for uid, text in zip(headings["uid"], headings["MeSH"]):
        yield uid, [term.strip() for term in text.split(";") if term.strip()], pictures.get(uid, [])


def _reports(folder: Path) -> Iterator[tuple[str, bytes]]:
    files = sorted([*folder.glob("ecgen-radiology/*.xml"), *folder.glob("*/ecgen-radiology/*.xml")])
    if files:
        for file in files:
            yield str(file), file.read_bytes()
        return
    archive = folder / "NLMCXR_reports.tgz"
    if not archive.is_file():
        raise CarinaError(
            f"{folder} has no ecgen-radiology/ with XML reports, no NLMCXR_reports.tgz and no indiana_reports.csv; "
            f"get one of them from {HOME}"
        )
    try:
        with tarfile.open(archive) as tar:
            for member in sorted(tar, key=lambda member: member.name):
                if member.isfile() and member.name.endswith(".xml"):
                    yield member.name, tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise CarinaError(f"{archive} cannot be read ({error}); download it again") from None


def _parse(name: str, text: bytes) -> Report:
    if b"<!ENTITY" in text:  # entities that refer to each other can fill the memory; no report has any
        raise CarinaError(f"{name} declares XML entities, which no report of Open-I does; remove it")
    try:
        root = ElementTree.fromstring(text)
        uid = root.find("uId").attrib["id"].removeprefix("CXR")
        pictures = [(node.attrib["id"], "") for node in root.iter("parentImage")]
    except (ElementTree.ParseError, AttributeError, KeyError):
        raise CarinaError(f"{name} is not a report of Open-I; remove it or download the reports again") from None
    return uid, [node.text.strip() for node in root.findall("MeSH/major") if node.text], pictures


def _labels(heads: list[list[str]]) -> Labels:
    apart = PLACES | {UNREAD, POOR}
    originals = sorted({head for found in heads for head in found} - apart - {NORMAL})
    names: list[str] = []
    for head in originals:
        if harmonize(head) not in names:
            names.append(harmonize(head))
    names.append(NO_FINDING)
    values = one_hot(([harmonize(head) for head in found if head not in apart] for found in heads), names)
    labels = Labels(names, values)
    normal = labels.column(NO_FINDING) == 1
    sick = np.array([any(head not in (NORMAL, UNREAD, POOR) for head in found) for found in heads], dtype=bool)
    labels = add_label(labels, ABNORMAL, np.where(normal, 0.0, np.where(sick, 1.0, np.nan)))
    # What was not indexed, or only as a bad picture, was not judged.
    labels.blank(~normal & ~sick)
    return labels


CATALOG = Catalog(
    name="openi",
    title="Open-I, Indiana University chest X-rays",
    homepage=HOME,
    terms=Terms(
        license="CC BY-NC-ND 4.0 (stated in every report)",
        url="https://creativecommons.org/licenses/by-nc-nd/4.0/",
        redistribution="ask",
        derived_weights="ask",
        credentialed=False,
        clause="Not commercial, with attribution; changed copies may not be passed on.",
        citation="Demner-Fushman D. et al., Preparing a collection of radiology examinations for distribution and "
        "retrieval, JAMIA 23(2), 2016",
    ),
    layout="ecgen-radiology/*.xml, NLMCXR_reports.tgz or indiana_reports.csv, and the pictures anywhere below",
    read=read,
    locate=locate,
)
