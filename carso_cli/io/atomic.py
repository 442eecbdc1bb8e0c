"""Files read whole and written whole: nothing without an end, nothing half done under its own name.

Only ways of reading and writing that all kinds of file share are here; what went wrong is an `OSError`, which
the caller tells in its own words.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def read_limited(path: Path, at_most: int) -> bytes:
    """Read a regular file; a pipe is not waited for, a device not read without end.

    Args:
        path: The file.
        at_most: Bytes that it may have.

    Raises:
        OSError: If it is missing, unreadable, larger, or a folder, pipe or device.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder; a file is needed")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or device; a file is needed")
    with path.open("rb") as stream:
        content = stream.read(at_most + 1)
    if len(content) > at_most:
        raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes; at most {at_most:,} are allowed")
    return content


@contextmanager
def atomic_write(target: Path) -> Iterator[BinaryIO]:
    """Open a stream whose content takes the name `target` only when the context ends well.

    It is written under a temporary name in the same folder, forced to disk and renamed, and so is the name;
    on any exception the temporary file is removed, and what was there before is untouched.

    Raises:
        OSError: If the disk is full or the folder cannot be written to.
    """
    # The process number keeps the processes of a distributed run out of each other's way.
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    partial.unlink(missing_ok=True)
    try:
        # "x": a file or link that someone put there meanwhile is not written to.
        with partial.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
        sync_folder(target.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk: a renamed file is only then safe from a power cut.

    Raises:
        OSError: If the disk reports a fault.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do this for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
