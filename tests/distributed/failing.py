"""A training whose second process meets an error that no other one meets."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

from carso_cli.__main__ import main
from carso_cli.distributed.launch import launch
from carso_cli.errors import NumericsError
from carso_cli.training import purifier as train_purifier
from carso_cli.training import purifier_step as purifier_steps


def train_step(*arguments: Any) -> Any:
    if launch().rank == 1 and arguments[3] == (0, 2):
        raise NumericsError("planted", hint="look elsewhere")
    return original(*arguments)


if __name__ == "__main__":
    original = purifier_steps.train_step
    sys.argv[0] = "carso"
    with mock.patch.object(train_purifier, "train_step", train_step):
        main()
