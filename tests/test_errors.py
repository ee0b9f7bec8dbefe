"""Mistakes through the real command: one clear sentence, exit 2, nothing lost."""

import errno
import json
import shutil

import pytest

from carina import files
from carina.errors import CarinaError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "debug/moco", "store=x", "out=y", "optim.rl=1"], r"'optim.rl' is not a key here (did you mean"),
        (["pretrain", "debug/moco", "store=x", "out=y", "steps=soon"], "steps: input should be a valid integer"),
        (["pretrain", "debug/moko", "store=x", "out=y"], "no recipe 'debug/moko'"),
        (["pretrain", "debug/moco", "store=nowhere", "out=y"], "nowhere is not a store"),
        (["pretrain", "debug/moco", "out=y"], "give store=FOLDER"),
        (["prepare", "nowhere", "out=y"], "nowhere"),
        (["prepare", "nowhere.csv", "out=y"], "nowhere.csv is not there"),
        (["evaluate", "nowhere", "store=x"], "holds no predictor"),
        (["finetune", "classify", "store=x", "out=y"], "give labels="),
        (["publish", "nowhere", "repo=a/b", "out=z", "--dry-run"], "nowhere is not a run of carina"),
        (["compare", "a=nowhere"], "compare: 'b' is needed"),
        (["compare", "a=x", "b=y", "resamples=many"], "compare: resamples: input should be a valid integer"),
        (["compare", "a=[1,2]", "b=y"], "compare: a"),
        (["pretian"], "'pretian' is not a verb of carina (did you mean 'pretrain'?)"),
        (["prepare", "--jsn", "x"], "has no flag --jsn"),
        (["prepare"], "carina prepare needs SOURCE"),
        (["predict", "nowhere", "x.png"], "holds no predictor"),
    ],
)
def test_mistakes_are_one_sentence(capsys, words, message, tmp_path, monkeypatch):
    from carina.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.startswith("carina: ") and told.err.count("\n") == 1
    assert told.out == "" and not list(tmp_path.iterdir())


def test_the_real_command_ends_with_two(carina, tmp_path):
    assert "nowhere" in carina("prepare", tmp_path / "nowhere", f"out={tmp_path / 'x'}", code=2).stderr


def test_an_empty_folder(carina, tmp_path):
    (tmp_path / "empty").mkdir()
    told = carina("prepare", tmp_path / "empty", f"out={tmp_path / 'store'}", code=2).stderr
    assert told.count("\n") == 1 and "empty" in told and not (tmp_path / "store").exists()


def test_a_folder_of_broken_files_only(tmp_path):
    from carina.intake.prepare import prepare

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(CarinaError, match="none of the 1 files could be used"):
        prepare(str(tmp_path / "in"), {"out": str(tmp_path / "store"), "workers": 1}, quiet=True)


def test_a_store_of_another_schema_version(carina, phantom_store, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(phantom_store, store)
    info = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps({**info, "schema_version": 99}))
    told = carina("pretrain", "debug/moco", f"store={store}", f"out={tmp_path / 'run'}", code=2).stderr
    assert "schema version 99, this carina reads version 2" in told and not (tmp_path / "run").exists()


def test_a_scale_the_store_lacks(carina, phantom_store, tmp_path):
    words = ("pretrain", "debug/moco", f"store={phantom_store}", f"out={tmp_path / 'run'}", "scales=[48]")
    assert "holds scale 32, 64, not 48" in carina(*words, code=2).stderr


def test_a_full_disk_stops_pretraining_with_a_sentence_and_keeps_the_last_checkpoint(
    phantom_store, tmp_path, monkeypatch
):
    from carina.models.backbones import load_backbone
    from carina.pretrain.run import pretrain

    given = {"store": str(phantom_store), "out": str(tmp_path / "run"), "steps": 8, "batch_size": 8, "threads": 1}
    given |= {"checkpoint_every": 2}
    original, calls = files.os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(list((tmp_path / "run").glob("checkpoints/step-*"))) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CarinaError, match=r"disk that holds .* is full.*what was finished is kept"):
        pretrain("debug/moco", given, quiet=True)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    monkeypatch.setattr(files.os, "fsync", original)
    pretrain("debug/moco", given, resume=True, quiet=True)
    assert load_backbone(str(tmp_path / "run")).dimension > 0


def test_a_full_disk_stops_prepare_and_it_continues(phantom_folder, tmp_path, monkeypatch):
    from carina.data.store import Store
    from carina.intake import prepare as module

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    given = {"out": str(tmp_path / "store"), "scales": [32], "workers": 1}
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(CarinaError, match="is full"):
            module.prepare(str(phantom_folder / "images"), given, quiet=True)
    module.prepare(str(phantom_folder / "images"), given, quiet=True)
    assert len(Store(tmp_path / "store")) > 40


def test_pasting_without_lung_masks(carina, phantom_folder, tmp_path):
    from carina.intake.prepare import prepare

    given = {"out": str(tmp_path / "store"), "scales": [64], "lungs": False, "labels": ["abnormal"], "workers": 1}
    prepare(str(phantom_folder / "labels.csv"), given, quiet=True)
    for words in (("pretrain", "debug/anatpaste"), ("finetune", "anomaly", "mode=full", "architecture=test_resnet")):
        told = carina(*words, f"store={tmp_path / 'store'}", f"out={tmp_path / 'run'}", code=2).stderr
        assert (
            "pasting and regions need lung masks" in told and "lungs=true" in told and not (tmp_path / "run").exists()
        )


def test_print_runs_nothing(capsys, tmp_path, monkeypatch):
    from carina.cli import VERBS, main

    monkeypatch.chdir(tmp_path)
    given = {"pretrain": "debug/moco", "finetune": "classify"}
    for verb, entry in VERBS.items():
        words = [given.get(verb, "x")] * max(entry.positionals[0], int(verb in given))
        assert main([verb, *words, "--print"]) == 0
    assert not list(tmp_path.iterdir()) and "optim:" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_files_that_do_not_fit_or_are_broken(suffix, tmp_path):
    import torch
    from safetensors.torch import save_file

    from carina.models.backbones import load_backbone, random_backbone

    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"not weights")
    with pytest.raises(CarinaError, match="weights"):
        load_backbone(str(path), architecture="test_resnet")
    weights = {k: v.contiguous() for k, v in random_backbone("test_vit", 64, 0).network.state_dict().items()}
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    with pytest.raises(CarinaError, match=r"lacks .* tensors of test_resnet"):
        load_backbone(str(path), architecture="test_resnet")
    assert load_backbone(str(path), architecture="test_vit", size=64).spec.size == 64


def test_a_fault_of_ours_is_not_blamed_on_the_user(capsys, monkeypatch):
    from carina import cli

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setitem(cli.VERBS, "doctor", cli.Verb("", "", "", broken, (0, 0)))
    assert cli.main(["doctor"]) == 1
    assert "a fault of carina" in capsys.readouterr().err


def test_nan_three_times_in_a_row_stops_and_names_the_loss(phantom_store, tmp_path, monkeypatch):
    from carina.pretrain import run as module

    original = module.Pretraining.forward

    def sick(self, batch):
        values = original(self, batch)
        return {**values, "loss": values["loss"] * float("nan"), "moco.loss": values["moco.loss"] * float("nan")}

    monkeypatch.setattr(module.Pretraining, "forward", sick)
    given = {"store": str(phantom_store), "out": str(tmp_path / "run"), "batch_size": 8, "threads": 1}
    with pytest.raises(
        CarinaError, match=r"loss on rank 0, moco.loss on rank 0 was not finite 3 times in a row, last at step 2"
    ):
        module.pretrain("debug/moco", given, quiet=True)
