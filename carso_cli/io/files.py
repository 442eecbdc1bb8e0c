"""Reading a file with a size limit, and writing one atomically.

- `read_limited`: a regular file as bytes, with OSErrors; `read_given`: the same, with a message for the user;
- `atomic_write`: a stream whose content replaces a file in one step.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from carso_cli.errors import DataError, nearest

MAX_BYTES = 2**26
"""Largest image or text file that is read (64 MiB)."""


def read_limited(path: Path, at_most: int) -> bytes:
    """Read a regular file of at most `at_most` bytes.

    Raises:
        OSError: If it is missing, unreadable, larger, or a folder, pipe or device.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder; a file is needed")
    # A read from a pipe may wait for ever, and one from a device may never end.
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or device; a file is needed")
    with path.open("rb") as stream:
        # One byte more: the file may have grown since `stat`.
        content = stream.read(at_most + 1)
    if len(content) > at_most:
        raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes; at most {at_most:,} are allowed")
    return content


def read_given(path: Path) -> bytes:
    """Read a file that a user names or a data set holds.

    Raises:
        DataError: If it is missing, unreadable, larger than `MAX_BYTES`, or a folder, pipe or device.
    """
    try:
        return read_limited(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", hint=similar_file(path)) from error
    # ValueError: a NUL byte in the name.
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def similar_file(path: Path) -> str:
    """Suggest names in the same folder that are close to a path that does not exist."""
    try:
        return nearest(path.name, os.listdir(path.parent))
    except OSError:
        return ""


@contextmanager
def atomic_write(target: Path) -> Iterator[BinaryIO]:
    """Open a stream whose content replaces `target` when the context ends without an exception.

    It is written to a temporary file in the same folder, forced to disk and renamed. On any exception the
    temporary file is removed and `target` stays as it was.

    Raises:
        OSError: If the disk is full or the folder cannot be written to.
    """
    # With the process number in it, processes of a distributed run do not share a temporary file.
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    # Left by a killed process that had the same number.
    partial.unlink(missing_ok=True)
    try:
        # "x": never write to a file or link that someone else has created meanwhile.
        with partial.open("xb") as stream:
            yield stream
            stream.flush()
            # Before the rename: after a power cut the name must not stand for bytes that were never written.
            os.fsync(stream.fileno())
        os.replace(partial, target)
        sync_folder(target.parent)
    # Ctrl-C included.
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk; without it a renamed file may be lost in a power cut.

    Raises:
        OSError: If the disk reports a fault.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not support this for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
