"""The protocol of few labels: nested subsets, what labels are used, figures, what is counted, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from statsmodels.stats.multitest import multipletests

from carina.data.splits import permute_patients
from carina.errors import CarinaError
from carina.finetune import few_labels
from carina.finetune.few_labels import FewLabels
from carina.finetune.few_labels_page import markdown
from carina.finetune.few_labels_plan import Cell, LabelsPlan
from carina.finetune.protocol import protocol, read_protocol
from carina.finetune.protocol_base import read_cell
from carina.finetune.run import training_targets
from carina.recipes import shipped

TINY = {
    "task": "classify",
    "title": "Tiny",
    "sets": {
        "phantoms": {
            "test": "val+test",
            "labels": ["abnormal", "Opacity"],
            "patients": [8, "all"],
            "draws": {"frozen": [2, 2], "full": [1, 1]},
            "within": ["view"],
        }
    },
    "recipe": {
        "scale": 32, "size": 32, "steps": 2, "batch_size": 8, "threads": 1, "wandb": "off", "precision": "no",
        "checkpoint_every": 1, "temperature": False, "probe": {"strengths": [0.01, 1.0]},
    },
    "arms": {
        "random": {"backbone": "random:resnet18", "modes": ["frozen"]},
        "scratch": {"backbone": "random:resnet18", "modes": ["full"]},
        "hog": {"backbone": "hog", "modes": ["frozen"]},
        "hog_64": {"backbone": "hog", "modes": ["frozen"], "recipe": {"scale": 64, "size": None}},
        "moco": {"backbone": "moco", "modes": ["frozen"]},
        "permuted": {"backbone": "hog", "modes": ["frozen"], "recipe": {"permute_labels": True}},
    },
    "backbones": {"moco": None},
    "primary": {
        "set": "phantoms", "label": "abnormal", "patients": 8, "arm": "hog", "mode": "frozen",
        "reference": {"arm": "random", "mode": "frozen"},
    },
    "references": {"frozen": ["random"]},
    "resamples": 100,
}  # fmt: skip
FROZEN = {"arms": {name: TINY["arms"][name] for name in ("random", "hog", "permuted")}, "backbones": {}}


def rows(**changes) -> dict:
    return {"sets": {"phantoms": {**TINY["sets"]["phantoms"], **changes}}}


def written(folder: Path, **changes) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return str(path)


def plan(folder: Path, store: Path, **changes) -> LabelsPlan:
    return LabelsPlan(read_protocol(written(folder, **changes), {"store": str(store), "out": str(folder / "out")}))


@pytest.fixture(scope="module")
def whole(phantom_store, tmp_path_factory) -> tuple[Path, dict]:
    """The tiny protocol: its folder, and what was returned."""
    folder = tmp_path_factory.mktemp("labels")
    given = {"store": str(phantom_store), "out": str(folder / "out")}
    return folder / "out", protocol(written(folder), given, quiet=True)


def cells(out: Path, row: dict) -> list[pd.DataFrame]:
    folder = out / "cells" / "phantoms" / row["arm"] / row["mode"] / row["patients"]
    return [read_cell(path)[0] for path in sorted(folder.iterdir())]


# -- the whole way ------------------------------------------------------------------------------------------------------


def test_the_table_holds_every_arm_mode_count_label_and_view(whole, phantom_store):
    out, result = whole
    (table,) = result["tables"]
    views = sorted(pd.read_parquet(phantom_store / "table.parquet")["view"].unique())
    kinds = {(r["arm"], r["mode"], r["patients"], r["label"], r["group"]) for r in table["rows"]}
    arms = [("random", "frozen"), ("hog", "frozen"), ("hog_64", "frozen"), ("permuted", "frozen"), ("scratch", "full")]
    assert kinds == {
        (*arm, count, label, group)
        for arm in arms for count in ("8", "all") for label in ("abnormal", "Opacity", "mean of labels")
        for group in ("overall", *(f"view {view}" for view in views))
    }  # fmt: skip
    assert table["cells"] == {"asked": 18, "done": 18}
    assert {(r["mode"], r["draws"]) for r in table["rows"]} == {("frozen", 2), ("full", 1)}
    assert result["left_out"] == ["arm moco: backbones.moco= is not given"]
    page = (out / "table.md").read_text()
    assert page == markdown(result) and "Synthetic images." in page and "Primary: hog (frozen) minus random" in page
    assert json.loads((out / "table.json").read_text()) == result
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG") and not list((out / "runs").iterdir())


def test_figures_are_means_over_draws_of_those_of_the_scores(whole):
    out, result = whole
    frames = {}
    for row in result["tables"][0]["rows"]:
        found, precise = [], []
        kind = row["arm"], row["mode"], row["patients"]
        frames[kind] = frames.get(kind) or cells(out, row)
        for frame in frames[kind]:
            part = frame if row["group"] == "overall" else frame[frame["view"] == row["group"].split()[1]]
            labels = [row["label"]] if row["label"] != "mean of labels" else ["abnormal", "Opacity"]
            parts = [part[part["label"] == label] for label in labels]
            found.append(np.mean([roc_auc_score(p["target"], p["score"]) for p in parts]))
            precise.append(average_precision_score(parts[0]["target"], parts[0]["score"]))
        assert row["auroc"]["value"] == pytest.approx(np.mean(found)), row
        assert row["auroc_by_draw"] == pytest.approx(found)
        if row["label"] != "mean of labels":
            assert row["average_precision"] == pytest.approx(np.mean(precise))


def test_one_contrast_is_primary_and_the_others_are_corrected_together(whole):
    (table,) = whole[1]["tables"]
    value = {
        (r["arm"], r["mode"], r["patients"]): r["auroc"]["value"]
        for r in table["rows"] if (r["label"], r["group"]) == ("abnormal", "overall")
    }  # fmt: skip
    primary = table["primary"]
    assert (primary["row"], primary["patients"]) == ({"arm": "hog", "mode": "frozen"}, "8")
    assert primary["difference"]["value"] == pytest.approx(value["hog", "frozen", "8"] - value["random", "frozen", "8"])
    others = table["exploratory"]
    assert [(e["row"]["arm"], e["patients"]) for e in others] == [("hog", "all"), ("hog_64", "8"), ("hog_64", "all")]
    corrected = multipletests([e["difference"]["p_value"] for e in others], method="holm")[1]
    assert [e["p_holm"] for e in others] == pytest.approx(corrected)
    assert not any(e["row"]["arm"] == "permuted" for e in others) and table["permuted"]


def test_a_row_says_which_labels_it_used_and_what_its_pretext_saw(phantom_store, pretrained, tmp_path):
    arms = {"moco": TINY["arms"]["moco"], "hog": TINY["arms"]["hog"]}
    changes = {"arms": arms, "primary": None, "references": {}, **rows(patients=[8], draws={"frozen": [1]})}
    changes["backbones"] = {"moco": str(pretrained)}
    given = {"store": str(phantom_store), "out": str(tmp_path / "out")}
    clean = protocol(written(tmp_path, **changes), given, quiet=True)["tables"][0]["rows"]
    assert {(r["arm"], r["labels_used"], r["seen_patients"], r["transductive"]) for r in clean} == {
        ("moco", "8 patients", 0, False), ("hog", "8 patients", 0, False)
    }  # fmt: skip
    folds = rows(patients=[8], draws={"frozen": [1]}, folds=2)
    given["out"] = str(tmp_path / "folds")
    table = protocol(written(tmp_path, **{**changes, **folds}), given, quiet=True)["tables"][0]
    trained = pd.read_parquet(phantom_store / "table.parquet").query("split == 'train'")["patient_id"].nunique()
    (row,) = [r for r in table["rows"] if (r["arm"], r["label"], r["group"]) == ("moco", "abnormal", "overall")]
    assert (row["seen_patients"], row["transductive"]) == (trained, True)
    assert f"| {trained} (transductive) |" in (tmp_path / "folds" / "table.md").read_text()


# -- labels -------------------------------------------------------------------------------------------------------------


def test_subsets_are_nested_shared_by_all_arms_and_apart_from_the_test(phantom_store, tmp_path):
    found = plan(tmp_path, phantom_store)

    def patients(arm: str, mode: str, count: str, draw: int) -> set[str]:
        train, test = found.fit_rows(Cell("phantoms", arm, mode, count, draw, None))
        assert not set(train.table["patient_id"]) & set(test.table["patient_id"])
        return set(train.table["patient_id"])

    for draw in (0, 1):
        few, more, everyone = (patients("hog", "frozen", count, draw) for count in ("8", "16", "all"))
        assert (len(few), len(more)) == (8, 16) and few < more < everyone
        assert few == patients("random", "frozen", "8", draw) == patients("scratch", "full", "8", draw)
    assert patients("hog", "frozen", "8", 0) != patients("hog", "frozen", "8", 1)
    share = plan(tmp_path, phantom_store, **rows(patients=["50%"], draws={"frozen": [1], "full": [1]}), primary=None,
                 arms=FROZEN["arms"], backbones={})  # fmt: skip
    half, _ = share.fit_rows(Cell("phantoms", "hog", "frozen", "50%", 0, None))
    assert half.table["patient_id"].nunique() == round(len(everyone) / 2)


@pytest.mark.parametrize("arm, mode", [("hog", "frozen"), ("random", "frozen"), ("scratch", "full")])
def test_no_label_beyond_the_labelled_patients_is_used(phantom_store, tmp_path, monkeypatch, arm, mode):
    """Every other training label turned around, and those of the test as well: the scores must not move."""
    from carina.data import store as stores

    cell = Cell("phantoms", arm, mode, "8", 0, None)
    changes = {"arms": {arm: TINY["arms"][arm]}, "backbones": {}, "primary": None, "references": {}}
    first = plan(tmp_path, phantom_store, **changes)
    labelled = set(first.fit_rows(cell)[0].table["patient_id"])
    list(FewLabels(first, tmp_path / "a", quiet=True).compute(replace(first.units[0], cells=(cell,))))
    truly = stores.Store.__init__

    def turned(self, path):
        truly(self, path)
        others = ~self.table["patient_id"].isin(labelled)
        for label in ("label.abnormal", "label.Opacity"):
            self.table.loc[others, label] = 1 - self.table.loc[others, label]

    monkeypatch.setattr(stores.Store, "__init__", turned)
    from carina.finetune import few_labels_plan

    few_labels_plan.rows_of.cache_clear()
    second = plan(tmp_path, phantom_store, **changes)
    list(FewLabels(second, tmp_path / "b", quiet=True).compute(replace(second.units[0], cells=(cell,))))
    few_labels_plan.rows_of.cache_clear()
    a, b = (read_cell(tmp_path / side / cell.place)[0] for side in "ab")
    assert (a["target"] == 1 - b["target"]).all() and len(a) > 20
    assert (a["score"] == b["score"]).all() and a["score"].nunique() > 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 8).map(str), min_size=1, max_size=40), st.integers(0, 5))
def test_permuted_patients_take_the_labels_of_one_patient_each(patients, seed):
    taken = permute_patients(patients, seed)
    assert (taken == permute_patients(patients, seed)).all()
    givers = [{patients[row] for row, own in zip(taken, patients) if own == patient} for patient in set(patients)]
    assert all(len(giver) == 1 for giver in givers) and len(set.union(*givers)) == len(set(patients))
    for patient in set(patients):
        mine = [row for row, own in zip(taken, patients) if own == patient]
        there = patients.count(patients[mine[0]])
        assert len(set(mine)) == min(len(mine), there), "every label of the giver is used before one is used twice"


def test_permuted_labels_are_chance_where_true_ones_are_perfect():
    """Features that tell the label outright, under the protocol's own probe: 40 deals of 60 patients."""
    from carina.finetune.probe import probe
    from carina.finetune.recipe import ProbeSettings

    generator = np.random.default_rng(0)
    patients = [str(number // 2) for number in range(120)]
    target = np.repeat(generator.permutation(np.arange(60) % 2), 2).astype(np.float32)
    x = generator.normal(size=(120, 4)) + 3 * target[:, None]
    new, truth = generator.normal(size=(400, 4)) + 3 * (np.arange(400) % 2)[:, None], np.arange(400) % 2
    chosen = ProbeSettings(strengths=[0.01, 1.0], folds=3)
    values = []
    for seed in [None, *range(40)]:
        dealt = target if seed is None else target[permute_patients(patients, seed)]
        found = probe(x, dealt[:, None], patients, ["a"], chosen, 0)
        values.append(roc_auc_score(truth, new @ found[0][0]))
    assert values[0] > 0.99
    spread = np.std(values[1:], ddof=1) / np.sqrt(40)
    assert abs(np.mean(values[1:]) - 0.5) < 3 * spread < 0.3


def test_a_label_of_one_class_is_chance_and_counted(phantom_store, tmp_path):
    """Two labelled patients cannot hold both classes of everything in every draw."""
    changes = rows(labels=["Pneumothorax"], patients=[2], draws={"frozen": [6]}, within=[])
    changes |= {"arms": {"hog": TINY["arms"]["hog"]}, "backbones": {}, "primary": None, "references": {}}
    given = {"store": str(phantom_store), "out": str(tmp_path / "out")}
    (row,) = protocol(written(tmp_path, **changes), given, quiet=True)["tables"][0]["rows"]
    found = plan(tmp_path, phantom_store, **changes)
    alone = []
    for draw in range(6):
        cell = Cell("phantoms", "hog", "frozen", "2", draw, None)
        known = training_targets(found.cell_recipe(cell), found.fit_rows(cell)[0])
        alone.append(len(np.unique(known)) == 1)
    assert row["one_class"] == f"{sum(alone)} of 6" and sum(alone) > 0
    assert all(value == 0.5 for value, single in zip(row["auroc_by_draw"], alone) if single)


# -- folds --------------------------------------------------------------------------------------------------------------


def test_folds_are_pooled_by_rank_and_never_see_their_patients(phantom_store, tmp_path):
    changes = {**FROZEN, **rows(folds=2, patients=[8], draws={"frozen": [2]}), "primary": None, "references": {}}
    given = {"store": str(phantom_store), "out": str(tmp_path / "out")}
    table = protocol(written(tmp_path, **changes), given, quiet=True)["tables"][0]
    everything = pd.read_parquet(phantom_store / "table.parquet")
    found = plan(tmp_path, phantom_store, **changes)
    values = []
    for draw in (0, 1):
        parts = []
        for fold in (0, 1):
            cell = Cell("phantoms", "hog", "frozen", "8", draw, fold)
            frame = read_cell(tmp_path / "out" / cell.place)[0].query("label == 'abnormal'")
            assert not set(frame["patient_id"]) & set(found.fit_rows(cell)[0].table["patient_id"])
            parts.append(frame.assign(place=frame["score"].rank() / len(frame)))
        both = pd.concat(parts)
        assert sorted(both["image_id"]) == sorted(everything["image_id"])
        values.append(roc_auc_score(both["target"], both["place"]))
    (row,) = [r for r in table["rows"] if (r["arm"], r["label"], r["group"]) == ("hog", "abnormal", "overall")]
    # half ranks against ranks: the same order inside a fold, ties between folds may fall otherwise
    assert row["auroc_by_draw"] == pytest.approx(values, abs=0.02)


# -- going on -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_no_finished_cell_is_made_again(phantom_store, tmp_path, whole):
    """The real command, killed outright five times at other moments, and then left to finish."""
    name, out = written(tmp_path), tmp_path / "out"
    words = [
        sys.executable,
        "-m",
        "carina",
        "finetune",
        "protocol",
        name,
        f"store={phantom_store}",
        f"out={out}",
        "--json",
    ]
    seen: dict[Path, int] = {}
    kills = 0
    for after in (1, 2, 4, 3, 2):  # new cells (or checkpoints of one that is trained) until the kill
        process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, limit = set(traces(out)), time.monotonic() + 240
        while process.poll() is None and len(set(traces(out)) - before) < after and time.monotonic() < limit:
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        now = {
            path: path.stat().st_mtime_ns for path in out.glob("cells/**/*.parquet") if not path.name.startswith(".")
        }
        assert {path: now[path] for path in seen} == seen, "a finished cell was written again"
        seen = now
    assert kills >= 3 and 3 < len(seen) < 18
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    again = {path: path.stat().st_mtime_ns for path in out.glob("cells/**/*.parquet")}
    assert {path: again[path] for path in seen} == seen and len(again) == 18
    told = [line for line in (out / "log.txt").read_text().splitlines() if line.endswith(" s") and ", draw " in line]
    lines = [line.split(" ", 2)[2].rpartition(":")[0] for line in told]
    assert len(lines) == len(set(lines)), "no cell was finished twice"
    assert json.loads(done.stdout) == json.loads((out / "table.json").read_text()) == whole[1]


def traces(out: Path) -> list[str]:
    return [str(path) for pattern in ("cells/**/draw-*.parquet", "runs/*/checkpoints/*") for path in out.glob(pattern)]


@pytest.mark.slow
def test_processes_beside_each_other_make_the_same_cells(phantom_store, tmp_path, whole):
    given = {"store": str(phantom_store), "out": str(tmp_path / "out"), "parallel": 2}
    result = protocol(written(tmp_path), given, quiet=True)
    assert result == whole[1]


def test_what_is_planned_is_counted_and_nothing_is_written(phantom_store, tmp_path, whole):
    given = {"store": str(phantom_store), "out": str(tmp_path / "out")}
    told = protocol(written(tmp_path), given, dry_run=True)
    assert (told["cells"], told["cells_to_do"], told["runs_to_train"]) == (18, 18, 2)
    assert told["hours"] > 0 and told["disk_mib"] > 100 and told["energy_basis"].startswith("estimated")
    assert set(told["rates"]) == {
        f"phantoms/{arm}" for arm in ("random/frozen", "hog/frozen", "hog_64/frozen", "permuted/frozen", "scratch/full")
    }
    assert not (tmp_path / "out").exists()
    more = protocol(written(tmp_path, watts=20.0), given, dry_run=True)
    assert more["energy_kwh"] == pytest.approx(20 * more["hours"] * more["parallel"] / 1000, rel=0.02, abs=2e-5)
    done = protocol(written(tmp_path), {**given, "out": str(whole[0])}, dry_run=True)
    assert (done["cells_to_do"], done["hours"]) == (0, 0)


def test_only_what_decides_a_cell_may_not_change(phantom_store, tmp_path, whole):
    given = {"store": str(phantom_store), "out": str(whole[0])}
    for changes, message in (
        ({"recipe": {**TINY["recipe"], "steps": 3}}, "scratch.*other settings .steps differ"),
        ({"recipe": {**TINY["recipe"], "probe": {"strengths": [1.0]}}}, "frozen.*other settings .probe.strengths"),
    ):
        with pytest.raises(CarinaError, match=message):
            protocol(written(tmp_path, **changes), given, dry_run=True)


# -- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"primary": {**TINY["primary"], "arm": "hogg"}}, "did you mean 'hog'"),
        ({"primary": {**TINY["primary"], "mode": "full"}}, "names hog in mode full, which arms.hog.modes has not"),
        ({"primary": {**TINY["primary"], "patients": 9}}, "primary.patients=9 is not among"),
        ({"references": {"frozen": ["randon"]}}, "references 'randon' is none of"),
        (rows(draws={"frozen": [1], "full": [1, 1]}), "draws.frozen needs a number for each of the 2 counts"),
        (rows(patients=[8, 4000]), "patients to label, 4000 are asked for"),
        (rows(labels=["Opacit"]), "Opacit"),
        (rows(test="train"), "patients are tested and stand in train=train"),
        (rows(within=["views"]), "within names the column 'views'"),
        ({"recipe": {"steps": 3, "patients": 5}}, "recipe.patients is decided by the protocol"),
        ({"recipe": {"stepps": 3}}, "arm .*'stepps' is not a key"),
        ({"regions": ["lungs"]}, "'regions' is not a key here"),
        ({"task": "clasify"}, "did you mean 'classify'"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_runs(phantom_store, tmp_path, changes, message):
    with pytest.raises(CarinaError, match=message):
        plan(tmp_path, phantom_store, **changes)


def test_shipped_protocols_name_one_contrast_and_hold_the_arms_that_are_always_there():
    found = {name: read_protocol(name) for name in shipped("protocol")}
    mine = {name: recipe for name, recipe in found.items() if recipe.task == "classify"}
    assert set(mine) == {"kermany_labels", "nih_labels"}
    for recipe in mine.values():
        kinds = {(arm.backbone, mode) for arm in recipe.arms.values() for mode in arm.modes}
        assert {("random:resnet18", "frozen"), ("random:resnet18", "full"), ("hog", "frozen")} <= kinds
        assert {("imagenet-lite0", "frozen"), ("imagenet-lite0", "full")} <= kinds
        assert (recipe.primary.arm, recipe.primary.mode, recipe.primary.patients) == ("moco_anatpaste", "frozen", 64)
        assert recipe.primary.reference.arm == "random"
    assert mine["kermany_labels"].recipe == mine["nih_labels"].recipe


def test_a_run_that_was_trained_but_not_scored_is_not_trained_again(phantom_store, tmp_path, monkeypatch):
    """A stop between training and writing keeps the run; the next command trains nothing again."""
    changes = {"arms": {"scratch": TINY["arms"]["scratch"]}, "backbones": {}, "primary": None, "references": {}}
    changes |= rows(patients=[8], draws={"full": [1]})
    changes["arms"]["scratch"] = {"backbone": "random:resnet18", "modes": ["full"]}
    name, given = written(tmp_path, **changes), {"store": str(phantom_store), "out": str(tmp_path / "out")}
    with monkeypatch.context() as patch:
        patch.setattr(few_labels, "write_cell", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            protocol(name, given, quiet=True)
    (run,) = (tmp_path / "out" / "runs").iterdir()
    assert (run / "manifest.parquet").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(few_labels, "finetune", lambda *_, **__: pytest.fail("trained again"))
        table = protocol(name, given, quiet=True)["tables"][0]
    assert table["cells"] == {"asked": 1, "done": 1} and not list((tmp_path / "out" / "runs").iterdir())
