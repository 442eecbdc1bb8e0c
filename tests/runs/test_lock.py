from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import pytest

from carso_cli.errors import CarsoError, StateError
from carso_cli.runs.lock import LOCK_FILE, locked
from carso_cli.runtime.reporter import Reporter, SilentReporter

HOLD = """
import sys, time
from pathlib import Path
from carso_cli.runtime.reporter import SilentReporter
from carso_cli.runs.lock import locked
with locked(Path(sys.argv[1]), SilentReporter()):
    print("held", flush=True)
    time.sleep(60)
"""


class Recorder(Reporter, Protocol):
    said: list[str]
    warned: list[str]


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_second_process_is_refused_and_told_who_is_there(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    told = rf"is in use by another process: {holder.pid} on {re.escape(socket.gethostname())}, since 20\d\d-"
    for _ in range(2):  # a refusal leaves the owner's name as it was
        with pytest.raises(StateError, match=told) as refused, locked(tmp_path, SilentReporter()):
            pytest.fail("two processes in one folder")
    assert "--run DIR" in refused.value.hint
    end(holder)


@pytest.mark.slow
def test_a_stale_lock_and_temporary_files_are_removed(
    holder: subprocess.Popen[str], tmp_path: Path, recorder: Recorder
) -> None:
    (tmp_path / ".state.safetensors.1.tmp").write_text("half")
    end(holder)
    with locked(tmp_path, recorder):
        assert not (tmp_path / ".state.safetensors.1.tmp").exists()
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    (told,) = recorder.said
    assert f"removed a stale lock on {tmp_path} left by process {holder.pid} on" in told
    with locked(tmp_path, recorder):
        pass
    assert recorder.said == [told]
    assert recorder.warned == []


def test_an_error_inside_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path, SilentReporter()):
        raise KeyError
    with locked(tmp_path, SilentReporter()):
        pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CarsoError, match="cannot write"), locked(tmp_path / "run", SilentReporter()):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path, recorder), locked(tmp_path, recorder):
        pass
    assert "has no locks" in recorder.warned[0]
    assert f"{os.getpid()} on" in recorder.warned[1]
    assert "may be at work there" in recorder.warned[1]
