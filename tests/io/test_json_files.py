from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from carso_cli.errors import CarsoError, StateError
from carso_cli.io.checksum import fingerprint
from carso_cli.io.json_files import (
    append_json_lines,
    ensure_folder,
    read_json,
    read_json_lines,
    write_atomically,
)
from carso_cli.runs.checkpoints import load_tensors, save_tensors


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_failed_write_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

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


def test_tensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "empty": torch.zeros(0), "count": torch.tensor(7)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"layers": ["one", "two"], "step": 3})
    loaded, metadata = load_tensors(tmp_path / "x.safetensors")
    assert metadata["layers"] == ["one", "two"]
    assert metadata["step"] == 3
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.randn(64)}, {})
    content = bytearray(path.read_bytes())
    content[-10] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(StateError, match="do not match the checksum"):
        load_tensors(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", (10**9).to_bytes(8, "little")])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(StateError, match="not a readable safetensors file"):
        load_tensors(path)


def test_fingerprint_depends_on_names_and_shapes() -> None:
    values = torch.arange(6.0)
    assert fingerprint({"a": values}) != fingerprint({"b": values})
    assert fingerprint({"a": values}) != fingerprint({"a": values.reshape(2, 3)})
    assert fingerprint({"a": values, "b": values}) == fingerprint({"b": values.clone(), "a": values})


def test_metadata_is_json(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"epoch": 2})
    header_length = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "x.safetensors").read_bytes()[8 : 8 + header_length])
    assert header["__metadata__"]["epoch"] == "2"
