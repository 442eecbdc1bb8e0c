"""One command in several processes, started by torchrun: one writes, one shows an error, all of them end."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
from collections.abc import Iterator, Sequence

from carso_cli.distributed.launch import is_one_of_several, launch
from carso_cli.errors import CarsoError, UsageError

SHARED = ("train-classifier", "train-purifier", "attack", "evaluate", "ablate")
"""Commands whose work several processes share."""


def check_command(name: str | None) -> None:
    """Refuse to start a single-process command in several processes.

    Raises:
        UsageError: If torchrun started several, and the command is none of `SHARED`.
    """
    size = launch().size
    # Each process would do the whole work and write the same files.
    if size > 1 and name is not None and name not in SHARED:
        raise UsageError(
            f"torchrun started {size} processes, but carso {name} runs in one",
            hint=f"start it without torchrun; these commands share their work: {', '.join(SHARED)}",
        )


@contextlib.contextmanager
def one_writer() -> Iterator[None]:
    """Let the main process alone write to stdout."""
    if launch().rank == 0:
        yield
        return
    # Every process computes the same result; one copy of it belongs on stdout.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def claim_error() -> str | None:
    """Return this process's name for an error message: empty if it runs alone, None if another shows it."""
    if not is_one_of_several():
        return ""
    # Only the handler that `main` sets is replaced, never one of a Python caller.
    if signal.getsignal(signal.SIGTERM) is signal.default_int_handler:
        # torchrun terminates the others when one process ends; this one must first finish its message.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Imported here, since it loads torch, for which a single process need not wait.
    from carso_cli.distributed import world as distributed

    return distributed.claim_error()


def lost_process(error: BaseException | None) -> CarsoError | None:
    """Return the error to show if this one only means that another process has died; otherwise None."""
    # torch raises a RuntimeError for a lost connection; any other error needs no import of torch.
    if not is_one_of_several() or not isinstance(error, RuntimeError):
        return None
    from carso_cli.distributed.world import is_lost_process

    if not is_lost_process(error):
        return None
    return CarsoError(
        "another process of this run has died, and the others cannot continue without it",
        hint="start again with --resume; with --max-restarts 3, `carso run` and torchrun do so themselves",
    )


def run_line(arguments: Sequence[str], devices: Sequence[str]) -> str:
    """Return the command line that runs a command on several GPUs, to be pasted into a shell.

    Args:
        arguments: The command line without the program's name, `--device` with its value included.
        devices: Numbers of the GPUs.
    """
    # `--device` and its value go: each process takes a GPU of its own.
    kept, skip = [], False
    for argument in arguments:
        if not (skip or re.match(r"--device(=|$)", argument)):
            kept.append(argument)
        skip = argument == "--device"
    # Processes take GPUs 0, 1, …, so any others must be renumbered to be these.
    first = [str(number) for number in range(len(devices))]
    chosen = "" if list(devices) == first else f"CUDA_VISIBLE_DEVICES={','.join(devices)} "
    return f"{chosen}carso run --nproc {len(devices)} {shlex.join(kept)}"


def torchrun_arguments(words: Sequence[str], processes: int, restarts: int) -> list[str]:
    """Return the arguments of Python that run a command in several processes of this machine.

    Args:
        words: The command and its options.
        processes: How many.
        restarts: How often torchrun restarts them after one has died.
    """
    # torchrun takes `--run` for an abbreviation of options of its own.
    words = [re.sub(r"^--run(?==|$)", "--run-dir", word) for word in words]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*torchrun, "--max-restarts", str(restarts), "-m", "carso_cli", *words]
