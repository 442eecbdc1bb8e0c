"""Entry point of the `carso` script, of `python -m carso_cli` and of torchrun."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from carso_cli.allocator import keep_freed_memory
    from carso_cli.cli.app import run

    keep_freed_memory()
    sys.exit(run())


if __name__ == "__main__":
    main()
