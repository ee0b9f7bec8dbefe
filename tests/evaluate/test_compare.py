"""The comparison of two arms: joins, refusals, roles, words."""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy.stats import binomtest, chi2
from sklearn.metrics import average_precision_score, roc_auc_score

from carina.errors import CarinaError
from carina.evaluate.compare import compare, main, table
from carina.files import write_json, write_table
from carina.metrics.delong import auroc_difference

PREVALENCE = {"Effusion": 0.4, "Mass": 0.5, "Hernia": 0.04}


def predictions(quality=1.5, noise_seed=0, images=240, labels=tuple(PREVALENCE), seed=0):
    """Made-up predictions: two images a patient, targets the same for every noise_seed, higher quality ranks better."""
    truth, noise = np.random.default_rng(0), np.random.default_rng(noise_seed + 1)
    frames = []
    for label in labels:
        target = np.repeat(truth.random(images // 2) < PREVALENCE[label], 2).astype(float)
        score = quality * target + noise.normal(size=images)
        target[truth.random(images) < 0.05] = np.nan
        image = [f"{i:016x}" for i in range(images)]
        patient = [f"patient{i // 2:04d}" for i in range(images)]
        frame = {"image_id": image, "patient_id": patient, "study_id": image, "split": "test", "fold": 0, "seed": seed}
        seen = {"view": "PA", "sex": "F", "age": 50.0, "manufacturer": "", "label": label}
        frames.append(pd.DataFrame(frame | seen | {"target": target, "score": score}))
    return pd.concat(frames, ignore_index=True)


@pytest.fixture
def arm(tmp_path):
    def write(name, frame, synthetic=False):
        write_table(tmp_path / name / "predictions.parquet", frame.sample(frac=1, random_state=len(name)))
        write_json(tmp_path / name / "metrics.json", {"synthetic": synthetic})
        return tmp_path / name

    return write


def by_row(result):
    return {(row["label"], row["metric"]): row for row in result["rows"]}


def test_figures_roles_and_words(arm):
    strong, weak = predictions(2.5), predictions(0.3, noise_seed=1)
    result = compare([arm("a", strong, synthetic=True)], [arm("b", weak)], resamples=500)
    rows = by_row(result)
    known = strong[(strong["label"] == "Mass") & strong["target"].notna()]
    assert rows["Mass", "auroc"]["a"]["value"] == pytest.approx(roc_auc_score(known["target"], known["score"]))
    expected = average_precision_score(known["target"], known["score"])
    assert rows["Mass", "average_precision"]["a"]["value"] == pytest.approx(expected)
    assert [key for key, row in rows.items() if row["role"] == "primary"] == [("macro", "auroc")]
    assert result["primary"] == "AUROC, mean over labels"
    macro = rows["macro", "auroc"]
    pair = [rows[label, "auroc"]["difference"]["value"] for label in ("Effusion", "Mass")]
    assert macro["difference"]["value"] == pytest.approx(np.mean(pair))
    assert macro["differs"] and "A ranks better than b" in macro["sentence"]
    assert macro["p_corrected"] == macro["p_value"]
    assert rows["Mass", "auroc"]["p_corrected"] > rows["Mass", "auroc"]["p_value"]
    assert result["macro_leaves_out"] == ["Hernia"]
    hernia = rows["Hernia", "auroc"]
    assert hernia["p_value"] is None and not hernia["differs"] and "too little to rely on" in hernia["sentence"]
    assert hernia["a"]["value"] is not None
    assert (result["images"], result["patients"], result["splits"]) == (240, 120, ["test"])
    assert result["synthetic"] and json.dumps(result, allow_nan=False)
    shown = io.StringIO()
    Console(file=shown, width=160).print(table(result))
    assert all(word in shown.getvalue() for word in ("synthetic", "a is better", "not estimable", "Hernia"))


def test_equal_arms_and_a_single_label(arm):
    one = predictions(labels=("Mass",))
    result = main(str(arm("a", one)), str(arm("b", one)), resamples=200)
    row = by_row(result)["Mass", "auroc"]
    assert result["primary"] == "AUROC, Mass" and row["role"] == "primary"
    assert (row["difference"]["value"], row["p_value"], row["differs"]) == (0, 1, False)
    assert "rank these images alike" in row["sentence"]


def test_runs_as_folders_or_as_seeds_are_the_same(arm):
    runs = [predictions(1.5, noise_seed=i, seed=i) for i in range(3)]
    other = arm("b", predictions(1.0, noise_seed=9))
    folders = [arm(f"a{i}", run) for i, run in enumerate(runs)]
    apart = main(",".join(map(str, folders)), str(other), resamples=300)
    together = compare([arm("all", pd.concat(runs))], [other], resamples=300)
    assert apart["a"]["runs"] == together["a"]["runs"] == 3 and apart["resampled"] == "patients and runs"
    assert apart["rows"] == together["rows"]


def test_delong_by_label_and_bootstrap_for_the_mean(arm):
    strong, weak = predictions(2.5), predictions(0.8, noise_seed=1)
    folders = arm("a", strong), arm("b", weak)
    result = compare(*[[folder] for folder in folders], resamples=300, method="delong")
    rows = by_row(result)
    mass = rows["Mass", "auroc"]
    known = (strong["label"] == "Mass") & strong["target"].notna()
    given = [strong[known], weak[known]]
    expected = auroc_difference(
        given[0]["target"].to_numpy(), *(one["score"].to_numpy() for one in given), given[0]["patient_id"].to_numpy()
    )
    assert mass["difference"]["method"] == "obuchowski"  # two images a patient
    assert mass["difference"]["value"] == pytest.approx(expected.value)
    assert (mass["p_value"], mass["difference"]["low"]) == pytest.approx((expected.p_value, expected.low))
    assert rows["macro", "auroc"]["difference"]["method"] == "percentile"
    resampled = by_row(compare(*[[folder] for folder in folders], resamples=300))
    assert mass["a"]["value"] == pytest.approx(resampled["Mass", "auroc"]["a"]["value"])
    assert rows["Mass", "average_precision"]["difference"] == resampled["Mass", "average_precision"]["difference"]
    with pytest.raises(CarinaError, match="one run with one run"):
        compare([folders[0], arm("c", predictions(2.4, noise_seed=5, seed=1))], [folders[1]], method="delong")


def test_decisions_are_tested_on_one_image_of_every_patient(arm):
    strong, weak = predictions(3.0), predictions(0.2, noise_seed=1)
    folders = arm("a", strong), arm("b", weak)
    limits = {"Effusion": 1.2, "Mass": 1.0}
    for folder in folders:
        table = [{"label": label, "threshold": value} for label, value in limits.items()]
        write_json(
            folder / "metrics.json", {"synthetic": False, "table": [*table, {"label": "Hernia", "threshold": None}]}
        )
    tests = {row["label"]: row for row in compare(*[[one] for one in folders], resamples=100)["mcnemar"]}
    assert set(tests) == set(limits)
    mass = tests["Mass"]
    known = strong[(strong["label"] == "Mass") & strong["target"].notna()]
    assert mass["images"] == known["patient_id"].nunique() and mass["images"] + mass["left_out"] == len(known)
    discordant = mass["only_a_right"] + mass["only_b_right"]
    if mass["exact"]:
        expected = binomtest(mass["only_a_right"], discordant).pvalue
    else:
        expected = chi2.sf((mass["only_a_right"] - mass["only_b_right"]) ** 2 / discordant, 1)
    assert mass["p_value"] == pytest.approx(expected) and mass["p_corrected"] < 0.05
    assert "A decides rightly more often" in mass["sentence"] and "one drawn of each patient" in mass["sentence"]
    alone = strong[strong["image_id"].isin(known.groupby("patient_id")["image_id"].first())]
    single = [arm("c", alone), arm("d", weak[weak["image_id"].isin(alone["image_id"])])]
    for folder in single:
        write_json(folder / "metrics.json", {"synthetic": False, "table": [{"label": "Mass", "threshold": 1.0}]})
    (row,) = compare(*[[one] for one in single], resamples=100)["mcnemar"]
    parts = [one[(one["label"] == "Mass") & one["image_id"].isin(alone["image_id"])] for one in (strong, weak)]
    parts = [one[one["target"].notna()] for one in parts]
    right = [((one["score"] >= 1.0) == (one["target"] == 1)).to_numpy() for one in parts]
    assert row["only_a_right"] == (right[0] & ~right[1]).sum() and row["only_b_right"] == (right[1] & ~right[0]).sum()
    assert row["left_out"] == 0 and "drawn" not in row["sentence"]


def test_refusals_name_how_many(arm, tmp_path):
    whole = predictions()
    base = arm("base", whole)
    fewer = whole[~((whole["label"] == "Mass") & (whole.index % 10 == 0))]
    other_target = whole.assign(target=np.where(whole.index < 3, 1 - whole["target"].fillna(0), whole["target"]))
    first = whole["image_id"].isin(whole["image_id"].unique()[:2])
    other_patient = whole.assign(patient_id=np.where(first, "x", whole["patient_id"]))
    for name, frame, said in (
        ("fewer", fewer, f"{len(whole) - len(fewer)} image-label pairs are only in the first and 0"),
        ("targets", other_target, f"disagree about 3 of {len(whole)} targets"),
        ("patients", other_patient, "2 of 240 images to different patients"),
        ("twice", pd.concat([whole, whole.head(4)]), "4 rows"),
        ("columns", whole.drop(columns="patient_id"), "lacks the columns patient_id"),
    ):
        with pytest.raises(CarinaError, match=said):
            compare([base], [arm(name, frame)], resamples=10)
    with pytest.raises(CarinaError, match=r"no predictions\.parquet"):
        compare([base], [tmp_path / "nowhere"])
    damaged = arm("damaged", whole)
    (damaged / "predictions.parquet").write_bytes(b"not a table")
    with pytest.raises(CarinaError, match="may be damaged"):
        compare([base], [damaged])
    with pytest.raises(CarinaError, match="two arms"):
        main(str(base), "")
