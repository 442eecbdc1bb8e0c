"""Fetching a data set's archive once: checked, reported, and never left half done under its name."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from pathlib import Path
from typing import BinaryIO

from carso_cli.data.whole_file import written_whole
from carso_cli.errors import DataError
from carso_cli.reporter import Reporter

_MIB = 2**20
_TIMEOUT_SECONDS = 30


def fetch(url: str, target: Path, *, md5: str, name: str, reporter: Reporter) -> None:
    """Download `url` to `target`, through a temporary file beside it.

    Args:
        url: Where the archive is published.
        target: The file to make; its folder is made too.
        md5: Checksum published for the archive.
        name: What to call the data set in messages.
        reporter: Where progress goes, in MiB.

    Raises:
        DataError: If there is no network, the disk refuses, or what came has another checksum;
            the message says what to fetch by hand and where to put it.
    """
    reporter.say(f"{name} is not on this machine yet: downloading {url}")
    try:
        with written_whole(target) as stream:
            seen = _copy(url, stream, name, reporter)
            if seen != md5:
                raise OSError(f"what came has the MD5 checksum {seen}, not {md5}")
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{name} is not on this machine and could not be downloaded: {error}",
            hint=f"fetch {url} where there is a network and put it at {target}",
        ) from error


def _copy(url: str, stream: BinaryIO, name: str, reporter: Reporter) -> str:
    """Copy what lies at `url` into a stream and return its MD5 checksum."""
    digest = hashlib.md5(usedforsecurity=False)
    with open_url(url) as response:
        total = int(response.headers.get("Content-Length") or 0)
        with reporter.progress(f"downloading {name}", total=-(-total // _MIB), unit="MiB") as progress:
            while block := response.read(_MIB):
                digest.update(block)
                stream.write(block)
                progress.advance()
    return digest.hexdigest()


def open_url(url: str) -> http.client.HTTPResponse:
    """Open a connection; the one place that touches the network.

    Raises:
        OSError: If there is no network or the server refuses.
    """
    response: http.client.HTTPResponse = urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS)
    return response


def file_md5(path: Path) -> str:
    """Return the MD5 checksum of a file, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
