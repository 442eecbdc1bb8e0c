"""How the processes that torchrun started find each other, and not what dead ones have left behind.

torchrun keeps its store when it starts processes anew, so the keys of the dead ones are there still: their
addresses, for one, to which a new process would go on trying to connect. Its count of restarts does not tell
attempts apart, for each machine counts its own (https://github.com/pytorch/pytorch/issues/135712).

- `connect` forms the process group of one attempt; `agree_on_name` is what it rests on;
- `open_store` gives torchrun's store, where processes leave each other notes.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from carso_cli.distributed.launch import Launch
from carso_cli.errors import CarsoError

_PATIENCE_TO_MEET = timedelta(minutes=5)
_PATIENCE_TO_CONNECT = timedelta(minutes=1)
"""Those who have met connect at once. gloo waits five times as long."""
_PATIENCE_TO_WORK = timedelta(days=30)
"""One process's block of attacks may take hours longer than another's. A process that dies closes its
connections, and torchrun watches for the rest, so nobody has to give up waiting."""
_PAUSE = 0.02
"""Seconds between two looks at the store."""
_ASKED, _ANSWERED = "carso/asked", "carso/answered"
_TRY_AGAIN = "torchrun --max-restarts 3 tries again by itself"


class Store(Protocol):
    """The part of `torch.distributed.Store` that a meeting needs."""

    def set(self, key: str, value: str, /) -> None:
        """Write a value."""

    def get(self, key: str, /) -> bytes:
        """Read a value that is there."""

    def check(self, keys: list[str], /) -> bool:
        """Say whether all keys are there."""


def open_store(patience: timedelta) -> Any:  # noqa: ANN401  (torch leaves it untyped)
    """Return torchrun's store.

    Raises:
        RuntimeError: If it does not answer within `patience`.
    """
    return next(rendezvous("env://", timeout=patience))[0]


def connect(device: torch.device, own: Launch) -> None:
    """Form the process group of the processes that are alive.

    Raises:
        CarsoError: If they do not all come, or one dies meanwhile.
    """
    try:
        store = open_store(_PATIENCE_TO_MEET)
        name = agree_on_name(store, own.rank, own.size, _PATIENCE_TO_MEET.total_seconds())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(name, store),
            rank=own.rank,
            world_size=own.size,
            timeout=_PATIENCE_TO_CONNECT,
        )
        _set_pg_timeout(_PATIENCE_TO_WORK)
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        raise CarsoError(f"the processes could not connect: {text}", hint=_TRY_AGAIN) from error


def agree_on_name(store: Store, rank: int, size: int, patience: float) -> str:
    """Return a name that the processes of this attempt share, and that no other attempt has had.

    Each of them asks with a word never used before, and process 0 answers to that word. So what is answered
    to a question that a dead process has left is read by nobody, and whoever reads an answer knows that it is
    of a process 0 that is alive.

    Args:
        store: Where the processes leave each other notes.
        rank: Number of this process, from 0.
        size: Number of processes.
        patience: Seconds that it waits for another.

    Raises:
        CarsoError: If one does not come.
    """
    word = uuid.uuid4().hex
    if rank == 0:
        for other in range(1, size):
            _wait_for(other, size, patience, partial(_has_heard, store, other, word))
        return word
    store.set(f"{_ASKED}/{rank}", word)
    _wait_for(0, size, patience, lambda: store.check([f"{_ANSWERED}/{word}"]))
    name = store.get(f"{_ANSWERED}/{word}").decode()
    store.set(f"{name}/{rank}", "heard")
    return name


def _has_heard(store: Store, rank: int, name: str) -> bool:
    """Answer what a process asks by now; say whether it has read the answer."""
    if store.check([f"{_ASKED}/{rank}"]):
        store.set(f"{_ANSWERED}/{store.get(f'{_ASKED}/{rank}').decode()}", name)
    return store.check([f"{name}/{rank}"])


def _wait_for(rank: int, size: int, patience: float, come: Callable[[], bool]) -> None:
    deadline = time.monotonic() + patience
    while not come():
        if time.monotonic() > deadline:
            late = f"process {rank + 1} of {size}"
            raise CarsoError(f"{late} has not come within {patience:g} seconds", hint=_TRY_AGAIN)
        time.sleep(_PAUSE)
