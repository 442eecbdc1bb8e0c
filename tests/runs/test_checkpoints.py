from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
import torch

from carso_cli.errors import CarsoError, StateError
from carso_cli.io.json_files import write_atomically
from carso_cli.runs import checkpoints
from carso_cli.runs.checkpoints import StateFile, load_state, load_tensors, save_tensors
from carso_cli.runtime.reporter import SILENT, Reporter


class Recorder(Reporter, Protocol):
    warned: list[str]


def save(path: Path, epoch: int) -> None:
    file = StateFile(path)
    file.save({"weights": torch.full((8,), float(epoch))}, {"epoch": epoch})
    file.wait()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for epoch in (1, 2):
        save(tmp_path / "state.safetensors", epoch)
    return tmp_path / "state.safetensors"


def epoch_of(path: Path, reporter: Reporter) -> int:
    found = load_state(path, reporter)
    assert found is not None
    assert torch.equal(found[0]["weights"], torch.full((8,), float(found[1]["epoch"])))
    return int(found[1]["epoch"])


def test_the_newest_state_is_used_without_a_warning(path: Path, recorder: Recorder) -> None:
    assert epoch_of(path, recorder) == 2
    assert recorder.warned == []
    assert load_state(path.with_name("other.safetensors"), recorder) is None


@pytest.mark.parametrize(("spoil", "reason"), [(damage, "is damaged"), (Path.unlink, "does not exist")])
def test_a_damaged_or_lost_state_gives_way_to_the_one_before(
    path: Path, recorder: Recorder, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(path)
    assert epoch_of(path, recorder) == 1
    assert f"state.safetensors {reason}" in recorder.warned[0]
    assert "resuming from" in recorder.warned[0]


def test_two_damaged_states_are_both_named(path: Path) -> None:
    damage(path)
    damage(path.with_name("previous-state.safetensors"))
    with pytest.raises(StateError, match=r"/state\.safetensors is damaged.*previous-state\.safetensors is"):
        load_state(path, SILENT)


def test_dying_at_any_rename_leaves_a_whole_state(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.replace
    seen = set()
    for fatal in range(3):
        left = fatal

        def die(*paths: object) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            original(*paths)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            with pytest.raises(KeyboardInterrupt):
                save(path, 3)
        seen.add(epoch_of(path, SILENT))
    # The third rename only puts aside what the second had already put in its place.
    assert seen == {2}
    save(path, 3)
    assert epoch_of(path, SILENT) == 3


def test_a_state_that_does_not_come_back_never_replaces_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_disk(target: Path, data: bytes) -> None:
        target.write_bytes(data[:-1] + b"\0")

    monkeypatch.setattr(checkpoints, "write_atomically", failing_disk)
    with pytest.raises(CarsoError, match="though it was written just now: the disk may be failing"):
        save(path, 3)
    assert epoch_of(path, SILENT) == 2


@pytest.mark.parametrize("fatal", [False, True])
def test_a_damaged_state_never_takes_the_place_of_the_one_before(
    path: Path, monkeypatch: pytest.MonkeyPatch, fatal: bool
) -> None:
    damage(path)
    if fatal:
        monkeypatch.setattr(os, "replace", _fail_on(os.replace, "next-state"))
        with pytest.raises(CarsoError, match="cannot write"):
            save(path, 3)
    else:
        save(path, 3)
        damage(path)
    assert epoch_of(path, SILENT) == 1


def _fail_on(original: Callable[[Path, Path], None], prefix: str) -> Callable[[Path, Path], None]:
    def replace(source: Path, target: Path) -> None:
        if Path(source).name.startswith(prefix):
            raise OSError(28, "no space left")
        original(source, target)

    return replace


def test_a_state_is_that_of_the_moment_and_its_error_comes_with_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, weights, log, release = StateFile(path), torch.full((8,), 3.0), [1], threading.Event()
    original = write_atomically

    def slow(target: Path, data: bytes) -> None:
        assert release.wait(timeout=30)
        original(target, data)

    monkeypatch.setattr(checkpoints, "write_atomically", slow)
    file.save({"weights": weights}, {"epoch": 3, "log": log})
    # Training goes on while the state is being written.
    weights.add_(1)
    log.append(2)
    release.set()
    file.wait()
    assert epoch_of(path, SILENT) == 3
    assert load_tensors(path)[1]["log"] == [1]
    monkeypatch.setattr(checkpoints, "write_atomically", _full_disk)
    file.save({"weights": weights}, {"epoch": 4})
    with pytest.raises(CarsoError, match="disk full"):
        file.save({"weights": weights}, {"epoch": 5})
    file.wait()
    assert epoch_of(path, SILENT) == 3


def _full_disk(path: Path, _data: bytes) -> None:
    raise CarsoError(f"cannot write {path}: disk full")


def test_a_closed_state_keeps_its_metadata_alone(path: Path) -> None:
    (path.parent / "next-state.safetensors").write_bytes(b"left by a kill")
    StateFile(path).close({"epoch": 3})
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert load_tensors(path) == ({}, {"epoch": 3})


def test_a_changed_header_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(4)}, {"epochs": 12})
    content = path.read_bytes()
    assert content.count(b'"12"') == 1
    path.write_bytes(content.replace(b'"12"', b'"13"'))
    with pytest.raises(StateError, match="do not match the checksum"):
        load_tensors(path)


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
    damage(path)
    with pytest.raises(StateError, match="do not match the checksum"):
        load_tensors(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", (10**9).to_bytes(8, "little")])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(StateError, match="not a readable safetensors file"):
        load_tensors(path)


def test_metadata_is_json(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"epoch": 2})
    header_length = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "x.safetensors").read_bytes()[8 : 8 + header_length])
    assert header["__metadata__"]["epoch"] == "2"
