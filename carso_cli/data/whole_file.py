"""Files read whole and written whole: nothing that blocks, nothing half done under its own name."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from carso_cli.errors import DataError, nearest

MAX_BYTES = 2**26
"""Largest image or text file that is read (64 MiB)."""


def read_whole(path: Path) -> bytes:
    """Read a regular file.

    Raises:
        DataError: If it is missing, unreadable, larger than `MAX_BYTES`, or a folder, pipe or device.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
            raise DataError(f"{path} is {kind}; a file is needed")
        if status.st_size > MAX_BYTES:
            raise DataError(f"{path} has {status.st_size} bytes; at most {MAX_BYTES} are allowed")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", hint=similar_file(path)) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def similar_file(path: Path) -> str:
    """Suggest names in the same folder that are close to a path that does not exist."""
    try:
        return nearest(path.name, os.listdir(path.parent))
    except OSError:
        return ""


@contextmanager
def written_whole(target: Path) -> Iterator[BinaryIO]:
    """Open a stream whose content takes the name `target` only when the context ends well.

    It is written under a temporary name in the same folder, which is made if need be, forced
    to disk and renamed; on any exception the temporary file is removed.

    Raises:
        OSError: If the folder cannot be made or written to.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # The process number keeps the processes of a distributed run out of each other's way.
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
