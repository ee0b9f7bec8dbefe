"""Labels: 1 present, 0 absent, NaN unknown, -1 uncertain; policies turn them into targets when training starts."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import AfterValidator

from carina.draws import Draws, sample_codes
from carina.errors import CarinaError, nearest
from carina.imaging.routing import LABELS as ROUTING_LABELS

VALUES = {"ignore": np.nan, "ones": 1.0, "zeros": 0.0}
SMOOTH = {"smooth_ones": (0.55, 0.85), "smooth_zeros": (0.0, 0.3)}  # between which targets are drawn


def _policy(name: str) -> str:
    soft = re.fullmatch(r"soft:(\d*\.?\d+|\d+\.)", name)
    if name not in (*VALUES, *SMOOTH) and not (soft and float(soft[1]) <= 1):
        raise ValueError(
            f"'{name}' is no policy for uncertain labels; give {', '.join((*VALUES, *SMOOTH))} or soft:P with a target P "
            "from 0 to 1"
        )
    return name


def _policies(given: str | dict[str, str]) -> str | dict[str, str]:
    for name in given.values() if isinstance(given, dict) else [given]:
        _policy(name)
    return given


# what -1 counts as: a policy for all labels, or by label, where those that are not named are ignored
Uncertain = Annotated[str | dict[str, str], AfterValidator(_policies)]
ABNORMAL = "abnormal"
NO_FINDING = "No_Finding"
SUPPORT_DEVICES = "Support_Devices"

# The vocabulary: what archives call one and the same finding. Kept apart on purpose, because a positive of one is not
# a positive of the other:
#   Opacity (any place, Open-I), Lung_Opacity (any lung opacity) and Consolidation (one kind of it);
#   Lung_Lesion (CheXpert: a nodule, a mass or more), Nodule, Mass (any), Pulmonary_Mass and VinDr's Nodule_Mass;
#   Hernia (NIH, CXR-LT: any) and Hiatal_Hernia; Fracture and its places; Emphysema and Subcutaneous_Emphysema;
#   COPD (a diagnosis) and COPD_Signs (what PadChest sees); Enlarged_Cardiomediastinum, Mediastinal_Enlargement and
#   Cardiomegaly; Aortic_Enlargement (VinDr), Aortic_Elongation (PadChest) and Tortuous_Aorta;
#   Aortic_Atheromatosis and Aortic_Calcification; Pulmonary_Hypertension and its arterial and venous kinds.
SYNONYMS: dict[str, tuple[str, ...]] = {
    NO_FINDING: ("no finding", "no findings", "normal"),
    ABNORMAL: ("abnormal",),
    "Aortic_Calcification": ("calcification of the aorta",),
    "Atelectasis": ("atelectases", "pulmonary atelectasis"),
    "Azygos_Lobe": (),
    "Bulla": ("bullas", "bullae"),
    "Cardiomegaly": (),
    "Cavitation": ("lung cavity",),
    "Consolidation": (),
    "COPD": ("pulmonary disease, chronic obstructive", "chronic obstructive pulmonary disease"),
    "Edema": ("pulmonary edema", "oedema", "pulmonary oedema"),
    "Effusion": ("pleural effusion", "pleural effusions"),
    "Emphysema": ("pulmonary emphysema", "emphysemas"),
    "Enlarged_Cardiomediastinum": (),
    "Enlarged_Pulmonary_Artery": ("enlarged pa", "pulmonary artery enlargement"),
    # NIH means fibrosis of the lung by its short word.
    "Fibrosis": ("pulmonary fibrosis",),
    "Fracture": ("fractures", "fractures, bone"),
    "Granuloma": (),
    "Heart_Failure": ("heart insufficiency",),
    "Hernia": (),
    "Hiatal_Hernia": ("hernia, hiatal",),
    "Infiltration": ("infiltrate", "infiltrates"),
    "Interstitial_Lung_Disease": ("ild", "lung diseases, interstitial"),
    "Lung_Lesion": (),
    "Lung_Opacity": (),
    "Mass": (),
    "Nodule": (),
    "Nodule_Mass": ("nodule/mass",),
    "Pectus_Carinatum": ("pectum carinatum",),
    "Pectus_Excavatum": ("pectum excavatum", "funnel chest"),
    "Pleural_Other": (),
    "Pleural_Thickening": (),
    "Pneumomediastinum": ("mediastinal emphysema",),
    "Pneumonia": (),
    "Pneumoperitoneum": ("pneumoperitoneo",),
    "Pneumothorax": (),
    "Pulmonary_Hypertension": ("hypertension, pulmonary",),
    "Round_Atelectasis": ("round(ed) atelectasis",),
    "Subcutaneous_Emphysema": (),
    SUPPORT_DEVICES: (),
    "Tortuous_Aorta": (),
    "Tuberculosis": (),
}


def _words(name: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.findall(r"[A-Za-z0-9]+", plain)


def _key(name: str) -> str:
    return " ".join(_words(name)).lower()


_KNOWN = {_key(other): name for name, others in SYNONYMS.items() for other in (name, *others)}
_KNOWN |= {_key(name): name for name in ROUTING_LABELS}  # a router is asked for its labels by these very names


def harmonize(name: str) -> str:
    """The vocabulary's name for a finding, whatever its archive calls it; of the form ``[A-Za-z][A-Za-z0-9_]*``.

    A name that no archive shares becomes Title_Case with underscores; capitals inside a word (COPD, NSG) stay. The
    result is its own harmonized name.
    """
    words = _words(name)
    known = _KNOWN.get(" ".join(words).lower())
    if known:
        return known
    if not words:  # nothing that ASCII can spell: still a name, and another one for every text
        return "Label_" + hashlib.blake2b(name.encode(errors="replace"), digest_size=4).hexdigest().upper()
    text = "_".join(word[0].upper() + word[1:] for word in words)
    return text if text[0].isalpha() else f"Label_{text}"


def to_targets(
    raw: np.ndarray,
    uncertain: Uncertain = "ignore",
    *,
    labels: Sequence[str] | None = None,
    images: Sequence[str] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Stored labels (N, L) as targets (float32, same shape): -1 becomes NaN, or what the policy says.

    `ignore`, `ones` and `zeros` are U-Ignore, U-Ones and U-Zeros of Irvin et al., CheXpert (AAAI 2019); `smooth_ones`
    and `smooth_zeros` draw from U(0.55, 0.85) and U(0, 0.3), once for an image and label (Pham et al., arXiv
    1911.06475); `soft:P` is P. labels: the columns' names, which policies by label and smooth ones need; images: the
    rows' image_ids, which smooth ones need. Raises CarinaError for a policy of a label that is not there.
    """
    targets = np.where(raw == -1, np.float32(np.nan), raw).astype(np.float32)
    if not isinstance(uncertain, dict) and uncertain not in SMOOTH:
        targets[raw == -1] = _value(uncertain)
        return targets
    assert labels is not None, "policies by label, and those that draw, need the labels' names"
    names = list(labels)
    policies = uncertain if isinstance(uncertain, dict) else dict.fromkeys(names, uncertain)
    for label, policy in policies.items():
        if label not in names:
            raise CarinaError(
                f"uncertain names the label '{label}', which is not among those that are learned"
                f"{nearest(label, names)}; they are {', '.join(names)}"
            )
        column = names.index(label)
        rows = raw[:, column] == -1
        if policy in SMOOTH:
            assert images is not None, "policies that draw need the image_ids"
            codes = sample_codes([image for image, row in zip(images, rows) if row])
            targets[rows, column] = Draws(seed, 0, codes).part("uncertain").uniform(label, *SMOOTH[policy])
        else:
            targets[rows, column] = _value(policy)
    return targets


def _value(policy: str) -> float:
    return float(policy.removeprefix("soft:")) if policy.startswith("soft:") else VALUES[policy]


def abnormal_from(labels: dict[str, np.ndarray]) -> np.ndarray | None:
    """`abnormal` from No_Finding and the findings: No_Finding 1 -> 0, any finding 1 -> 1, else NaN; None without it.

    A tube or a wire is no finding: CheXpert's labeler gives No_Finding beside Support_Devices (Irvin et al. 2019).
    """
    if NO_FINDING not in labels:
        return None
    normal = labels[NO_FINDING] == 1
    apart = (NO_FINDING, ABNORMAL, SUPPORT_DEVICES)
    findings = [value == 1 for name, value in labels.items() if name not in apart]
    result = np.full(len(normal), np.nan, dtype=np.float32)
    result[normal] = 0
    if findings:
        result[np.any(findings, axis=0) & ~normal] = 1
    else:
        result[labels[NO_FINDING] == 0] = 1
    return result
