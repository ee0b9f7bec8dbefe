"""Synthetic radiographs: the same for the same numbers, and their truth is true."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carina.errors import CarinaError
from carina.imaging.phantom import FINDINGS, VIEWS, drawn_findings, phantom
from carina.imaging.phantom_anatomy import patient_of

# Pixels that the detector's blur and the turn of the frame can carry a change beyond the drawn lesion.
REACH = 4


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * pixels + 1,) * 2, np.uint8)) > 0


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    patient=st.integers(0, 10**6),
    study=st.integers(0, 9),
    image=st.integers(0, 9),
    size=st.sampled_from([16, 33, 64, 130, 256]),
    view=st.sampled_from([None, *VIEWS]),
    findings=st.none() | st.sets(st.sampled_from(FINDINGS)),
)
def test_the_contract_holds_for_any_numbers(seed, patient, study, image, size, view, findings):
    given_ = {"size": size, "view": view, "findings": findings}
    first, second = (phantom(seed, patient, study, image, **given_) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes() and first.markers == second.markers
    assert first.image.dtype == np.float32 and first.image.shape == (size, size)
    assert np.isfinite(first.image).all() and first.image.min() >= 0 and first.image.max() <= 1
    assert first.image.max() - first.image.min() > 0.4
    assert first.lungs.dtype == bool and 0.05 < first.lungs.mean() < 0.7
    assert first.view in VIEWS and (view is None or first.view == view)
    assert first.sex in "FM" and type(first.age) is int and 18 <= first.age <= 90
    assert list(first.labels) == list(FINDINGS)
    assert {name for name, present in first.labels.items() if present} == set(first.lesions)
    if findings is not None:
        assert set(first.lesions) == findings
    for name, mask in first.lesions.items():
        assert mask.dtype == bool and mask.shape == (size, size)
        if name != "Cardiomegaly":
            assert not (mask & ~first.lungs).any()
    for _, x0, y0, x1, y1 in first.markers:
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", FINDINGS)
def test_a_lesion_changes_its_own_pixels_and_no_others(name, view):
    contrast = []
    for patient in range(8):
        normal = phantom(4, patient, view=view, findings=())
        ill = phantom(4, patient, view=view, findings=(name,))
        mask = ill.lesions[name]
        assert mask.any()
        changed = ill.image != normal.image
        if name == "Cardiomegaly":
            # The outline holds the patient's own heart, which was there before; what is new is the rim.
            new = mask & normal.lungs
            assert new.any()
            # Below the mask the heart shows a little through the dome of the diaphragm; above and beside it, never.
            rows, columns = np.nonzero(mask)
            assert not changed[: rows.min() - REACH].any()
            assert (
                not changed[:, : columns.min() - 4 * REACH].any() and not changed[:, columns.max() + 4 * REACH :].any()
            )
        else:
            new = mask
        contrast.append(float((ill.image - normal.image)[new].mean()))
        assert changed[new].mean() > 0.9
        # Beyond the mask only the soft rim of the lesion is left (its faintest parts lie outside the mask).
        outside = ~grown(mask, REACH)
        assert np.abs(ill.image - normal.image)[outside].mean() < 0.006
        if name in ("Opacity", "Nodule"):
            assert not changed[~grown(normal.lungs, REACH)].any()
        if name == "Nodule":
            assert not changed[outside].any()
        assert ill.markers == normal.markers
    sign = -1 if name == "Pneumothorax" else 1
    assert sign * np.mean(contrast) > 0.02
    # From subtle to clear: patients differ.
    assert max(contrast) - min(contrast) > 0.01


def test_lungs_are_darker_than_what_lies_between_them_and_below():
    for patient in range(10):
        drawn = phantom(7, patient, findings=(), view=("PA", "AP")[patient % 2], marker=False)
        rows, columns = np.nonzero(drawn.lungs)
        middle = np.zeros_like(drawn.lungs)
        top, bottom, center = rows.min(), rows.max(), int(columns.mean())
        middle[(top + bottom) // 2 : bottom, center - 6 : center + 6] = True
        assert drawn.image[drawn.lungs].mean() < drawn.image[middle & ~drawn.lungs].mean() - 0.15
        # The left dome stands lower and the heart lies to the patient's left: there the lung field is smaller.
        assert drawn.lungs[:, :center].sum() > drawn.lungs[:, center:].sum()


def test_anatomy_is_the_patients_and_pose_is_the_images():
    first, again, other_study = (phantom(2, 11, study, image, findings=()) for study, image in ((0, 0), (0, 1), (1, 0)))
    assert {(p.sex, p.age) for p in (first, again, other_study)} == {(first.sex, first.age)}
    assert not np.array_equal(first.image, again.image) and not np.array_equal(first.image, other_study.image)
    assert patient_of(2, 11) == patient_of(2, 11) != patient_of(2, 12)

    # The ratio of the two lung fields and their aspect belong to the patient; pose moves and scales them a little.
    def shape(seed_patient: int, image: int) -> np.ndarray:
        lungs = phantom(2, seed_patient, 0, image, findings=(), view="PA", marker=False).lungs
        rows, columns = np.nonzero(lungs)
        return np.array([np.ptp(columns) / np.ptp(rows), lungs.sum() / (np.ptp(columns) * np.ptp(rows))])

    shapes = np.array([[shape(patient, image) for image in range(3)] for patient in range(12)])
    within, between = shapes.var(axis=1).mean(axis=0), shapes.mean(axis=1).var(axis=0)
    assert (between > 3 * within).all()


def test_a_finding_stays_where_it_is_between_studies_and_changes_in_strength():
    centers, areas = [], []
    for study in range(4):
        mask = phantom(9, 3, study, findings=("Opacity",), view="PA").lesions["Opacity"]
        lungs = phantom(9, 3, study, findings=(), view="PA").lungs
        rows, columns = np.nonzero(lungs)
        at = np.argwhere(mask).mean(axis=0)
        centers.append((at - (rows.min(), columns.min())) / (np.ptp(rows), np.ptp(columns)))
        areas.append(mask.sum())
    assert np.ptp(centers, axis=0).max() < 0.12
    assert len(set(areas)) > 1


def test_markers_lie_in_their_boxes_and_are_the_only_difference():
    texts = set()
    for patient in range(24):
        marked, bare = (
            phantom(1, patient, size=192, findings=(), marker=marker, view=("PA", "AP")[patient % 2])
            for marker in (True, False)
        )
        assert marked.markers and not bare.markers
        inside = np.zeros((192, 192), bool)
        for text, x0, y0, x1, y1 in marked.markers:
            box = slice(round(y0 * 192), round(y1 * 192)), slice(round(x0 * 192), round(x1 * 192))
            inside[box] = True
            texts.add(text)
            assert marked.image[box].max() > bare.image[box].max() + 0.05 or marked.image[box].max() > 0.9
        different = marked.image != bare.image
        assert different[inside].any() and not different[~grown(inside, 2)].any()
        assert (np.abs(marked.image - bare.image)[~inside] < 0.2).all()
        side = marked.markers[0]
        # L is at the picture's right: a radiograph is seen from the front.
        assert (side[1] > 0.5) == (side[0] == "L")
    assert {"L", "R"} <= texts


def test_draws_follow_the_stated_shares():
    shown = [drawn_findings(0, patient) for patient in range(2000)]
    normal = sum(not names for names in shown) / 2000
    assert 0.5 <= normal < 0.68
    for name in FINDINGS:
        assert 0.08 < sum(name in names for names in shown) / 2000 < 0.3
    views = [phantom(3, patient, size=16, findings=()).view for patient in range(120)]
    assert 0.45 < views.count("PA") / 120 < 0.75 and views.count("LATERAL") < 18


def test_a_smaller_picture_shows_the_same():
    large, small = (phantom(5, 8, size=size, findings=("Nodule",), view="PA", marker=False) for size in (256, 64))
    reduced = cv2.resize(large.image, (64, 64), interpolation=cv2.INTER_AREA)
    assert np.corrcoef(reduced.ravel(), small.image.ravel())[0, 1] > 0.98
    share = cv2.resize(large.lungs.astype(np.float32), (64, 64), interpolation=cv2.INTER_AREA) > 0.5
    assert (share & small.lungs).sum() / (share | small.lungs).sum() > 0.93


@pytest.mark.parametrize(
    "given_, words",
    [
        ({"size": 8}, "16 to 4096"),
        ({"view": "pa"}, "no view 'pa'"),
        ({"findings": ("Nodul",)}, "did you mean 'Nodule'"),
        ({"findings": "Nodule"}, "a collection"),
    ],
)
def test_mistakes_end_in_a_sentence(given_, words):
    with pytest.raises(CarinaError, match=words):
        phantom(0, 0, **given_)


@pytest.mark.real
def test_grays_lie_where_those_of_real_radiographs_lie(real_data):
    """Not a likeness, only that the pictures are neither washed out nor black and white beside real ones."""
    files = sorted((real_data / "nih_cxr14" / "images512").iterdir())[::40]
    read = (cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) for file in files)
    real = np.array([cv2.resize(image, (128, 128), interpolation=cv2.INTER_AREA) / 255 for image in read])
    synthetic = np.array([phantom(0, patient, size=128).image for patient in range(24)])
    for statistic in (np.mean, np.std):
        low, high = np.percentile(statistic(real, axis=(1, 2)), (2, 98))
        assert low < np.median(statistic(synthetic, axis=(1, 2))) < high
