"""Files: read with a size limit, written completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from carso_cli.errors import DataError
from carso_cli.io.files import atomic_write, read_given, read_limited


def test_a_file_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    with atomic_write(target) as stream:
        stream.write(b"content")
        assert not target.exists()
    assert target.read_bytes() == b"content"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_a_failure_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")

    def write_and_fail() -> None:
        with atomic_write(target) as stream:
            stream.write(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"untouched")
    (tmp_path / f".file.bin.{os.getpid()}.tmp").symlink_to("precious")
    with atomic_write(tmp_path / "file.bin") as stream:
        stream.write(b"content")
    assert (tmp_path / "precious").read_bytes() == b"untouched"
    assert (tmp_path / "file.bin").read_bytes() == b"content"


def test_reading_ends(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"four")
    assert read_limited(tmp_path / "file", 4) == b"four"
    with pytest.raises(OSError, match="it has 4 bytes; at most 3 are allowed"):
        read_limited(tmp_path / "file", 3)
    os.mkfifo(tmp_path / "pipe")
    for endless in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="it is a pipe or device; a file is needed"):
            read_limited(endless, 10)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a")
    assert read_given(tmp_path / "labels.txt") == b"a"
    with pytest.raises(DataError, match=r"label\.txt does not exist") as caught:
        read_given(tmp_path / "label.txt")
    assert caught.value.hint == "did you mean 'labels.txt'?"
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        read_given(tmp_path / ("long" * 100))
    with pytest.raises(DataError, match="cannot be read: it is a folder"):
        read_given(tmp_path)
