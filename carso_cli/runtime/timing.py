"""How long a piece of work takes: for predicting the cost of a run, and for `bench`."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    """Wait for a device: the work of any but the CPU is only queued when a call returns."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def images_to_time(device: torch.device) -> int:
    """Return how many images show the time of each in a large batch: a GPU needs more to be filled."""
    return 8 if device.type == "cpu" else 128


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the faster of two runs, after one to warm up."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    # Whatever else runs on the machine can only slow a run down.
    return min(times[1:])
