"""Downloads: complete and checked, or not there at all. No test touches the network."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Protocol
from urllib.error import URLError

import pytest

from carso_cli.data import download
from carso_cli.errors import DataError
from carso_cli.reporter import Reporter

CONTENT = b"archive" * 400_000
MD5 = hashlib.md5(CONTENT).hexdigest()
URL = "https://example.org/a.zip"


class _Recorder(Reporter, Protocol):
    said: list[str]
    tasks: list[tuple[str, int, str]]
    steps: int


class Response(io.BytesIO):
    """What a server answers."""

    headers: dict[str, str]

    def __init__(self, content: bytes, length: str | None) -> None:
        super().__init__(content)
        self.headers = {} if length is None else {"Content-Length": length}


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes, length: str | None = None) -> None:
    monkeypatch.setattr(download, "open_url", lambda url: Response(content, length))


def test_a_download_is_checked_reported_and_put_in_place(
    tmp_path: Path, recorder: _Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, CONTENT, str(len(CONTENT)))
    target = tmp_path / "data" / "a.zip"
    download.fetch(URL, target, md5=MD5, name="tiny", reporter=recorder)
    assert target.read_bytes() == CONTENT
    assert download.file_md5(target) == MD5
    assert recorder.tasks == [("downloading tiny", 3, "MiB")]
    assert recorder.steps == 3
    assert URL in recorder.said[0]


def test_a_cut_download_leaves_nothing(
    tmp_path: Path, recorder: _Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, CONTENT[:-1])
    seen = hashlib.md5(CONTENT[:-1]).hexdigest()
    with pytest.raises(DataError, match=f"what came has the MD5 checksum {seen}, not {MD5}"):
        download.fetch(URL, tmp_path / "a.zip", md5=MD5, name="tiny", reporter=recorder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", [URLError("Name or service not known"), TimeoutError("timed out")])
def test_no_network_is_a_sentence(
    tmp_path: Path, recorder: _Recorder, monkeypatch: pytest.MonkeyPatch, fault: OSError
) -> None:
    def refuse(url: str) -> None:
        raise fault

    monkeypatch.setattr(download, "open_url", refuse)
    with pytest.raises(DataError, match="tiny is not on this machine and could not be downloaded") as caught:
        download.fetch(URL, tmp_path / "a.zip", md5=MD5, name="tiny", reporter=recorder)
    assert str(fault) in caught.value.message
    assert caught.value.hint == f"fetch {URL} where there is a network and put it at {tmp_path / 'a.zip'}"
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []
