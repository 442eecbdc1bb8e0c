"""Ctrl-C, and the signal by which schedulers end a job, as a request to stop between two steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SAME_EVENT = 1.0
"""Seconds within which signals are one: under torchrun a Ctrl-C arrives twice, and from two senders."""


class StopRequest:
    """Whether somebody asked this process to stop; see `stop_requests`."""

    def __init__(self) -> None:
        self.received: float | None = None

    def __bool__(self) -> bool:
        """Return whether a signal has come."""
        return self.received is not None

    def receive(self, _number: int, _frame: object) -> None:
        """Note a signal.

        Raises:
            KeyboardInterrupt: At the second one: whoever sends it does not want to wait for the step's end.
        """
        now = time.monotonic()
        if self.received is not None and now - self.received > _SAME_EVENT:
            raise KeyboardInterrupt
        # The first counts: its echoes must not move the second within which they are ignored.
        self.received = self.received or now


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request inside the context, where they would end the process at once.

    Outside the main thread, which alone receives signals, the request never comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
