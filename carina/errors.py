"""What carina says when it cannot go on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CarinaError(Exception):
    """A mistake in what was asked or given.

    The message is one sentence that says what is wrong, where, and how to mend it. The command line prints it and
    exits with 2; nothing already written is lost.
    """


class Preempted(Exception):
    """A signal asked the run to stop; a checkpoint has been written. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def nearest(word: str, words: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest of `words`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
