"""Processes that start anew find each other in a store that is full of what dead ones left."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch exports it, unlisted

from carso_cli.distributed.rendezvous import agree_on_name
from carso_cli.errors import CarsoError

pytestmark = pytest.mark.slow  # each waits for processes


def attempt(store: HashStore, size: int, delays: dict[int, float], timeout: float) -> dict[int, str]:
    """What each process ends with, name or error; those without a delay never come."""

    def process(rank: int) -> str:
        time.sleep(delays[rank])
        try:
            return agree_on_name(store, rank, size, timeout)
        except CarsoError as error:
            return error.message

    with ThreadPoolExecutor(len(delays)) as pool:
        return dict(zip(delays, pool.map(process, delays), strict=True))


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
    assert found[0] == "process 3 of 3 has not come within 0.2 seconds"
    assert attempt(store, 3, {1: 0.0}, timeout=0.0)[1] == "process 1 of 3 has not come within 0 seconds"
