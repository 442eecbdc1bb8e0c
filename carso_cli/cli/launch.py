"""`carso run`: one command in several processes, one per GPU, started by torchrun."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from carso_cli.cli import options
from carso_cli.cli.processes import SHARED, torchrun_arguments
from carso_cli.errors import UsageError, nearest

# Options behind COMMAND are that command's own.
CONTEXT = {"allow_interspersed_args": False}

CommandArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="COMMAND",
        help=f"One of {', '.join(SHARED)}, with its own options.",
        autocompletion=options.among(SHARED),
    ),
]
ProcessesOption = Annotated[int, options.whole("--nproc", "Processes, one per GPU.", 1)]
RestartsOption = Annotated[
    int | None,
    options.whole(
        "--max-restarts", "How often to restart them after one has died, resuming (default: 0).", 0
    ),
]


def command(words: CommandArgument, processes: ProcessesOption, restarts: RestartsOption = None) -> None:
    """Run a command in several processes on this machine: `carso run --nproc 8 train-purifier cifar10`.

    They share the work, as under torchrun, which starts them; for several machines use torchrun itself.
    """
    if words[0] not in SHARED:
        raise UsageError(
            "; ".join(filter(None, (f"carso run cannot start '{words[0]}'", nearest(words[0], SHARED)))),
            hint=f"these commands share their work: {', '.join(SHARED)}",
        )
    line = torchrun_arguments(words, processes, restarts or 0)
    sys.stdout.flush()
    # In place of this process: signals and the exit code are torchrun's.
    os.execv(sys.executable, [sys.executable, *line])
