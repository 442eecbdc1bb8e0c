"""A folder or a zip file as one thing: names, subfolders, bytes, and a fingerprint.

A zip file may come from anyone, so every member is checked before it is used. Nothing is ever unpacked to
disk; members are read into memory one at a time.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from carso_cli.data.decode import START_BYTES, SUFFIXES, looks_like_image, read_start
from carso_cli.errors import DataError
from carso_cli.io.files import MAX_BYTES, read_given, similar_file

MAX_TOTAL_BYTES = 2**36
"""Largest uncompressed size of a whole zip file (64 GiB)."""

# lead / split / class / images / file, and one to spare; also ends loops of symbolic links
_MAX_DEPTH = 6
_CLUTTER = frozenset({"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"})
_ENCRYPTED = 0x1
# Python unpacks the other kinds without a bound: a few kilobytes may become gigabytes.
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_NO_ZIP = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError)
# On top of those: bad compressed data, a short file, a wrong password.
_NO_MEMBER = (*_NO_ZIP, zlib.error, EOFError, RuntimeError)


class FileTree:
    """The files under a folder or in a zip file; names are relative, with `/` between parts.

    Hidden files and what operating systems leave behind (`.DS_Store`, `__MACOSX`) are not listed.

    Args:
        path: The folder or zip file, for messages and fingerprints.
        store: What reads it.
    """

    def __init__(self, path: Path, store: _FolderStore | ZipStore) -> None:
        self.path = path
        self._store = store
        self.files = frozenset(name for name in store.files if not _is_clutter(name))
        self._subfolders: dict[str, set[str]] = defaultdict(set)
        self._images: dict[str, list[str]] = defaultdict(list)
        self._others: dict[str, list[str]] = defaultdict(list)
        folders = {name for name in store.folders if not _is_clutter(name)}
        # Sorted, since `indices` number the images, and each file system lists in an order of its own.
        for name in sorted(self.files):
            folder, _, base = name.rpartition("/")
            folders.add(folder)
            ending = os.path.splitext(base)[1].lower()
            # Files named by a number or a checksum alone: only those are opened here.
            is_image = ending in SUFFIXES or (not ending and looks_like_image(store.start(name)))
            (self._images if is_image else self._others)[folder].append(name)
        for folder in folders:
            # A zip file need not list the folders around a folder.
            while folder:
                parent, _, base = folder.rpartition("/")
                self._subfolders[parent].add(base)
                folder = parent

    def subfolders(self, folder: str) -> list[str]:
        """Return the sorted names of the folders directly inside `folder` (`""` is the top)."""
        return sorted(self._subfolders.get(folder, ()))

    def images(self, folder: str) -> list[str]:
        """Return the sorted full names of the images directly inside `folder`."""
        return self._images.get(folder, [])

    def others(self, folder: str) -> list[str]:
        """Return the sorted full names of the files directly inside `folder` that are no images."""
        return self._others.get(folder, [])

    def read(self, name: str) -> bytes:
        """Return a file's bytes.

        Raises:
            DataError: If it is missing, unreadable, damaged or absurdly large; the file is named.
        """
        return self._store.read(name)

    def where(self, name: str) -> str:
        """Return what to call a file or folder of this tree in a message."""
        if not name:
            return str(self.path)
        return f"{self.path}: {name}" if self.path.is_file() else str(self.path / name)

    def fingerprint(self, names: Iterable[str]) -> str:
        """Return a checksum that changes when the path or any of these files does.

        It covers the size and modification time of each file; of a zip file, its size and time, and the
        CRC and size of each member. Nothing is read or decoded.
        """
        status = self.path.stat()
        digest = hashlib.blake2b(os.fsencode(f"{self.path.resolve()}\n"), digest_size=32)
        if self.path.is_file():
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        # In the order given, which is that of the decoded images.
        for name in names:
            digest.update(os.fsencode(f"{name} {self._store.stamp(name)}\n"))
        return digest.hexdigest()


@contextmanager
def open_tree(path: Path) -> Iterator[FileTree]:
    """Open a folder or a zip file, whichever `path` is.

    Raises:
        DataError: If `path` is absent or neither of the two, or the zip file is unsafe or damaged.
    """
    try:
        # Asked first: `is_dir` and `is_zipfile` do not say why they fail.
        path.stat()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", hint=similar_file(path)) from error
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}") from error
    if path.is_dir():
        yield FileTree(path, _FolderStore(path))
    elif zipfile.is_zipfile(path):
        with ZipStore(path) as store:
            yield FileTree(path, store)
    else:
        raise DataError(
            f"{path} is neither a folder nor a complete zip file",
            hint="fetch it again if it should be a zip file; unpack any other kind of archive",
        )


class _FolderStore:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.files: list[str] = []
        self.folders: set[str] = set()
        # Without `onerror` a folder that cannot be listed would be left out in silence, with its images.
        for parent, folders, files in os.walk(path, onerror=_refuse_folder, followlinks=True):
            base = "" if parent == str(path) else f"{os.path.relpath(parent, path)}/"
            self.files += [base + name for name in files]
            # `os.walk` descends into the folders that are left in its list, and no others.
            folders[:] = [name for name in folders if not _is_clutter(name)]
            self.folders.update(base + name for name in folders)
            # `os.walk` does not notice a loop of the links that it follows.
            if base.count("/") >= _MAX_DEPTH:
                folders.clear()

    def read(self, name: str) -> bytes:
        return read_given(self._path / name)

    def start(self, name: str) -> bytes:
        return read_start(self._path / name)

    def stamp(self, name: str) -> str:
        try:
            status = (self._path / name).stat()
        except OSError as error:
            raise DataError(f"{self._path / name} cannot be read: {error.strerror}") from error
        return f"{status.st_size} {status.st_mtime_ns}"


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed: {error.strerror}") from error


class ZipStore:
    """The members of one zip file, by normalised name; a context manager that closes it.

    Raises:
        DataError: If it is no zip file, or a member has an absolute path, a `..`, a name in use
            already, is encrypted or compressed otherwise than by deflate, or the whole would unpack to
            more than `MAX_TOTAL_BYTES`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except _NO_ZIP as error:
            raise DataError(f"{path} cannot be read as a zip file: {error}", hint="fetch it again") from error
        self.files: dict[str, zipfile.ZipInfo] = {}
        self.folders: set[str] = set()
        try:
            self._index()
        # The caller has no object yet whose `__exit__` could close it.
        except DataError:
            self._zip.close()
            raise

    def __enter__(self) -> ZipStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def _index(self) -> None:
        # Not `getinfo` by name: of two members with one name it knows the last alone.
        for member in self._zip.infolist():
            name = self._safe_name(member)
            if member.is_dir():
                self.folders.add(name)
            elif name in self.files:
                raise DataError(f"{self._path} holds {name!r} twice", hint="make the zip file again")
            else:
                self.files[name] = member
        # What members claim is enough, since `read` never unpacks more.
        total = sum(member.file_size for member in self._zip.infolist())
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

    def read(self, name: str) -> bytes:
        """Return a member's bytes, its CRC checked.

        Raises:
            DataError: If it is damaged, cannot be decompressed, or is larger than `MAX_BYTES`.
        """
        member = self.files[name]
        if member.file_size > MAX_BYTES:
            size = f"{member.file_size} bytes; at most {MAX_BYTES} are allowed"
            raise DataError(f"{self._path}: {name} would unpack to {size}")
        try:
            with self._zip.open(member) as stream:
                # Without a number, `read` would unpack all there is, even if it is more than was claimed.
                return stream.read(member.file_size)
        except _NO_MEMBER as error:
            message = f"{self._path}: {name} is damaged: {error}"
            raise DataError(message, hint="fetch the file again") from error

    def start(self, name: str) -> bytes:
        """Return a member's first bytes; none if it is damaged, which `read` reports."""
        try:
            with self._zip.open(self.files[name]) as stream:
                return stream.read(START_BYTES)
        except _NO_MEMBER:
            return b""

    def stamp(self, name: str) -> str:
        """Return what changes when the member's content does: CRC and size."""
        member = self.files[name]
        return f"{member.CRC:08x} {member.file_size}"


def _is_clutter(name: str) -> bool:
    return any(part.startswith(".") or part in _CLUTTER for part in name.split("/"))
