"""The report: one file, nothing loaded, nothing leaked, and honest about what is synthetic or unknown."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_curve

from carina.evaluate.report import build_report, figures, page
from carina.metrics.intervals import patient_bootstrap
from carina.metrics.resampling import patient_codes, patient_resamples

NASTY = "<script>alert('label')</script>"
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Collects text and images, and holds that every tag is closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.images, self.text = [], set(), [], ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def figures(self) -> list[bytes]:
        return [base64.b64decode(image["src"].split(",", 1)[1]) for image in self.images]


@pytest.fixture(scope="module")
def content():
    rng, count = np.random.default_rng(0), 160
    patients = np.repeat(np.arange(count // 2), 2)
    frames, rows = [], []
    for label, share in (("Effusion", 0.4), (NASTY, 0.05), ("Fracture", 0.0)):
        target = (np.arange(count) < share * count).astype(float)
        score = 1 / (1 + np.exp(-(target + rng.normal(size=count))))
        ids = {
            "image_id": [f"secretimage{i}" for i in range(count)],
            "patient_id": [f"secretpatient{p}" for p in patients],
        }
        frames.append(pd.DataFrame(ids | {"seed": 0, "label": label, "target": target, "score": score}))
        auroc, ap = (
            patient_bootstrap(target, score, patients, m, resamples=200) for m in ("auroc", "average_precision")
        )
        row = {"label": label, "n": count, "positives": int(target.sum()), "note": auroc.reason}
        rows.append(row | {"auroc": auroc.to_dict(), "ap": ap.to_dict()})
    image = np.linspace(0, 1, 48 * 40).reshape(48, 40)
    lungs = np.zeros((48, 40), bool)
    lungs[10:30, 8:30] = True
    return {
        "title": "A & B <i>compared</i>",
        "metrics": [*rows, {**rows[0], "label": "macro"}],
        "predictions": pd.concat(frames),
        "examples": [
            {"image": image, "heat": image**2, "lungs": lungs, "caption": "Effusion, case seven"},
            {"image": image, "heat": None, "lungs": None, "caption": "plain"},
        ],
        "data_flow": [{"what": "Rows in the store", "images": 1234, "patients": 80, "note": ""}],
        "recipe": {"store": "/home/jane/data/nih-store", "optimizer": {"rate": 0.1, "betas": (0.9, 0.99)}},
        "environment": {"python": "3.11", "device": {"name": "CPU"}},
        "warnings": [f"Read from C:\\Users\\jane\\x.csv {NASTY}"],
        "how_to_cite": "https://example.org/carina/cite",
    }


def read(tmp_path, content):
    return Reader(build_report(tmp_path, content).read_text(encoding="utf-8"))


def test_is_one_file_that_loads_and_runs_nothing(tmp_path, content):
    html = build_report(tmp_path, content).read_text(encoding="utf-8")
    found = Reader(html)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "script" not in found.tags and "link" not in found.tags and NASTY not in html
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in found.images)
    assert not re.search(r"url\(|@import", html)
    assert all(b"<script" not in data for data in found.figures())
    assert build_report(tmp_path, content).read_text(encoding="utf-8") == html


def test_headline_comes_before_curves_and_curves_before_details(tmp_path, content):
    text = read(tmp_path, content).text
    title = "A & B <i>compared</i>"
    order = [title, "mean AUROC", "Results", "ROC curves", "Calibration", "Examples", "Recipe", "How to cite"]
    places = [text.rindex(word) for word in order]
    assert places == sorted(places)
    value = content["metrics"][0]["auroc"]
    assert f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})" in text


def test_holds_no_identifier_and_no_path(tmp_path, content):
    path = build_report(tmp_path, content)
    everything = path.read_bytes() + b"".join(Reader(path.read_text(encoding="utf-8")).figures())
    assert b"secret" not in everything and b"jane" not in everything
    text = Reader(path.read_text(encoding="utf-8")).text
    assert "nih-store" in text and "x.csv" in text and "https://example.org/carina/cite" in text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/data/a/b.csv", "b.csv"),
        ("store=/data/a", "store=a"),
        ("[~/x/y, /p/q/]", "[y, ]"),
        ("1/10/100 % n/a AUROC/AP", "1/10/100 % n/a AUROC/AP"),
        ("hub:org/name", "hub:org/name"),
        ("http://a.b/c/d", "http://a.b/c/d"),
    ],
)
def test_only_the_last_name_of_a_path_is_kept(text, kept):
    assert page._printable({"key": [text]}) == {"key": [kept]}


def test_synthetic_marks_every_figure(tmp_path, content):
    plain, marked = (read(tmp_path, content | {"synthetic": flag}) for flag in (False, True))
    assert "synthetic" not in plain.text.lower()
    assert len(plain.images) == len(marked.images) == 2 * 4 + 2
    for before, after, image in zip(plain.figures(), marked.figures(), marked.images):
        assert "synthetic" in image["alt"].lower() and before != after
        if image["src"].startswith("data:image/svg"):
            assert b"synthetic" in after and b"synthetic" not in before
    assert "nothing here is a clinical result" in marked.text


def test_says_what_is_unknown_or_cannot_be_estimated(tmp_path, content):
    found = read(tmp_path, content)
    assert "cannot be excluded" in found.text and "not recorded" in found.text
    assert "interval not estimable" in found.text and "one class only" in found.text
    assert not any("Fracture" in image["alt"] for image in found.images)
    overlap = {"sentence": "Three test patients were seen.", "counts": {"seen": 3}}
    assert "Three test patients were seen." in read(tmp_path, content | {"overlap": overlap}).text


def test_anomaly_scores_are_distances_and_runs_are_apart(tmp_path, content):
    one = content["predictions"].query("label == 'Effusion'")
    runs = pd.concat([one.assign(seed=s, score=one["score"] * (s + 5)) for s in range(2)])
    anomaly = {"title": "Anomalies", "kind": "anomaly", "predictions": runs}
    found = read(tmp_path, anomaly)
    assert [image["alt"].split(" of ")[0] for image in found.images] == ["ROC curves", "Precision and recall", "Scores"]
    assert "2 runs" in found.text and "Calibration" not in found.text


def test_control_rows_and_localization_have_their_tables(tmp_path, content):
    figure = content["metrics"][0]["auroc"]
    rows = [
        {"control": f"HOG {NASTY}", "method": "gaussian", "auroc": figure, "ap": figure, "fpr95": 0.125, "missing": ""},
        {"control": "file size", "method": "gaussian", "missing": "the same for every image"},
    ]
    where = [{"name": "AUPRO", "found": figure, "chance": 0.15, "words": "overlap of each lesion"}]
    metrics = [{**content["metrics"][0], "fpr95": 0.375}]
    anomaly = {"kind": "anomaly", "metrics": metrics, "controls": rows, "localization": where}
    found = read(tmp_path, {**content, **anomaly, "localization_words": "3 lesions in 2 of 9 images."})
    for words in ("Control rows", "0.125", "the same for every image", "0.375", "overlap of each lesion", "3 lesions"):
        assert words in found.text
    assert "script" not in found.tags and "Control rows" not in read(tmp_path, content).text


def test_roc_band_is_the_bootstrap_of_scikit_learns_curves():
    rng = np.random.default_rng(0)
    target, patients = rng.integers(0, 2, 60).astype(float), np.repeat(np.arange(20), 3)
    score = (target + rng.normal(size=60)).round(1)
    grid, low, high = figures.roc_band(target, score, patients, resamples=50)
    curves = []
    codes = patient_codes(patients)
    for draw in np.concatenate(list(patient_resamples(codes, 50, seed=0)), axis=1).T:
        false, true, _ = roc_curve(target, score, sample_weight=draw[codes], drop_intermediate=False)
        curves.append(np.interp(grid, false, true))
    np.testing.assert_allclose([low, high], np.quantile(curves, [0.025, 0.975], axis=0), atol=1e-12)
