"""What core code may tell a user while it works, without knowing how it is shown.

`Reporter` is the protocol; the command line implements it with progress bars, and
`SilentReporter` serves tests and Python users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Progress(Protocol):
    """One task under way."""

    def advance(self, steps: int = 1, **figures: float) -> None:
        """Report `steps` units done, with figures to show beside the bar (`loss=…`)."""


class Reporter(Protocol):
    """Where core code sends what a user should see."""

    def info(self, message: str) -> None:
        """Tell the user something."""

    def warning(self, message: str) -> None:
        """Tell the user something that may make a result untrustworthy."""

    def progress(
        self, description: str, total: int, unit: str = "images"
    ) -> AbstractContextManager[Progress]:
        """Open a task of `total` units; leaving the context ends it."""

    def measured(self, figures: Mapping[str, float], step: int) -> None:
        """Log figures of a training after `step` optimiser steps, named `step/…` or `epoch/…`."""

    def pictured(self, name: str, draw: Callable[[], Tensor], step: int) -> None:
        """Log a picture of a training, (channels, H, W) in [0, 1]; `draw` is called where it is kept."""


class _SilentProgress:
    def advance(self, steps: int = 1, **figures: float) -> None:
        pass


class SilentReporter:
    """A reporter that shows nothing."""

    def info(self, message: str) -> None:
        """Drop the message."""

    def warning(self, message: str) -> None:
        """Drop the message."""

    @contextmanager
    def progress(self, description: str, total: int, unit: str = "images") -> Iterator[Progress]:
        """Yield a task that shows nothing."""
        yield _SilentProgress()

    def measured(self, figures: Mapping[str, float], step: int) -> None:
        """Drop the figures."""

    def pictured(self, name: str, draw: Callable[[], Tensor], step: int) -> None:
        """Draw nothing."""


SILENT: Reporter = SilentReporter()


def shown(reporter: Reporter | None) -> Reporter:
    """Return a reporter, or where Python users name none, one that shows progress and every warning."""
    # By name, since the command line lies above all rooms.
    found: Reporter = reporter or resolve_name("carso_cli.cli.progress:RichReporter")()
    return found
