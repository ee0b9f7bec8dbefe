"""BMAD's chest radiographs (Bao et al., CVPR workshops 2024): the labeled pictures of RSNA in folders, normal or not.

train/good, valid/good, valid/Ungood, test/good and test/Ungood, some copies with img/ below. Ungood holds both of RSNA's
classes that are not normal. Pictures were dealt, not patients, so a patient of NIH may stand on both sides.
"""

from __future__ import annotations

from carina.intake.catalogs import rsna
from carina.intake.catalogs.base import Catalog
from carina.intake.catalogs.folders import by_folder

HOME = "https://github.com/DorisBao/BMAD"
read, locate = by_folder("(train|valid|test)", "good", "ungood", HOME)

CATALOG = Catalog(
    name="bmad_rsna",
    title="BMAD, chest X-rays of RSNA",
    homepage=HOME,
    terms=rsna.CATALOG.terms,
    layout="train/good, valid/good, valid/Ungood, test/good and test/Ungood",
    read=read,
    locate=locate,
    lineage=("rsna", "nih14"),
    split="train, valid (val) and test folders",
    patients="picture",
)
