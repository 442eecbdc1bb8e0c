"""Whole files: written completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from carso_cli.data.whole_file import read_whole, written_whole
from carso_cli.errors import DataError


def test_a_file_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.bin"
    with written_whole(target) as stream:
        stream.write(b"content")
        assert not target.exists()
    assert target.read_bytes() == b"content"
    assert [entry.name for entry in target.parent.iterdir()] == ["file.bin"]


def test_a_failure_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")

    def write_and_fail() -> None:
        with written_whole(target) as stream:
            stream.write(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a")
    with pytest.raises(DataError, match=r"label\.txt does not exist") as caught:
        read_whole(tmp_path / "label.txt")
    assert caught.value.hint == "did you mean 'labels.txt'?"
    with pytest.raises(DataError, match="cannot be read"):
        read_whole(tmp_path / ("long" * 100))
    with pytest.raises(DataError, match="is a folder"):
        read_whole(tmp_path)
