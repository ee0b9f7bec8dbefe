"""What the scripts share: arguments as `key=value`, mistakes as sentences, one width where nothing is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from carina.errors import CarinaError, Preempted
from carina.recipes import Section, merge, parse_overrides, validate


def script(
    words: Sequence[str] | None,
    name: str,
    doc: str,
    model: type[Section],
    defaults: Mapping[str, Any],
    work: Callable[[Any], None],
) -> int:
    """Run a script and return its exit code: 0, 2 for a mistake in what was asked, 128 + a signal's number.

    words: `key=value` (None: those of the command line). work: takes the arguments, writes and prints. Without words,
    where some are needed, `doc` is printed.
    """
    words = sys.argv[1:] if words is None else words
    needed = set(model.model_fields) - set(defaults)
    try:
        if (words and words[0] in ("-h", "--help")) or (needed and not words):
            print(doc)
        else:
            work(validate(model, merge(defaults, parse_overrides(words)), "arguments"))
    except (CarinaError, Preempted) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return 0


def console(width: int = 150) -> Console:
    return Console(width=None if sys.stdout.isatty() else width)
