"""One process at a time in one folder: a lock that names its owner and ends with it.

The operating system drops the lock (filelock's `FileLock`) when its process ends, however that ends. The lock
file says who holds it: host, process, command, since when. On network file systems the lock reaches as far as
theirs do: NFS carries it between hosts, and where a file system supports no locks a warning says so.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from carso_cli.errors import StateError
from carso_cli.io.json_files import writing
from carso_cli.runtime.reporter import Reporter

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path, reporter: Reporter) -> Iterator[None]:
    """Keep other processes out of a folder; of a distributed run, only the main process calls this.

    Temporary files that a killed process left there are removed.

    Args:
        folder: An existing folder.
        reporter: Told of a stale lock that was removed, and warned where locks are not supported.

    Raises:
        StateError: If another process holds the lock, naming it.
        CarsoError: If the lock file cannot be written.
    """
    path = folder / LOCK_FILE
    # Without `fallback_to_soft=False`, filelock replaces missing locks by a file that a killed owner leaves.
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    with writing(path, "choose another folder with --run DIR"):
        try:
            lock.acquire()
        # First, since filelock's Timeout is an OSError too.
        except Timeout:
            raise StateError(
                f"{folder} is in use by another process: {_read_owner(path) or 'one without a name'}",
                hint="wait until it is done or stop it, or choose another folder with --run DIR",
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        owner = _read_owner(path)
        if not lock.is_locked:
            maybe = f"; {owner} may be at work there" if owner else ""
            reporter.warning(f"the file system of {folder} has no locks: start one process at a time{maybe}")
        elif owner:
            reporter.info(f"removed a stale lock on {folder} left by process {owner}")
    try:
        # Who holds the lock is the only one to write here, so these are of killed processes.
        for leftover in folder.glob(".*.tmp"):
            with suppress(OSError):
                leftover.unlink()
        with writing(path):
            path.write_text(json.dumps(_describe_owner()))
        try:
            yield
        finally:
            # A killed owner does not get here: its name stays, and the next one reports it. A full disk may
            # leave it too.
            with suppress(OSError):
                # Emptied, not removed: two processes could each lock a file of this name, one deleted.
                path.write_text("")
    finally:
        lock.release()


def _describe_owner() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["carso", *sys.argv[1:]]),
    }


def _read_owner(path: Path) -> str:
    """Return the owner of a lock file in words; empty where nobody is named."""
    try:
        owner = json.loads(path.read_bytes())
        return f"{owner['pid']} on {owner['host']}, since {owner['since']}: {owner['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
