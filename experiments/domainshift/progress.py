"""A progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_SECONDS = 30.0  # without a terminal, at most one line of progress in this time


def show_any_name() -> None:
    """Print what the encoding of standard output lacks as an escape, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a caller may have put anything there
        sys.stdout.reconfigure(errors="backslashreplace")


class Screen:
    """Lines and progress of one run, on standard output."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.warnings: set[str] = set()

    def say(self, line: str, style: str = "") -> None:
        self.console.print(Text(line, style=style))

    def warn(self, line: str) -> None:
        """Say a warning, once however often it comes."""
        if line in self.warnings:
            return
        self.warnings.add(line)
        self.say(f"warning: {line}", "bold red" if line.startswith("INVALID") else "yellow")

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Any]:
        """Yields a function `advance(images)`. Shows images, images/s and the time left."""
        if self.console.is_terminal:
            bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]:.0f} images/s, left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
        else:
            bar = None
        start = last_line = time.perf_counter()
        done = 0

        def rate() -> float:
            return done / max(time.perf_counter() - start, 1e-9)

        def advance(n: int) -> None:
            nonlocal done, last_line
            done += n
            now = time.perf_counter()
            if bar is not None:
                bar.update(task, advance=n, rate=rate())
            elif now - last_line >= LINE_SECONDS and done < total:
                last_line = now
                left = (total - done) / rate()
                self.say(f"{what}: {done}/{total} images, {rate():.0f} images/s, {left:.0f} s left")

        if bar is None:
            yield advance
            return
        with bar:
            task = bar.add_task(what, total=total, rate=0.0)
            yield advance
