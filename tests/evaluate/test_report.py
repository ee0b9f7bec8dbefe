"""The report: one file, nothing loaded, nothing leaked, complete where figures are there and quiet where they are not."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_curve

from carina.data.store import select
from carina.evaluate.report import build_report, checklists, figures, page, plain, private
from carina.evaluate.report.content import _dealt, _kinds
from carina.evaluate.report.document import Column, Table, table_frame
from carina.metrics.intervals import patient_bootstrap
from carina.metrics.resampling import patient_codes, patient_resamples
from carina.models.predictor import load_predictor

NASTY = "<script>alert('50 % & $x_1$ \\ {#|~^')</script>"
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Collects text, images and drawings, and holds that every tag is closed in order."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.images, self.alts, self.ids, self.links, self.text = [], set(), [], [], [], [], ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.add(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"][1:]] if str(given.get("href")).startswith("#") else []
        self.alts += [given["aria-label"]] if given.get("role") == "img" else []
        if tag == "img":
            self.images.append(given)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def figure(value, low=None, high=None, estimable=True):
    return {"value": value, "low": low, "high": high, "estimable": estimable, "reason": ""}


@pytest.fixture(scope="module")
def content():
    """Predictions of three labels, one of them of one class, and the oldest metrics.json there may be."""
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
    return {
        "title": "A & B <i>compared</i>",
        "result": {
            "table": [*rows, {**rows[0], "label": "macro"}],
            "words": [f"Read from C:\\Users\\jane\\x.csv {NASTY}"],
        },
        "predictions": pd.concat(frames),
        "recipe": {"store": "/home/jane/data/nih-store", "optimizer": {"rate": 0.1, "betas": (0.9, 0.99)}},
        "environment": {"python": "3.11", "packages": {"torch": "2.15"}},
    }


@pytest.fixture(scope="module")
def full(content):
    """The same with everything that an evaluation may know."""
    f, labels = figure(0.71, 0.6, 0.8), ["Effusion", NASTY]
    table = [dict(row) for row in content["result"]["table"]]
    for row in table:
        if row["label"] in labels:
            row |= {
                "threshold": 0.5,
                "sensitivity": f,
                "specificity": f,
                "ppv": f,
                "npv": f,
                "f1": f,
                "brier": f,
                "ece": f,
            }
            row |= {"calibration_slope": figure(0.8, 0.5, 1.1), "calibration_intercept": figure(-0.25, -0.5, 0.1)}
            row["at_prevalence"] = {"prevalence": 0.05, "ppv": figure(0.123, 0.1, 0.2), "npv": f}
    group = {"n": 80, "patients": 40, "positives": 30, "auroc": f, "ap": f, "sensitivity": None, "specificity": f}
    confounder = {
        "prevalence": {"AP": 0.5, "PA": 0.2},
        "overall": f,
        "within": f,
        "groups": {},
        "difference": figure(0.1, 0.05, 0.2),
    }
    before = {"brier": f, "ece": f, "slope": f, "intercept": figure(0.4, 0.1, 0.7)}
    curve = {"x": "strength", "y": "AUROC", "start": f, "series": [
        {"name": kind, "unit": kind, "x": [1, 2], "value": [0.8, None], "low": [0.7, None], "high": [0.9, None]}
        for kind in ("gamma", "noise")
    ]}  # fmt: skip
    thresholds = [0.01, 0.1, 0.5]
    result = {
        "kind": "classify", "split": "test", "where": "view == 'AP'", "labels": labels, "table": table, "resamples": 200,
        "words": content["result"]["words"], "thresholds_from": "validation",
        "averages": [{"name": "tail", "labels": labels, "left_out": ["Fracture"], "words": "few", "auroc": f, "ap": f}],
        "decision_curves": {"Effusion": {"threshold": thresholds, "model": [0.4, 0.3, 0.1], "all": [0.39, 0.3, -0.2]}},
        "calibration_bins": {"Effusion": [{"predicted": 0.2, "observed": 0.25, "low": 0.1, "high": 0.4, "n": 80}]},
        "subgroups": [{"variable": v, "group": g, "label": one, "note": "", **group}
                      for one in labels for v, g in (("view", "AP"), ("view", "PA"), ("sex", "F"))],
        "confounders": [{"variable": "view", "label": "Effusion", "sentence": "The view is read.", **confounder}],
        "worst": [{"label": "Effusion", "variable": "sex", "group": "F", "auroc": f, "gap": figure(0.2, 0.1, 0.3),
                   "sentence": "Women fare worse."}],
        "external": {"kind": "external", "sentence": "From another place.",
                     "shift": [{"label": "Effusion", "train_prevalence": 0.1, "test_prevalence": 0.4, "train_n": 99,
                                "test_n": 160}],
                     "recalibration": [{"label": "Effusion", "patients_fitted": 40, "patients_left": 40, "temperature": 1.5,
                                        "intercept": -0.5, "before": before, "after": before}]},
        "flow": [{"step": "rows of the store", "images": 1234, "patients": 500, "note": ""},
                 {"step": "known Effusion", "images": 150, "patients": 78, "note": ""},
                 {"step": "known Fracture", "images": 160, "patients": 80, "note": ""},
                 {"step": "scored", "images": 160, "patients": 80, "note": "split test"}],
        "sentences": ["A plain sentence."],
        "audits": [{"name": "robustness", "sentence": "It withstands noise.", "curve": curve,
                    "rows": [{"kind": "gamma", "strength": 1.1, "drop": figure(0.02, -0.01, 0.05), "missing": ""},
                             {"kind": "noise", "strength": 0.1, "drop": figure(None), "missing": ""}]}],
    }  # fmt: skip
    image = np.linspace(0, 1, 48 * 40).reshape(48, 40)
    lungs = np.zeros((48, 40), bool)
    lungs[10:30, 8:30] = True
    people = {"images": 160, "patients": 80, "view": {"AP": 90, "PA": 70}, "sex": {"F": 80, "M": 80}, "source": {"nih": 160},
              "age_median": 50.0, "age_percentiles": [20.0, 80.0]}  # fmt: skip
    return content | {
        "result": result,
        "examples": [
            {"image": image, "heat": image**2, "lungs": lungs, "right": False, "caption": "Effusion: missed."},
            {"image": image, "heat": None, "lungs": None, "right": True, "caption": "Effusion: found."},
        ],
        "people": [("Training", people), ("Test", people)],
        "sources": {"nih": {"title": "NIH ChestX-ray14", "terms": {"citation": "Wang et al., CVPR 2017"}}},
        "backbone": {"name": "resnet18", "origin": "ImageNet", "license": "Apache-2.0"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def built(full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    build_report(folder, full)
    return folder


def read(tmp_path, content):
    return Reader(build_report(tmp_path, content).read_text(encoding="utf-8"))


def test_is_one_file_that_loads_and_runs_nothing(built, tmp_path, full):
    html = (built / "report.html").read_text(encoding="utf-8")
    found = Reader(html)
    assert not {"script", "link", "iframe", "object"} & found.tags and NASTY not in html
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in found.images)
    assert len(found.ids) == len(set(found.ids)) and set(found.links) <= set(found.ids)
    assert "://" not in html and "@import" not in html and not re.search(r"url\((?!#)", html)
    assert build_report(tmp_path, full).read_text(encoding="utf-8") == html


def test_every_section_stands_where_its_figures_are_there_and_nowhere_else(built, tmp_path, content):
    old, new = read(tmp_path, content), Reader((built / "report.html").read_text())
    always = ["Data", "Discrimination", "Curves", "Calibration", "What the model had seen", "How to cite"]
    more = ["Decision curves", "At the operating points", "Subgroups", "External test", "Audits", "Examples"]
    for name in always:
        assert name in old.text and name in new.text
    for name in more:
        assert name not in old.text and name in new.text
    for words in (
        "A plain sentence.", "The view is read.", "Women fare worse.", "From another place.", "It withstands noise.",
        "0.123", "−0.250", "1,074 images and 420 patients left out", "Wang et al., CVPR 2017", "Mean over labels",
    ):  # fmt: skip
        assert words in new.text, words
    order = [
        "A plain sentence.",
        "1,234 images",
        "ROC curves",
        "Women fare worse.",
        "It withstands noise.",
        "CLAIM 2024",
    ]
    places = [new.text.index(word) for word in order[:-1]] + [new.text.rindex(order[-1])]
    assert places == sorted(places)


def test_a_figure_is_shown_with_its_interval_everywhere(built, full):
    found = Reader((built / "report.html").read_text())
    value = next(row for row in full["result"]["table"] if row["label"] == "Effusion")["auroc"]
    told = [f"{value[end]:.3f}" for end in ("value", "low", "high")]
    assert re.search(rf"{told[0]}\s+{told[1]} to {told[2]}", found.text)
    table = pd.read_csv(built / "tables" / "results.csv").set_index("Label").loc["Effusion"]
    np.testing.assert_allclose(
        table[["AUROC", "AUROC, low", "AUROC, high"]].astype(float), list(value.values())[:3], rtol=1e-12
    )
    line = f"{told[0]} ({told[1]} to {told[2]})"
    assert line in (built / "report.md").read_text() and line in (built / "tables" / "results.tex").read_text()


def test_holds_no_identifier_and_no_path(built):
    files = [path for path in built.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if re.search(rb"secret|jane", path.read_bytes())]
    text = (built / "report.html").read_text()
    assert "nih-store" in text and "x.csv" in text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/data/a/b.csv", "b.csv"),
        ("store=/data/a", "store=a"),
        ("[~/x/y, /p/q/]", "[y, ]"),
        ("1/10/100 % n/a AUROC/AP", "1/10/100 % n/a AUROC/AP"),
        ("hub:org/name", "hub:org/name"),
        ("http://a.b/c/d", "http://a.b/c/d"),
        ("doi:10.1148/ryai.240300, see https://a.b/c.", "doi:10.1148/ryai.240300, see https://a.b/c."),
        ("nih14:/data/nih/hospital", "nih14:hospital"),
        ("path:/home/jane/run1", "path:run1"),
        ("file:///home/jane/x/y", "y"),
        ("s3://jane-bucket/x/y", "y"),
        ("\\\\server\\share\\jane\\x", "x"),
        ("D:/jane/x and C:\\Users\\Jane Doe\\y.csv", "x and y.csv"),
        ("../Doe_John_1950/store", "store"),
        ("~jane/store", "store"),
        ("read /data/John Doe/xrays/run.", "read run."),
    ],
)
def test_only_the_last_name_of_a_path_is_kept(text, kept):
    assert private.printable({"key": [text]}) == {"key": [kept]}


def test_places_are_cut_by_their_key_and_conditions_at_any_depth():
    recipe = {
        "backbone": "home/Doe_John/run", "init": "timm:resnet18.a1_in1k", "out": "jane, x/run", "lr": 0.1,
        "probe": {"where": "patient_id == 'x'", "store": ["hub:org/name", "hub:/jane/x", "jane/store"]},
        "rows": ["content_hash != 'ab'"], "pool": [{"rows": "mrn in ['7']"}], "where": "view == 'AP'", "loss": "bce",
    }  # fmt: skip
    assert private.settings(recipe) == {
        "backbone": "run", "init": "timm:resnet18.a1_in1k", "out": "run", "lr": 0.1,
        "probe": {"where": private.HIDDEN, "store": ["hub:org/name", "x", "store"]},
        "rows": [private.HIDDEN], "pool": [{"rows": private.HIDDEN}], "where": "view == 'AP'", "loss": "bce",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("where", "shown"),
    [
        ("view == 'PA' and age >= 18", True),
        ("(sex == 'F') | ~(label_Pleural_Thickening == 1) & source in ['nih', 'x'] and 17 < age < 80", True),
        ("content_hash == 'ab12'", False),
        ("patient_id == 'x'", False),
        ("view == 'PA' and duplicates != 3", False),
        ("age == 93 and sex == 'F'", False),
        ("age > 90", False),
        ("age in [40]", False),
        ("-age > -18", False),
        ("view == 'PA' and age.between(40, 40)", False),
        ("index == 7", False),
        ("view ==", False),
    ],
)
def test_a_condition_is_shown_where_its_columns_name_nobody(where, shown, tmp_path, content):
    assert private.condition(where) == (where if shown else private.HIDDEN)
    step = {"step": f"where {where}", "images": 99, "patients": 50, "note": ""}
    result = content["result"] | {"where": where, "flow": [step]}
    page_content = page.assembled(content | {"result": result, "recipe": {"a": [{"where": where}]}})
    for text in (
        page_content["result"]["where"],
        page_content["result"]["flow"][0]["step"],
        str(page_content["recipe"]),
    ):
        assert (where in text or repr(where) in text) is shown


def test_groups_of_few_patients_are_named_and_not_told(tmp_path, full):
    row = {**full["result"]["subgroups"][0], "variable": "age", "withheld": False, "auroc": figure(0.987, 0.976, 0.998)}
    uncounted = {**row, "withheld": True, "group": "40 to 59", "n": None, "patients": None, "positives": None}
    few = {**uncounted, "group": "80 and older", "auroc": None, "ap": None}
    rows = [{**row, "group": "18 to 39", "n": 120, "patients": 60, "positives": 59}, uncounted, few]
    found = read(tmp_path, full | {"result": full["result"] | {"subgroups": rows}})
    assert "80 and older (not shown)" in found.text and "40 to 59 (not shown)" not in found.text
    assert "groups of fewer than 20 patients" in found.text
    table = pd.read_csv(tmp_path / "tables" / "subgroups.csv", index_col="Group")
    counts = table[["Images", "Patients", "Positive"]]
    assert counts.iloc[0].tolist() == [120, 60, 59] and counts.iloc[1:].isna().all(axis=None)
    assert table["AUROC"].tolist()[:2] == [0.987, 0.987] and np.isnan(table["AUROC"].iloc[2])


def test_the_headline_is_of_the_labels_that_can_be_estimated(tmp_path, full):
    result = dict(full["result"])
    f = {**result["averages"][0]["auroc"], "value": 0.777, "low": 0.7, "high": 0.8, "estimable": True}
    macro = {**result["table"][0], "label": "macro", "auroc": {**f, "value": 0.555, "estimable": False}}
    sure = {"name": "estimable", "labels": ["A", "B"], "left_out": [], "words": "", "auroc": f, "ap": f}
    changed = result | {"table": [macro, *result["table"]], "averages": [sure]}
    found = read(tmp_path, full | {"result": changed}).text
    assert "AUROC 0.777 (0.700 to 0.800) for the mean over the 2 labels with enough patients" in found


def test_few_people_are_not_counted_and_no_age_is_that_of_one(tmp_path, full):
    people = dict(full["people"])["Test"] | {"sex": {"F": 151, "M": 9}, "view": {"AP": None, "PA": 140}}
    old = people | {"age_range": [8.0, 97.0]}
    old.pop("age_percentiles")
    found = read(tmp_path, full | {"people": [("Training", old), ("Test", people)]})
    assert "M fewer than 20" in found.text and "AP fewer than 20" in found.text and "50 (20 to 80)" in found.text
    assert "97" not in (tmp_path / "tables" / "people.csv").read_text() and "Training" in found.text


def test_pictures_only_where_they_are_allowed(built, tmp_path, full):
    assert len(Reader((built / "report.html").read_text()).images) == 2
    off = read(tmp_path, full | {"examples": (), "switched_off": True})
    assert not off.images and "pixels=true" in off.text
    assert "under Examples" not in off.text


def test_pixels_and_conditions_on_persons_stay_where_they_are(phantom_store, tmp_path):
    from carina.evaluate.report.content import report_content
    from carina.evaluate.score import evaluate
    from carina.finetune.run import finetune

    run, where = tmp_path / "run", "patient_id != 'secret' and age > 0"
    common = {"backbone": "random:resnet10t", "store": str(phantom_store), "scale": 32, "size": 32, "threads": 1}
    finetune(
        "classify", {**common, "labels": ["Effusion"], "where": where, "wandb": "off", "out": str(run)}, quiet=True
    )
    asked = {"store": str(phantom_store), "split": "test", "resamples": 100, "examples": 0, "where": where}
    result = evaluate(str(run), asked, quiet=True)
    out = run / "evaluations" / "test"
    assert not [path for path in out.rglob("*.*") if path.suffix != ".json" and b"secret" in path.read_bytes()]
    frame, predictor = pd.read_parquet(out / "predictions.parquet"), load_predictor(run)
    done = [(predictor, select(phantom_store, where=where).split("test"), frame[["score"]].to_numpy(), {})]
    as_if_real = {**result, "synthetic": False}
    for synthetic, pixels, shown in ((False, False, False), (False, True, True), (True, False, True)):
        made = report_content({**as_if_real, "synthetic": synthetic}, frame, done, str(run), 3, pixels)
        assert bool(made["examples"]) is shown and made["switched_off"] is not shown


def test_examples_are_the_most_certain_of_right_and_wrong():
    target, score = np.array([1, 1, 1, 0, 0, 0, np.nan]), np.array([0.9, 0.2, 0.1, 0.8, 0.7, 0.05, 0.99])
    kinds = {kind: rows.tolist() for kind, _, rows in _kinds(target, score, 0.5)}
    assert kinds == {"missed": [2, 1], "false alarm": [3, 4], "found": [0], "rightly left": [5]}
    dealt = _dealt([(0, 2, 0, "missed", 0), (0, 0, 0, "found", 1), (1, 1, 0, "missed", 0)], 2)
    assert [one[3] for one in dealt] == ["missed", "found"]


def test_synthetic_marks_every_figure(built, tmp_path, full):
    plainly = Reader((built / "report.html").read_text())
    marked = read(tmp_path, full | {"result": full["result"] | {"synthetic": True}})
    assert "synthetic" not in plainly.text.lower()
    assert len(plainly.alts) == len(marked.alts) == 2 * 4 + 1 + 2
    assert all("synthetic" in alt.lower() for alt in [*marked.alts, *(image["alt"] for image in marked.images)])
    svgs = re.findall(r"<svg viewBox.*?</svg>", (tmp_path / "report.html").read_text(), re.DOTALL)
    assert len(svgs) == len(marked.alts) and all(">synthetic<" in svg for svg in svgs)
    assert "nothing here is a clinical result" in marked.text
    assert "(synthetic images)" in (tmp_path / "tables" / "results.tex").read_text()


def test_says_what_is_unknown_or_cannot_be_estimated(tmp_path, content):
    found = read(tmp_path, content)
    assert "cannot be excluded" in found.text and "not recorded" in found.text
    assert "interval not estimable" in found.text and "one class only" in found.text
    assert not any("Fracture" in alt for alt in found.alts)
    known = {"known": True, "doubts": [], "stages": {"pretrain": {"patients": 3}}}
    seen = content["result"] | {"overlap": known, "overlap_sentence": "Three test patients were seen."}
    assert "Three test patients were seen." in read(tmp_path, content | {"result": seen}).text


def test_anomaly_scores_are_distances_and_runs_are_apart(tmp_path, content):
    one = content["predictions"].query("label == 'Effusion'")
    runs = pd.concat([one.assign(seed=s, score=one["score"] * (s + 5)) for s in range(2)])
    anomaly = {"title": "Anomalies", "result": {"kind": "anomaly"}, "predictions": runs}
    found = read(tmp_path, anomaly)
    assert [alt.split(" of ")[0] for alt in found.alts] == ["ROC curves", "Precision and recall", "Scores"]
    assert "2 runs" in found.text and "Calibration" not in found.text


def test_control_rows_and_localization_have_their_tables(tmp_path, content):
    found = content["result"]["table"][0]["auroc"]
    rows = [
        {"control": f"HOG {NASTY}", "method": "gaussian", "auroc": found, "ap": found, "fpr95": 0.125, "missing": ""},
        {"control": "file size", "method": "gaussian", "missing": "the same for every image"},
    ]
    names = ("pixel_auroc", "aupro", "pointing_game")
    where = dict.fromkeys(names, found) | {"limit": 0.3, "chance": dict.fromkeys(names, 0.15), "regions": 3}
    where |= {"images_with_lesions": 2, "images": 9, "lesions_from": "masks", "left_out": 0}
    table = [{**content["result"]["table"][0], "fpr95": 0.375}]
    result = {"kind": "anomaly", "table": table, "controls": rows, "localization": where}
    shown = read(tmp_path, content | {"result": result})
    for words in ("Control rows", "0.125", "the same for every image", "0.375", "overlap of each lesion", "3 lesions"):
        assert words in shown.text
    assert "script" not in shown.tags and "Control rows" not in read(tmp_path, content).text


def test_pooled_folds_keep_their_operating_points(tmp_path, full):
    """Each fold has a threshold of its own, so none stands in the table."""
    table = [row | {"threshold": None} for row in full["result"]["table"]]
    found = read(tmp_path, full | {"result": full["result"] | {"table": table}})
    assert "At the operating points" in found.text and "each fit's own" in found.text and "0.123" in found.text


def test_the_level_that_is_judged_is_said(tmp_path, full):
    found = read(tmp_path, full | {"result": full["result"] | {"level": "patient", "pool": "max"}})
    for words in ("Every figure judges patients, not images, each by the max of", "positive patients are found",
                  "Patients in groups of about equal size", "net benefit of 100 patients"):  # fmt: skip
        assert words in found.text
    assert "judges images" in read(tmp_path, full).text


def test_many_labels_have_all_points_and_some_charts(tmp_path, content):
    rng, names = np.random.default_rng(0), [f"Finding {n:02}" for n in range(55)]
    ids = {"image_id": np.arange(50).astype(str), "patient_id": np.arange(50).astype(str), "seed": 0}
    frames = [
        pd.DataFrame(ids | {"label": name, "target": np.arange(50) % 2 * 1.0, "score": rng.random(50)})
        for name in names
    ]
    sure = figure(0.5, 0.4, 0.6)
    rows = [
        {"label": name, "n": 50, "positives": 25, "note": "", "auroc": sure | {"estimable": n >= 10}, "ap": sure}
        for n, name in enumerate(names)
    ]
    found = read(tmp_path, content | {"result": {"table": rows}, "predictions": pd.concat(frames)})
    drawn = [alt.split(" of ")[1].split(":")[0] for alt in found.alts if alt.startswith("ROC")]
    assert drawn == names[10:50] and "Drawn are 40 of 55 labels" in found.text
    for name in ("roc-curves", "precision-and-recall", "scores", "calibration-curves"):
        points = pd.read_csv(tmp_path / "figures" / f"{name}.csv")
        assert set(points["label"]) == set(names), name
    assert len(pd.read_csv(tmp_path / "tables" / "results.csv")) == 55


def test_the_mean_over_labels_counts_nobody(built):
    table = pd.read_csv(built / "tables" / "results.csv").set_index("Label")["Positive"]
    assert np.isnan(table["Mean over labels"]) and table["Effusion"] == 64


def test_names_that_look_like_markup_stay_names():
    table = Table("x", "Cap", [Column("Group"), Column("v", "number")],
                  [["[2mm] lesion", 0.1], ["*b", 0.2], ["=HYPERLINK('e')", -0.5], ["@x", None], ["-3.5e-2", -1.0],
                   ["+cmd", 1.0]])  # fmt: skip
    text = plain.latex_table(table, False)
    assert not re.search(r"(\\\\|\\midrule|\\toprule)\s*[\[*]", text) and "{}[2mm] lesion" in text
    frame = table_frame(table)
    assert frame["Group"].tolist() == ["[2mm] lesion", "*b", "'=HYPERLINK('e')", "'@x", "-3.5e-2", "'+cmd"]
    assert frame["v"].tolist()[:3] == [0.1, 0.2, -0.5]
    for name in ("Cost $x", r"$\frac{$", "A $a$ B"):
        drawing = figures.stack_drawing({"weights": {name: [0.5, 0.5]}, "scales": [128, 256]}, False)
        assert f">{name}<" in drawing.svg
    assert plain._safe("a\r# H\u2028b\x85c") == "a # H b c" and plain._safe("# H") == r"\# H"
    assert plain._safe("&lt;b&gt; A & B") == "&amp;lt;b&amp;gt; A & B"


def test_latex_is_balanced_escaped_and_compiles_where_there_is_a_tex(built, tmp_path):
    tables = sorted((built / "tables").glob("*.tex"))
    assert len(tables) > 12
    for path in tables:
        text = path.read_text()
        body = re.sub(r"\\[\\&%$#_{}]", "", re.sub(r"\\\\", " ", text.split("\n", 1)[1]))
        assert not re.search(r"[#$_~^<>|]|(?<!\\)%", body.replace("tab:", "")), path.name
        assert body.count("{") == body.count("}")
        opened, closed = (re.findall(rf"\\{word}\{{(\w+)\}}", text) for word in ("begin", "end"))
        assert opened == closed[::-1]
        rows = re.findall(r"^(.*) \\\\$", text[text.index(r"\midrule") :], re.MULTILINE)
        columns = text[: text.index(r"\toprule")].rsplit("{", 1)[1] if "tabular" in text else ""
        if rows and re.fullmatch(r"[lr]+\}\n", columns):
            assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns) - 3}
    if shutil.which("pdflatex"):
        lines = [r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs,longtable}\begin{document}"]
        lines += [rf"\input{{{path.with_suffix('')}}}" for path in tables]
        (tmp_path / "all.tex").write_text("\n".join([*lines, r"\end{document}"]))
        done = subprocess.run(["pdflatex", "-halt-on-error", "all.tex"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]


def test_markdown_shows_a_nasty_label_as_it_is(built):
    lines = (built / "report.md").read_text().splitlines()
    assert not any("<script" in line or "<i>" in line for line in lines)
    columns = 0
    for line in lines:  # a bar inside a cell would add a column
        bars = len(re.findall(r"(?<!\\)\|", line))
        columns = 0 if not bars else columns or bars
        assert bars == columns, line


def test_every_drawn_point_is_written(built, full):
    one = full["predictions"].query("label == 'Effusion'")
    roc = pd.read_csv(built / "figures" / "roc-curves.csv").query("label == 'Effusion' and what == 'curve'")
    rates = np.array(roc_curve(one["target"], one["score"], drop_intermediate=False)[:2])
    drawn = roc[["false_positive_rate", "true_positive_rate"]].to_numpy().T
    for point in drawn.T:
        assert np.abs(rates.T - point).sum(axis=1).min() < 1e-12
    names = {path.name for path in (built / "figures").iterdir()}
    assert names == {"roc-curves.csv", "precision-and-recall.csv", "scores.csv", "calibration-curves.csv",
                     "decision-curves.csv", "audit-robustness.csv"}  # fmt: skip


@pytest.mark.parametrize(
    ("overlap", "answer"),
    [
        (None, "Not known."),
        ({"known": False, "doubts": [], "stages": {}}, "Not known."),
        (
            {"known": True, "doubts": [], "stages": {"thresholds": {"patients": 82, "identical_images": 0}}},
            "Not disjoint.",
        ),
        (
            {"known": True, "doubts": [], "stages": {"pretrain": {"patients": 0, "near_identical_images": 3}}},
            "Not disjoint.",
        ),
        ({"known": True, "doubts": ["x"], "stages": {"pretrain": {"patients": 0}}}, "In doubt."),
        ({"known": True, "doubts": [], "stages": {"pretrain": {"patients": 0}}}, "Patient."),
    ],
)
def test_checklists_claim_no_more_than_the_run_knows(full, overlap, answer):
    result = full["result"] | {"overlap": overlap, "overlap_sentence": "A sentence.", "split": "all"}

    def answers(**given):
        return checklists.answers(page.assembled(full | {"result": result} | given))

    found = answers(recipe={"uncertain": {"Edema": "ones"}}, preparation={"keep": "chest"})
    assert found["disjoint"] == f"{answer} A sentence."
    assert ("by patient: none" in found["partitions"]) is (answer == "Patient.") and "All rows" in found["partitions"]
    assert "Frontal" not in found["eligibility"] and "Edema: ones" in found["missing"]
    assert "imputed" not in found["missing"] and "Frontal" not in answers()["eligibility"]
    assert answers(recipe={"uncertain": "ignore"})["missing"].endswith("Nothing was imputed.")
    assert answers(preparation={"keep": "frontal"})["eligibility"].startswith("Frontal")
    titles = [section.title for build in page.SECTIONS if (section := build(page.assembled(full))) is not None]
    assert found["updated"].split("under ")[1].rstrip(".") in titles and "patients of whom" in found["events"]


def test_checklists_have_their_items_once_and_say_what_the_run_does_not_know(full):
    numbers = [number for number, *_ in checklists.CLAIM]
    assert numbers == [str(number) for number in range(1, 45)]
    items = [number for number, *_ in checklists.TRIPOD]
    assert len(items) == len(set(items)) == 52 and len({re.sub(r"\D", "", item) for item in items}) == 27
    section = checklists.section(page.assembled(full))
    answered = {table.name: {row[0]: row[2] for row in table.rows} for table in section.blocks[1:]}
    claim, tripod = answered["CLAIM 2024"], answered["TRIPOD+AI"]
    assert claim["44"] == tripod["18a"] == checklists.OPEN
    assert "From another place." in claim["33"] and claim["32"] == checklists.OPEN
    assert "view == 'AP'" in claim["8"] and "half of these patients" in tripod["12f"]
    known = sum(answer != checklists.OPEN for answer in claim.values())
    assert f"CLAIM 2024: {known} of 44 answered" in section.blocks[0].sentences[0]
    keys = {key for _, _, key in (*checklists.CLAIM, *checklists.TRIPOD)} - {""}
    assert set(checklists.answers(page.assembled(full))) <= keys


@pytest.mark.parametrize(
    ("text", "shown"), [("50 % & a_b", r"50 \% \& a\_b"), ("a\\b{−1}", r"a\textbackslash{}b\{\ensuremath{-}1\}")]
)
def test_latex_escapes(text, shown):
    assert plain.latex(text) == shown


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
