"""Rendezvous: how the processes that torchrun started form a process group.

When torchrun restarts processes it keeps its store, with the keys of the dead ones, among others their
addresses, to which a new process would try to connect. Its count of restarts does not tell attempts apart:
each machine counts its own, see https://github.com/pytorch/pytorch/issues/135712.

- `connect` forms the process group of one attempt, under the name of `agree_on_name`;
- `open_store` gives torchrun's store.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from carso_cli.distributed.launch import Launch
from carso_cli.errors import CarsoError

_RENDEZVOUS_TIMEOUT = timedelta(minutes=5)
# Processes that have met connect at once; gloo waits five times as long as it is told.
_CONNECT_TIMEOUT = timedelta(minutes=1)
# One process's block of attacks may take hours longer than another's. A process that dies closes its
# connections, and torchrun watches for the rest, so no process needs to time out.
_WORK_TIMEOUT = timedelta(days=30)
_POLL_SECONDS = 0.02
_ASKED, _ANSWERED = "carso/asked", "carso/answered"
_TRY_AGAIN = "torchrun --max-restarts 3 tries again by itself"


def open_store(timeout: timedelta) -> Store:
    """Return torchrun's store.

    Raises:
        RuntimeError: If it does not answer in time.
    """
    store: Store = next(rendezvous("env://", timeout=timeout))[0]
    return store


def connect(device: torch.device, process: Launch) -> None:
    """Form the process group of the processes that are alive.

    Raises:
        CarsoError: If one of them does not come, or dies meanwhile.
    """
    try:
        store = open_store(_RENDEZVOUS_TIMEOUT)
        name = agree_on_name(store, process.rank, process.size, _RENDEZVOUS_TIMEOUT.total_seconds())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(name, store),
            rank=process.rank,
            world_size=process.size,
            timeout=_CONNECT_TIMEOUT,
        )
        # torch takes one time for connecting and working, and has no public call to change it.
        _set_pg_timeout(_WORK_TIMEOUT)
    except RuntimeError as error:
        # Further lines are a C++ stack trace.
        text = str(error).splitlines()[0]
        raise CarsoError(f"the processes could not connect: {text}", hint=_TRY_AGAIN) from error


def agree_on_name(store: Store, rank: int, size: int, timeout: float) -> str:
    """Return a name that the processes of this attempt share, and that no other attempt has had.

    Each process asks with a random word, and process 0 answers under that word with its own. So nobody reads
    an answer to a dead process's question, and whoever reads an answer knows that its process 0 is alive.

    Args:
        store: Torchrun's store.
        rank: Number of this process, from 0.
        size: Number of processes.
        timeout: Seconds to wait for each of the others.

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
        for other in range(1, size):
            _wait_for(other, size, timeout, partial(has_met, other))
        return word
    store.set(f"{_ASKED}/{rank}", word)
    _wait_for(0, size, timeout, lambda: store.check([f"{_ANSWERED}/{word}"]))
    name: str = store.get(f"{_ANSWERED}/{word}").decode()
    # Under the answer's name: process 0 may stop answering, and no earlier attempt's note misleads it.
    store.set(f"{name}/{rank}", "met")
    return name


def _wait_for(rank: int, size: int, timeout: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            late = f"process {rank + 1} of {size}"
            raise CarsoError(f"{late} has not come within {timeout:g} seconds", hint=_TRY_AGAIN)
        time.sleep(_POLL_SECONDS)
