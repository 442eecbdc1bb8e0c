"""Files that a user names or a data set holds: read whole, or named with what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

from carso_cli.errors import DataError, nearest
from carso_cli.io.atomic import read_limited

MAX_BYTES = 2**26
"""Largest image or text file that is read (64 MiB)."""


def read_given(path: Path) -> bytes:
    """Read a file.

    Raises:
        DataError: If it is missing, unreadable, larger than `MAX_BYTES`, or a folder, pipe or device.
    """
    try:
        return read_limited(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", hint=similar_file(path)) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def similar_file(path: Path) -> str:
    """Suggest names in the same folder that are close to a path that does not exist."""
    try:
        return nearest(path.name, os.listdir(path.parent))
    except OSError:
        return ""
