"""Entry point of the `carso` script, of `python -m carso_cli` and of torchrun."""

from __future__ import annotations

import io
import os
import signal
import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from carso_cli.cli.app import run
    from carso_cli.distributed.launch import launch
    from carso_cli.runtime.allocator import keep_freed_memory

    keep_freed_memory()
    _open_streams()
    # A scheduler that ends a job is met as Ctrl-C is: whatever can be resumed is saved.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = run()
    except KeyboardInterrupt:
        # One that came while an error was being told.
        code = 130
    if launch().size > 1:
        if code:
            # A collective that waits for a dead process would keep the interpreter from ending.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        from carso_cli.distributed.world import leave

        leave()
    sys.exit(code)


def _open_streams() -> None:
    """Stand in for streams that were closed, and let stdout take names of files that are no text."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # In this order each takes the lowest free number: its own, which no other file then gets.
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  (stays open)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
