"""What the tests of commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from carso_cli.cli import app


class Shown(NamedTuple):
    """What a command printed."""

    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def carso(capsys: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    """Run a command line, check its exit code and words on stderr, and return what it printed."""

    def call(*arguments: object, code: int = 0, err: str = "") -> Shown:
        capsys.readouterr()
        found = app.run([str(argument) for argument in arguments])
        shown = Shown(*capsys.readouterr())
        assert found == code, shown.err
        assert err in shown.err
        return shown

    return call
