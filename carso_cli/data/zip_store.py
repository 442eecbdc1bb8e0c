"""Reading a zip file that someone else made: every member is checked before it is used.

Nothing is ever unpacked to disk; members are read into memory one at a time.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

from carso_cli.errors import DataError
from carso_cli.io.files import MAX_BYTES

MAX_TOTAL_BYTES = 2**36
"""Largest uncompressed size of a whole archive (64 GiB)."""

_ENCRYPTED = 0x1
# Python unpacks the other kinds without a bound: a few kilobytes may become gigabytes.
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class ZipStore:
    """The members of one zip file, by normalised name.

    Raises:
        DataError: If it is no zip file, or a member has an absolute path, a `..`, a name in use
            already, is encrypted or compressed otherwise than by deflate, or the whole would unpack to
            more than `MAX_TOTAL_BYTES`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise DataError(f"{path} cannot be read as a zip file: {error}", hint="fetch it again") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._folders: set[str] = set()
        try:
            self._index()
        except DataError:
            self.close()
            raise

    def _index(self) -> None:
        total = 0
        for member in self._zip.infolist():
            name = self._safe_name(member)
            total += member.file_size
            if member.is_dir():
                self._folders.add(name)
            elif name in self._members:
                raise DataError(f"{self._path} holds {name!r} twice", hint="make the zip file again")
            else:
                self._members[name] = member
        if total > MAX_TOTAL_BYTES:
            raise DataError(
                f"{self._path} would unpack to {total} bytes; at most {MAX_TOTAL_BYTES} are allowed"
            )

    def _safe_name(self, member: zipfile.ZipInfo) -> str:
        # Archives made on Windows may separate folders by backslashes.
        name = member.filename.replace("\\", "/")
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
            raise DataError(
                f"{self._path} holds the member {member.filename!r}, which points outside the archive",
                hint="such a file is not safe to use; make the zip file again",
            )
        if member.flag_bits & _ENCRYPTED:
            raise DataError(f"{self._path} holds the encrypted member {member.filename!r}")
        if member.compress_type not in _BOUNDED:
            raise DataError(
                f"{self._path} holds the member {member.filename!r}, compressed otherwise than by deflate",
                hint="make the zip file again, with the usual compression",
            )
        return name.rstrip("/")

    def files(self) -> list[str]:
        """Return the names of all files."""
        return list(self._members)

    def folders(self) -> set[str]:
        """Return the folders that have an entry of their own."""
        return self._folders

    def read(self, name: str) -> bytes:
        """Return a member's bytes, its CRC checked.

        Raises:
            DataError: If it is damaged, cannot be decompressed, or is larger than `MAX_BYTES`.
        """
        member = self._members[name]
        if member.file_size > MAX_BYTES:
            raise DataError(
                f"{self._path}: {name} would unpack to {member.file_size} bytes;"
                f" at most {MAX_BYTES} are allowed"
            )
        try:
            with self._zip.open(member) as stream:
                # What is read without a number is unpacked whole, however much more than claimed it is.
                return stream.read(member.file_size)
        except (
            zipfile.BadZipFile,
            zlib.error,
            OSError,
            EOFError,
            ValueError,
            RuntimeError,
            NotImplementedError,
        ) as error:
            raise DataError(
                f"{self._path}: {name} is damaged: {error}", hint="fetch the file again"
            ) from error

    def stamp(self, name: str) -> str:
        """Return what changes when the member's content does: CRC and size."""
        member = self._members[name]
        return f"{member.CRC:08x} {member.file_size}"

    def close(self) -> None:
        """Close the file."""
        self._zip.close()
