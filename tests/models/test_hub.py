"""What a published folder holds, what must not be in it, what its card says, and the upload against a hub that the test
plays."""

import hashlib
import json
import re
import shutil
from types import SimpleNamespace
from typing import ClassVar

import httpx
import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import carina.models.hub as hub_package
from carina.data.manifest import find_manifest
from carina.errors import CarinaError
from carina.files import read_json, write_json
from carina.models.backbones import load_backbone, resize_images
from carina.models.export import resizing
from carina.models.hub import Told, backbone_card, clauses_of, findings, verify
from carina.models.hub.results import evaluation_table
from carina.models.hub.scan import PIECE
from carina.publish import publish
from carina.runs import Run

FILES = {"README.md", "SHA256SUMS", "carina.json", "config.json", "model.safetensors", "recipe.yaml"}


class Hub:
    calls: ClassVar[list] = []
    stored: ClassVar[dict] = {}
    fail: ClassVar[list] = []
    private = True

    def create_repo(self, repo, **options):
        self.calls.append(("create", repo, options))
        return f"https://hub.invalid/{repo}"

    def repo_info(self, repo):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.calls.append(("upload", repo_id, folder_path))
        if self.fail:
            raise self.fail.pop()
        files = [p for p in folder_path.rglob("*") if p.is_file()]
        self.stored.update({p.relative_to(folder_path).as_posix(): p.stat().st_size for p in files})

    def list_repo_tree(self, repo, recursive):
        return [SimpleNamespace(path=name, size=size) for name, size in self.stored.items()]


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    for name, value in (("calls", []), ("stored", {}), ("fail", [])):
        monkeypatch.setattr(Hub, name, value)
    monkeypatch.setattr(hub_package, "load_back", lambda *_: {})  # tests/test_publish.py has the real one
    monkeypatch.setattr("time.sleep", lambda _: None)
    return Hub


def send(run, out, **more):
    given = {"repo": "org/name", "out": str(out), "license": "apache-2.0", "onnx": False, **more}
    return publish(str(run), given, quiet=True)


def test_upload_is_private_and_sends_what_dry_run_shows(hub, pretrained, tmp_path):
    out = tmp_path / "published"
    shown = publish(str(pretrained), {"repo": "org/name", "out": str(out), "onnx": False}, dry_run=True, quiet=True)
    assert hub.calls == []
    result = send(pretrained, out)
    assert hub.calls == [("create", "org/name", {"private": True, "exist_ok": True}), ("upload", "org/name", out)]
    assert result["uploaded"] == "https://hub.invalid/org/name"
    assert set(shown["files"]) == set(result["files"]) == set(hub.stored) == FILES
    assert "license: apache-2.0" in (out / "README.md").read_text()


def test_a_hub_that_is_busy_is_asked_again_and_one_that_refuses_is_one_sentence(hub, pretrained, tmp_path):
    out = tmp_path / "published"
    hub.fail += [httpx.ConnectError("line broke"), ConnectionResetError()]
    send(pretrained, out)
    assert [call[0] for call in hub.calls] == ["create", "upload", "upload", "upload"]
    hub.fail += [ValueError("no such user")]
    with pytest.raises(CarinaError, match=r"could not be reached or refused org/name .*the folder .* is ready"):
        send(pretrained, out)
    assert (out / "model.safetensors").is_file()
    send(pretrained, out)


def test_what_did_not_arrive_is_noticed(hub, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "list_repo_tree", lambda *_, **__: [SimpleNamespace(path="README.md", size=1)])
    with pytest.raises(CarinaError, match=r"README.md did not arrive whole at org/name"):
        send(pretrained, tmp_path / "published")


def test_an_existing_public_repository_is_not_filled_by_default(hub, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "private", False)
    with pytest.raises(CarinaError, match="exists and is public"):
        send(pretrained, tmp_path / "published")
    assert [call[0] for call in hub.calls] == ["create"]


def test_a_changed_file_is_noticed(hub, pretrained, tmp_path):
    out = tmp_path / "published"
    send(pretrained, out)
    verify(out)
    (out / "config.json").write_text("{}")
    with pytest.raises(CarinaError, match=r"config.json in .* is not what was published"):
        verify(out)
    with pytest.raises(CarinaError, match=r"config.json in .* is not what was published"):
        send(pretrained, out)


# -- clauses ----------------------------------------------------------------------------------------------------------


def _origins():
    from carina.intake.sources import find_provenance

    nothing = SimpleNamespace()
    mimic = find_provenance("mimic:.", nothing)
    return {"mimic": mimic, "nih14": find_provenance("nih14:.", nothing), "cxrlt": find_provenance("cxrlt:.", nothing),
            "own": find_provenance("folder", nothing), "old": {}}  # fmt: skip


def test_sources_ask_by_their_terms():
    record = {"synthetic": False, "data": {"origins": _origins()}}
    asked = {clause.source: clause for clause in clauses_of(record)}
    assert set(asked) == {"mimic", "cxrlt", "own", "old"}, "NIH allows derived weights without being asked"
    assert asked["mimic"].credentialed and "credentialed" in asked["mimic"].sentence()
    changed = json.loads(json.dumps(record))
    changed["data"]["origins"]["mimic"]["terms"]["clause"] += " And more."
    assert asked["mimic"].id not in {clause.id for clause in clauses_of(changed)}, "one confirms words, not a name"
    later = {"synthetic": False, "data": {"origins": {}}, "earlier_origins": {"mimic": _origins()["mimic"]}}
    assert [c.source for c in clauses_of(later)] == ["mimic"], "what the first weights were trained on counts too"
    predictor = {"synthetic": True, "data": {"origins": {"phantoms": {}}}, "pretraining": record}
    assert "mimic" in {c.source for c in clauses_of(predictor)}, "synthetic labels do not free the backbone's patients"
    assert clauses_of({"synthetic": True, "data": {"origins": {"phantoms": {}}}, "pretraining": None}) == []


def test_credentialed_data_is_published_only_after_its_clause_was_confirmed(hub, pretrained, tmp_path):
    run = shutil.copytree(pretrained, tmp_path / "run")
    record = read_json(run / "backbone" / "carina.json")
    record |= {"synthetic": False}
    record["data"]["origins"] = {"mimic": _origins()["mimic"]}
    write_json(run / "backbone" / "carina.json", record)
    (wanted,) = (clause.id for clause in clauses_of(record))
    with pytest.raises(CarinaError, match=rf"mimic \(MIMIC-CXR-JPG, .*agreement.*confirm=\[{wanted}\]"):
        send(run, tmp_path / "out")
    assert hub.calls == []
    with pytest.raises(CarinaError, match=rf"confirm=mimic-000000 is no clause .*{wanted}"):
        send(run, tmp_path / "out", confirm="mimic-000000")
    send(run, tmp_path / "out", confirm=[wanted])
    assert f"confirmed clause {wanted}" in (tmp_path / "out" / "README.md").read_text()


# -- what must not leave ----------------------------------------------------------------------------------------------


def _plant_picture(folder):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "x.png")


def _plant_picture_by_another_name(folder):
    _plant_picture(folder)
    (folder / "x.png").rename(folder / "scales.safetensors")


def _plant_manifest_row(folder):
    patient = find_manifest(str(folder.parent))["patient_id"].iloc[0]
    write_json(folder / "carina.json", {**read_json(folder / "carina.json"), "note": patient})


def _plant_file_name(folder):
    write_json(folder / "carina.json", {**read_json(folder / "carina.json"), "note": "seen in p0001_a_0 first"})


def _note(text):
    return lambda folder: write_json(folder / "carina.json", {**read_json(folder / "carina.json"), "origin": text})


def _plant_tail(folder):
    with open(folder / "model.safetensors", "ab") as handle:
        handle.write(b"x" * 1000)


PLANTED = {
    "a picture": (_plant_picture, "x.png is a picture"),
    "its name changed": (_plant_picture_by_another_name, "scales.safetensors holds a picture"),
    "a hash": (_plant_manifest_row, "carina.json holds the hash of a patient"),
    "an e-mail address": (_note("ask jane.doe@clinic.example for it"), "carina.json holds an e-mail address"),
    "a UID": (_note("study 1.2.276.0.7230010.3.1.2.8323329"), "a DICOM UID"),
    "a path": (_note("made in /home/doe/images/ward"), "a path of a machine"),
    "a Windows path": (_note("made in C:\\Users\\doe"), "a path of a machine"),
    "a name": (_note("of DOE^JANE"), "a person's name"),
    "a number": (_note("MRN 1234567"), "a record number"),
    "a file": (_note("like IM-0001-0001.jpeg"), "the name of a picture"),
    "another file": (lambda folder: (folder / "table.csv").write_text("a"), "table.csv is no part"),
    "a folder": (lambda folder: (folder / "images").mkdir(), "images is no part"),
    "a tail": (_plant_tail, "bytes beside its tensors"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_stops_it(hub, pretrained, tmp_path, name):
    plant, said = PLANTED[name]
    run = shutil.copytree(pretrained, tmp_path / "run")
    clean = findings(run / "backbone", find_manifest(str(run))["patient_id"])
    assert clean == []
    plant(run / "backbone")
    found = findings(run / "backbone", find_manifest(str(run))["patient_id"])
    assert any(said in one for one in found), found
    if name in ("a picture", "a hash", "a name"):
        with pytest.raises(CarinaError, match=r"cannot be published: .*take it out"):
            send(run, tmp_path / "out")
        assert hub.calls == [] and not (tmp_path / "out").exists()


def test_names_of_the_owners_files_are_found(pretrained, tmp_path):
    folder = shutil.copytree(pretrained / "backbone", tmp_path / "backbone")
    names = {"p0001_a_0", "p0001_a_0.png", "ab"}
    assert findings(folder, names=names) == []
    _plant_file_name(folder)
    assert "holds the name of one of the training files" in findings(folder, names=names)[0]


def test_a_memory_is_found_whatever_the_file_says_of_it(tmp_path):
    member = {"scorer": {"name": "knn", "memory": False}}
    write_json(tmp_path / "predictor.json", {"members": [member, {"scorer": {"name": "gaussian"}}]})
    assert [one.split()[0] for one in findings(tmp_path)] == ["member-0.safetensors"]
    assert findings(tmp_path, allow_memory=True) == []


def test_a_hash_is_found_in_large_weights(tmp_path):
    """At the beginning, in the middle, over the border of two pieces, at the end: in bytes that are like weights."""
    patient = hashlib.blake2b(b"patient", digest_size=12).hexdigest()
    weights = np.random.default_rng(0).standard_normal(5 * 2**20 // 4).astype(np.float32).tobytes()
    for place in (8, 12345, PIECE - 7, len(weights) - 24):
        data = weights[:place] + patient.encode() + weights[place + 24 :]
        (tmp_path / "model.safetensors").write_bytes(data)
        assert any("hash" in one for one in findings(tmp_path, [patient])), place
        assert not any("hash" in one for one in findings(tmp_path, [patient[::-1]]))


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=30), st.integers(0, 2**96 - 1), st.booleans())
def test_a_hash_is_found_at_any_place(tmp_path_factory, before, number, capitals):
    folder, patient = tmp_path_factory.mktemp("x"), f"{number:024x}"
    shown = patient.upper() if capitals else patient
    (folder / "README.md").write_text(f"{before}{shown}0a", encoding="utf-8")
    assert any("hash" in one for one in findings(folder, [patient]))
    assert not any("hash" in one for one in findings(folder, [f"{(number + 1) % 2**96:024x}"]))


# -- the card and the formats -----------------------------------------------------------------------------------------


def test_the_card_is_filled_from_the_run(pretrained):
    record = read_json(pretrained / "backbone" / "carina.json")
    record["data"]["origins"] = _origins()
    audit = {"name": "shortcut", "sentence": "The label can be read without the lungs."}
    told = Told(environment=Run.open(pretrained).environment(), audits=[audit], watts=250, license="CC-BY-4.0")
    card = backbone_card(load_backbone(str(pretrained)), record, told)
    lines = card.splitlines()
    line = next(line for line in lines if line.startswith("* cxrlt:"))
    assert "drawn from mimic" in line and _origins()["cxrlt"]["terms"]["license"] in line and "consent" in line
    assert card.count("upstream terms are not known to carina") == 2
    data = record["data"]
    row = next(line for line in lines if line.startswith("| phantoms |"))
    assert f"| {data['images']:,} | {data['patients']:,} |" in row and f"median {data['age_median']:.0f}" in row
    scales = ",".join(map(str, record["scales"]))
    for text in (
        "not a medical device",
        "Out of scope: clinical use",
        "can memorize",
        "x 250 W",
        "license: cc-by-4.0",
        audit["sentence"],
        f"carina prepare FILES out=STORE scales=[{scales}] window=auto",
        "carina pretrain recipe.yaml store=STORE out=RUN",
        "MoCo v2 (Chen et al. 2020",
        "the robust range (0.5 % to 99.5 %)",
        f"torch {torch.__version__.split('+')[0]}",
    ):
        assert text in card, text


def test_the_table_shows_plain_numbers_intervals_sentences_and_groups():
    plain = {"label": "A", "auroc": {"value": None}, "ap": {"value": 0.5}, "sensitivity": 0.75, "positives": 9, "n": 90,
             "note": "not estimable"}  # fmt: skip
    figure = {"value": 0.8, "low": 0.7, "high": 0.9}
    whole = {**plain, "label": "B", "auroc": figure, "sensitivity": figure, "note": ""}
    group = {"variable": "view", "group": "AP", "label": "B", "n": 1200, "patients": 900, "positives": 7,
             "auroc": figure, "note": ""}  # fmt: skip
    other = {
        **group,
        "group": "LL",
        "withheld": True,
        "n": None,
        "patients": None,
        "positives": None,
        "note": "uncounted",
    }
    few = {**other, "group": "PA", "auroc": None, "note": "fewer than 20 patients: not shown"}
    mean = {**whole, "label": "macro", "positives": None}
    metrics = {"kind": "classify", "mode": "frozen", "split": "test", "synthetic": False, "patients": 1500,
               "labels_used": "9 patients", "table": [mean, plain, whole], "subgroups": [group, few, other],
               "sentences": ["B is read off the view."]}  # fmt: skip
    card = evaluation_table(metrics)
    assert "| A | - | 0.500 | 0.750 | 9 of 90 | not estimable |" in card and "1,500 patients" in card
    assert "| B | 0.800 (0.700 to 0.900) | 0.500 | 0.800 (0.700 to 0.900) | 9 of 90 |  |" in card
    assert "* B is read off the view." in card and "| B | view | AP | 7 of 1,200 | 0.800 (0.700 to 0.900) |" in card
    assert "| B | view | PA |  | - | fewer than 20 patients: not shown |" in card
    assert "| B | view | LL |  | 0.800 (0.700 to 0.900) | uncounted |" in card
    assert "| macro | 0.800 (0.700 to 0.900) | 0.500 | 0.800 (0.700 to 0.900) |  |  |" in card


def test_ages_and_counts_of_few_that_an_earlier_record_holds_are_not_published(hub, pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path / "run")
    path = tmp_path / "run" / "backbone" / "carina.json"
    record = read_json(path)
    rows = record["data"], *record["data"]["by_source"].values()
    for row in rows:
        row |= {"age_range": [8.0, 97.0], "sex": {"F": 140, "M": 7}, "age_median": 50.0}
        row.pop("age_percentiles")
    write_json(path, record)
    send(tmp_path / "run", tmp_path / "out")
    for text in ((tmp_path / "out" / name).read_text() for name in ("carina.json", "README.md")):
        assert "97.0" not in text and "8 to 97" not in text and not re.search(r"M\W+7\b", text)
    assert "F 140, M fewer than 20" in (tmp_path / "out" / "README.md").read_text()


def test_the_published_recipe_makes_the_same_run(hub, pretrained, tmp_path):
    from carina.pretrain.recipe import PretrainRecipe
    from carina.recipes import build

    send(pretrained, tmp_path / "out")
    again = build("pretrain", PretrainRecipe, str(tmp_path / "out" / "recipe.yaml"), []).model_dump(mode="json")
    first = Run.open(pretrained).recipe()
    assert {key for key in first if first[key] != again[key]} <= {"store", "out"}


@given(st.integers(8, 60), st.integers(8, 60))
def test_resizing_as_matrices_is_resizing(scale, size):
    image, matrix = torch.rand(1, 1, scale, scale), resizing(scale, size)
    assert torch.allclose(matrix @ image @ matrix.T, resize_images(image, size), atol=1e-5)
