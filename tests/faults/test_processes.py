"""Faults under torchrun: after each, going on gives the result of an undisturbed run.

    python -m pytest tests/faults/test_processes.py --faults 40 --seed 7

plants one in four of the faults asked for, each at a random moment of a run of two processes. Those of one
sort are chosen by `-k`: one_killed, all_killed, terminated; train-purifier, evaluate.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.workshop import NOTHING_YET, Scene, Workshop


@dataclass
class Job:
    """One torchrun under way."""

    process: subprocess.Popen[str]
    work: Path
    started: float = 0.0

    def wait_for_work(self, marker: str) -> None:
        """Wait until the processes have begun to write, which follows some seconds of imports."""
        while not any(self.work.glob(marker)):
            assert self.process.poll() is None, self.stderr()
            time.sleep(0.01)
        self.started = time.monotonic()

    def end(self) -> int:
        """Wait for the end; return the exit code."""
        return self.process.wait(timeout=300)

    def stderr(self) -> str:
        return (self.work / "stderr").read_text()


def start(work: Path, home: Path, size: int, argv: list[str], restarts: int = 0) -> Job:
    # torchrun takes `--run` for an abbreviation of options of its own.
    argv = ["--run-dir" if word == "--run" else word for word in argv]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", "-m", "carso_cli", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CARSO_HOME": str(home), "COLUMNS": "1000"}
    with (work / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=work, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, text=True
        )
    return Job(process, work)


def workers(agent: int) -> list[int]:
    """The processes that an agent of torchrun has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = entry.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == agent:
            found.append(int(entry.parent.name))
    return found


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[Any, float]]:
    """Outcome of each scene undisturbed, and how long its work took."""
    return {}


def marker(scene: Scene) -> str:
    return "run/evaluation/*/settings.json" if scene.name == "evaluate" else "run/recipe.yaml"


def reference(
    workshop: Workshop, scene: Scene, references: dict[str, tuple[Any, float]]
) -> tuple[Any, float]:
    if scene.name == "evaluate":
        # The number of processes makes no difference to records and result: one process is the reference.
        return workshop.reference(scene), workshop.whole[scene.name].cpu
    if scene.name not in references:
        work = workshop.prepare(scene, workshop.folder / "two" / scene.name)
        job = start(work, workshop.folder / "home", 2, scene.argv)
        job.wait_for_work(marker(scene))
        assert job.end() == 0, job.stderr()
        references[scene.name] = workshop.outcome(work), time.monotonic() - job.started
    return references[scene.name]


def test_a_fault_under_torchrun(
    workshop: Workshop,
    work: Path,
    references: dict[str, tuple[Any, float]],
    fault: tuple[int, str, str],
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    number, kind, name = fault
    source = random.Random(f"{request.config.getoption('--seed')} {number}")
    scene = workshop.scenes[name]
    expected, seconds = reference(workshop, scene, references)
    workshop.prepare(scene, work)
    result = KINDS[kind](workshop, scene, work, source.uniform(0.0, seconds))
    assert workshop.outcome(work) == expected
    record_property("fault", f"torchrun, {kind}, {name}: {result}")


def one_worker_killed(workshop: Workshop, scene: Scene, work: Path, moment: float) -> str:
    """Without a word from us, torchrun starts the processes anew and they go on."""
    job = start(work, workshop.folder / "home", 2, scene.argv, restarts=3)
    job.wait_for_work(marker(scene))
    time.sleep(moment)
    alive = workers(job.process.pid)
    for victim in random.Random(moment).sample(alive, min(1, len(alive))):
        os.kill(victim, signal.SIGKILL)
    assert job.end() == 0, job.stderr()
    check_messages(job)
    told = "removed a stale lock" in job.stderr() or "has died" in job.stderr()
    return "continued" if told else "came too late"


def all_killed(workshop: Workshop, scene: Scene, work: Path, moment: float) -> str:
    job = start(work, workshop.folder / "home", 2, scene.argv)
    job.wait_for_work(marker(scene))
    time.sleep(moment)
    alive = workers(job.process.pid)
    for victim in (job.process.pid, *alive):
        os.kill(victim, signal.SIGKILL)
    ended = job.end()
    check_messages(job)
    # An evaluation's records are the same whatever the number of processes; a training's bits are not.
    finish(workshop, scene, work, 1 if scene.name == "evaluate" else 2)
    return "continued" if ended else "came too late"


def terminated(workshop: Workshop, scene: Scene, work: Path, moment: float) -> str:
    """As a scheduler does it: torchrun hands SIGTERM on."""
    job = start(work, workshop.folder / "home", 2, scene.argv)
    job.wait_for_work(marker(scene))
    time.sleep(moment)
    job.process.terminate()
    ended = job.end()
    check_messages(job)
    if ended:
        told = [line for line in job.stderr().splitlines() if "stopped;" in line or line == "interrupted"]
        assert len(told) <= 1, job.stderr()
    finish(workshop, scene, work, 2)
    return "continued" if ended else "came too late"


def finish(workshop: Workshop, scene: Scene, work: Path, size: int) -> None:
    job = start(work, workshop.folder / "home", size, [*scene.argv, "--resume"])
    if job.end() and NOTHING_YET.search(job.stderr()):
        job = start(work, workshop.folder / "home", size, scene.argv)
    assert job.end() == 0, job.stderr()
    check_messages(job)


def check_messages(job: Job) -> None:
    """torchrun shows tracebacks of its own; none of them may be ours, and no error is shown twice."""
    text = job.stderr()
    assert "carso_cli/" not in text, text
    assert "this is a bug" not in text, text
    errors = [line for line in text.splitlines() if line.startswith("error")]
    assert len(errors) <= 1, text


KINDS: dict[str, Callable[[Workshop, Scene, Path, float], str]] = {
    "one_killed": one_worker_killed,
    "all_killed": all_killed,
    "terminated": terminated,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # They start several processes twice each: a fourth as many will do.
    count = metafunc.config.getoption("--faults") // 4
    names = ("train-purifier", "evaluate")
    faults = [(n, list(KINDS)[n % 3], names[(n % 3 + n // 3) % 2]) for n in range(count)]
    metafunc.parametrize("fault", faults, ids=lambda fault: "-".join(map(str, fault)))
