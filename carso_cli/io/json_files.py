"""JSON files with checksums: whole files replaced atomically, and logs of one object per line.

- `write_atomically` replaces a file of any kind; `write_json`, `read_json`: one object with its checksum,
  `read_plain_json` one without;
- `append_json_lines` adds records to a log, `write_json_lines` replaces it, `read_json_lines` reads it and
  drops a last line that a killed process left unfinished.

Symbolic links are replaced or refused, never followed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from carso_cli.errors import CarsoError, StateError
from carso_cli.io.checksum import RESTORE, add_checksum, remove_checksum
from carso_cli.io.files import atomic_write, read_limited

_MAX_BYTES = 2**30


@contextmanager
def writing(what: str | Path, hint: str = "") -> Iterator[None]:
    """Turn an OSError inside the context into a CarsoError that says what cannot be written."""
    try:
        yield
    except OSError as error:
        raise CarsoError(f"cannot write {what}: {error.strerror or error}", hint=hint) from error


def ensure_folder(folder: Path) -> Path:
    """Create a folder, and prove it writable by creating a temporary file, before any work is done.

    Raises:
        CarsoError: If it cannot be created or written to.
    """
    with writing(f"to the folder {folder}", "choose another folder with --run DIR"):
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions say nothing of a read-only disk: only a file that is created does.
        tempfile.TemporaryFile(dir=folder).close()
    return folder


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` in one step, in UTF-8 if it is text; see `atomic_write`.

    Raises:
        CarsoError: If the disk is full or the folder cannot be written; `path` is then untouched.
    """
    # A file name in the text may hold bytes that are no UTF-8: they are written as escapes.
    payload = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    hint = "free some space or choose another folder with --run DIR; what was there before is intact"
    with writing(path, hint), atomic_write(path) as stream:
        stream.write(payload)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by indented JSON with a checksum; NaN and infinities are refused."""
    write_atomically(path, json.dumps(add_checksum(content), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, without the checksum that `write_json` gave it.

    Raises:
        StateError: If the file is absent, is not a JSON object, or does not match its checksum.
    """
    return remove_checksum(read_plain_json(path), str(path))


def read_plain_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that `write_json` did not write.

    Raises:
        StateError: If the file is absent, or is not a JSON object.
    """
    try:
        content = json.loads(read_limited(path, _MAX_BYTES))
    # ValueError: no JSON, or no UTF-8. RecursionError: damage that looks like brackets without end.
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StateError(f"cannot read {path}: {reason}", hint=RESTORE) from error
    if not isinstance(content, dict):
        raise StateError(f"{path} holds {type(content).__name__}, not a JSON object", hint=RESTORE)
    return content


def append_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to a JSON-lines file in one write, each with a checksum, and force them to disk.

    Raises:
        CarsoError: If they cannot be written; none of them is then in the file.
    """
    lines = memoryview(_as_lines(records))
    with (
        writing(path, "free some space, then resume with --resume; what was there before is intact"),
        # Unbuffered: a full buffer would be written again on closing, after the lines were taken back.
        open(path, "ab", buffering=0, opener=_open_no_link) as stream,
    ):
        length = stream.tell()
        try:
            while lines:
                # A raw write may take a part only, for one on a disk that becomes full.
                lines = lines[stream.write(lines) :]
            os.fsync(stream.fileno())
        except OSError:
            with suppress(OSError):
                # Whole lines of a failed append would count as stored.
                stream.truncate(length)
            raise


def _as_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(add_checksum(record), allow_nan=False) + "\n" for record in records).encode()


def _open_no_link(path: str, flags: int) -> int:
    # The mode that `open` gives a new file; the umask takes from it.
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSON-lines file.

    Raises:
        CarsoError: If it cannot be written; the earlier one is then intact.
    """
    write_atomically(path, _as_lines(records))


def read_json_lines(path: Path, *, repair: bool = True) -> list[dict[str, Any]]:
    """Read a JSON-lines file, without the checksums; an absent file is an empty log.

    A last line without its newline was cut off by a kill: it is dropped here and removed from the
    file, so that the next append starts on a fresh line.

    Args:
        path: The file.
        repair: Remove such a line; False for a mere reader, since another process may be writing it.

    Raises:
        StateError: If it cannot be read, or if any other line is not a JSON object or does not match its
            checksum.
    """
    try:
        content = read_limited(path, _MAX_BYTES)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror or error}", hint=RESTORE) from error
    complete = content[: content.rfind(b"\n") + 1]
    if repair and len(complete) < len(content):
        write_atomically(path, complete)
    # Not `splitlines`, which also cuts at other control characters, such as damage may have put there.
    lines = complete.split(b"\n")[:-1]
    return [_read_line(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _read_line(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{place} is damaged: {error}", hint=RESTORE) from error
    if not isinstance(record, dict):
        raise StateError(f"{place} is not a JSON object", hint=RESTORE)
    return remove_checksum(record, place)
