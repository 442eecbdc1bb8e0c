"""Trials as many as `--faults` asks for, and a count of what became of them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_workshops: list[Any] = []


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    found = importlib.util.spec_from_file_location("workshop", Path(__file__).with_name("workshop.py"))
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    # Where dataclasses look for it.
    sys.modules["workshop"] = module
    found.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("faults")
    made = module.Workshop(folder)
    _workshops.append(made)
    yield made
    made.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trial" in metafunc.fixturenames:
        metafunc.parametrize("trial", range(metafunc.config.getoption("--faults")))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for made in _workshops:
        for kind, results in sorted(made.tally.items()):
            told = ", ".join(f"{result} {count}" for result, count in sorted(results.items()))
            terminalreporter.write_line(f"faults, {kind}: {told}")
