"""Processes that start anew find each other in a store that is full of what dead ones left."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch exports it, unlisted

from carso_cli.distributed import rendezvous
from carso_cli.distributed.launch import Launch, launch
from carso_cli.distributed.rendezvous import Wait, agree_on_name, connect
from carso_cli.errors import CarsoError, UsageError


def attempt(store: HashStore, size: int, delays: dict[int, float], timeout: float) -> dict[int, str]:
    """What each process ends with, name or error; those without a delay never come."""

    def process(rank: int) -> str:
        time.sleep(delays[rank])
        try:
            return agree_on_name(store, rank, Wait(timeout, size))
        except CarsoError as error:
            return error.message

    with ThreadPoolExecutor(len(delays)) as pool:
        return dict(zip(delays, pool.map(process, delays), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_no_attempt_takes_up_what_an_earlier_one_left(size: int) -> None:
    source, store, names = random.Random(size), HashStore(), set()
    for _ in range(12):
        # First some processes that die before the others come, then all of them, in any order.
        alive = source.sample(range(size), size - 1)
        attempt(store, size, dict.fromkeys(alive, 0.0), timeout=0.05)
        found = attempt(store, size, {rank: source.uniform(0.0, 0.1) for rank in range(size)}, timeout=60.0)
        (name,) = set(found.values())
        names.add(name)
    assert len(names) == 12


def test_it_is_told_who_does_not_come() -> None:
    store = HashStore()
    attempt(store, 3, {0: 0.0, 1: 0.0, 2: 0.0}, timeout=60.0)
    found = attempt(store, 3, {0: 0.0, 1: 0.0}, timeout=0.2)
    # Both that came name the third.
    assert set(found.values()) == {"process 3 of 3 has not come within 0.2 seconds"}
    assert attempt(store, 3, {1: 0.0}, timeout=0.0)[1] == "process 1 of 3 has not come within 0 seconds"


def test_the_time_is_for_all_together() -> None:
    started = time.monotonic()
    found = attempt(HashStore(), 6, {0: 0.0, 3: 0.3}, timeout=0.5)
    assert found[0] == "processes 2, 3, 5 and 6 of 6 have not come within 0.5 seconds"
    # One deadline each would come to 2.5 seconds.
    assert time.monotonic() - started < 2.0


# What another job left in the environment


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


SIX = {"WORLD_SIZE": "8", "RANK": "5", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "3"}, Launch()),
        ({"RANK": "three", "LOCAL_RANK": "-1"}, Launch()),
        ({"WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "2"}, Launch(restarts=2)),
        (SIX | {"LOCAL_RANK": "1"}, Launch(5, 8, 1)),
        (SIX | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Launch(5, 8, 1, 4)),
    ],
)
def test_how_a_process_was_started(
    variables: dict[str, str], expected: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch() == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many' is not allowed; it must be a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not allowed"),
        ({"WORLD_SIZE": "8"}, "RANK is not set; it must be a whole number from 0 to 7, beside WORLD_SIZE=8"),
        ({"WORLD_SIZE": "1", "RANK": "3"}, "RANK='3' is not allowed; it must be a whole number from 0 to 0"),
        (SIX | {"RANK": "8"}, "RANK='8' is not allowed; it must be a whole number from 0 to 7"),
        (SIX | {"RANK": "1.5"}, "RANK='1.5' is not allowed"),
        (SIX | {"LOCAL_RANK": ""}, "LOCAL_RANK is not set"),
        (SIX | {"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_RANK='4' is not allowed"),
        (SIX | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE='9' is not allowed"),
        (SIX | {"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT='x' is not allowed"),
        (SIX | {"MASTER_PORT": "99999"}, "MASTER_PORT='99999' is not allowed; it must be a whole number"),
        (SIX | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set; it must be the host name of process 1"),
    ],
)
def test_a_malformed_variable_is_named(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as raised:
        launch()
    assert message in raised.value.message
    assert "unset" in raised.value.hint


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "whom"), [("0", "processes 2 and 3 of 3"), ("1", "process 1 of 3")])
def test_a_left_over_world_says_whom_it_waits_for_and_ends_at_the_first_signal(rank: str, whom: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"WORLD_SIZE": "3", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    process = subprocess.Popen(
        [sys.executable, "-m", "carso_cli", "evaluate", "digits", "--target", "classifier", "--limit", "3"],
        env={**os.environ, **variables},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # As a shell script starts its background jobs.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        # torch adds warnings of its own.
        (told,) = [next(line for line in lines if line.startswith("waiting for"))]
        assert told == f"waiting for {whom} (WORLD_SIZE is 3), 300 seconds at most\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
    finally:
        process.kill()
        process.communicate()


def test_a_hung_gpu_ends_in_minutes_and_uneven_work_on_cpus_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: dict[str, timedelta] = {}

    class Backend:
        def _set_default_timeout(self, timeout: timedelta) -> None:
            set_to["nccl"] = timeout

    class Group:
        def _get_backend(self, device: torch.device) -> Backend:
            assert device.type == "cuda"
            return Backend()

    for name, value in SIX.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "open_store", lambda timeout: HashStore())
    monkeypatch.setattr(rendezvous, "agree_on_name", lambda store, rank, wait: "name")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *given, **named: None)
    monkeypatch.setattr(rendezvous, "_set_pg_timeout", lambda timeout: set_to.update(all=timeout))
    monkeypatch.setattr(rendezvous, "_get_default_group", Group)
    connect(torch.device("cuda", 0), launch())
    assert set_to == {"all": timedelta(days=30), "nccl": timedelta(minutes=30)}
