"""Fetching a published file once: resumed, checked, reported, and never half done under its name.

- `fetch` downloads; an interrupted download goes on where it stopped;
- `recorded_problem` holds a file for which no checksum is published against the one it came with.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, BinaryIO

from carso_cli.errors import MissingError
from carso_cli.runtime.reporter import Reporter

_MIB = 2**20
_TIMEOUT_SECONDS = 30
_LARGEST_MIB = 8 * 1024
"""Above any file that a recipe names by a wide margin: a server that never ends must not fill the disk."""


def fetch(
    url: str, target: Path, *, name: str, reporter: Reporter, checksum: str = "", page: str = ""
) -> None:
    """Download `url` to `target`, by way of `<target>.part` beside it.

    A `.part` that an earlier call left is completed where the server allows it, and begun anew where not, or
    where neither a published checksum nor the server can tell that the file is still the same one.
    Without a published checksum, the SHA-256 of what came is kept in `<target>.sha256`.

    Args:
        url: Where the file is published.
        target: The file to make; its folder is made too.
        name: What to call it in messages.
        reporter: Where progress goes, in MiB.
        checksum: The published one, `md5:` or `sha256:` and hexadecimal digits; empty where there is none.
        page: Where a browser finds the file, if not at `url`.

    Raises:
        MissingError: If there is no network, the disk refuses, the connection ends early, or what came is a
            web page, has another checksum or does not end; the message says what to fetch by hand and where
            to put it.
    """
    reporter.info(f"{name} is not on this machine yet: downloading {page or url}")
    partial = target.with_name(f"{target.name}.part")
    version = target.with_name(f"{target.name}.part.version")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as stream:
            # Held until the stream is closed; another process may finish the file while this one waits.
            fcntl.flock(stream, fcntl.LOCK_EX)
            if target.is_file():
                partial.unlink(missing_ok=True)
                return
            _receive(url, stream, version, bool(checksum), name, reporter)
            os.fsync(stream.fileno())
            _check(partial, target, checksum)
            partial.replace(target)
            version.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise MissingError(
            f"{name} is not on this machine and could not be downloaded: {reason}{_kept(partial, version)}",
            hint=f"fetch {page or url} where there is a network and put it at {target}",
        ) from error


def fetch_command(recipe: str) -> str:
    """Return the command line that downloads what a recipe lacks."""
    return f"carso doctor {recipe} --fetch"


def _kept(partial: Path, version: Path) -> str:
    """Say how much of a download is kept for the next try; remove what is of no use to it."""
    size = partial.stat().st_size if partial.is_file() else 0
    if size == 0:
        partial.unlink(missing_ok=True)
        version.unlink(missing_ok=True)
        return ""
    return f"; {size / _MIB:.1f} MiB are kept, and the next try goes on from there"


def _receive(url: str, stream: BinaryIO, version: Path, checked: bool, name: str, reporter: Reporter) -> None:
    """Append what is missing of `url` to a stream; begin anew where it might be another file by now.

    Args:
        url: What to ask for.
        stream: What has come so far, locked.
        version: File with what the server told the file's versions apart by, if it did.
        checked: Whether what comes will be held against a published checksum.
        name: What to call it.
        reporter: Where progress goes.
    """
    known = version.read_text() if version.is_file() else ""
    start = _size(stream) if known or checked else 0
    with _open_from(url, start, known) as response:
        if response.headers.get_content_type() == "text/html":
            raise OSError("the server sent a web page in its place")
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            stream.truncate(0)
            start = 0
        version.write_text(_version(response))
        length = response.headers.get("Content-Length")
        total = start + int(length or 0)
        _limit(stream, total)
        with reporter.progress(f"downloading {name}", total=-(-total // _MIB), unit="MiB") as progress:
            progress.advance(start // _MIB)
            while block := response.read(_MIB):
                stream.write(block)
                _limit(stream, _size(stream))
                progress.advance()
        stream.flush()
        if length is not None and _size(stream) != total:
            raise OSError(f"the connection ended after {_size(stream)} of {total} bytes")


def _limit(stream: BinaryIO, size: int) -> None:
    if size > _LARGEST_MIB * _MIB:
        stream.truncate(0)
        raise OSError(f"it has more than {_LARGEST_MIB:,} MiB, the most that is taken from a server")


def _version(response: http.client.HTTPResponse) -> str:
    """Return what tells this version of a file from others; empty where the server does not say."""
    tag = response.headers.get("ETag", "")
    # A weak tag stays the same where the bytes need not.
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")


def _size(stream: BinaryIO) -> int:
    # Not `tell`: another process may have written, and truncating leaves the position as it was.
    return os.fstat(stream.fileno()).st_size


def _open_from(url: str, start: int, version: str) -> http.client.HTTPResponse:
    try:
        return open_url(url, start, version)
    except urllib.error.HTTPError as error:
        # Nothing lies beyond `start`: the file is complete or another one now, which only a new start tells.
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return open_url(url, 0)
        raise


def open_url(url: str, start: int = 0, version: str = "") -> http.client.HTTPResponse:
    """Open a connection; the one place that touches the network.

    Args:
        url: What to ask for.
        start: Bytes to leave out, which the server need not heed.
        version: What `_version` returned for those bytes: the server sends all of any other version.

    Raises:
        OSError: If there is no network, the server refuses, or it leads from https to anything else.
    """
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and version:
        headers["If-Range"] = version
    request = urllib.request.Request(url, headers=headers)
    opener = urllib.request.build_opener(StayingEncrypted)
    response: http.client.HTTPResponse = opener.open(request, timeout=_TIMEOUT_SECONDS)
    return response


class StayingEncrypted(urllib.request.HTTPRedirectHandler):
    """Follows a server to another address, but never out of https, where anyone on the way could answer."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Return the request to make next.

        Raises:
            OSError: If it would leave https.
        """
        if req.type == "https" and not newurl.startswith("https:"):
            raise OSError(f"the server leads from https to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check(partial: Path, target: Path, checksum: str) -> None:
    """Hold a download against its published checksum, or record the one it has."""
    algorithm, _, expected = (checksum or "sha256:").partition(":")
    seen = file_digest(partial, algorithm)
    if not expected:
        _record_of(target).write_text(f"{seen}\n")
    elif seen != expected:
        partial.unlink()
        raise OSError(f"what came has the {algorithm.upper()} checksum {seen}, not {expected}; it is removed")


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def recorded_problem(path: Path) -> str:
    """Say how a file differs from what was downloaded; empty where it does not, or was put there by hand."""
    record = _record_of(path)
    if not record.is_file() or record.read_text().strip() == file_digest(path, "sha256"):
        return ""
    return (
        f"it is not what was downloaded: its SHA-256 is not that in {record.name}; remove both, fetch again"
    )


def file_digest(path: Path, algorithm: str) -> str:
    """Return a file's checksum in hexadecimal digits; `algorithm` is a name of hashlib."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
