"""What torchrun tells a process about itself in the environment, read without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass


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
    """Return how this process was started."""
    names = ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")
    numbers = (int(os.environ.get(*name)) for name in (*names, ("TORCHELASTIC_RESTART_COUNT", "0")))
    return Launch(*numbers)
