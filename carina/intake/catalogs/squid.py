"""SQUID's copy of CheXpert (Xiang et al., CVPR 2023): postero-anterior pictures at 256 px, normal or not, in folders.

train_256_pa, val_256_pa and our_test_256_pa, each with normal_256 and abnormal_256. Names do not say the patient.
"""

from __future__ import annotations

from carina.intake.catalogs import chexpert
from carina.intake.catalogs.base import Catalog
from carina.intake.catalogs.folders import by_folder

HOME = "https://github.com/tiangexiang/SQUID"
read, locate = by_folder("(?:our_)?(train|val|test)(?:_256)?(?:_pa)?", "normal(?:_256)?", "abnormal(?:_256)?", HOME)

CATALOG = Catalog(
    name="squid_chexpert",
    title="SQUID's split of CheXpert",
    homepage=HOME,
    terms=chexpert.CATALOG.terms,
    layout="train_256_pa/, val_256_pa/ and our_test_256_pa/ with normal_256/ and abnormal_256/",
    read=read,
    locate=locate,
    lineage=("chexpert",),
    split="train, val and our_test folders",
    patients="picture",
)
