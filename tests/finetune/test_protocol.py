"""Protocols: everything named beforehand, run cell by cell to one table, and gone on with after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from carina.errors import CarinaError
from carina.finetune import protocol_anomaly as module
from carina.finetune.protocol import protocol, read_protocol
from carina.finetune.protocol_anomaly_page import markdown
from carina.finetune.protocol_anomaly_plan import Plan, known
from carina.finetune.protocol_anomaly_tables import measure
from carina.finetune.protocol_base import read_cell
from carina.models.controls import controls
from carina.recipes import shipped

TINY = {
    "title": "Tiny",
    "sets": {"phantoms": {"pool": "val", "prevalence": 0.5}},
    "recipe": {
        "scale": 32, "size": 32, "steps": 2, "batch_size": 8, "threads": 1, "wandb": "off", "cross_folds": 2,
        "select": "aucp", "keep_every": 1, "checkpoint_every": 1,
    },
    "arms": {
        "random": {"backbone": "random:resnet18", "mode": "frozen"},
        "anatpaste": {"backbone": "random:resnet18", "mode": "full"},
        "moco": {"backbone": "moco", "mode": "frozen"},
    },
    "backbones": {"moco": None},
    "scorers": {"gaussian": {"name": "gaussian"}, "nearest": {"name": "knn", "neighbors": 3}},
    "primary": {
        "set": "phantoms", "arm": "anatpaste", "scorer": "gaussian", "region": "whole",
        "reference": {"arm": "random", "scorer": "gaussian", "region": "whole"},
    },
    "resamples": 200,
}  # fmt: skip
FROZEN = {
    "arms": {"random": TINY["arms"]["random"]}, "backbones": {}, "primary": None, "regions": ["whole"],
    "scorers": {"gaussian": {"name": "gaussian"}},
}  # fmt: skip


def written(folder: Path, **changes) -> str:
    path = folder / "tiny.yaml"
    path.write_text("# tiny\n" + yaml.safe_dump({**TINY, **changes}))
    return str(path)


@pytest.fixture(scope="module")
def whole(carina, phantom_store, tmp_path_factory) -> tuple[Path, dict]:
    """The tiny protocol run by the real command: its folder, and what it printed as JSON."""
    folder = tmp_path_factory.mktemp("protocol")
    done = carina("finetune", "protocol", written(folder), f"store={phantom_store}", f"out={folder / 'out'}", "--json")
    return folder / "out", json.loads(done.stdout)


def cell(out: Path, row: dict) -> pd.DataFrame:
    name = f"{row['checkpoint']}-{row['region']}-{row['scorer']}.parquet"
    return read_cell(out / "cells" / "phantoms" / row["arm"] / "seed-0" / name)[0]


# -- the whole way ------------------------------------------------------------------------------------------------------


def test_the_table_holds_every_cell_and_always_the_controls(whole):
    out, result = whole
    (table,) = result["tables"]
    kinds = {(r["arm"], r["checkpoint"], r["region"], r["scorer"]) for r in table["rows"]}
    pairs = [(region, scorer) for region in ("whole", "lungs", "background") for scorer in ("gaussian", "nearest")]
    arms = [("random", "frozen"), ("anatpaste", "last"), ("anatpaste", "aucp")]
    assert kinds == {(*arm, *pair) for arm in arms for pair in pairs}
    assert table["cells"] == {"asked": 18, "done": 18}
    assert {row["control"] for row in table["controls"]} == {control.name for control in controls(64, 0)}
    assert result["left_out"] == ["arm moco: backbones.moco= is not given"] and result["published"] == []
    page = (out / "table.md").read_text()
    assert page == markdown(result) and "Synthetic images." in page and "control: HOG" in page
    assert json.loads((out / "table.json").read_text()) == result


def test_figures_are_those_of_the_scores(whole):
    out, result = whole
    for row in result["tables"][0]["rows"]:
        frame = cell(out, row)
        test, old = frame[frame["role"] == "test"], frame.loc[frame["role"] == "reference", "score"]
        new = test.loc[test["target"] == 0, "score"]
        alarms, hits, _ = roc_curve(test["target"], test["score"], drop_intermediate=False)
        assert row["auroc"]["value"] == pytest.approx(roc_auc_score(test["target"], test["score"]))
        assert row["average_precision"] == pytest.approx(average_precision_score(test["target"], test["score"]))
        assert row["fpr_at_95_tpr"] == pytest.approx(min(a for a, h in zip(alarms, hits) if h >= 0.95))
        assert row["fpr_nominal"] == pytest.approx((new > np.quantile(old, 0.95)).mean())
        both = np.concatenate([np.zeros(len(old)), np.ones(len(new))])
        assert row["shift"] == pytest.approx(roc_auc_score(both, np.concatenate([old, new])))
        assert "shift_held_out" in row and row["labels_used"] == "the normal flag" and row["pretext_saw"] == "nothing"


def test_the_primary_row_is_the_one_named_and_its_difference_is_paired(whole):
    (table,) = whole[1]["tables"]
    named = [row for row in table["rows"] if row["primary"]]
    assert [(r["arm"], r["checkpoint"], r["scorer"], r["region"]) for r in named] == [
        ("anatpaste", "last", "gaussian", "whole")
    ]
    (theirs,) = [r for r in table["rows"] if (r["arm"], r["scorer"], r["region"]) == ("random", "gaussian", "whole")]
    found = table["primary"]["difference"]
    assert found["value"] == pytest.approx(named[0]["auroc"]["value"] - theirs["auroc"]["value"])
    assert found["low"] <= found["value"] <= found["high"] and "Primary: anatpaste" in table["primary"]["sentence"]


def test_lesions_are_claimed_only_where_lungs_beat_background(whole):
    rows = whole[1]["tables"][0]["lungs_minus_background"]
    assert len(rows) == 7 and rows[-1]["row"] == "control: HOG"
    for row in rows:
        gain = row["lungs"]["value"] - row["background"]["value"]
        assert row["difference"]["value"] == pytest.approx(gain)
        assert row["claims_lesions"] == (row["difference"]["low"] > 0 and row["lungs"]["low"] > 0.5)
        assert not row["sentence"] or row["claims_lesions"]


def test_trained_arms_are_runs_and_choose_on_the_pool_alone(whole, phantom_store):
    out, result = whole
    run = out / "runs" / "phantoms-anatpaste-0"
    chosen = json.loads((run / "selection.json").read_text())
    rows = {row["checkpoint"]: row for row in result["tables"][0]["rows"] if row["arm"] == "anatpaste"}
    assert rows["last"]["steps"] == [2] and rows["aucp"]["steps"] == [chosen["step"]]
    assert rows["last"]["finetune_saw"] == "normals only"
    table = pd.read_parquet(phantom_store / "table.parquet")
    seen = pd.read_parquet(run / "manifest.parquet")
    assert not set(seen["patient_id"]) & set(table.loc[table["split"] == "test", "patient_id"])


def test_a_changed_protocol_leaves_what_was_made_alone(whole, phantom_store, tmp_path):
    out, _ = whole
    for changes, message in (
        (
            {"recipe": {**TINY["recipe"], "steps": 3}},
            r"was made with other settings \(steps differ\); choose another out=",
        ),
        ({"scorers": {**TINY["scorers"], "nearest": {"name": "knn", "neighbors": 4}}}, r"scorer\.neighbors differ"),
    ):
        with pytest.raises(CarinaError, match=message):
            protocol(written(tmp_path, **changes), {"store": str(phantom_store), "out": str(out)}, quiet=True)


# -- stopped and gone on with -------------------------------------------------------------------------------------------


def test_a_stopped_protocol_computes_no_cell_twice(phantom_store, tmp_path, monkeypatch):
    name, given = written(tmp_path, regions=["whole"]), {"store": str(phantom_store), "out": str(tmp_path / "out")}
    truly, told, trained = module.write_cell, [], []

    def counted(stop_at):
        def write(path, frame, facts):
            if len(told) == stop_at:
                raise KeyboardInterrupt
            told.append(path)
            truly(path, frame, facts)

        return write

    finetune = module.finetune
    monkeypatch.setattr(module, "finetune", lambda *a, **k: trained.append(k["resume"]) or finetune(*a, **k))
    wanted = sum(len(control.methods) for control in controls(64, 0)) + 6
    for stop_at in (
        3,
        wanted - 1,
    ):  # among the control rows, and after the first cell of the trained arm's last reading
        monkeypatch.setattr(module, "write_cell", counted(stop_at))
        with pytest.raises(KeyboardInterrupt):
            protocol(name, given, quiet=True)
    plan = protocol(name, given, dry_run=True)
    assert (plan["cells"], plan["cells_to_do"], plan["runs_to_train"]) == (6, 1, 0)
    monkeypatch.setattr(module, "write_cell", counted(None))
    result = protocol(name, given, quiet=True)
    assert len(told) == len(set(told)) == wanted and trained == [False]
    assert result["tables"][0]["cells"] == {"asked": 6, "done": 6}
    monkeypatch.setattr(module, "write_cell", counted(len(told)))
    assert protocol(name, given, quiet=True) == result


def test_a_run_that_was_stopped_is_gone_on_with(phantom_store, tmp_path, monkeypatch):
    from carina.training.engine import Engine

    changes = {"arms": {"anatpaste": TINY["arms"]["anatpaste"]}, "backbones": {}, "primary": None, "regions": ["whole"]}
    name, given = written(tmp_path, **changes), {"store": str(phantom_store), "out": str(tmp_path / "out")}
    step, steps = Engine.step, []

    def stopping(self, number, pieces):
        if number == 1 and not steps.count(1):
            steps.append(1)
            raise KeyboardInterrupt
        steps.append(number)
        return step(self, number, pieces)

    monkeypatch.setattr(Engine, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        protocol(name, given, quiet=True)
    protocol(name, given, quiet=True)
    assert steps == [0, 1, 1], "the step before the checkpoint is not taken again"


# -- rows ---------------------------------------------------------------------------------------------------------------


def plan(folder: Path, store: Path, **changes) -> Plan:
    given = {"store": str(store), "out": str(folder / "out")}
    return Plan(read_protocol(written(folder, **changes), given))


def test_rows_that_are_not_the_protocols_are_refused(phantom_store, tmp_path):
    table = pd.read_parquet(phantom_store / "table.parquet")
    counted = table.groupby(["split", "label.abnormal"]).size()
    right = {"train_normal": int(counted["train", 0]), "test_normal": int(counted["test", 0])}
    right["test_abnormal"] = int(counted["test", 1])
    figure = [{"method": "other", "auroc": 0.9, "source": "a paper"}]

    def sets(**changes):
        return {"sets": {"phantoms": {"counts": {**right, **changes}}}, "published": figure, **FROZEN}

    assert plan(tmp_path, phantom_store, **sets()).published[0].method == "other"
    wrong = right["train_normal"] + 1
    with pytest.raises(
        CarinaError, match=rf"{right['train_normal']} train normal images instead of {wrong}.*check=false"
    ):
        plan(tmp_path, phantom_store, **sets(train_normal=wrong))
    loose = plan(tmp_path, phantom_store, check=False, **sets(train_normal=wrong))
    assert loose.published == [] and "these are not the rows of the protocol" in loose.remarks[0]
    both = plan(tmp_path, phantom_store, **{**FROZEN, "sets": {"both": {"train": "train+val"}}})
    fit = both.fit_rows("both", both.set_recipe("both"))
    assert set(fit.train.table["split"]) == {"train", "val"} and (known(fit.train) == 0).all()


def test_folds_score_every_image_once_by_what_never_saw_its_patient(phantom_store, tmp_path):
    changes = {**FROZEN, "sets": {"folds": {"folds": 2}}}
    given = {"store": str(phantom_store), "out": str(tmp_path / "out")}
    result = protocol(written(tmp_path, **changes), given, quiet=True)
    frame, facts = read_cell(
        tmp_path / "out" / "cells" / "folds" / "random" / "seed-0" / "frozen-whole-gaussian.parquet"
    )
    test, old = frame[frame["role"] == "test"], frame[frame["role"] == "reference"]
    table = pd.read_parquet(phantom_store / "table.parquet").set_index("image_id")["label.abnormal"]
    assert sorted(test["image_id"]) == sorted(table.index[table.notna()])
    for fold in (0, 1):
        sides = [set(part.loc[part["fold"] == fold, "patient_id"]) for part in (test, old)]
        assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert (table[old["image_id"]] == 0).all() and facts["asked"]["folds"] == 2
    (row,) = result["tables"][0]["rows"]
    inside = [roc_auc_score(part["target"], part["score"]) for _, part in test.groupby("fold")]
    assert row["auroc_within_folds"] == pytest.approx(np.mean(inside))
    page = markdown(result)
    assert "2 patient folds" in page and "| within folds |" in page


def test_seeds_are_given_by_arm_and_slow_scorers_asked_once(phantom_store, tmp_path):
    arms = {
        "random": TINY["arms"]["random"],
        "anatpaste": {**TINY["arms"]["anatpaste"], "seeds": [1, 2]},
        "given": {"backbone": "elsewhere", "mode": "frozen"},
    }
    many = {
        "seeds": [0, 1, 2],
        "slow": ["nearest"],
        "regions": ["whole"],
        "backbones": {"elsewhere": "runs/moco-{seed}"},
    }
    made = plan(tmp_path, phantom_store, **{**many, "arms": arms})
    seeds = {name: [unit.seed for unit in made.units if unit.arm == name] for name in arms}
    assert seeds == {"random": [0, 1, 2], "anatpaste": [1, 2], "given": [0, 1, 2]}
    assert [u.recipes[0].backbone for u in made.units if u.arm == "given"] == [f"runs/moco-{n}" for n in range(3)]
    asked = {(c.arm, c.seed, c.checkpoint) for unit in made.units for c in unit.cells if c.scorer == "nearest"}
    assert asked == {("random", 0, "frozen"), ("anatpaste", 1, "last"), ("given", 0, "frozen")}


def test_a_checkpoint_that_labels_chose_is_told_from_one_that_none_did(phantom_store, tmp_path):
    by_labels = plan(tmp_path, phantom_store, recipe={**TINY["recipe"], "select": "validation"})
    (unit,) = [unit for unit in by_labels.units if unit.full]
    assert {cell.checkpoint for cell in unit.cells} == {"last", "validation"}
    assert (unit.recipes[0].threshold_rows, unit.recipes[0].pool_rows) == ("val", None)
    unlabelled = plan(tmp_path, phantom_store)
    (unit,) = [unit for unit in unlabelled.units if unit.full]
    assert (unit.recipes[0].threshold_rows, unit.recipes[0].pool_rows) == (None, "val") and not unlabelled.remarks
    without = plan(tmp_path, phantom_store, sets={"phantoms": {"folds": 2}})
    assert {cell.checkpoint for unit in without.units for cell in unit.cells} == {"frozen", "last"}
    assert without.remarks == ["Set phantoms has no pool to choose a checkpoint on: last epochs alone."]


def test_contaminated_normals_stand_beside_the_same_seeds_without(phantom_store, tmp_path):
    mixed = {"levels": [0.1, 0.2], "arms": ["random"], "scorers": ["gaussian"], "seeds": [1]}
    changes = {**FROZEN, "sets": {"phantoms": {}}, "contamination": mixed, "seeds": [0, 1]}
    given = {"store": str(phantom_store), "out": str(tmp_path / "out")}
    result = protocol(written(tmp_path, **changes), given, quiet=True)
    low, high = result["tables"][0]["contamination"]
    assert (low["share"], high["share"]) == (0.1, 0.2) and low["clean"] == high["clean"]
    (clean,) = result["tables"][0]["rows"]
    assert clean["seeds"] == 2 and low["clean"]["value"] == pytest.approx(clean["auroc_by_seed"][1])
    place = (
        tmp_path / "out" / "cells" / "phantoms" / "random-contaminated20" / "seed-1" / "frozen-whole-gaussian.parquet"
    )
    frame, facts = read_cell(place)
    normals = frame[frame["role"] == "reference"]
    assert (normals["target"] == 1).mean() == pytest.approx(0.2, abs=0.02) and "wrong for 20%" in facts["labels_used"]


# -- mistakes -----------------------------------------------------------------------------------------------------------


PLAIN = {"arms": {"random": TINY["arms"]["random"]}, "backbones": {}, "primary": None}
ROW = {"arm": "random", "scorer": "gaussian", "region": "whole"}
MIXED = {"levels": [0.1], "arms": ["random"], "scorers": ["gaussian"]}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"primary": {**ROW, "set": "phantoms", "arm": "rando", "reference": ROW}}, "did you mean 'random'"),
        ({"primary": {**ROW, "set": "phantom", "reference": ROW}}, "primary.set 'phantom' is none of phantoms"),
        (
            {"sets": {"a": {"store": "one"}, "b": {"store": "two"}}},
            "reads 2 stores; give store.one=FOLDER store.two=FOLDER",
        ),
        (
            {"arms": {"random": {**PLAIN["arms"]["random"], "recipe": {"stepps": 3}}}},
            "arm random:.*'stepps' is not a key",
        ),
        ({"scorers": {"gaussian": {"nam": "knn"}}}, "arm random:.*'nam' is not a key"),
        ({"sets": {"phantoms": {"test": "train"}}}, "patients are tested and stand in train=train"),
        ({"sets": {"phantoms": {"pool": "val+test"}}}, "patients are tested and stand in .*pool=val.test"),
        ({"sets": {"phantoms": {"where": "label_abnormal == 0"}}}, "known to be abnormal, so nothing can be ranked"),
        ({"only": ["randon"]}, "only 'randon' is none of random"),
        ({"backbones": {"moco": "runs/moco"}}, "no arm asks for backbones.moco"),
        (
            {"contamination": {**MIXED, "seeds": [7]}},
            r"contamination.seeds must be among \[0\], the seeds of arm random and scorer gaussian",
        ),
        (
            {"contamination": {**MIXED, "seeds": [1]}, "seeds": [0, 1], "slow": ["gaussian"]},
            r"contamination.seeds must be among \[0\]",
        ),
        (
            {
                "contamination": {**MIXED, "seeds": [0]},
                "seeds": [0, 1],
                "arms": {"random": {**PLAIN["arms"]["random"], "seeds": [1]}},
            },
            r"contamination.seeds must be among \[1\]",
        ),
        ({"arms": {"random": {**PLAIN["arms"]["random"], "seeds": [5]}}}, "arms.random.seeds must be among seeds"),
        ({"slow": ["knn"]}, "slow 'knn' is none of gaussian, nearest"),
        ({"store": None}, "needs the stores that its sets name; give store=FOLDER"),
        ({"store": {"phantoms": "here"}}, "reads no store 'phantoms'; give store=FOLDER"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_runs(phantom_store, tmp_path, changes, message):
    given = {"store": str(phantom_store), **{key: changes[key] for key in changes if key == "store"}}
    with pytest.raises(CarinaError, match=message):
        Plan(read_protocol(written(tmp_path, **{**PLAIN, **changes}), given))


def test_the_command_lists_what_ships(carina):
    done = carina("finetune", "protocol", code=2)
    assert "kermany_patients" in done.stderr
    assert "takes one recipe" in carina("finetune", "anomaly", "classify", code=2).stderr


# -- what ships ---------------------------------------------------------------------------------------------------------


def test_shipped_protocols_are_valid_and_published_figures_stay_under_their_own():
    names = shipped("protocol")
    figures = {}
    for name in names:
        recipe = read_protocol(name)
        if recipe.task != "anomaly":
            continue
        assert recipe.primary.region == "whole" and recipe.primary.scorer == "gaussian", name
        assert (
            recipe.arms[recipe.primary.arm].mode == "full"
            and recipe.arms[recipe.primary.reference.arm].mode == "frozen"
        )
        if recipe.published:
            assert all(rows.counts and rows.counts.test_abnormal for rows in recipe.sets.values()), name
            assert all("arXiv" in row.source or "doi" in row.source for row in recipe.published), name
        figures[name] = {(row.method, row.auroc) for row in recipe.published}
    assert figures["kermany_patients"] == figures["nih_views"] == set()
    told = [figure for found in figures.values() for figure in found]
    assert len(told) == len(set(told)) >= 10, "no figure stands under two protocols"
    zhang = read_protocol("zhanglab").sets["zhanglab"]
    assert zhang.train == "train+val" and zhang.counts.model_dump() == {
        "train_normal": 1349, "test_normal": 234, "test_abnormal": 390
    }  # fmt: skip


# -- figures by hand ----------------------------------------------------------------------------------------------------


def test_figures_of_a_case_by_hand():
    """Four abnormal (scores 2, 5, 6, 7) and four normal test images (1, 3, 4, 8), reference normals 0 to 9."""
    test = pd.DataFrame({"target": [1, 1, 1, 1, 0, 0, 0, 0], "score": [2.0, 5, 6, 7, 1, 3, 4, 8]}).assign(
        role="test", fold=0
    )
    old = pd.DataFrame({"target": 0.0, "score": np.arange(10.0)}).assign(role="reference", fold=0)
    frame = pd.concat([test, old], ignore_index=True)
    frame["image_id"] = frame["patient_id"] = [f"{i:02d}" for i in range(len(frame))]
    entry, _ = measure([frame, frame], 100, 0)
    assert entry["auroc"]["value"] == (1 + 3 + 3 + 3) / 16 and entry["auroc_by_seed"] == [10 / 16] * 2
    assert entry["fpr_at_95_tpr"] == 3 / 4, "all four abnormal are found at 2, where 3, 4 and 8 are called too"
    assert entry["fpr_nominal"] == 0, "the 95 % quantile of 0 ... 9 is 8.55"
    assert entry["shift"] == (1.5 + 3.5 + 4.5 + 8.5) / 40
    assert "fpr_nominal_held_out" not in entry
