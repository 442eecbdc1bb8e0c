"""Files that a user names: read, or named with what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from carso_cli.errors import DataError
from carso_cli.io.files import read_given


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
