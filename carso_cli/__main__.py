"""Entry point of the `carso` script, of `python -m carso_cli` and of torchrun."""

from __future__ import annotations

import io
import os
import signal
import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from carso_cli.cli.app import run
    from carso_cli.distributed.launch import is_one_of_several
    from carso_cli.runtime.allocator import keep_freed_memory
    from carso_cli.runtime.threads import share_cores

    share_cores()
    keep_freed_memory()
    _open_streams()
    # A scheduler ends a job with SIGTERM; treated as Ctrl-C, it lets the run save its state. A shell script
    # makes its background jobs ignore SIGINT, which a run acts on all the same.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        code = run()
    except KeyboardInterrupt:
        # A second Ctrl-C, while an error was being shown.
        code = 130
    if is_one_of_several():
        if code:
            # A collective that waits for a dead process would keep the interpreter from ending.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        from carso_cli.distributed.world import leave

        # Only after success: a process group is left by all processes together.
        leave()
    sys.exit(code)


def _open_streams() -> None:
    """Replace streams that were closed, and let stdout take file names that are not valid text."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # open() takes the lowest free descriptor, so that in this order each stream gets its own number.
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  (stays open)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Python keeps bytes that are no UTF-8 as surrogates, which stdout refuses to print.
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
