"""The kinds of error a user can see: a message, the next step, an exit code.

Core code raises these and never prints; `carso_cli.cli.app` shows them on stderr and exits with their code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

RESUME = "resume with the same command and --resume"
"""Hint in whose place the command line shows the command itself."""


class CarsoError(Exception):
    """An error a user can act on.

    Args:
        message: What is wrong: file, key, value seen, what is allowed.
        hint: The next step, usually a command to run. Empty if there is none.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(CarsoError):
    """A command line that cannot be carried out."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that does not say what a run needs."""


class MissingError(CarsoError):
    """Data or weights that are absent, or present and unusable."""

    exit_code = 3


class DataError(MissingError):
    """Images that are absent, damaged or not of the shape the recipe states."""


class WeightsError(MissingError):
    """Weights that are absent, damaged or made for another architecture."""


class SanityCheckError(CarsoError):
    """A result whose sanity checks failed under `--strict`."""

    exit_code = 4


class StateError(CarsoError):
    """A stored state that belongs to another configuration, or is damaged."""

    exit_code = 5


class NumericsError(CarsoError):
    """A loss, gradient or activation that is NaN or infinite."""


class InterruptedRun(CarsoError):  # noqa: N818  (an interruption is not a fault)
    """The user stopped the run; its state is saved."""

    exit_code = 130


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Suggest known names close to a misspelt one.

    Returns:
        A sentence such as `did you mean 'cifar10'?`, or an empty string when nothing is close.
    """
    matches = difflib.get_close_matches(name, list(known), n=limit, cutoff=0.5)
    return f"did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
