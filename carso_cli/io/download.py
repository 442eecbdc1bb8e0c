"""Downloading a published file: resumed where possible, verified, and complete or absent.

- `fetch` downloads; an interrupted download is resumed where it stopped;
- `offline` keeps it from downloading;
- `recorded_problem` compares a file without a published checksum with the checksum it was downloaded with.
"""

from __future__ import annotations

import http.client
import os
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, BinaryIO
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock

from carso_cli.errors import MissingError
from carso_cli.io.checksum import file_digest
from carso_cli.runtime.reporter import Reporter

_MIB = 2**20
# Of silence on the line, not of the whole download.
_TIMEOUT_SECONDS = 30
_LARGEST_MIB = 8 * 1024
"""Far above any file that a recipe names: a server that never stops sending must not fill the disk."""

_OFFLINE = ContextVar("offline", default=False)


@contextmanager
def offline() -> Iterator[None]:
    """Let `fetch` raise at once, as without a network: a dry run downloads nothing."""
    before = _OFFLINE.set(True)
    try:
        yield
    finally:
        _OFFLINE.reset(before)


def fetch(
    url: str, target: Path, *, name: str, reporter: Reporter, checksum: str = "", page: str = ""
) -> None:
    """Download `url` to `target`, through `<target>.part` beside it.

    A `.part` file of an earlier call is completed if the server allows it, and if a published checksum or the
    server's own version tag can prove that both parts belong to one file; otherwise the download starts over.
    Without a published checksum, the SHA-256 of the first download is stored in `<target>.sha256`, and any
    later one is refused that differs from it.

    Args:
        url: Where the file is published.
        target: The file to make; its folder is made too.
        name: What to call it in messages.
        reporter: Where progress goes, in MiB.
        checksum: The published one, `md5:` or `sha256:` and hexadecimal digits; empty where there is none.
        page: Where a browser finds the file, if not at `url`.

    Raises:
        MissingError: If there is no network, the disk is full, the connection ends early, or the download
            is a web page, has another checksum, has no sensible length or does not end; the message says
            what to fetch by hand and where to put it.
    """
    if _OFFLINE.get():
        raise MissingError(
            f"{name} is not on this machine", hint=f"fetch {page or url} and put it at {target}"
        )
    reporter.info(f"{name} is not on this machine yet: downloading {page or url}")
    partial = target.with_name(f"{target.name}.part")
    version = target.with_name(f"{target.name}.part.version")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A file of its own: what is locked must not be what is renamed.
        lock = target.with_name(f"{target.name}.lock")
        with FileLock(lock):
            # Another process may have finished the file while this one waited for the lock.
            if not target.is_file():
                _complete(url, partial, version, target, checksum, name, reporter)
            # While it is held: whoever waits for it, or makes a new one, finds the file complete.
            lock.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        # Of a plain URLError the reason alone; its subclass HTTPError says more itself, such as the code.
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise MissingError(
            f"{name} is not on this machine and could not be downloaded: {reason}{_kept(partial, version)}",
            hint=f"fetch {page or url} where there is a network and put it at {target}",
        ) from error


def _complete(
    url: str, partial: Path, version: Path, target: Path, checksum: str, name: str, reporter: Reporter
) -> None:
    """Complete `partial`, check it and give it the name `target`; the lock is held."""
    expected = checksum or _recorded(target)
    with partial.open("ab") as stream:
        _receive(url, stream, version, bool(expected), name, reporter)
        # On disk before it gets its name: a power cut must not leave a whole name on half a file.
        os.fsync(stream.fileno())
    _check(partial, target, expected)
    partial.replace(target)
    version.unlink(missing_ok=True)


def fetch_command(recipe: str) -> str:
    """Return the command line that downloads what a recipe lacks."""
    return f"carso doctor {recipe} --fetch"


def _kept(partial: Path, version: Path) -> str:
    """Say how much of a download is kept to be resumed; remove an empty one."""
    size = partial.stat().st_size if partial.is_file() else 0
    if size == 0:
        partial.unlink(missing_ok=True)
        version.unlink(missing_ok=True)
        return ""
    return f"; {size / _MIB:.1f} MiB are kept and the next download resumes there"


def _receive(url: str, stream: BinaryIO, version: Path, checked: bool, name: str, reporter: Reporter) -> None:
    """Append what is missing of `url` to a locked stream, or start over where the server sends another file.

    The tag by which the server tells versions of the file apart is kept in the file `version`. Bytes from
    before are used if there is such a tag, or if the whole is `checked` against a published checksum.
    """
    known = version.read_text() if version.is_file() else ""
    start = _size(stream) if known or checked else 0
    with _open_from(url, start, known) as response:
        # Pages of logins and warnings come with a status of success.
        if response.headers.get_content_type() == "text/html":
            raise OSError("the server sent a web page in its place")
        # The server ignored `Range` or sends from elsewhere: appended, the parts would not make one file.
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            stream.truncate(0)
            start = 0
        # Before the first byte, so that no bytes lie there under the tag of another version.
        version.write_text(_version(response))
        length = response.headers.get("Content-Length")
        if length is not None and not length.isdecimal():
            raise OSError(f"the server announces '{length[:20]}' bytes, which is no number")
        total = start + int(length or 0)
        # By the length that is claimed, before a byte is written; below by what really comes.
        _limit(stream, total)
        with reporter.progress(f"downloading {name}", total=-(-total // _MIB), unit="MiB") as progress:
            progress.advance(start // _MIB)
            while block := response.read(_MIB):
                stream.write(block)
                _limit(stream, _size(stream))
                progress.advance()
        stream.flush()
        # `read` with a size raises nothing when the connection ends early.
        if length is not None and _size(stream) != total:
            raise OSError(f"the connection ended after {_size(stream)} of {total} bytes")


def _limit(stream: BinaryIO, size: int) -> None:
    if size > _LARGEST_MIB * _MIB:
        # Kept, it would be resumed only to be refused again.
        stream.truncate(0)
        raise OSError(f"it has more than {_LARGEST_MIB:,} MiB, the largest download allowed")


def _version(response: http.client.HTTPResponse) -> str:
    """Return what tells this version of a file from others; empty where the server does not say."""
    tag = response.headers.get("ETag", "")
    # A weak tag may stay the same when bytes change.
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")


def _size(stream: BinaryIO) -> int:
    # Not `tell`: another process may have written, and truncating leaves the position as it was.
    return os.fstat(stream.fileno()).st_size


def _open_from(url: str, start: int, version: str) -> http.client.HTTPResponse:
    try:
        return open_url(url, start, version)
    except urllib.error.HTTPError as error:
        # It is an open response too, whose connection nobody else would close.
        error.close()
        # Nothing lies beyond `start`: the part is complete or of another file, which only a new start tells.
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return open_url(url, 0)
        raise


def open_url(url: str, start: int = 0, version: str = "") -> http.client.HTTPResponse:
    """Open a connection; the one place that touches the network.

    Args:
        url: What to ask for.
        start: Bytes to leave out, which the server may ignore.
        version: What `_version` returned for those bytes: the server sends all of any other version.

    Raises:
        OSError: If there is no network, the server refuses, or it redirects from https to another scheme.
    """
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and version:
        headers["If-Range"] = version
    # As a subclass it takes the place of the handler that urllib would add.
    opener = build_opener(HttpsOnly)
    response: http.client.HTTPResponse = opener.open(Request(url, headers=headers), timeout=_TIMEOUT_SECONDS)
    return response


class HttpsOnly(HTTPRedirectHandler):
    """Follows redirects, but never from https to another scheme, which anyone on the way could answer."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> Request | None:
        """Return the request to make next.

        Raises:
            OSError: If it would leave https.
        """
        if req.type == "https" and not newurl.startswith("https:"):
            raise OSError(f"the server leads from https to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check(partial: Path, target: Path, checksum: str) -> None:
    """Compare a download with its published or recorded checksum, or record the one it has."""
    algorithm, _, expected = (checksum or "sha256:").partition(":")
    seen = file_digest(partial, algorithm)
    if not expected:
        # Before the file has its name: without the record it would pass as put there by hand.
        _record_of(target).write_text(f"{seen}\n")
    elif seen != expected:
        # Kept, it would be resumed and fail for ever.
        partial.unlink()
        first = (
            f"; {record.name} holds that of the first download"
            if (record := _record_of(target)).is_file()
            else ""
        )
        raise OSError(
            f"it has the {algorithm.upper()} checksum {seen}, not {expected}, and was removed{first}"
        )


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _recorded(path: Path) -> str:
    """Return the checksum of the first download, as `fetch` takes it; empty if there was none."""
    record = _record_of(path)
    return f"sha256:{record.read_text().strip()}" if record.is_file() else ""


def recorded_problem(path: Path) -> str:
    """Say how a file differs from what was downloaded; empty where it does not, or was put there by hand."""
    record = _record_of(path)
    if not record.is_file() or record.read_text().strip() == file_digest(path):
        return ""
    return (
        f"it is not what was downloaded: its SHA-256 is not that in {record.name}; remove both, fetch again"
    )
