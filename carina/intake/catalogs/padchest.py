"""PadChest (Bustos et al., Medical Image Analysis 2020): 160,861 pictures of 16-bit PNG, labels read or mined.

One table, PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv. Its column Labels is a list in Python's notation with
193 findings and blanks (194 texts in all). A quarter of the rows was labeled by physicians, the rest by a network from
the report. The archive has no official split.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from carina.data.labels import ABNORMAL, NO_FINDING, harmonize
from carina.errors import CarinaError
from carina.intake.catalogs.base import Catalog, Records, Terms
from carina.intake.catalogs.places import by_name
from carina.intake.catalogs.tables import add_label, need_table, one_hot, read_csv, sexes, to_numbers
from carina.intake.items import Labels

HOME = "https://bimcv.cipf.es/bimcv-projects/padchest/"
# A reader who names the kind does not also name the whole; without this the kind would count as its absence.
KIND_OF = {
    "Atelectasis": (
        *("Atelectasis_Basal", "Laminar_Atelectasis", "Lobar_Atelectasis", "Round_Atelectasis"),
        *("Segmental_Atelectasis", "Total_Atelectasis"),
    ),
    "Effusion": ("Loculated_Pleural_Effusion", "Loculated_Fissural_Effusion", "Hydropneumothorax"),
    "Pleural_Thickening": ("Apical_Pleural_Thickening", "Calcified_Pleural_Thickening"),
    "Pneumonia": ("Atypical_Pneumonia",),
    "Pneumothorax": ("Hydropneumothorax",),
    "Nodule": ("Multiple_Nodules",),
    "Mass": ("Pulmonary_Mass",),
    "Fracture": ("Clavicle_Fracture", "Humeral_Fracture", "Rib_Fracture", "Vertebral_Fracture"),
    "Granuloma": ("Calcified_Granuloma",),
    "Adenopathy": ("Calcified_Adenopathy", "Calcified_Mediastinal_Adenopathy"),
}
# Neither health nor disease: what was implanted or inserted, and remarks on the examination.
NO_DISEASE = frozenset(
    (
        *("unchanged", "exclude", "suboptimal study", "nipple shadow", "end on vessel", "external foreign body"),
        *(
            "NSG tube",
            "endotracheal tube",
            "tracheostomy tube",
            "chest drain tube",
            "gastrostomy tube",
            "nephrostomy tube",
        ),
        *(
            "ventriculoperitoneal drain tube",
            "catheter",
            "central venous catheter",
            "reservoir central venous catheter",
        ),
        *(f"central venous catheter via {vein} vein" for vein in ("jugular", "subclavian", "umbilical")),
        *(
            "pacemaker",
            "dual chamber device",
            "single chamber device",
            "dai",
            "electrical device",
            "metal",
            "prosthesis",
        ),
        *("suture material", "osteosynthesis material", "bone cement", "double J stent", "endoprosthesis"),
        *("aortic endoprosthesis", "humeral prosthesis", "mammary prosthesis", "artificial heart valve"),
        *("artificial aortic heart valve", "artificial mitral heart valve", "sternotomy"),
    )
)
_ENTRY = re.compile(r"'([^']*)'|\"([^\"]*)\"|\bnan\b")
_LIST = re.compile(rf"\[\s*(?:(?:{_ENTRY.pattern})[\s,]*)*\]")


def parse_labels(text: str) -> list[str] | None:
    """``['normal', ' pacemaker']`` -> names without blanks; None for a field that is blank; CarinaError for another.

    A parser of its own: a table from elsewhere is data, not Python.
    """
    text = text.strip()
    if text in ("", "nan"):
        return None
    if not _LIST.fullmatch(text):
        raise CarinaError(f"the label list {text[:60]!r} of PadChest is not of the form ['normal', 'nodule']")
    return [name for name in ((a or b).strip() for a, b in _ENTRY.findall(text)) if name]


def read(folder: Path) -> Records:
    path = need_table(folder, "padchest", HOME, "PADCHEST_chest_x_ray_images_labels_160K_*.csv", "PADCHEST_*.csv")
    columns = ("ImageID", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM", "StudyDate_DICOM", "Projection")
    table = read_csv(path, (*columns, "Labels"), usecols=lambda name: name in (*columns, "Labels"))
    year = to_numbers(table["StudyDate_DICOM"].str[:4])
    age = year - to_numbers(table["PatientBirth"])
    rows = pd.DataFrame(
        {
            "relative": table["ImageID"],
            "patient": table["PatientID"],
            "study": table["StudyID"],
            "view": table["Projection"].str.strip(),
            "sex": sexes(table["PatientSex_DICOM"]),
            "age": age,
            "year": year,
            "original": table["Labels"],
        }
    )
    codes, texts = pd.factorize(table["Labels"])  # a fifth of the texts are different
    return Records(rows, label_matrix([parse_labels(text) for text in texts]).take(codes), path.name)


def label_matrix(found: list[list[str] | None]) -> Labels:
    """All findings that occur, by their harmonized name; a row of blank labels is unknown throughout."""
    spelled = {name: harmonize(name) for name in sorted({name for names in found if names for name in names})}
    original = {target: name for name, target in spelled.items()}
    values = one_hot(([spelled[name] for name in names or []] for names in found), list(original))
    column = {name: values[:, i] for i, name in enumerate(original)}
    apart = {NO_FINDING, *map(harmonize, NO_DISEASE)}
    disease = np.any([column[name] for name in original if name not in apart], axis=0)
    for whole, kinds in KIND_OF.items():
        for kind in kinds:
            if whole in column and kind in column:
                column[whole] |= column[kind]
    normal = column.get(NO_FINDING, np.zeros(len(found))) == 1
    labels = Labels(list(original), values, list(original.values()))
    # "normal" may be said of one sentence of the report; a disease that stands beside it is there.
    labels = add_label(labels, ABNORMAL, np.where(disease, 1.0, np.where(normal, 0.0, np.nan)))
    labels.blank(np.array([not names for names in found]))
    return labels


CATALOG = Catalog(
    name="padchest",
    title="PadChest",
    homepage=HOME,
    terms=Terms(
        license="PadChest Dataset Research Use Agreement",
        url=HOME,
        redistribution="no",
        derived_weights="ask",
        credentialed=False,
        clause="Research only, not commercial, after registration; the pictures may not be passed on.",
        citation="Bustos A. et al., PadChest: a large chest x-ray image dataset with multi-label annotated reports, "
        "Medical Image Analysis 66, 2020",
    ),
    layout="PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv and the pictures, flat or in folders 0 ... 54",
    read=read,
    locate=by_name(".png", ".jpg"),
)
