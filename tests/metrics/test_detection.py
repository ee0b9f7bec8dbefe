"""Boxes and marks: overlaps, FROC and JAFROC against their definitions written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carina.errors import CarinaError
from carina.metrics.detection import (
    boxes_of,
    froc,
    hit_rate,
    jafroc,
    jafroc_difference,
    match,
    overlaps,
    sensitivity_at,
    sensitivity_interval,
)


def test_overlaps_by_counting_pixels():
    rng = np.random.default_rng(0)
    start, size = rng.integers(0, 12, (6, 2)), rng.integers(1, 8, (6, 2))
    boxes = np.concatenate([start, start + size], axis=1)

    def filled(box):
        canvas = np.zeros((20, 20), bool)
        canvas[box[1] : box[3], box[0] : box[2]] = True
        return canvas

    for criterion in ("iou", "iobb"):
        found = overlaps(boxes[:3], boxes[3:], criterion)
        for i in range(3):
            for j in range(3):
                a, b = filled(boxes[i]), filled(boxes[3 + j])
                expected = (a & b).sum() / ((a | b).sum() if criterion == "iou" else a.sum())
                assert found[i, j] == pytest.approx(expected)
    assert overlaps([[0, 0, 2, 2]], [[0, 0, 1.5, 1.5], [1.5, 0, 3, 3]], "center").tolist() == [[1.0, 0.0]]
    with pytest.raises(CarinaError, match="ends where it begins"):
        overlaps([[0, 0, 0, 1]], [[0, 0, 1, 1]])


def images(seed, n=30):
    """Marks on a line of unit boxes: a mark k lies on lesion k or beside all of them."""
    rng = np.random.default_rng(seed)
    there, found, scores = [], [], []
    for _ in range(n):
        lesions = rng.integers(0, 3)
        there.append(np.array([[4 * k, 0, 4 * k + 1, 1] for k in range(lesions)], float).reshape(-1, 4))
        marks = rng.integers(0, 5)
        place = rng.integers(0, 6, marks)
        found.append(np.array([[4 * k, 0, 4 * k + 1, 1] for k in place], float).reshape(-1, 4))
        scores.append(np.round(rng.normal(size=marks) + (place < lesions), 1))
    return found, scores, there


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_froc_and_jafroc_by_their_definitions(seed):
    found, scores, there = images(seed)
    marks = match(found, scores, there, np.arange(30))
    if not len(marks.lesions) or not marks.normal.any():
        return
    lesions, best_alarm, all_alarms = [], [], []
    for boxes, values, truth in zip(found, scores, there):
        alarms = []
        own = {k: -np.inf for k in range(len(truth))}
        for box, value in zip(boxes, values):
            k = int(box[0] // 4)
            if k in own:
                own[k] = max(own[k], value)
            else:
                alarms.append(value)
        lesions += own.values()
        all_alarms += alarms
        if not len(truth):
            best_alarm.append(max(alarms, default=-np.inf))
    pairs = [1.0 if y > x else 0.5 if y == x else 0.0 for x in best_alarm for y in lesions]
    assert jafroc(marks)[0] == pytest.approx(np.mean(pairs))
    rates, hits, thresholds = froc(marks)
    for rate, hit, threshold in zip(rates[1:], hits[1:], thresholds[1:]):
        assert hit == pytest.approx(np.mean(np.array(lesions) >= threshold))
        assert rate == pytest.approx(np.sum(np.array(all_alarms) >= threshold) / 30)
    assert (
        hit_rate(marks) == np.mean(np.isfinite(lesions)) and (np.diff(rates) >= 0).all() and (np.diff(hits) >= 0).all()
    )
    allowed = [h for r, h in zip(rates, hits) if r <= 0.5]
    assert sensitivity_at(marks, 0.5) == max(allowed)


def test_intervals_and_the_paired_difference():
    found, scores, there = images(1, 120)
    marks = match(found, scores, there, np.arange(120))
    value, low, high = jafroc(marks)
    assert low < value < high
    point, below, above = sensitivity_interval(marks, 1.0, 500)
    assert below <= point <= above and below < above
    better = [s + 3 * np.array([b[0] // 4 < len(t) for b in f]) for f, s, t in zip(found, scores, there)]
    gap = jafroc_difference(match(found, better, there, np.arange(120)), marks)
    assert gap[0] > 0 and gap[1] > 0 and gap[3] < 0.05
    assert jafroc_difference(marks, marks) == (0.0, 0.0, 0.0, 1.0)


def test_a_second_mark_on_a_lesion_is_no_alarm_and_nothing_found_is_no_lesion():
    box = np.array([[0, 0, 1, 1.0]])
    marks = match([np.repeat(box, 2, axis=0), np.empty((0, 4))], [[1.0, 2.0], []], [box, box], ["a", "b"])
    assert marks.lesions.tolist() == [2.0, -np.inf] and not len(marks.alarms) and hit_rate(marks) == 0.5


def test_boxes_of_a_heat_map():
    heat = np.zeros((10, 20))
    heat[2:4, 5:9], heat[8, 15] = 1.0, 0.6
    boxes, scores = boxes_of(heat)
    assert boxes.tolist() == [[0.25, 0.2, 0.45, 0.4], [0.75, 0.8, 0.8, 0.9]] and scores.tolist() == [1.0, 0.6]
    assert not len(boxes_of(np.zeros((4, 4)))[0])
