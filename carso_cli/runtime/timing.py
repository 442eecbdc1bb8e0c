"""How long a piece of work takes, for predicting the cost of a run."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the faster of two runs, after one to warm up."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            # The GPU's work is only queued when `work` returns.
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    # Whatever else runs on the machine can only slow a run down.
    return min(times[1:])
