"""Waiting threads sleep, and a container's quota bounds their number, unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from carso_cli.runtime import threads
from carso_cli.runtime.threads import share_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_allowed_cores", lambda: 8)


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"cpu.max": "150000 100000\n"}, "1"),
        ({"cpu.max": "400000 100000\n"}, "4"),
        ({"cpu.max": "50000 100000\n"}, "1"),
        ({"cpu.max": "1600000 100000\n"}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "nonsense\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "3"),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_quota_bounds_threads(files: dict[str, str], count: str | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    environment: dict[str, str] = {}
    share_cores(environment, tmp_path)
    assert environment.get("OMP_NUM_THREADS") == count
    assert environment["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_what_the_user_set_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    environment = {name: "6", "OMP_WAIT_POLICY": "active"}
    share_cores(environment, tmp_path)
    assert environment == {name: "6", "OMP_WAIT_POLICY": "active"}


@pytest.mark.slow
def test_the_command_line_decides_before_torch_loads() -> None:
    program = (
        "import os, sys\nfrom carso_cli import __main__ as entry\nsys.argv = ['carso', '--version']\n"
        "try:\n    entry.main()\nexcept SystemExit:\n"
        "    print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    environment = {name: text for name, text in os.environ.items() if name != "OMP_WAIT_POLICY"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == "passive False", found.stderr
