"""The reporter of the command line: bars on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from carso_cli.cli.console import duration, figure, messages
from carso_cli.runtime import reporter

if TYPE_CHECKING:
    from torch import Tensor

SECONDS_BETWEEN_LINES = 5.0
Clock = Callable[[], float]


class RichReporter:
    """Shows on stderr what core code reports.

    Args:
        console: Where to write; stderr by default.
        clock: Seconds from any fixed point.
    """

    def __init__(self, console: Console | None = None, *, clock: Clock = time.monotonic) -> None:
        self._console = console or messages()
        self._clock = clock
        self._bars: Progress | None = None

    def info(self, message: str) -> None:
        """Show a line; on a terminal it is wrapped between words."""
        self._console.print(Text(message), soft_wrap=not self._console.is_terminal)

    def warning(self, message: str) -> None:
        """Show a line that starts with `warning:`."""
        text = Text(f"warning: {message}", style="yellow")
        self._console.print(text, soft_wrap=not self._console.is_terminal)

    @contextmanager
    def progress(self, description: str, total: int, unit: str = "images") -> Iterator[reporter.Progress]:
        """Show a task; tasks opened inside another share its display."""
        # Bars are redrawn in place; a log file would keep every one of the redrawings.
        if not self._console.is_terminal:
            lines = _Lines(self._console, self._clock, f"{description}: ", total, unit)
            try:
                yield lines
            finally:
                # Also after an error, so that the log says how far the task came.
                lines.close()
            return
        # Rich allows one live display at a time, so that of the outermost task shows the inner ones too.
        outermost = self._bars is None
        bars = self._bars = self._bars or self._new_bars()
        if outermost:
            bars.start()
        # Both fields from the start: a column that formats a missing one raises KeyError.
        task = bars.add_task(description, total=total, rate="", figures="")
        try:
            yield _Bar(bars, task, self._clock, unit)
        finally:
            if outermost:
                bars.stop()
                self._bars = None
            else:
                # Removed, or the many tasks inside one evaluation would pile up on the display.
                bars.remove_task(task)

    def measured(self, figures: Mapping[str, float], step: int) -> None:
        """Show nothing: the bars show the loss."""

    def pictured(self, name: str, draw: Callable[[], Tensor], step: int) -> None:
        """Draw nothing."""

    def _new_bars(self) -> Progress:
        return Progress(
            # Descriptions may hold names from files: Rich must not read brackets in them as markup.
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[rate]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}", markup=False),
            console=self._console,
        )


class _Bar:
    def __init__(self, bars: Progress, task: TaskID, clock: Clock, unit: str) -> None:
        self._bars, self._task, self._clock, self._unit = bars, task, clock, unit
        self._started, self._done = clock(), 0

    def advance(self, steps: int = 1, **figures: float) -> None:
        self._done += steps
        speed = _rate(self._done, self._clock() - self._started, self._unit)
        self._bars.update(self._task, advance=steps, rate=speed)
        if figures:
            self._bars.update(self._task, figures=_figures(figures))


class _Lines:
    """Progress for a log file: at most one line every few seconds, and one at the end."""

    def __init__(self, console: Console, clock: Clock, prefix: str, total: int, unit: str) -> None:
        self._console, self._clock, self._prefix, self._total, self._unit = (
            console, clock, prefix, total, unit
        )  # fmt: skip
        self._started = self._shown = clock()
        self._done = 0
        self._figures: dict[str, float] = {}

    def advance(self, steps: int = 1, **figures: float) -> None:
        self._done += steps
        # Kept from earlier steps, since not every step brings figures.
        self._figures |= figures
        if self._clock() - self._shown >= SECONDS_BETWEEN_LINES:
            elapsed = self._clock() - self._started
            # Steps may add up to more than the total, as the MiB of a resumed download do.
            left = elapsed / self._done * max(self._total - self._done, 0) if self._done else 0.0
            self._show(f"{duration(left)} left" if self._done else "")

    def close(self) -> None:
        self._show(f"took {duration(self._clock() - self._started)}")

    def _show(self, timing: str) -> None:
        self._shown = self._clock()
        rate = _rate(self._done, self._shown - self._started, self._unit)
        count = f"{self._prefix}{self._done}/{self._total} {self._unit}"
        parts = (count, rate, timing, _figures(self._figures))
        self._console.print(Text(", ".join(part for part in parts if part)), soft_wrap=True)


def _rate(done: int, seconds: float, unit: str) -> str:
    """Write a speed as `45.2 images/s`, or `12.3 s each` below one in two seconds."""
    if done == 0 or seconds <= 0:
        return ""
    speed = done / seconds
    return f"{speed:.3g} {unit}/s" if speed >= 0.5 else f"{1 / speed:.3g} s each"


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {figure(value)}" for name, value in figures.items())
