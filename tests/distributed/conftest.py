"""Real torchrun on the loopback device, and what its processes write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("worker.py")
Launcher = Callable[..., "subprocess.CompletedProcess[str]"]


def command(size: int, *arguments: str, restarts: int = 0) -> list[str]:
    """A torchrun command line, by the interpreter that runs the tests."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc-per-node", str(size), "--max-restarts", str(restarts), *arguments]


def environment(home: Path) -> dict[str, str]:
    """One thread a process, in memory of its own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CARSO_HOME": str(home)}


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Start torchrun and wait for its end."""
    home = tmp_path_factory.mktemp("home")

    def start(size: int, *arguments: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(size, *arguments, restarts=restarts),
            env=environment(home),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return start


@pytest.fixture(scope="session", params=[2, 3])
def answers(
    request: pytest.FixtureRequest, torchrun: Launcher, once: Callable[..., Path]
) -> tuple[Path, list[dict[str, Any]]]:
    """What two and three processes make of the same work: a folder, and what each process says."""
    size = request.param

    def work(out: Path) -> None:
        ended = torchrun(size, str(WORKER), str(out))
        assert ended.returncode == 0, ended.stderr

    out = once(f"size{size}", work)
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(size)]
