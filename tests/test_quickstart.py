"""The whole way on phantoms, with a few steps of everything."""

import json
from pathlib import Path

import pytest

from carina import quickstart
from carina.errors import CarinaError


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "out"
    steps, quickstart.STEPS = quickstart.STEPS, {"classify": 2, "anomaly": 2}
    try:
        result = quickstart.quickstart({"out": str(out), "patients": 60, "steps": 2}, quiet=True, as_json=True)
    finally:
        quickstart.STEPS = steps
    return out, result


def test_it_ends_with_pretrained_beside_random_and_frozen_beside_full(small):
    out, result = small
    arms = {(row["task"], row["backbone"], row["mode"]) for row in result["rows"]}
    assert arms == {
        (t, b, m) for t in ("classify", "anomaly") for b in ("pretrained", "random") for m in ("frozen", "full")
    }
    text = (out / "table.md").read_text()
    assert "synthetic" in text and text.count("| classify (macro) |") == 2 and text.count("| anomaly (abnormal) |") == 2
    told = json.loads((out / "quickstart.json").read_text())
    assert told["synthetic"] and len(told["differences"]) == 4
    assert all("pretrained" in row["sentence"] for row in told["differences"])


def test_what_it_points_to_is_there(small):
    out, result = small
    words = quickstart.closing_words(result, out)
    for path in (out / "store" / "sheet.html", out / "published" / "README.md"):
        assert path.is_file() and str(path) in words
    assert result["report"] in words and "synthetic" in Path(result["report"]).read_text()


def test_it_never_overwrites(small):
    with pytest.raises(CarinaError, match="is not empty"):
        quickstart.quickstart({"out": str(small[0])}, quiet=True)


def test_commands_are_printed_as_they_would_be_typed(capsys):
    stages = quickstart._Stages(Path("x"), quickstart.QuickstartSettings(), quiet=False)
    stages.say(
        "finetune", "classify", {"mode": "full", "steps": 1, "threshold_rows": None, "labels": ["A", "B"], "s": True}
    )
    assert (
        capsys.readouterr().err
        == "\n$ carina finetune classify mode=full steps=1 threshold_rows=null labels=[A,B] s=true\n"
    )
