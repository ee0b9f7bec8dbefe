"""Montgomery County (Jaeger et al. 2014): 138 PA pictures, 58 with tuberculosis, masks of both lungs.

CXR_png/MCUCXR_0001_0.png (the last digit is 1 for tuberculosis), ClinicalReadings/MCUCXR_0001_0.txt, and
ManualMask/leftMask/ and ManualMask/rightMask/ with files of the same names.
"""

from __future__ import annotations

from pathlib import Path

from carina.intake.catalogs.base import Catalog, Records, Terms
from carina.intake.catalogs.places import by_name
from carina.intake.catalogs.readings import read_set

HOME = "https://lhncbc.nlm.nih.gov/LHC-publications/pubs/TuberculosisChestXrayImageDataSets.html"

TERMS = Terms(
    license="terms of the National Library of Medicine",
    url=HOME,
    redistribution="ask",
    derived_weights="ask",
    credentialed=False,
    clause="Open to research; publications cite the papers and acknowledge the source.",
    citation="Jaeger S. et al., Two public chest X-ray datasets for computer-aided screening of pulmonary diseases, "
    "Quantitative Imaging in Medicine and Surgery 4(6), 2014",
)


def read(folder: Path) -> Records:
    records = read_set(folder, "MCUCXR", "the Montgomery set", HOME)
    left, right = ({path.stem: path for path in folder.rglob(f"{side}Mask/*.png")} for side in ("left", "right"))
    for row, name in enumerate(records.table["relative"]):
        stem = name.rsplit(".", 1)[0]
        if stem in left and stem in right:
            records.masks[row] = [str(left[stem]), str(right[stem])]
    return records


CATALOG = Catalog(
    name="montgomery",
    title="Montgomery County chest X-ray set",
    homepage=HOME,
    terms=TERMS,
    layout="CXR_png/, ClinicalReadings/ and ManualMask/ (MontgomerySet)",
    read=read,
    locate=by_name(".png", ".dcm", skip=("ManualMask", "leftMask", "rightMask")),
)
