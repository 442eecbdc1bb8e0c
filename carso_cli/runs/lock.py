"""One process at a time in one folder: a lock that names its owner and ends with it.

The operating system holds the lock (`flock`) and drops it when its process ends, however that ends, so no
lock outlives its owner. The file beside it says who that is: host, process, command, since when. On network
file systems the lock reaches as far as theirs do: NFS carries `flock` between hosts, and where a file system
keeps no locks at all a warning says so.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from carso_cli.errors import CarsoError, StateError
from carso_cli.runtime.reporter import Reporter

LOCK_FILE = ".lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path, reporter: Reporter) -> Iterator[None]:
    """Keep other processes out of a folder; of a distributed run, only the main process calls this.

    Temporary files that a killed process left there are removed.

    Args:
        folder: An existing folder.
        reporter: Told when an earlier owner did not end well, or locks do not work here.

    Raises:
        StateError: If another process holds the lock, naming it.
        CarsoError: If the lock file cannot be written.
    """
    path = folder / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CarsoError(
            f"cannot write {path}: {error.strerror}", hint="choose another folder with --run DIR"
        ) from error
    try:
        held = _take(descriptor, folder)
        earlier = _read_owner(descriptor)
        if not held:
            told = f"; {earlier} may be at work there" if earlier else ""
            reporter.warning(f"the file system of {folder} keeps no locks: start one process at a time{told}")
        elif earlier:
            reporter.info(f"process {earlier} did not end well; its lock on {folder} is void")
        for leftover in folder.glob(".*.tmp"):
            with suppress(OSError):
                leftover.unlink()
        _write_owner(descriptor, path, json.dumps(_describe_owner()))
        try:
            yield
        finally:
            # A killed owner does not get here: its name stays, and the next one tells of it. A full disk may
            # leave it too.
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path) -> bool:
    """Take the lock; return False where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        if error.errno not in _TAKEN:
            raise CarsoError(f"cannot lock {folder}: {error.strerror}") from error
        owner = _read_owner(descriptor) or "one that has not said who it is"
        raise StateError(
            f"{folder} is in use by another process: {owner}",
            hint="wait until it is done or stop it, or choose another folder with --run DIR",
        ) from None
    return True


def _describe_owner() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["carso", *sys.argv[1:]]),
    }


def _read_owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 1 << 16, 0))
        return f"{owner['pid']} on {owner['host']}, since {owner['since']}: {owner['command']}"
    except (ValueError, KeyError, TypeError):
        return ""


def _write_owner(descriptor: int, path: Path, text: str) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    except OSError as error:
        raise CarsoError(f"cannot write {path}: {error.strerror}") from error
