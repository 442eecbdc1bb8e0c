from __future__ import annotations

import os
from pathlib import Path

import pytest

from carso_cli.errors import CarsoError, StateError
from carso_cli.io.json_files import (
    append_json_lines,
    ensure_folder,
    read_json,
    read_json_lines,
    write_atomically,
)


def test_failed_write_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "oldest")
    write_atomically(path, "old")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("carso_cli.io.files.os.fsync", full)
    with pytest.raises(CarsoError, match=r"file\.txt: No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CarsoError, match="cannot write to the folder"):
        ensure_folder(tmp_path / "run")


def test_json_lines_survive_a_kill_in_mid_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_json_lines(path, [{"epoch": 1}])
    with open(path, "ab") as stream:
        stream.write(b'{"epoch": 2')
    assert read_json_lines(path) == [{"epoch": 1}]
    append_json_lines(path, [{"epoch": 2}])
    assert read_json_lines(path) == [{"epoch": 1}, {"epoch": 2}]


def test_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_json_lines(path, [{"epoch": 1}])
    with open(path, "a") as stream:
        stream.write('{"epo\n{"epoch": 3}\n')
    with pytest.raises(StateError, match=r"log\.jsonl, line 2 is damaged"):
        read_json_lines(path)


def test_what_has_no_end_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    os.mkfifo(path)
    for read in (read_json, read_json_lines):
        with pytest.raises(StateError, match=r"cannot read .*log\.jsonl: it is a pipe or device"):
            read(path)


def test_names_that_are_no_text_are_written_as_escapes(tmp_path: Path) -> None:
    write_atomically(tmp_path / "page.html", "\udcff.png \N{EN DASH}")
    assert (tmp_path / "page.html").read_text() == "\\udcff.png \N{EN DASH}"


def test_records_refuse_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_json_lines(tmp_path / "log.jsonl", [{"loss": float("nan")}])
