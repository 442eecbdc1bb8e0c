"""Rendezvous: how the processes that torchrun started form a process group.

When torchrun restarts processes it keeps its store, with the keys of the dead ones, among others their
addresses, to which a new process would try to connect. Its count of restarts does not tell attempts apart:
each machine counts its own, see https://github.com/pytorch/pytorch/issues/135712.

- `connect` forms the process group of one attempt, under the name of `agree_on_name`;
- `Wait` is the time that a process has for it, and tells whom it waits for;
- `open_store` gives torchrun's store.

torch waits in C++, where no signal is acted on; here every long wait is a loop of short ones.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    PrefixStore,
    Store,
    _get_default_group,
    _set_pg_timeout,
)

from carso_cli.distributed.launch import Launch
from carso_cli.errors import CarsoError
from carso_cli.runtime.reporter import SILENT, Reporter

_RENDEZVOUS_SECONDS = 300.0
# Processes that have met connect at once; gloo waits five times as long as it is told.
_CONNECT_TIMEOUT = timedelta(minutes=1)
# gloo carries results: one process's block of attacks may take hours longer than another's. A process that
# dies closes its connections, and torchrun watches for the rest, so none needs to time out.
_WORK_TIMEOUT = timedelta(days=30)
# nccl carries gradients and batch statistics, step by step, and a GPU that hangs closes no connection. torch
# then ends the process with a message that names the collective.
_GPU_TIMEOUT = timedelta(minutes=30)
_POLL_SECONDS = 0.02
_SILENT_SECONDS = 3.0
_ASKED, _ANSWERED = "carso/asked", "carso/answered"


class Wait:
    """The time that a process has to meet all the others.

    Args:
        seconds: For all of them together.
        size: Number of processes.
        reporter: Told once whom this process waits for, after a few seconds.
    """

    def __init__(self, seconds: float, size: int, reporter: Reporter = SILENT) -> None:
        self.seconds, self.size, self.reporter = seconds, size, reporter
        self._started, self._told = time.monotonic(), False

    def pause(self, ranks: Iterable[int]) -> None:
        """Wait a moment for some processes, by their numbers from 0.

        Raises:
            CarsoError: If the time is over.
        """
        passed, late = time.monotonic() - self._started, self._names(ranks)
        if passed > self.seconds:
            have = "has" if late.startswith("process ") else "have"
            raise CarsoError(f"{late} {have} not come within {self.seconds:g} seconds", hint=_hint(self.size))
        if passed > _SILENT_SECONDS and not self._told:
            self._told = True
            self.reporter.info(
                f"waiting for {late} (WORLD_SIZE is {self.size}), {self.seconds:g} seconds at most"
            )
        time.sleep(_POLL_SECONDS)

    def _names(self, ranks: Iterable[int]) -> str:
        numbers = [str(rank + 1) for rank in ranks]
        if len(numbers) == 1:
            return f"process {numbers[0]} of {self.size}"
        return f"processes {', '.join(numbers[:-1])} and {numbers[-1]} of {self.size}"


def _hint(size: int) -> str:
    return (
        f"start all {size} processes, as torchrun does (--max-restarts 3 tries again by itself); if another "
        "job left WORLD_SIZE behind: unset WORLD_SIZE"
    )


def open_store(timeout: timedelta) -> Store:
    """Return torchrun's store, trying once; signals are acted on afterwards.

    Raises:
        RuntimeError: If it does not answer in time.
    """
    store: Store = dist.TCPStore(  # type: ignore[attr-defined]  # torch exports it, unlisted
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=_keeps_store(),
        timeout=timeout,
        wait_for_workers=False,
        # `claim_error` opens the store of this process a second time.
        multi_tenant=True,
    )
    return store


def _keeps_store() -> bool:
    # torchrun keeps the store itself; under another launcher process 0 does.
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and os.environ["RANK"] == "0"


def connect(device: torch.device, process: Launch, reporter: Reporter = SILENT) -> None:
    """Form the process group of the processes that are alive.

    Args:
        device: Device of this process.
        process: How it was started.
        reporter: Told whom this process waits for, where that takes seconds.

    Raises:
        CarsoError: If one of them does not come, or dies meanwhile.
    """
    wait = Wait(_RENDEZVOUS_SECONDS, process.size, reporter)
    try:
        store = _find_store(wait)
        name = agree_on_name(store, process.rank, wait)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(name, store),
            rank=process.rank,
            world_size=process.size,
            timeout=_CONNECT_TIMEOUT,
        )
        # torch takes one time for connecting and working, and has no public call to change it.
        _set_pg_timeout(_WORK_TIMEOUT)
        if device.type == "cuda":
            _get_default_group()._get_backend(device)._set_default_timeout(_GPU_TIMEOUT)
    except RuntimeError as error:
        # Further lines are a C++ stack trace.
        text = str(error).splitlines()[0]
        raise CarsoError(f"the processes could not connect: {text}", hint=_hint(process.size)) from error


def _find_store(wait: Wait) -> Store:
    while True:
        try:
            store = open_store(timedelta(seconds=1))
        except RuntimeError:
            # Only who keeps the store learns at once that it cannot be opened.
            if _keeps_store():
                raise
            wait.pause([0])
        else:
            store.set_timeout(timedelta(seconds=wait.seconds))
            return store


def agree_on_name(store: Store, rank: int, wait: Wait) -> str:
    """Return a name that the processes of this attempt share, and that no other attempt has had.

    Each process asks with a random word, and process 0 answers under that word with its own. So nobody reads
    an answer to a dead process's question, and whoever reads an answer knows that its process 0 is alive.
    Under its own word process 0 keeps the numbers of those that have not come.

    Args:
        store: Torchrun's store.
        rank: Number of this process, from 0.
        wait: The time for it.

    Raises:
        CarsoError: If one does not come.
    """
    word = uuid.uuid4().hex

    def has_met(other: int) -> bool:
        """Answer the latest question of a process; say whether it has read the answer."""
        if store.check([f"{_ASKED}/{other}"]):
            store.set(f"{_ANSWERED}/{store.get(f'{_ASKED}/{other}').decode()}", word)
        met: bool = store.check([f"{word}/{other}"])
        return met

    if rank == 0:
        missing = list(range(1, wait.size))
        while missing:
            # Before the first answer, since whoever reads that reads this next.
            store.set(f"{word}/missing", ",".join(map(str, missing)))
            missing = [other for other in missing if not has_met(other)]
            if missing:
                wait.pause(missing)
        store.set(f"{word}/missing", "nobody")
        return word
    store.set(f"{_ASKED}/{rank}", word)
    while not store.check([f"{_ANSWERED}/{word}"]):
        wait.pause([0])
    name: str = store.get(f"{_ANSWERED}/{word}").decode()
    # Under the answer's name: process 0 may stop answering, and no earlier attempt's note misleads it.
    store.set(f"{name}/{rank}", "met")
    # In `init_process_group` a signal would not be acted on, so all wait here until everybody has come.
    while (found := store.get(f"{name}/missing").decode()) != "nobody":
        wait.pause(map(int, found.split(",")))
    return name
