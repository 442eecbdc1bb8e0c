"""An error is told once, by the process that met it; results are told by one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
Launcher = Callable[..., "subprocess.CompletedProcess[str]"]
FAILING = Path(__file__).with_name("failing.py")


def errors(ended: subprocess.CompletedProcess[str]) -> list[str]:
    # torchrun adds tracebacks of its own, of which no line is ours.
    assert "carso_cli/" not in ended.stderr, ended.stderr
    return [line for line in ended.stderr.splitlines() if line.startswith(("error", "hint", "this is"))]


def test_the_error_of_one_process_is_told_once_with_its_number(torchrun: Launcher, tmp_path: Path) -> None:
    ended = torchrun(2, str(FAILING), "train-purifier", "digits", "--run-dir", str(tmp_path / "run"))
    assert ended.returncode != 0
    assert errors(ended) == ["error in process 2 of 2: planted", "hint: look elsewhere"]
    assert ended.stdout == ""


def test_the_error_of_all_processes_is_told_once(torchrun: Launcher) -> None:
    ended = torchrun(2, "-m", "carso_cli", "evaluate", "digits", "--set", "evaluation.imagse=3")
    assert ended.returncode != 0
    (told, *_) = found = errors(ended)
    assert told.startswith(("error in process 1 of 2: ", "error in process 2 of 2: "))
    assert len([line for line in found if line.startswith("error")]) == 1
    assert ended.stderr.count("evaluation.imagse=3") == 1


def test_carso_run_starts_the_processes() -> None:
    words = ("run", "--nproc", "2", "evaluate", "digits", "--run", "x", "--set", "evaluation.imagse=3")
    command = [sys.executable, "-m", "carso_cli", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode != 0
    assert len([line for line in errors(ended) if line.startswith("error")]) == 1
    assert ended.stderr.count("evaluation.imagse=3") == 1
