"""Zip files from elsewhere: unsafe or damaged members are refused by name."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import pytest

from carso_cli.data import zip_store
from carso_cli.data.zip_store import ZipStore
from carso_cli.errors import DataError
from carso_cli.io.files import MAX_BYTES


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as target:
        for name, content in members.items():
            target.writestr(name, content)
    return path


@pytest.mark.parametrize(
    "name", ["../outside.png", "a/../../outside.png", "/etc/outside.png", "C:/outside.png", "..\\outside.png"]
)
def test_members_that_point_outside_are_refused(tmp_path: Path, name: str) -> None:
    file = archive(tmp_path / "a.zip", {"fine.png": b"", name: b""})
    with pytest.raises(DataError, match="which points outside the archive") as caught:
        ZipStore(file)
    assert repr(name) in caught.value.message
    assert str(file) in caught.value.message


def test_names_with_two_dots_inside_a_part_are_fine(tmp_path: Path) -> None:
    assert ZipStore(archive(tmp_path / "a.zip", {"a..b.png": b""})).files() == ["a..b.png"]


def test_backslashes_separate_folders(tmp_path: Path) -> None:
    store = ZipStore(archive(tmp_path / "a.zip", {"cat\\1.png": b"x"}))
    assert store.files() == ["cat/1.png"]
    assert store.read("cat/1.png") == b"x"


def test_a_name_in_use_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 'cat/1\.png' twice"):
        ZipStore(archive(tmp_path / "a.zip", {"cat/1.png": b"", "cat\\1.png": b""}))


def test_absurd_sizes_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = b"\0" * (MAX_BYTES + 1)
    file = archive(tmp_path / "a.zip", {"cat/bomb.png": bomb}, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 100_000
    with pytest.raises(DataError, match=rf"cat/bomb\.png would unpack to {len(bomb)} bytes"):
        ZipStore(file).read("cat/bomb.png")
    monkeypatch.setattr(zip_store, "MAX_TOTAL_BYTES", 1000)
    with pytest.raises(DataError, match=rf"a\.zip would unpack to {len(bomb)} bytes; at most 1000"):
        ZipStore(file)


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    file = archive(tmp_path / "a.zip", {"cat/1.png": b"x"})
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flags of its entry in the central directory
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"the encrypted member 'cat/1\.png'"):
        ZipStore(file)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_unpacks_without_a_bound_is_refused(tmp_path: Path, compression: int) -> None:
    file = archive(tmp_path / "a.zip", {"cat/1.png": b"x"}, compression)
    with pytest.raises(DataError, match=r"the member 'cat/1\.png', compressed otherwise than by deflate"):
        ZipStore(file)


def test_a_member_that_unpacks_to_more_than_it_claims_takes_no_more_memory(tmp_path: Path) -> None:
    file = archive(tmp_path / "a.zip", {"cat/1.png": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    content = bytearray(file.read_bytes())
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = content.index(signature) + place
        content[start : start + 4] = (1000).to_bytes(4, "little")
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"cat/1\.png is damaged: Bad CRC-32"):
            ZipStore(file).read("cat/1.png")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_damage_is_found_by_the_crc(tmp_path: Path) -> None:
    file = archive(tmp_path / "a.zip", {"cat/1.png": b"some content"})
    file.write_bytes(file.read_bytes().replace(b"some content", b"sore content"))
    with pytest.raises(DataError, match=r"cat/1\.png is damaged: Bad CRC-32"):
        ZipStore(file).read("cat/1.png")


def test_what_is_no_zip_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.zip"
    file.write_bytes(b"nothing of the sort")
    with pytest.raises(DataError, match=r"a\.zip cannot be read as a zip file: File is not a zip file"):
        ZipStore(file)
