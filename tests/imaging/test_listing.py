"""Which files of a folder are taken for pictures."""

from __future__ import annotations

import pytest

from carina.errors import CarinaError
from carina.imaging.dicom import list_files


def test_list_files(tmp_path):
    names = [
        "b/2.dcm",
        "b/10.dcm",
        "a.PNG",
        "c/no_suffix",
        "c/labels.csv",
        "notes.TXT",
        "DICOMDIR",
        ".x.png",
        ".h/1.dcm",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)

    def found(source) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in list_files(source)]

    assert found(tmp_path) == ["a.PNG", "b/10.dcm", "b/2.dcm", "c/no_suffix"]
    assert found(f"{tmp_path}/b/*.dcm") == ["b/10.dcm", "b/2.dcm"]
    assert found(f"{tmp_path}/**/*s*") == ["c/no_suffix"]
    assert found(tmp_path / "notes.TXT") == ["notes.TXT"]  # named outright, so it is for the reader to refuse
    for source in (tmp_path / "absent", f"{tmp_path}/*.tif"):
        with pytest.raises(CarinaError, match=r"\.$|path|folder"):
            list_files(source)
