import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carina.data.labels import SYNONYMS, abnormal_from, harmonize

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
