"""Downloads: complete and checked, or not there at all. A server on this machine, and no other, is asked."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPMessage
from io import BytesIO
from pathlib import Path
from typing import Protocol
from urllib.request import Request

import pytest

from carso_cli.errors import MissingError
from carso_cli.io import download
from carso_cli.io.download import HttpsOnly, fetch, recorded_problem
from carso_cli.runtime.reporter import SILENT, Reporter

CONTENT = bytes(range(256)) * 10_000
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class Site(Protocol):
    url: str
    content: bytes
    kind: str
    resumes: bool
    announces: bool
    length: str
    version: str
    cut_after: int | None
    asked: list[str | None]


class Recorder(Reporter, Protocol):
    said: list[str]
    tasks: list[tuple[str, int, str]]
    steps: int


@pytest.fixture
def target(tmp_path: Path, site: Site) -> Path:
    site.content = CONTENT
    return tmp_path / "data" / "a.zip"


def get(site: Site, target: Path, checksum: str = MD5, page: str = "", reporter: Reporter = SILENT) -> None:
    fetch(site.url, target, name="tiny", reporter=reporter, checksum=checksum, page=page)


def part_of(target: Path) -> Path:
    return target.with_name("a.zip.part")


def test_a_download_is_checked_reported_and_put_in_place(
    site: Site, target: Path, recorder: Recorder
) -> None:
    get(site, target, reporter=recorder)
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["a.zip"]
    assert recorder.tasks == [("downloading tiny", 3, "MiB")]
    assert recorder.steps == 3
    assert recorder.said == [f"tiny is not on this machine yet: downloading {site.url}"]
    assert site.asked == [None]


def test_a_cut_connection_is_gone_on_from(site: Site, target: Path, recorder: Recorder) -> None:
    site.cut_after = 1_500_000
    with pytest.raises(MissingError, match=f"ended after 1500000 of {len(CONTENT)} bytes; 1.4 MiB are kept"):
        get(site, target)
    assert not target.exists()
    assert part_of(target).read_bytes() == CONTENT[:1_500_000]
    site.cut_after = None
    get(site, target, reporter=recorder)
    assert target.read_bytes() == CONTENT
    assert site.asked == [None, "bytes=1500000-"]
    # One of three MiB was there, and two blocks came.
    assert recorder.steps == 3


@pytest.mark.parametrize(
    ("versions", "checksum", "asked"),
    [
        # The same file, told by the server; another file of the same size; nothing to tell them apart by.
        (('"1"', '"1"'), "", "bytes=1500000-"),
        (('"1"', '"2"'), "", "bytes=1500000-"),
        (('W/"1"', 'W/"1"'), "", None),
        (("", ""), "", None),
        (("", ""), MD5, "bytes=1500000-"),
    ],
)
def test_parts_of_two_versions_are_never_joined(
    site: Site, target: Path, versions: tuple[str, str], checksum: str, asked: str | None
) -> None:
    changed = versions != ('"1"', '"1"') and not checksum
    site.content = CONTENT[::-1] if changed else CONTENT
    site.version, site.cut_after = versions[0], 1_500_000
    with pytest.raises(MissingError, match="ended after 1500000"):
        get(site, target, checksum=checksum)
    site.content, site.version, site.cut_after = CONTENT, versions[1], None
    get(site, target, checksum=checksum)
    assert target.read_bytes() == CONTENT
    assert site.asked == [None, asked]
    assert {path.name for path in target.parent.iterdir()} - {"a.zip.sha256"} == {"a.zip"}


@pytest.mark.parametrize("away", ["http://example.org/a", "ftp://example.org/a", "file:///etc/passwd"])
def test_no_server_leads_out_of_https(away: str) -> None:
    headers = HTTPMessage()
    asked = Request("https://example.org/a")
    with pytest.raises(OSError, match=f"leads from https to {away}, which is not followed"):
        HttpsOnly().redirect_request(asked, BytesIO(), 302, "Found", headers, away)
    found = HttpsOnly().redirect_request(asked, BytesIO(), 302, "Found", headers, "https://example.com/b")
    assert found is not None
    assert found.full_url == "https://example.com/b"


def test_a_server_that_does_not_resume_begins_anew(site: Site, target: Path) -> None:
    site.resumes = False
    target.parent.mkdir()
    part_of(target).write_bytes(b"x" * 1000)
    get(site, target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("there", [CONTENT, CONTENT + b"more"])
def test_a_part_with_nothing_missing_begins_anew(site: Site, target: Path, there: bytes) -> None:
    target.parent.mkdir()
    part_of(target).write_bytes(there)
    get(site, target)
    assert target.read_bytes() == CONTENT
    assert site.asked == [f"bytes={len(there)}-", None]


def test_another_checksum_leaves_nothing(site: Site, target: Path) -> None:
    site.content = CONTENT[:-1]
    seen = hashlib.md5(CONTENT[:-1]).hexdigest()
    with pytest.raises(MissingError, match=f"the MD5 checksum {seen}, not {MD5.removeprefix('md5:')}"):
        get(site, target)
    assert [path.name for path in target.parent.iterdir()] == ["a.zip.lock"]


def test_a_web_page_is_refused(site: Site, target: Path) -> None:
    site.content, site.kind = b"<html>Quota exceeded</html>", "text/html; charset=utf-8"
    with pytest.raises(MissingError, match="the server sent a web page in its place") as caught:
        get(site, target, checksum="", page="https://example.org/a")
    assert caught.value.hint == f"fetch https://example.org/a where there is a network and put it at {target}"
    assert [path.name for path in target.parent.iterdir()] == ["a.zip.lock"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_file_without_an_end_is_given_up(
    announced: bool, site: Site, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_LARGEST_MIB", 1)
    site.announces = announced
    with pytest.raises(MissingError, match="it has more than 1 MiB, the largest download allowed"):
        get(site, target)
    assert [path.name for path in target.parent.iterdir()] == ["a.zip.lock"]


def test_without_a_published_checksum_the_first_one_counts(site: Site, target: Path) -> None:
    get(site, target, checksum="")
    record = target.with_name("a.zip.sha256")
    assert record.read_text() == f"{hashlib.sha256(CONTENT).hexdigest()}\n"
    assert recorded_problem(target) == ""
    target.write_bytes(CONTENT[:-1] + b"?")
    assert "its SHA-256 is not that in a.zip.sha256; remove both" in recorded_problem(target)
    record.unlink()
    assert recorded_problem(target) == ""


def test_a_later_download_must_be_the_first_one(site: Site, target: Path) -> None:
    get(site, target, checksum="")
    target.unlink()
    site.content = CONTENT[:-1] + b"?"
    with pytest.raises(
        MissingError, match=r"and was removed; a\.zip\.sha256 holds that of the first download"
    ):
        get(site, target, checksum="")
    assert not target.exists()
    site.content = CONTENT
    get(site, target, checksum="")
    assert target.read_bytes() == CONTENT


def test_a_length_that_is_no_number_is_refused(site: Site, target: Path) -> None:
    site.length = "many"
    with pytest.raises(MissingError, match="the server announces 'many' bytes, which is no number"):
        get(site, target)
    assert not target.exists()


def test_no_network_is_a_sentence(site: Site, target: Path) -> None:
    # A port at which nobody listens.
    site.url = "http://127.0.0.1:1/a.zip"
    with pytest.raises(
        MissingError, match="tiny is not on this machine and could not be downloaded"
    ) as caught:
        get(site, target)
    assert caught.value.message.endswith("Connection refused")
    assert caught.value.hint == f"fetch {site.url} where there is a network and put it at {target}"
    assert caught.value.exit_code == 3
    assert [path.name for path in target.parent.iterdir()] == ["a.zip.lock"]


def test_two_at_once_download_once(site: Site, target: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: get(site, target), range(2)))
    assert target.read_bytes() == CONTENT
    assert site.asked == [None]
    assert [path.name for path in target.parent.iterdir()] == ["a.zip"]
