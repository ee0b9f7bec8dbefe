"""One progress line: a bar on a terminal, plain lines every few seconds in a pipe."""

from __future__ import annotations

import sys
import time

PLAIN_EVERY = 10.0  # seconds between lines when standard error is no terminal


def clock(seconds: float) -> str:
    seconds = round(seconds)
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Progress:
    """``with Progress("prepare", 5000, unit="files") as p: p.advance(16, "note")``: rate and time left on stderr."""

    def __init__(self, name: str, total: int, *, unit: str, done: int = 0, quiet: bool = False):
        self.name, self.total, self.unit, self.done, self.quiet = name, total, unit, done, quiet
        self.start_done = done
        self.bar = None

    def __enter__(self) -> Progress:
        self.start = self.last_line = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Rich

            self.bar = Rich(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=self.total, completed=self.done, note="")
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        if self.quiet:
            return
        now = time.monotonic()
        elapsed = max(now - self.start, 1e-6)
        rate = (self.done - self.start_done) / elapsed
        left = (self.total - self.done) / rate if rate else 0.0
        text = f"{note + '  ' if note else ''}{rate:,.1f} {self.unit}/s  {clock(left)} left"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=text)
        elif now - self.last_line >= PLAIN_EVERY or self.done >= self.total:
            self.last_line = now
            print(f"{self.name} {self.done}/{self.total}  {text}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
