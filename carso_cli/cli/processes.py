"""One command in several processes, started by torchrun: one writes, one shows an error, all of them end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator, Sequence

from carso_cli.distributed.launch import launch
from carso_cli.errors import CarsoError, UsageError

SHARED = ("train-classifier", "train-purifier", "attack", "evaluate", "ablate")
"""Commands whose work several processes share."""


def check_command(name: str | None) -> None:
    """Refuse to run in several processes what one does alone.

    Raises:
        UsageError: If torchrun started several, and the command is none of `SHARED`.
    """
    size = launch().size
    if size > 1 and name is not None and name not in SHARED:
        raise UsageError(
            f"torchrun started {size} processes, and carso {name} runs in one",
            hint=f"start it without torchrun; {', '.join(SHARED)} share their work",
        )


@contextlib.contextmanager
def one_writer() -> Iterator[None]:
    """Let the main process alone write to stdout."""
    if launch().rank == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def claim_error() -> str | None:
    """Return how this process names itself in an error: empty when alone, None where another shows it."""
    if launch().size == 1:
        return ""
    if signal.getsignal(signal.SIGTERM) is signal.default_int_handler:
        # This process ends by itself now; torchrun, which stops all when one ends, must not cut it short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from carso_cli.distributed import world as distributed

    return distributed.claim_error()


def lost_process(error: BaseException | None) -> CarsoError | None:
    """Return what to say of an error that only means that another process has died; None of any other."""
    if launch().size == 1 or not isinstance(error, RuntimeError):
        return None
    from carso_cli.distributed.world import is_lost_process

    if not is_lost_process(error):
        return None
    return CarsoError(
        "another process of this run has died, and the others cannot go on without it",
        hint="torchrun --max-restarts 3 goes on by itself; without it, start again with --resume",
    )


def torchrun_line(arguments: Sequence[str], devices: Sequence[str]) -> str:
    """Return the command line that runs a command on several GPUs.

    Args:
        arguments: The command line without the program's name, `--device` with its value included.
        devices: Numbers of the GPUs.
    """
    kept, skip = [], False
    for argument in arguments:
        if not (skip or re.match(r"--device(=|$)", argument)):
            kept.append(argument)
        skip = argument == "--device"
    count = len(devices)
    first = [str(number) for number in range(count)]
    chosen = "" if list(devices) == first else f"CUDA_VISIBLE_DEVICES={','.join(devices)} "
    # torchrun takes `--run` for an abbreviation of options of its own.
    kept = [re.sub(r"^--run(?==|$)", "--run-dir", argument) for argument in kept]
    return f"{chosen}torchrun --nproc-per-node {count} -m carso_cli {' '.join(kept)}"
