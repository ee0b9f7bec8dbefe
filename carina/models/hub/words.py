"""What cards say in words of settings and names: how a picture is prepared, how labels came about, what a method is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# How the labels of an archive were made, by the name of its catalog; after its own publication.
LABELED = {
    "bmad_rsna": "normal or not, from the reading of RSNA's challenge",
    "chexpert": "mined from radiology reports by rules, by study; what a report does not mention is unknown",
    "cxrlt": "mined from radiology reports, by study, with rarer findings added",
    "jsrt": "nodules confirmed by CT, chosen by radiologists",
    "kermany": "normal or pneumonia, graded by two physicians; folders of the archive",
    "mimic": "mined from radiology reports by rules, by study; what a report does not mention is unknown",
    "montgomery": "tuberculosis, from the clinical reading",
    "nih14": "mined from radiology reports by text processing; No_Finding means none of fourteen mined findings, not normal",
    "openi": "index terms that people gave to reports",
    "padchest": "a quarter by physicians, the rest mined from reports by a network",
    "rsna": "boxes of opacities by radiologists; “not normal” without opacity is a class of its own",
    "shenzhen": "tuberculosis, from the clinical reading",
    "siim": "masks of pneumothorax by radiologists",
    "squid_chexpert": "normal or not, from CheXpert's mined labels",
    "vindr": "three radiologists a training picture, five in consensus a test picture",
}
METHODS = {
    "anatpaste": "AnatPaste (Sato et al. 2023, doi 10.1016/j.isci.2023.107086)",
    "barlow": "Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230)",
    "byol": "BYOL (Grill et al. 2020, arXiv 2006.07733)",
    "cutpaste": "CutPaste (Li et al. 2021, arXiv 2104.04015)",
    "dino": "DINO (Caron et al. 2021, arXiv 2104.14294)",
    "dinov2": "DINOv2 (Oquab et al. 2023, arXiv 2304.07193)",
    "mae": "MAE (He et al. 2021, arXiv 2111.06377)",
    "moco": "MoCo v2 (Chen et al. 2020, arXiv 2003.04297)",
    "mocov3": "MoCo v3 (Chen et al. 2021, arXiv 2104.02057)",
    "nsa": "NSA (Schlüter et al. 2021, arXiv 2109.15222)",
    "patches": "patch contrast, related to DenseCL (Wang et al. 2020, arXiv 2011.09157)",
    "simclr": "SimCLR (Chen et al. 2020, arXiv 2002.05709)",
    "simmim": "SimMIM (Xie et al. 2021, arXiv 2111.09886)",
    "swav": "SwAV (Caron et al. 2020, arXiv 2006.09882)",
    "vicreg": "VICReg (Bardes et al. 2021, arXiv 2105.04906)",
}
SETTINGS = {
    "window": {
        "auto": "the header's VOI LUT or window where it shows something, else the robust range (0.5 % to 99.5 %) of more "
        "than 8 bits and the full range of 8",
        "header": "the header's VOI LUT or window, else the full range",
        "percentile": "the robust range (0.5 % to 99.5 %) inside the collimated area",
        "full": "the full stored range",
    },
    "for_processing": {"reject": "", "log": "the logarithm of raw detector data"},
    "frames": {"reject": "", "first": "the first of several frames"},
    "equalize": {"none": "no equalization", "clahe": "CLAHE (8 x 8 tiles, clip limit 2)"},
    "markers": {
        "keep": "side markers are kept",
        "inpaint": "side markers outside the lungs are painted over",
        "clip": "side markers outside the lungs are clipped to the range of the rest",
    },
    "fit": {
        "pad": "padded with black to a square",
        "stretch": "stretched to a square, whatever the aspect",
        "crop": "the central square",
    },
}


def prepared(record: Mapping[str, Any], sides: Iterable[int]) -> str:
    """How a radiograph becomes an image of these weights."""
    chosen = {**record["photometry"], **record["geometry"]}
    said = (SETTINGS.get(key, {}).get(value, f"{key}={value}") for key, value in chosen.items())
    shown = ", ".join(f"{side} x {side}" for side in sides)
    return (
        "One channel in [0, 1], dense tissue bright, frontal views. Gray: " + "; ".join(filter(None, said)) + f"; then "
        f"shrunk to {shown} px by an area filter. Other gray, an inverted picture or another frame gives other numbers: "
        "where a header is at hand let carina read the file."
    )


def methods(pretexts: Mapping[str, float]) -> str:
    """The methods of a pretraining and their weights."""
    shown = [(METHODS.get(name, name), weight) for name, weight in pretexts.items()]
    return " and ".join(f"{name}" + (f" with weight {weight:g}" if len(shown) > 1 else "") for name, weight in shown)


def labeled(origins: Mapping[str, Any], sources: Iterable[str]) -> list[str]:
    """How the labels of every source came about, lines of a list."""
    unknown = "not recorded: the publisher should say who or what gave the labels"
    known = {name: LABELED.get(name) for name in sources if (origins.get(name, {}).get("terms") or {}).get("license")}
    return [f"* {name}: {known.get(name) or unknown}." for name in sources]
