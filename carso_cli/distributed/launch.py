"""What torchrun tells a process about itself, read from the environment, without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """How this process was started; the defaults are those of a process on its own.

    Args:
        rank: Its number among all processes of the run, from 0.
        size: Number of processes.
        local_rank: Its number among those on its machine, from 0.
        local_size: Number of processes on its machine.
        restarts: How often torchrun has started the processes anew after one of them died.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0

    @property
    def name(self) -> str:
        """What a person calls it: `process 2 of 3`."""
        return f"process {self.rank + 1} of {self.size}"


def launch() -> Launch:
    """Return how this process was started."""
    return Launch(
        rank=int(os.environ.get("RANK", "0")),
        size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )
