"""A folder or a zip file as one thing: names, subfolders, bytes, and a fingerprint."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from carso_cli.data.decode import SUFFIXES
from carso_cli.data.zip_store import ZipStore
from carso_cli.errors import DataError
from carso_cli.io.files import read_given, similar_file

# lead / split / class / images / file, and one to spare; also ends loops of symbolic links
_MAX_DEPTH = 6
_CLUTTER = frozenset({"__MACOSX", "@eaDir"})


class _Store(Protocol):
    def files(self) -> list[str]: ...
    def folders(self) -> set[str]: ...
    def read(self, name: str) -> bytes: ...
    def stamp(self, name: str) -> str: ...
    def close(self) -> None: ...


class FileTree:
    """The files under a folder or in a zip file; names are relative, with `/` between parts.

    Hidden files and what operating systems leave behind (`.DS_Store`, `__MACOSX`) are not listed.

    Args:
        path: The folder or zip file, for messages and fingerprints.
        store: What reads it.
    """

    def __init__(self, path: Path, store: _Store) -> None:
        self.path = path
        self._store = store
        self.files = frozenset(name for name in store.files() if not _is_clutter(name))
        self._subfolders: dict[str, set[str]] = defaultdict(set)
        self._images: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.files):
            folder, _, base = name.rpartition("/")
            if os.path.splitext(base)[1].lower() in SUFFIXES:
                self._images[folder].append(name)
        parents = {name.rpartition("/")[0] for name in self.files}
        for folder in parents | {name for name in store.folders() if not _is_clutter(name)}:
            self._add_folder(folder)

    def _add_folder(self, folder: str) -> None:
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

        Files are told apart by size and modification time, members of a zip file by CRC and
        size along with the zip's own size and time; nothing is read or decoded.
        """
        status = self.path.stat()
        digest = hashlib.blake2b(os.fsencode(f"{self.path.resolve()}\n"), digest_size=32)
        if self.path.is_file():
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        for name in names:
            digest.update(os.fsencode(f"{name} {self._store.stamp(name)}\n"))
        return digest.hexdigest()


class _FolderStore:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: list[str] = []
        self._folders: set[str] = set()
        self._scan("")

    def _scan(self, folder: str) -> None:
        if folder.count("/") >= _MAX_DEPTH:
            return
        try:
            with os.scandir(self._path / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if not entry.is_dir():
                        self._files.append(name)
                    elif not _is_clutter(name):
                        self._folders.add(name)
                        self._scan(name)
        except OSError as error:
            raise DataError(f"{self._path / folder} cannot be listed: {error.strerror}") from error

    def files(self) -> list[str]:
        return self._files

    def folders(self) -> set[str]:
        return self._folders

    def read(self, name: str) -> bytes:
        return read_given(self._path / name)

    def stamp(self, name: str) -> str:
        try:
            status = (self._path / name).stat()
        except OSError as error:
            raise DataError(f"{self._path / name} cannot be read: {error.strerror}") from error
        return f"{status.st_size} {status.st_mtime_ns}"

    def close(self) -> None:
        pass


@contextmanager
def open_tree(path: Path) -> Iterator[FileTree]:
    """Open a folder or a zip file, whichever `path` is.

    Raises:
        DataError: If `path` is absent or neither of the two, or the zip file is unsafe or damaged.
    """
    try:
        path.stat()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", hint=similar_file(path)) from error
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}") from error
    if not path.is_dir() and not zipfile.is_zipfile(path):
        raise DataError(
            f"{path} is neither a folder nor a complete zip file",
            hint="fetch it again if it should be a zip file; unpack any other kind of archive",
        )
    store: _Store = _FolderStore(path) if path.is_dir() else ZipStore(path)
    try:
        yield FileTree(path, store)
    finally:
        store.close()


def _is_clutter(name: str) -> bool:
    return any(part.startswith(".") or part in _CLUTTER for part in name.split("/"))
