"""Trials as many as `--faults` asks for, and a count of what became of them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.workshop import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    made = Workshop(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


@pytest.fixture
def work(workshop: Workshop) -> Iterator[Path]:
    """The folder that a trial works in."""
    folder = workshop.folder / "work"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [
        getattr(report, "user_properties", ()) for report in reports if getattr(report, "when", "") == "call"
    ]
    counts = Counter(value for found in properties for name, value in found if name == "fault")
    for told, count in sorted(counts.items()):
        terminalreporter.write_line(f"faults, {told}: {count}")
