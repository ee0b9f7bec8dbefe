"""Work that may take its process down with it: decoders of broken files panic, crash or hang, and each costs one file."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import BrokenProcessPool

SECONDS = 60.0  # far beyond what the largest radiograph takes in any syntax, also from slow storage

Item = TypeVar("Item")
Result = TypeVar("Result")


def hush() -> None:
    """For a process of our own: what a decoder writes to standard error as it panics or dies goes nowhere.

    Its file is counted and listed with a reason; pages of a stack that the user cannot mend would bury that.
    """
    faulthandler.disable()  # joblib's processes turn it on
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _hushed(function: Callable[[Item], Result], item: Item) -> Result:
    hush()
    return function(item)


def isolated(
    function: Callable[[Item], Result], items: Iterable[Item], seconds: float = SECONDS
) -> Iterator[tuple[Result | None, str]]:
    """(result, "") or (None, reason) for each item in turn, from one other process.

    The process is replaced when an item kills it or takes longer than `seconds`; exceptions of `function` are raised
    here. The reason names no file.
    """
    pool = None
    try:
        for item in items:
            pool = pool or ProcessPoolExecutor(1)
            try:
                result = pool.submit(_hushed, function, item).result(timeout=seconds)
            except (BrokenProcessPool, TimeoutError) as error:
                pool.shutdown(kill_workers=True)
                pool = None
                yield None, "its decoder hung" if isinstance(error, TimeoutError) else "its decoder crashed"
            else:
                yield result, ""
    finally:
        if pool is not None:
            pool.shutdown(kill_workers=True)
