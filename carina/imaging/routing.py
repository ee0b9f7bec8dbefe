"""Is this a frontal chest radiograph? The header's word first, then a router's probabilities, each with its reason.

Pham, Do and Nguyen, "DICOM Imaging Router" (ICCV Workshops 2021) sorts whole archives by body part from pixels; here
the header (DICOM PS3.3 C.7.3.1.1.1, C.8.1, and the body parts of PS3.16 Annex L) speaks first where it says anything,
because a technologist chose the words; pixels decide what it leaves open. Reasons hold words of the tables below and
nothing else of a header.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

from carina.errors import CarinaError, nearest

VIEWS = ("PA", "AP", "LATERAL")
LABELS = ("chest", *VIEWS)  # what a router may have learned
FAMILIAR = "familiar"  # 1: like the chests a router was shown, 0: unlike all of them
Wanted = Literal["frontal", "chest", "all"]

# A header that says CHEST may be the default of the workstation: pixels as sure as this are believed instead.
OVERRULE = 0.99


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# RF, OT and SC are missing on purpose: rooms for fluoroscopy and film scanners write them on plain radiographs too.
NO_RADIOGRAPHS = _words(
    """AR AU BDUS BI BMD CF CT DG DMS DOC ECG EPS ES EEG EMG GM HD IO IVOCT IVUS KER KO LEN LS M3D MG MR NM OAM OCT OP
    OPM OPT OPTBSV OPTENF OPV OSS PR PT PX REG RESP RTDOSE RTIMAGE RTPLAN RTRECORD RTSTRUCT RWV SEG SM SMR SR SRF STAIN
    TG US VA XA XC"""
)

# Only words that leave no doubt: unknown ones are no evidence. Plurals are formed below.
_CHEST = _words("CHEST CXR THORAX TORAX TORACE LUNG LUNGE PULMON HEART")
_PARTLY = _words("RIB WHOLEBODY BABYGRAM TRUNK TORSO")  # the chest among others, or exposed for bone
_ELSEWHERE = _words(
    """ABD ABDOMEN ACETABULUM ACJOINT ADRENAL ANKLE ANUS ARM AXILLA BACK BLADDER BRAIN BREAST BUTTOCK
    CALCANEUS CALF CARPUS CLAVICLE COCCYX COLON CRANIUM CSPINE CTSPINE DENTAL DUODENUM ELBOW ESOPHAGUS EXTREMITY EYE FACE
    FEMUR FIBULA FINGER FOOT FEET FOREARM FOREFOOT GALLBLADDER HAND HEAD HEEL HIP HUMERUS ILIUM INTESTINE JAW
    KIDNEY KNEE KUB LARYNX LEG LIMB LIVER LSPINE LSSPINE MANDIBLE MAXILLA METACARPAL METATARSAL MOUTH NECK NOSE ORBIT
    PANCREAS PATELLA PELVIS PHARYNX PROSTATE RADIUS RECTUM SACRUM SCAPULA SELLA SHOULDER SIJOINT SINUS SKULL SPINE SPLEEN
    SSPINE STERNUM STOMACH TEETH TOOTH TESTIS THIGH THUMB TIBFIB TIBIA TLSPINE TMJ TOE TSPINE ULNA UTERUS VERTEBRA WRIST
    ZYGOMA CADERA CODO COLUMNA CRANEO HOMBRO MANO MUNECA PIE RODILLA TOBILLO BECKEN FUSS HUEFTE KNIE SCHAEDEL SCHULTER
    WIRBELSAEULE"""
)
_BESIDE = _words(
    """ADULT BEDSIDE BILATERAL CHILD CR DX ERECT INFANT L LEFT MOBILE PED PEDIATRIC PEDS PORT PORTABLE R RIGHT SUPINE
    UPRIGHT VIEW VIEWS XR PA AP LAT LATERAL"""
)

_VIEW_WORDS = {
    "PA": "PA",
    "POSTEROANTERIOR": "PA",
    "AP": "AP",
    "ANTEROPOSTERIOR": "AP",
    "LATERAL": "LATERAL",
    "LAT": "LATERAL",
    "LL": "LATERAL",
    "RL": "LATERAL",
}
_OBLIQUE = _words("LAO RAO LPO RPO LLO RLO OBLIQUE OBL SWIMMERS")
_FRONTAL = _words("FRONTAL LLD RLD DECUBITUS")  # frontal, but from which side is not said


@dataclass(frozen=True)
class Route:
    """What is done with an image, and why.

    keep: it enters the store. view: PA, AP, LATERAL or "" (unknown). view_source: table, header, router or "".
    view_confidence: of a view that a router gave, in [0, 1]; NaN otherwise. chest: the router's probability in [0, 1],
    NaN without one. reason: words, the same for all images of one case, so that they can be counted.
    says_chest, says_frontal: what table and header say of it; None where they say nothing.
    """

    keep: bool
    view: str = ""
    view_source: str = ""
    view_confidence: float = math.nan
    chest: float = math.nan
    reason: str = "unknown"
    says_chest: bool | None = None
    says_frontal: bool | None = None


def by_header(facts: dict[str, Any], view: str = "") -> Route:
    """What table and header alone say.

    facts: those of `carina.imaging.dicom.Radiograph` (modality, body_part and view are read; all may be missing).
    view: what a table says, which wins over the header. An image is left out only for a modality that takes no
    radiographs or a body part other than the chest; `decide` adds the wanted views and the router.
    """
    modality = str(facts.get("modality") or "").upper()
    body = str(facts.get("body_part") or "")
    says_chest, words = _body_part(body)
    if modality in NO_RADIOGRAPHS:
        says_chest, reason = False, f"modality {modality} is no radiograph"
    else:
        reason = "unknown" if says_chest is None else f"body part {' '.join(words)}"

    named, frontal = view_of(str(facts.get("view") or ""))
    if not named and frontal is None:
        named, frontal = view_of(" ".join(part for part in _all_parts(body) if part in ("PA", "AP", "LAT", "LATERAL")))
    source = "header" if named else ""
    told, told_frontal = view_of(view)
    if told or told_frontal is not None:
        if told or frontal != told_frontal:
            if named and named != told:
                reason += f"; the header says {named}, the table {told or 'otherwise'}: the table was trusted"
            named, source = told, "table" if told else ""
        frontal = told_frontal
    return Route(says_chest is not False, named, source, reason=reason, says_chest=says_chest, says_frontal=frontal)


def view_of(text: str) -> tuple[str, bool | None]:
    """A view in any spelling of tables and ViewPosition -> (PA, AP, LATERAL or "", frontal or not, None unknown).

    Decubitus pictures are frontal; obliques (LAO, RPO ...) are neither frontal nor lateral. Words that contradict each
    other, as in "PA LAT", say nothing.
    """
    words = re.findall(r"[A-Z]+", re.sub(r"(POSTERO|ANTERO)[^A-Z]+", r"\1", text.upper()))
    if words == ["L"]:  # PadChest's lateral; beside other words it is a side
        return "LATERAL", False
    named = {_VIEW_WORDS[word] for word in words if word in _VIEW_WORDS}
    if "DECUBITUS" in words:  # "lateral decubitus" says how the patient lies, the beam is frontal
        named.discard("LATERAL")
    if not _OBLIQUE.isdisjoint(words):  # "AP oblique" too
        return "", False
    frontal = not _FRONTAL.isdisjoint(words)
    if len(named) > 1 or (frontal and "LATERAL" in named):
        return "", None
    if named:
        view = named.pop()
        return view, view != "LATERAL"
    return "", True if frontal else None


@lru_cache(maxsize=4096)
def _parts(token: str) -> tuple[str, ...] | None:
    """A run of letters as words of the tables: CHESTPA is CHEST, PA. None when it cannot be read whole."""
    if not token:
        return ()
    for end in range(len(token), 0, -1):
        head = token[:end]
        single = next((form for form in (head, head.removesuffix("S")) if form in _CHEST | _PARTLY | _ELSEWHERE), None)
        if single or head in _BESIDE:
            rest = _parts(token[end:])
            if rest is not None:
                return (single or head, *rest)
    return None


def _all_parts(text: str) -> list[str]:
    return [part for token in re.findall(r"[A-Z]+", text.upper()) for part in _parts(token) or ()]


def _body_part(text: str) -> tuple[bool | None, list[str]]:
    """(chest, not the chest or None, the known words that say so) of BodyPartExamined in any spelling."""
    found = list(dict.fromkeys(part for part in _all_parts(text) if part not in _BESIDE))
    kinds = {part in _CHEST for part in found}
    if len(kinds) != 1 or not _PARTLY.isdisjoint(found):
        return None, []
    return kinds.pop(), found


def decide(header: Route, scores: dict[str, float] | None, wanted: Wanted, reject_below: float) -> Route:
    """The last word on an image.

    header: of `by_header`. scores: a router's probabilities of `LABELS`, and `FAMILIAR`, any of which may be absent or
    NaN; None without a router. wanted: frontal chests, chests of any view, or all images (then nothing is left out, and
    the reason says what was found). reject_below: a router less sure than this, in [0, 1], is not believed.

    Where header and router disagree, a header that says "not the chest" is trusted (nobody types HIP by default); one
    that says CHEST is trusted unless the router is sure at `OVERRULE`; a view of table or header is trusted. The reason
    says so. Without any evidence an image is kept, its reason "unknown"; one that the router is unsure of, or that is
    unlike what it was shown, is left out; an unsure view is kept as unknown. A classifier alone cannot know what it was
    never shown: one trained on chests and hands takes a pelvis for a chest, and is sure of it.
    Raises CarinaError for settings or scores outside their range.
    """
    _check(scores, wanted, reject_below)
    known = {label: float(value) for label, value in (scores or {}).items() if not math.isnan(value)}
    chest = known.get("chest", math.nan)
    familiar = known.get(FAMILIAR, math.nan)
    keep, reasons = _chest(header, chest, familiar, reject_below)
    believed = {} if not keep or familiar < 0.5 else known
    route = _view(replace(header, chest=chest), believed, reject_below, reasons)
    if keep and wanted == "frontal":
        if route.view == "LATERAL":
            whose = {"table": "", "header": " (unvalidated)", "router": " (unvalidated)"}[route.view_source]
            keep, reasons = False, [*reasons, f"lateral view by the {route.view_source}{whose}"]
        elif route.says_frontal is False:
            keep, reasons = False, [*reasons, "oblique view"]
    elif keep and route.view == "LATERAL" and route.view_source != "table":
        reasons.append("lateral views are unvalidated")
    return replace(route, keep=keep or wanted == "all", reason="; ".join(reasons))


def _check(scores: dict[str, float] | None, wanted: str, reject_below: float) -> None:
    if wanted not in get_args(Wanted):
        choices = get_args(Wanted)
        raise CarinaError(f"'{wanted}' images cannot be wanted{nearest(wanted, choices)}: take {', '.join(choices)}")
    if not 0 <= reject_below <= 1:
        raise CarinaError(f"a router's confidence lies between 0 and 1, so {reject_below} cannot be its least")
    for label, value in (scores or {}).items():
        if not math.isnan(value) and not 0 <= value <= 1:
            raise CarinaError(f"the router's score {value} of {label} is no probability; use a classify predictor")


def _chest(header: Route, chest: float, familiar: float, reject_below: float) -> tuple[bool, list[str]]:
    sure = max(chest, 1 - chest) >= reject_below  # like all comparisons here, False for NaN
    strange = familiar < 0.5
    if header.says_chest is False:
        disagrees = sure and chest >= 0.5 and not strange
        return False, [header.reason, *["the router saw a chest: the header was trusted"] * disagrees]
    if header.says_chest:
        if 1 - chest >= max(OVERRULE, reject_below):
            return False, [header.reason, "the router saw no chest: the router was trusted, being almost certain"]
        if strange:
            return True, [header.reason, "unlike the chests that the router knows: the header was trusted"]
        disagrees = sure and chest < 0.5
        return True, [header.reason, *["the router saw no chest: the header was trusted"] * disagrees]
    rest = header.reason.removeprefix("unknown")  # a view on which header and table disagree
    if sure and chest < 0.5:
        return False, ["the router saw no chest" + rest]
    if strange:
        return False, ["unlike the chests that the router knows" + rest]
    if not math.isnan(chest):
        return sure, [("the router saw a chest" if sure else "the router is unsure whether this is a chest") + rest]
    return True, [header.reason if math.isnan(familiar) else "like the chests that the router knows" + rest]


def _view(route: Route, scores: dict[str, float], reject_below: float, reasons: list[str]) -> Route:
    """`route` with the router's view where nothing else names one; disagreement and doubt are added to `reasons`."""
    best, confidence = best_view(scores)
    sure = best != "" and confidence >= reject_below
    if route.view:
        if sure and best != route.view:
            reasons.append(f"view {route.view}, but the router saw {best}: the {route.view_source} was trusted")
        return route
    if route.says_frontal is False or scores.keys().isdisjoint(VIEWS):
        return route
    if not sure:
        reasons.append("view unsure")
        return route
    if best == "LATERAL" and route.says_frontal:
        reasons.append("called frontal, but the router saw LATERAL: the word was trusted")
        return route
    return replace(route, view=best, view_source="router", view_confidence=confidence)


def best_view(scores: dict[str, float]) -> tuple[str, float]:
    """The likeliest view and its probability, or ("", NaN) when no view is scored or none of them is likeliest.

    The heads of a router are independent, the views exclude each other: given that at most one of them holds, view i
    has the odds p_i / (1 - p_i) against none of them. So two high scores are a doubt, and so are only low ones.
    """
    odds = {view: p / max(1 - p, 1e-9) for view, p in scores.items() if view in VIEWS}
    best = max(odds, key=odds.__getitem__, default="")
    if not best or odds[best] < 1:
        return "", math.nan
    return best, odds[best] / (1 + sum(odds.values()))
