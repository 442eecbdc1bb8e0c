"""What hostile input is given to: the command line in this process, within bounds of time and memory."""

from __future__ import annotations

import contextlib
import io
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from carso_cli.cli.app import run

Bounded = Callable[[], AbstractContextManager[None]]
Call = Callable[[Sequence[str]], tuple[int, str]]
SECONDS = 5.0
"""Processor time that no single input may take."""
KILOBYTES = 400_000
"""Memory that no single input may add to the process's, at its peak."""
_RESET_PEAK = Path("/proc/self/clear_refs")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The file that a module writes hostile content to; messages must name it."""
    return tmp_path_factory.mktemp("hostile") / str(request.module.NAME)


@pytest.fixture(scope="session")
def bounded() -> Bounded:
    """Hold a piece of work to `SECONDS` and `KILOBYTES`."""

    @contextmanager
    def hold() -> Iterator[None]:
        # Elsewhere than on Linux an input's peak may hide below an earlier one's.
        if _RESET_PEAK.exists():
            _RESET_PEAK.write_text("5")
        started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield
        assert time.process_time() - started < SECONDS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES

    return hold


@pytest.fixture(scope="session")
def carso(bounded: Bounded) -> Call:
    """Run a command line; return its exit code and what it said, which is never about a bug."""

    def call(arguments: Sequence[str]) -> tuple[int, str]:
        errors = io.StringIO()
        with bounded(), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = run(list(arguments))
        said = errors.getvalue()
        assert "bug in carso" not in said, said
        assert "Traceback" not in said, said
        return code, said

    return call
