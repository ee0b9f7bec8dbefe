"""inspect on what the stages really write: what it is, the facts, and that no identifier is among them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from carina.errors import CarinaError
from carina.evaluate.compare import compare
from carina.files import write_json
from carina.inspect import inspect

IMAGES, PATIENTS, SCALE, BATCH = 36, 18, 32, 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store, a pretraining run counted in epochs, a frozen classifier and its evaluation, features, a publication."""
    from carina.evaluate.predict import embed
    from carina.evaluate.score import evaluate
    from carina.finetune.run import finetune
    from carina.intake.prepare import prepare
    from carina.pretrain.run import pretrain
    from carina.publish import publish

    root = tmp_path_factory.mktemp("made")
    noise = np.random.default_rng(0)
    rows = []
    for number in range(IMAGES):
        name = f"Doe_Jane_{number:02d}.png"
        ill = number % 4 < 2
        Image.fromarray(noise.integers(0, 120 + 100 * ill, (48, 40), dtype=np.uint8)).save(root / name)
        patient = number // 2
        split = "test" if patient % 3 == 0 else "train"
        rows.append({"path": name, "patient_id": f"Doe{patient}", "Effusion": int(ill), "split": split})
    pd.DataFrame(rows).to_csv(root / "labels.csv", index=False)
    store, run = str(root / "store"), str(root / "pretrained")
    columns = {"patient": "patient_id", "labels": ["Effusion"], "split": "split", "lungs": False}
    prepare(str(root / "labels.csv"), {"out": store, "scales": [SCALE], "workers": 1, **columns}, quiet=True)
    short = {"steps": None, "epochs": 2, "batch_size": BATCH, "checkpoint_every": 2, "threads": 1, "scales": [SCALE]}
    pretrain("debug/moco", {"store": store, "out": run, **short}, quiet=True)
    frozen = {"backbone": run, "store": store, "out": str(root / "frozen"), "labels": ["Effusion"], "threads": 1}
    finetune("classify", frozen, quiet=True)
    evaluate(str(root / "frozen"), {"store": store, "resamples": 100, "examples": 0}, quiet=True)
    embed(run, [store], {"out": str(root / "features.parquet")}, quiet=True)
    publish(run, {"repo": "org/name", "out": str(root / "published")}, dry_run=True, quiet=True)
    return root


def test_a_store_is_told_by_its_counts(made):
    facts = inspect(made / "store")
    assert (facts["what"], facts["images"], facts["patients"]) == ("store", IMAGES, PATIENTS)
    assert facts["split"] == {"test": 12, "train": 24}
    assert facts["labels"] == {"Effusion": {"positive": 18, "negative": 18, "uncertain": 0}}


def test_a_store_that_is_not_finished_says_how_far_it_came(tmp_path):
    write_json(tmp_path / "plan.json", {"files": 2500, "recipe": {"scales": [64]}})
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "rows-00000.parquet").touch()
    facts = inspect(tmp_path)
    assert (facts["what"], facts["shards_done"], facts["shards"]) == ("unfinished store", 1, 3)


def test_a_finished_run_shows_its_artefact(made):
    facts = inspect(made / "pretrained")
    assert (facts["what"], facts["state"]) == ("pretrain run", "finished")
    assert facts["steps"] == facts["steps_done"] == 2 * (24 // BATCH)
    assert facts["pretexts"] == {"moco": 1.0} and facts["last"]["loss"] > 0
    assert facts["backbone"]["patients"] == 12 and facts["backbone"]["input"] == [1, SCALE, SCALE]


def test_a_run_that_stopped_says_where_it_goes_on(made, tmp_path):
    run = shutil.copytree(made / "pretrained", tmp_path / "run")
    shutil.rmtree(run / "backbone")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:5]) + '\n{"step": 5, "lo')
    facts = inspect(run)
    assert facts["state"] == "unfinished; --resume goes on from step 4"
    assert (facts["steps_done"], facts["steps"]) == (5, 6)
    shutil.rmtree(run / "checkpoints")
    assert "begins anew" in inspect(run)["state"]


def test_a_backbone_counts_its_parameters_as_torch_does(made):
    from carina.models.backbones import load_backbone

    facts = inspect(made / "pretrained" / "backbone")
    network = load_backbone(str(made / "pretrained")).network
    assert facts["what"] == "backbone" and facts["architecture"] == "test_resnet"
    assert facts["parameters"] == sum(values.numel() for values in network.parameters())


def test_a_fine_tuned_run_its_predictor_and_evaluation(made):
    run, predictor = inspect(made / "frozen"), inspect(made / "frozen" / "predictor")
    assert (run["what"], run["state"], predictor["what"]) == ("finetune run", "finished", "predictor (classify)")
    assert predictor["backbone"] == "test_resnet" and predictor["remembers_patients"] is False
    evaluation = inspect(made / "frozen" / "evaluations" / "test")
    assert evaluation["what"] == "evaluation" and evaluation["images"] == 12
    assert run["evaluations"] == {"test": evaluation["results"]}
    metrics = json.loads((made / "frozen" / "evaluations" / "test" / "metrics.json").read_text())
    row = metrics["table"][0]
    said = evaluation["results"]["Effusion"]
    assert said.startswith("AUROC" if row["auroc"]["value"] is not None else "not estimable")
    assert row["auroc"]["value"] is None or f"{row['auroc']['value']:.3f}" in said


def test_a_comparison_shows_every_row(made, tmp_path):
    arm = [made / "frozen" / "evaluations" / "test"]
    result = compare(arm, arm, resamples=100)
    write_json(tmp_path / "comparison.json", result)
    facts = inspect(tmp_path)
    assert facts["what"] == "comparison"
    assert list(facts["results"].values()) == [row["sentence"] for row in result["rows"]]


def test_a_published_folder_is_checked(made, tmp_path):
    folder = shutil.copytree(made / "published", tmp_path / "published")
    facts = inspect(folder)
    assert facts["what"] == "published backbone" and facts["license"] == "not chosen yet"
    assert facts["intact"].startswith("yes")
    (folder / "carina.json").write_text((folder / "carina.json").read_text() + " ")
    assert inspect(folder)["intact"].startswith("no: carina.json")


@pytest.mark.parametrize(
    ("file", "what", "rows"),
    [
        ("features.parquet", "features", IMAGES),
        ("frozen/evaluations/test/predictions.parquet", "predictions", 12),
        ("pretrained/manifest.parquet", "manifest of what was seen (private)", 24),
        ("store/table.parquet", "table of a store", IMAGES),
        ("store/rejected.parquet", "rejected files", 0),
    ],
)
def test_parquet_files_are_told_apart(made, file, what, rows):
    facts = inspect(made / file)
    assert (facts["what"], facts["rows"]) == (what, rows)
    if what == "features":
        assert facts["dimension"] == inspect(made / "pretrained" / "backbone")["features"]


def test_nothing_shown_names_a_patient_or_a_place(made):
    shown = [inspect(made / name) for name in ("store", "pretrained", "frozen", "frozen/evaluations/test", "published")]
    shown += [inspect(path) for path in made.rglob("*.parquet")]
    text = json.dumps(shown, allow_nan=False)
    table = pd.read_parquet(made / "store" / "table.parquet")
    for secret in ("Doe", "labels.csv", str(made), *table["patient_id"], *table["image_id"]):
        assert secret not in text, secret


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("prepare", "fit", "stretch"),
        ("pretrain", "init", "x"),
        ("finetune", "mode", "full"),
        ("evaluate", "examples", 3),
    ],
)
def test_a_recipe_says_what_it_changes(stage, key, value, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"{key}: {value}\n")
    facts = inspect(tmp_path / "mine.yaml")
    assert (facts["what"], facts["valid"]) == (f"recipe of {stage}", "yes")
    assert facts["differs_from_default"] == {key: value}


def test_a_recipe_with_a_mistake_says_which(tmp_path):
    (tmp_path / "mine.yaml").write_text("pretexts: {moco: {wieght: 1}}\n")
    assert "did you mean" in inspect(tmp_path / "mine.yaml")["valid"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("absent", None), ("notes.txt", b"x"), ("list.yaml", b"- 1"), ("bad.yaml", b"a: ["), ("other.yaml", b"a: 1"),
     ("bad.parquet", b"PAR1"), ("other.parquet", "frame"), ("folder", "folder")],
)  # fmt: skip
def test_anything_else_is_refused_in_one_sentence(name, content, tmp_path):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content == "frame":
        pd.DataFrame({"a": [1]}).to_parquet(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(CarinaError, match=name.split(".")[0]) as error:
        inspect(path)
    assert "\n" not in str(error.value)


def test_the_command_prints_json(carina, made):
    facts = json.loads(carina("inspect", made / "store", "--json").stdout)
    assert facts["images"] == IMAGES
    assert "is nothing that carina knows" in carina("inspect", made.parent, code=2).stderr
