"""Entry point of the `carso` script, of `python -m carso_cli` and of torchrun."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from carso_cli.allocator import keep_freed_memory
    from carso_cli.cli.app import run
    from carso_cli.launch import launch

    keep_freed_memory()
    # A scheduler that ends a job is met as Ctrl-C is: whatever can be resumed is saved.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = run()
    if launch().size > 1:
        if code:
            # A collective that waits for a dead process would keep the interpreter from ending.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        from carso_cli.distributed import leave

        leave()
    sys.exit(code)


if __name__ == "__main__":
    main()
