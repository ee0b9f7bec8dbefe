import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carina.errors import CarinaError
from carina.imaging.dicom import Unreadable, read_radiograph
from carina.imaging.routing import FAMILIAR, LABELS, NO_RADIOGRAPHS, VIEWS, Route, best_view, by_header, decide, view_of


@pytest.mark.parametrize(
    ("modality", "body_part", "keep", "says", "reason"),
    [
        ("CR", "CHEST", True, True, "body part CHEST"),
        ("DX", "PORT CHEST", True, True, "body part CHEST"),
        ("DX", "CHEST PA", True, True, "body part CHEST"),
        ("DX", "CHEST_1_VIEW", True, True, "body part CHEST"),
        ("DX", "XR CHEST 2 VIEWS", True, True, "body part CHEST"),
        ("DX", "CHESTPA", True, True, "body part CHEST"),
        ("CR", "THORAX", True, True, "body part THORAX"),
        ("CR", "TORAX", True, True, "body part TORAX"),
        ("CR", "LUNGS", True, True, "body part LUNG"),
        ("CR", "HIP", False, False, "body part HIP"),
        ("CR", "LT HIP", False, False, "body part HIP"),
        ("DX", "RKNEE", False, False, "body part KNEE"),
        ("DX", "HANDS", False, False, "body part HAND"),
        ("DX", "TIBIAFIBULA", False, False, "body part TIBIA FIBULA"),
        ("DX", "ABDOMEN", False, False, "body part ABDOMEN"),
        ("DX", "T SPINE", False, False, "body part SPINE"),
        ("DX", "THORACIC SPINE", False, False, "body part SPINE"),
        ("DX", "C-SPINE", False, False, "body part SPINE"),
        ("CR", "RODILLA", False, False, "body part RODILLA"),
        # a chest among others, a chest exposed for bone, words nobody knows: pixels must decide
        ("DX", "RIBS", True, None, "unknown"),
        ("DX", "CHEST RIBS", True, None, "unknown"),
        ("DX", "CHESTABDOMEN", True, None, "unknown"),
        ("DX", "CHEST ABDOMEN", True, None, "unknown"),
        ("DX", "WHOLEBODY", True, None, "unknown"),
        ("DX", "UNKNOWN", True, None, "unknown"),
        ("DX", "JANE DOE", True, None, "unknown"),
        ("", "", True, None, "unknown"),
        ("OT", "", True, None, "unknown"),
        ("CT", "CHEST", False, False, "modality CT is no radiograph"),
        ("MG", "", False, False, "modality MG is no radiograph"),
        ("US", "HEART", False, False, "modality US is no radiograph"),
    ],
)
def test_body_parts_and_modalities_as_they_are_spelled(modality, body_part, keep, says, reason):
    route = by_header({"modality": modality, "body_part": body_part, "view": ""})
    assert (route.keep, route.says_chest, route.reason) == (keep, says, reason)
    assert math.isnan(route.chest) and math.isnan(route.view_confidence)


@pytest.mark.parametrize(
    ("text", "view", "frontal"),
    [
        *[(text, "PA", True) for text in ("PA", "pa", "POSTERO_ANTERIOR", "Postero-anterior", "PA ERECT", "PA LLD")],
        *[(text, "AP", True) for text in ("AP", "AP SUPINE", "AP_horizontal", "ANTEROPOSTERIOR", "AP AXIAL", "AP LLD")],
        *[(text, "LATERAL", False) for text in ("LL", "RL", "LATERAL", "LAT", "L", "XTABLE LATERAL")],
        *[(text, "", True) for text in ("LLD", "RLD", "Frontal", "LATERAL DECUBITUS")],
        *[(text, "", False) for text in ("LAO", "RPO", "AP OBLIQUE", "SWIMMERS")],
        *[(text, "", None) for text in ("", "PA LAT", "UNKNOWN", "R", "FRONTAL LATERAL")],
    ],
)
def test_views_as_they_are_spelled(text, view, frontal):
    assert view_of(text) == (view, frontal)


def test_the_table_wins_over_the_header_and_the_header_over_the_body_part():
    facts = {"modality": "DX", "body_part": "CHEST AP", "view": "PA"}
    assert (by_header(facts).view, by_header(facts).view_source) == ("PA", "header")
    assert by_header({**facts, "view": ""}).view == "AP"
    told = by_header(facts, "LATERAL")
    assert (told.view, told.view_source, told.says_frontal) == ("LATERAL", "table", False)
    assert told.reason == "body part CHEST; the header says PA, the table LATERAL: the table was trusted"
    assert by_header(facts, "Frontal").view == "PA"
    assert by_header({**facts, "view": "LL"}, "Frontal").view == ""


def test_a_reason_never_quotes_the_header():
    facts = {"modality": "DX", "body_part": "DOE JANE CHEST 19700101", "view": "PA DOE"}
    for view in ("", "AP MRS DOE"):
        for scores in (None, {"chest": 0.999, "PA": 0.01, "AP": 0.99}, {"chest": 0.001}):
            assert "DOE" not in decide(by_header(facts, view), scores, "frontal", 0.9).reason


CHEST, HIP, NOTHING = (by_header({"modality": "DX", "body_part": part}) for part in ("CHEST", "HIP", ""))


@pytest.mark.parametrize(
    ("header", "chest", "keep", "reason"),
    [
        (CHEST, None, True, "body part CHEST"),
        (CHEST, 0.97, True, "body part CHEST"),
        (CHEST, 0.5, True, "body part CHEST"),
        (CHEST, 0.05, True, "body part CHEST; the router saw no chest: the header was trusted"),
        (CHEST, 0.005, False, "body part CHEST; the router saw no chest: the router was trusted, being almost certain"),
        (HIP, None, False, "body part HIP"),
        (HIP, 0.01, False, "body part HIP"),
        (HIP, 0.999, False, "body part HIP; the router saw a chest: the header was trusted"),
        (NOTHING, None, True, "unknown"),
        (NOTHING, 0.97, True, "the router saw a chest"),
        (NOTHING, 0.03, False, "the router saw no chest"),
        (NOTHING, 0.85, False, "the router is unsure whether this is a chest"),
        (NOTHING, 0.15, False, "the router is unsure whether this is a chest"),
        (HIP, (0.999, 0), False, "body part HIP"),
        (CHEST, (0.999, 0), True, "body part CHEST; unlike the chests that the router knows: the header was trusted"),
        (NOTHING, (0.999, 0), False, "unlike the chests that the router knows"),
        (NOTHING, (0.001, 0), False, "the router saw no chest"),
        (NOTHING, (math.nan, 1), True, "like the chests that the router knows"),
        (NOTHING, (0.999, 1), True, "the router saw a chest"),
        (NOTHING, (0.6, 1), False, "the router is unsure whether this is a chest"),
    ],
)
def test_chest_or_not(header, chest, keep, reason):
    """A pair is the router's probability and whether the image is like the chests it was shown."""
    given = chest if isinstance(chest, tuple) else (chest,)
    scores = None if chest is None else dict(zip(("chest", FAMILIAR), given))
    route = decide(header, scores, "chest", 0.9)
    assert (route.keep, route.reason) == (keep, reason)
    assert decide(header, scores, "all", 0.9).keep
    assert route.chest == given[0] or (math.isnan(route.chest) and given[0] in (None, math.nan))


@pytest.mark.parametrize(
    ("told", "scores", "keep", "view", "source", "words"),
    [
        ("", {"PA": 0.99, "AP": 0.02}, True, "PA", "router", "unknown"),
        ("", {"PA": 0.6, "AP": 0.4}, True, "", "", "view unsure"),
        ("", {"PA": 0.99, "AP": 0.99}, True, "", "", "view unsure"),
        ("", {"PA": 0.02, "AP": 0.02}, True, "", "", "view unsure"),
        (
            "",
            {"PA": 0.01, "AP": 0.01, "LATERAL": 0.99},
            False,
            "LATERAL",
            "router",
            "lateral view by the router (unval",
        ),
        ("PA", {"PA": 0.01, "AP": 0.99}, True, "PA", "header", "but the router saw AP: the header was trusted"),
        ("LL", {"PA": 0.99, "AP": 0.01}, False, "LATERAL", "header", "lateral view by the header (unvalidated)"),
        ("LLD", {"LATERAL": 0.99}, True, "", "", "called frontal, but the router saw LATERAL"),
        ("LLD", {"AP": 0.99}, True, "AP", "router", "unknown"),
        ("LAO", {"PA": 0.99}, False, "", "", "oblique view"),
        ("AP", None, True, "AP", "header", "unknown"),
        ("", {"PA": 0.99, "AP": 0.02, "familiar": 0.0}, False, "", "", "unlike the chests"),
        ("", {"chest": math.nan, "PA": math.nan}, True, "", "", "unknown"),
    ],
)
def test_views_with_a_router(told, scores, keep, view, source, words):
    header = by_header({"view": told})
    route = decide(header, scores, "frontal", 0.9)
    assert (route.keep, route.view, route.view_source) == (keep, view, source) and words in route.reason
    assert decide(header, scores, "chest", 0.9).keep == ("unlike" not in words)
    assert math.isnan(route.view_confidence) == (source != "router")


def test_the_best_view_is_a_posterior_over_exclusive_views():
    """Enumerated: independent heads, of which at most one may be right."""
    scores = {"PA": 0.9, "AP": 0.3, "LATERAL": 0.2, "chest": 0.8}
    worlds = {"": math.prod(1 - scores[view] for view in VIEWS)}
    for view in VIEWS:
        worlds[view] = math.prod(scores[v] if v == view else 1 - scores[v] for v in VIEWS)
    name, confidence = best_view(scores)
    assert name == "PA" and confidence == pytest.approx(worlds["PA"] / sum(worlds.values()))
    assert best_view({"PA": 1.0})[1] == pytest.approx(1) and best_view({})[0] == ""


parts = st.sampled_from(["", "CHEST", "HIP", "PELVIS", "CHEST PA", "RIBS", "THORAX", "X"]) | st.text(max_size=40)
modalities = st.sampled_from(["CR", "DX", "CT", "MG", "OT", ""]) | st.text(max_size=16)
views = st.sampled_from(["", "PA", "AP", "LL", "LAO", "LLD", "PA LAT"]) | st.text(max_size=16)
facts = st.fixed_dictionaries({}, optional={"modality": modalities, "body_part": parts, "view": views})
probability = st.floats(0, 1) | st.just(math.nan) | st.sampled_from([0.0, 0.001, 0.5, 0.999, 1.0])
router = st.none() | st.dictionaries(st.sampled_from((*LABELS, FAMILIAR)), probability)


@given(facts, views, router, st.sampled_from(["frontal", "chest", "all"]), st.floats(0, 1))
def test_every_decision_is_sound(header, table, scores, wanted, reject_below):
    route = by_header(header, table)
    final = decide(route, scores, wanted, reject_below)
    chest = (scores or {}).get("chest", math.nan)
    assert final.reason and final.view in ("", *VIEWS) and final.view_source in ("", "table", "header", "router")
    assert (final.view == "") == (final.view_source == "")
    assert math.isnan(final.view_confidence) or 0 <= final.view_confidence <= 1
    assert final.chest == chest or (math.isnan(chest) and math.isnan(final.chest))
    if wanted == "all":
        assert final.keep
        return
    if route.says_chest is False:
        assert not final.keep
    if route.says_chest is None and (chest < 0.5 or (scores or {}).get(FAMILIAR, 1) < 0.5):
        assert not final.keep  # no word for it, and the pixels against it
    if not scores and wanted == "chest":
        assert final.keep == (route.says_chest is not False)
    if wanted == "frontal" and final.keep:
        assert final.view != "LATERAL" and final.says_frontal is not False
    if final.view_source == "router":
        assert final.view_confidence >= reject_below
    if not route.keep:
        assert header.get("modality", "").upper() in NO_RADIOGRAPHS or "body part" in route.reason


@pytest.mark.parametrize(
    ("wanted", "reject_below", "scores", "words"),
    [
        ("frontals", 0.9, None, "did you mean 'frontal'"),
        ("chest", 1.5, None, "between 0 and 1"),
        ("chest", 0.9, {"chest": 3.2}, "no probability"),
    ],
)
def test_mistakes_are_said(wanted, reject_below, scores, words):
    with pytest.raises(CarinaError, match=words):
        decide(Route(True), scores, wanted, reject_below)


@pytest.mark.real
def test_headers_of_real_files(real_data):
    """No chest is left out by its header, every hip is; the rest says nothing of itself."""
    table = pd.read_csv(real_data / "dicom" / "labels.csv", dtype=str, keep_default_na=False)
    seen = 0
    for row in table.itertuples():
        try:
            radiograph = read_radiograph(real_data / "dicom" / row.path)
        except Unreadable:
            continue
        route = decide(by_header(radiograph.facts), None, "frontal", 0.9)
        seen += 1
        said = row.body_part_examined_tag
        assert route.keep == (row.body_part != "hip") and route.view == row.view, row.path
        assert route.reason == (f"body part {said}" if said else "unknown"), row.path
    assert seen >= 20
