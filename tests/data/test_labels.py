import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carina.data.labels import SMOOTH, SYNONYMS, abnormal_from, harmonize, to_targets
from carina.errors import CarinaError
from carina.finetune.recipe import FinetuneRecipe
from carina.recipes import build

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@given(st.text(max_size=40))
def test_every_text_has_a_name_that_recipes_can_hold(text):
    name = harmonize(text)
    assert NAME.fullmatch(name)
    assert harmonize(name) == name, "a harmonized name is its own"


@given(st.sampled_from(sorted(SYNONYMS)), st.booleans(), st.sampled_from(["_", " ", "  ", "-"]))
def test_spelling_does_not_matter_for_the_vocabulary(name, upper, joint):
    text = name.replace("_", joint)
    assert harmonize(text.upper() if upper else text.lower()) == name


@pytest.mark.parametrize(
    ("archives", "name"),
    [
        (["Effusion", "Pleural Effusion", "pleural effusion", "Pleural effusion"], "Effusion"),
        (["Infiltration", "Infiltrate", "infiltrates"], "Infiltration"),
        (["No Finding", "No finding", "Normal", "normal"], "No_Finding"),
        (["Pleural_Thickening", "Pleural thickening", "Pleural Thickening"], "Pleural_Thickening"),
        (["Edema", "pulmonary edema", "Pulmonary Edema"], "Edema"),
        (["ILD", "Lung Diseases, Interstitial"], "Interstitial_Lung_Disease"),
        (["Round(ed) Atelectasis", "round atelectasis"], "Round_Atelectasis"),
        (["COPD", "Pulmonary Disease, Chronic Obstructive"], "COPD"),
    ],
)
def test_what_means_the_same_has_one_name(archives, name):
    assert {harmonize(text) for text in archives} == {name}


@pytest.mark.parametrize(
    "different",
    [
        ["Opacity", "Lung Opacity", "Consolidation", "Infiltration", "increased density"],
        ["Lung Lesion", "Mass", "Nodule", "Nodule/Mass", "pulmonary mass", "Lung tumor"],
        ["Emphysema", "Subcutaneous Emphysema", "COPD", "COPD signs"],
        ["Fracture", "Rib fracture", "Clavicle fracture", "callus rib fracture"],
        ["Hernia", "hiatal hernia", "Hernia, Diaphragmatic"],
        ["Effusion", "pericardial effusion", "Pleural Other", "Pleural Thickening"],
    ],
)
def test_what_means_something_else_stays_apart(different):
    assert len({harmonize(text) for text in different}) == len(different)


def test_unknown_names_are_kept_in_the_form_of_the_house():
    texts = ["ground glass pattern", "NSG tube", "2nd rib", "Fibroadénome", "肺炎", "結節", ""]
    names = [harmonize(text) for text in texts]
    assert names[:4] == ["Ground_Glass_Pattern", "NSG_Tube", "Label_2nd_Rib", "Fibroadenome"]
    assert len(set(names)) == len(names), "names that ASCII cannot spell do not fall together"


def test_a_device_is_no_disease():
    nan = np.nan
    labels = {"No_Finding": [1, nan, nan, 1], "Support_Devices": [1, 1, 1, 0], "Mass": [0, nan, 1, 0]}
    result = abnormal_from({name: np.array(values) for name, values in labels.items()})
    np.testing.assert_array_equal(result, [0, nan, 1, 0])


# -- what uncertain counts as ---------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
IMAGES = [f"{number:016x}" * 2 for number in RNG.integers(0, 2**62, 400).tolist()]
RAW = RNG.choice(np.array([0, 1, -1, np.nan], dtype=np.float32), size=(400, 3))
NAMES = ["Edema", "Effusion", "Mass"]


@pytest.mark.parametrize(
    ("policy", "value"), [("ignore", np.nan), ("ones", 1), ("zeros", 0), ("soft:0.3", 0.3), ("soft:1", 1)]
)
def test_a_policy_changes_what_is_uncertain_and_nothing_else(policy, value):
    for policies in (policy, dict.fromkeys(NAMES, policy)):
        targets = to_targets(RAW, policies, labels=NAMES, images=IMAGES)
        np.testing.assert_array_equal(targets, np.where(RAW == -1, np.float32(value), RAW))


def test_smooth_targets_are_drawn_once_for_an_image_and_label():
    for policy, (low, high) in SMOOTH.items():
        targets = to_targets(RAW, policy, labels=NAMES, images=IMAGES, seed=3)
        drawn = targets[RAW == -1]
        assert low <= drawn.min() < low + 0.02 and high - 0.02 < drawn.max() <= high and len(np.unique(drawn)) > 250
        np.testing.assert_array_equal(targets[RAW != -1], RAW[RAW != -1])
        order = RNG.permutation(400)
        again = to_targets(
            RAW[order][:, ::-1], policy, labels=NAMES[::-1], images=[IMAGES[row] for row in order], seed=3
        )
        np.testing.assert_array_equal(again, targets[order][:, ::-1])
        other = to_targets(RAW, policy, labels=NAMES, images=IMAGES, seed=4)
        assert (other[RAW == -1] != drawn).mean() > 0.9


def test_policies_by_label_and_labels_without_one_are_ignored():
    targets = to_targets(RAW, {"Edema": "ones", "Mass": "zeros"}, labels=NAMES)
    uncertain = RAW == -1
    assert (targets[uncertain[:, 0], 0] == 1).all() and (targets[uncertain[:, 2], 2] == 0).all()
    assert np.isnan(targets[uncertain[:, 1], 1]).all()


def test_a_label_that_is_not_learned_is_told_with_the_nearest():
    with pytest.raises(CarinaError, match=r"'Efusion'.*did you mean 'Effusion'"):
        to_targets(RAW, {"Efusion": "ones"}, labels=NAMES)


@pytest.mark.parametrize(
    "wrong", ["uncertain=one", "uncertain=soft:1.2", "uncertain={Edema: soft}", "uncertain=soft:-1"]
)
def test_a_recipe_refuses_what_is_no_policy(wrong):
    with pytest.raises(CarinaError, match=r"uncertain: .* is no policy"):
        build("finetune", FinetuneRecipe, "classify", [wrong])
    assert build("finetune", FinetuneRecipe, "classify", ["uncertain.Edema=soft:.25"]).uncertain == {
        "Edema": "soft:.25"
    }
