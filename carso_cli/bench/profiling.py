"""What a piece of work costs: floating-point operations, memory, and time.

- `counted_operations`, `peak_bytes`: of one run;
- `matrix_product`, `peak_flops`: what the device can reach in a precision;
- `alternating_seconds`: of several pieces of work, turn by turn, so that a busy machine slows all alike.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from carso_cli.runtime.precision import set_tf32
from carso_cli.runtime.timing import seconds_of, synchronize

Work = Callable[[], object]


class _NoModules(nullcontext[None]):
    """Replaces the counter's tracker of modules, whose hooks break `torch.autograd.grad`."""

    parents = frozenset({"Global"})


def counted_operations(work: Work) -> int:
    """Run once; return the floating-point operations of its matrix products and convolutions."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        work()
    return int(counter.get_total_flops())


def matrix_product(precision: str, device: torch.device) -> tuple[Work, int]:
    """Return a product large enough to show what the device reaches in a precision, and its operations."""
    size = 2048 if device.type == "cpu" else 8192
    # TF32 is a mode of float32 products, which the process is in.
    factor = torch.rand(
        size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
    )
    # Each of size^2 entries takes as many multiplications and additions as `size`.
    return lambda: factor @ factor, 2 * size**3


def peak_flops(precision: str, device: torch.device) -> float:
    """Return the operations per second of a matrix product in a precision, which the process is then in."""
    set_tf32(precision, device)
    work, operations = matrix_product(precision, device)
    return operations / seconds_of(work, device)


def peak_bytes(work: Work, device: torch.device) -> int:
    """Run once; return the most bytes of tensors at one time, on top of those there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        # Weights and images are there already, and do not count.
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _HeldStorages() as held:
        work()
    return int(held.peak)


class _HeldStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Adds up the storages that operations allocate, each for as long as anything holds it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.peak = 0
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  (whatever the operation returns)
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            key = storage._cdata
            # A view or an operation in place returns a storage that was there before.
            if key not in inputs and key not in self._bytes:
                self._bytes[key] = storage.nbytes()
                # The last tensor frees it, and its address may then come again for another one.
                weakref.finalize(storage, self._bytes.pop, key, None)
        # After the operation, while its inputs and its result are both held.
        self.peak = max(self.peak, sum(self._bytes.values()))
        return result


def _storages(values: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def alternating_seconds(
    works: Sequence[Work], device: torch.device, *, rounds: int, patience: float
) -> list[list[float]]:
    """Time several pieces of work, each once in every round.

    One thread on a CPU is timed by its processor time, which other processes do not take away.

    Args:
        works: Run before, so that nothing is set up while they are timed.
        device: Where they run.
        rounds: Most rounds; three are always made.
        patience: Seconds after which no further round begins.

    Returns:
        Seconds of each round, work by work.
    """
    times: list[list[float]] = [[] for _ in works]
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    # torch runs a backward pass on CPUs in the thread that asks for it, so this clock sees it.
    clock = time.thread_time if one_thread else time.perf_counter
    began = time.perf_counter()
    for turn in range(rounds):
        # The median of fewer would be a single round's luck.
        if turn >= 3 and time.perf_counter() - began > patience:
            break
        for work, found in zip(works, times, strict=True):
            started = clock()
            work()
            synchronize(device)
            found.append(clock() - started)
    return times
