"""Writing files so that a reader never meets half of one.

- `write_atomically` replaces a whole file;
- `append_json_line` adds one record to a log and forces it to disk, `write_json_lines` replaces a log;
- `read_json_lines` reads a log back, dropping a last line that a killed process left unfinished;
- `file_sha256` is a file's checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from carso_cli.errors import CarsoError, StateError


def ensure_folder(folder: Path) -> Path:
    """Create a folder and prove it writable before any work is done.

    Raises:
        CarsoError: If it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CarsoError(
            f"cannot write to the folder {folder}: {error.strerror or error}",
            hint="choose another folder with --run DIR",
        ) from error
    return folder


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data`: temporary file, flush, fsync, rename.

    Raises:
        CarsoError: If the disk is full or the folder cannot be written; `path` is then untouched.
    """
    payload = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CarsoError(
            f"cannot write {path}: {error.strerror or error}",
            hint="free some space or choose another folder with --run DIR; what was there before is intact",
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by indented JSON; NaN and infinities are refused."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        StateError: If the file is absent or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StateError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise StateError(f"{path} holds {type(content).__name__}, not a JSON object")
    return content


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record to a JSON-lines file and force it to disk.

    Raises:
        CarsoError: If the line cannot be written.
    """
    append_json_lines(path, [record])


def append_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to a JSON-lines file in one write and force them to disk.

    Raises:
        CarsoError: If they cannot be written.
    """
    lines = _lines(records)
    try:
        with open(path, "ab") as stream:
            stream.write(lines)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise CarsoError(f"cannot write {path}: {error.strerror or error}") from error


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSON-lines file atomically.

    Raises:
        CarsoError: As `write_atomically`.
    """
    write_atomically(path, _lines(records))


def _lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()


def read_json_lines(path: Path, *, repair: bool = True) -> list[dict[str, Any]]:
    """Read a JSON-lines file; an absent file is an empty log.

    A last line without its newline was cut off by a kill: it is dropped here and removed from the
    file, so that the next append starts on a fresh line.

    Args:
        path: The file.
        repair: Remove such a line; False for a mere reader, since another process may be writing it.

    Raises:
        StateError: If any other line is not a JSON object.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if repair and len(complete) < len(content):
        write_atomically(path, complete)
    records = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            record = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise StateError(f"{path}, line {number} is damaged: {error}") from error
        if not isinstance(record, dict):
            raise StateError(f"{path}, line {number} is not a JSON object")
        records.append(record)
    return records


def file_sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
