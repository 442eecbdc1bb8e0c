"""What torchrun tells a process about itself in the environment, read without torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from carso_cli.errors import UsageError

_HINT = "torchrun sets {0} itself; where another job left it behind: unset {0}"


@dataclass(frozen=True)
class Launch:
    """How this process was started; the defaults are those of a single process.

    Args:
        rank: Its number among all processes of the run, from 0.
        size: Number of processes.
        local_rank: Its number among those on its machine, from 0.
        local_size: Number of processes on its machine.
        restarts: How often torchrun has restarted the processes after one of them died.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0

    @property
    def name(self) -> str:
        """What messages call it: `process 2 of 3`."""
        return f"process {self.rank + 1} of {self.size}"


def launch() -> Launch:
    """Return how this process was started.

    Without WORLD_SIZE it is a single process, whatever else another job left in the environment.

    Raises:
        UsageError: If a variable of torchrun's is missing or malformed.
    """
    if "WORLD_SIZE" not in os.environ:
        return Launch()
    size = _number("WORLD_SIZE", 1)
    several = size > 1
    rank = _number("RANK", 0, size - 1, default=None if several else 0)
    local_size = _number("LOCAL_WORLD_SIZE", 1, size, default=1)
    # Other launchers set LOCAL_RANK alone.
    most = local_size - 1 if "LOCAL_WORLD_SIZE" in os.environ else size - 1
    local_rank = _number("LOCAL_RANK", 0, most, default=0)
    restarts = _number("TORCHELASTIC_RESTART_COUNT", 0, default=0)
    if several:
        _number("MASTER_PORT", 1, 65535)
        if not os.environ.get("MASTER_ADDR"):
            raise _unusable("MASTER_ADDR", "the host name of process 1")
    return Launch(rank, size, local_rank, local_size, restarts)


def is_one_of_several() -> bool:
    """Say whether this process is one of several; False where the environment does not tell."""
    try:
        return launch().size > 1
    except UsageError:
        return False


def _number(name: str, low: int, high: int | None = None, *, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if (
        text is None
        or not re.fullmatch(r"[0-9]{1,9}", text)
        or not low <= int(text) <= (int(text) if high is None else high)
    ):
        raise _unusable(name, f"a whole number from {low}" + (f" to {high}" if high is not None else ""))
    return int(text)


def _unusable(name: str, wanted: str) -> UsageError:
    text, size = os.environ.get(name), os.environ["WORLD_SIZE"]
    found = f"{name}={text!r} is not allowed" if text else f"{name} is not set"
    # A variable that is missing was not left behind: what announces several processes was.
    left = name if text else "WORLD_SIZE"
    about = "" if name == "WORLD_SIZE" else f", beside WORLD_SIZE={size}"
    return UsageError(f"environment variable {found}; it must be {wanted}{about}", hint=_HINT.format(left))
