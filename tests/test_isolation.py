"""A decoder that dies or hangs costs one file."""

from __future__ import annotations

import os
import signal
import time

import pytest

from carina.isolation import isolated


def act(word: str) -> str:
    if word == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "hang":
        time.sleep(60)
    if word == "fail":
        raise KeyError(word)
    return word.upper()


def test_each_death_and_each_hang_costs_its_own_item(capfd):
    results = list(isolated(act, ["a", "die", "b", "hang", "c"], seconds=3))
    assert results == [
        ("A", ""),
        (None, "its decoder crashed"),
        ("B", ""),
        (None, "its decoder hung"),
        ("C", ""),
    ]
    assert "Fatal" not in capfd.readouterr().err


def test_an_exception_is_raised_here():
    with pytest.raises(KeyError):
        list(isolated(act, ["a", "fail"]))
