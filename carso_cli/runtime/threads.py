"""Threads of a process on a CPU: how they wait, and how many there are. Set before torch is imported."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
# Either one is the user's own choice of a number of threads; torch reads both.
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def share_cores(environment: MutableMapping[str, str] | None = None, cgroup: Path = CGROUP) -> None:
    """Let waiting threads sleep, and start no more threads than the control group lets run.

    By default a thread of OpenMP that waits for the others spins. Two processes that share cores then take
    each other's time: two evaluations side by side on two cores took 140 s each, and 62 s with threads that
    sleep. torch counts the cores that this process may run on, but not a container's quota of their time.
    What the user has set stays.

    Args:
        environment: Variables to complete; by default this process's.
        cgroup: Folder of the control group's limits.
    """
    variables = os.environ if environment is None else environment
    variables.setdefault("OMP_WAIT_POLICY", "passive")
    quota = _quota(cgroup)
    if quota is not None and quota < _allowed_cores() and not any(name in variables for name in COUNTS):
        variables["OMP_NUM_THREADS"] = str(quota)


def _allowed_cores() -> int:
    # Only Linux tells which cores a process may run on.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota(cgroup: Path) -> int | None:
    """Return how many whole cores' time the control group grants, at least 1; None without a limit."""
    try:
        if (unified := cgroup / "cpu.max").exists():
            quota, period = unified.read_text().split()
        else:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        # "max", and -1 in the older form, stand for no limit.
        return max(1, int(quota) // int(period)) if quota.isdigit() else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
