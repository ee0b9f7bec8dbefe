import errno

import pytest

from carina import files
from carina.errors import CarinaError


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "folder"
    for text in ("one", "two"):
        with files.atomic_folder(target) as temporary:
            (temporary / text).write_text(text)
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CarinaError, match=r"disk that holds .* is full"):
        files.write_text(tmp_path / "x.txt", "text")
    assert not list(tmp_path.iterdir())


def test_nan_never_reaches_json(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})
