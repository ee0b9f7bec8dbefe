"""The upload, against a hub that the test plays."""

from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest

from carina.errors import CarinaError
from carina.models.hub import verify
from carina.publish import publish


class Hub:
    calls: ClassVar[list] = []
    fail = None
    private = True

    def create_repo(self, repo, **options):
        if self.fail:
            raise self.fail
        self.calls.append(("create", repo, options))
        return f"https://hub.invalid/{repo}"

    def repo_info(self, repo):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **options):
        self.calls.append(("upload", options["repo_id"], options["folder_path"]))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_upload_is_private_and_sends_what_dry_run_shows(hub, pretrained, tmp_path):
    out = tmp_path / "published"
    result = publish(str(pretrained), {"repo": "org/name", "out": str(out), "license": "apache-2.0"}, quiet=True)
    assert hub.calls == [("create", "org/name", {"private": True, "exist_ok": True}), ("upload", "org/name", out)]
    assert result["uploaded"] == "https://hub.invalid/org/name"
    assert set(result["files"]) == {"README.md", "SHA256SUMS", "carina.json", "config.json", "model.safetensors"}
    assert "license: apache-2.0" in (out / "README.md").read_text()


def test_a_hub_that_refuses_is_one_sentence_and_the_folder_stays(hub, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "fail", OSError("no route"))
    out = tmp_path / "published"
    with pytest.raises(CarinaError, match=r"could not be reached or refused org/name .*the folder .* is ready"):
        publish(str(pretrained), {"repo": "org/name", "out": str(out), "license": "mit"}, quiet=True)
    assert (out / "model.safetensors").is_file()
    monkeypatch.setattr(hub, "fail", None)
    publish(str(pretrained), {"repo": "org/name", "out": str(out), "license": "mit"}, quiet=True)
    assert [call[0] for call in hub.calls] == ["create", "upload"], "the same command goes on after the failure"


def test_an_existing_public_repository_is_not_filled_by_default(hub, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "private", False)
    given = {"repo": "org/name", "out": str(tmp_path / "published"), "license": "mit"}
    with pytest.raises(CarinaError, match="exists and is public"):
        publish(str(pretrained), given, quiet=True)
    assert [call[0] for call in hub.calls] == ["create"]


def test_a_changed_file_is_noticed(pretrained, tmp_path):
    out = tmp_path / "published"
    publish(str(pretrained), {"repo": "org/name", "out": str(out)}, dry_run=True, quiet=True)
    verify(out)
    (out / "config.json").write_text("{}")
    with pytest.raises(CarinaError, match=r"config.json in .* is not what was published"):
        verify(out)


def test_the_card_says_what_the_owners_of_each_source_allow(pretrained):
    from carina.files import read_json
    from carina.intake.sources import find_provenance
    from carina.models.backbones import load_backbone
    from carina.models.hub import backbone_card

    record = read_json(pretrained / "backbone" / "carina.json")
    nothing = SimpleNamespace()
    origins = {"cxrlt": find_provenance("cxrlt:.", nothing), "mimic": {}, "own": find_provenance("folder", nothing)}
    record["data"]["origins"] = origins
    card = backbone_card(load_backbone(str(pretrained)), record)
    line = next(line for line in card.splitlines() if line.strip().startswith("* cxrlt:"))
    assert "drawn from mimic" in line and origins["cxrlt"]["terms"]["license"] in line and "consent" in line
    assert card.count("upstream terms are not known to carina") == 2
