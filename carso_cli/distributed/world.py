"""The processes that torchrun started, and what they do together.

    world = join(device)                                  # a single process is a world of size 1
    for block, found in world.map_sharded(blocks, attack):  # every process gets every result, in order
        world.on_main(lambda: folder.append(found))        # one writes

- `World`: rank, size and device of this process; shards of work, sums, broadcasts, data-parallel training;
- `join` and `leave` a world; `device_of_process` before that;
- `claim_error`: which of several failing processes shows its error.

nccl connects GPUs. Small values and Python objects go by gloo, which is there beside it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from carso_cli.distributed.launch import launch
from carso_cli.distributed.rendezvous import connect, open_store
from carso_cli.distributed.sync_batch_norm import convert_sync_batch_norm
from carso_cli.errors import CarsoError, UsageError
from carso_cli.runtime.reporter import SILENT, Reporter, SilentReporter

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class World:
    """This process among those that work on one run.

    Args:
        device: Its device.
        rank: Its number, from 0; process 0, the main one, writes and reports.
        size: Number of processes.
        local_rank: Its number on its machine, from 0.
        restarted: Whether torchrun started the processes again after one of them died.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarted: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def reporter(self, reporter: Reporter) -> Reporter:
        """Return the reporter on the main process, a silent one elsewhere."""
        return reporter if self.is_main else SilentReporter()

    def shard(self, count: int) -> slice:
        """Return this process's shard of `range(count)`: every `size`-th, so classes in order are spread."""
        return slice(self.rank, count, self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a CPU tensor over all processes; the same bits on each."""
        return _all_reduced(values) if self.size > 1 else values

    def any(self, condition: bool) -> bool:
        """Say whether a condition holds on some process."""
        return (self.size > 1 and bool(self.sum(torch.tensor(float(condition))) > 0)) or condition

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Do something on the main process alone; return its result, or raise its CarsoError, on all."""
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer = [work(), None]
            # Any other error ends this process, and torchrun then ends the others.
            except CarsoError as error:
                answer = [None, error]
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        result: Result = answer[0]
        return result

    @contextmanager
    def main_holds(self, held: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Hold a context, such as a lock, on the main process while all of them work; raises as `on_main`."""
        with ExitStack() as stack:
            # Without a return value: what `on_main` returns is pickled for the others, and a lock cannot be.
            def enter() -> None:
                stack.enter_context(held())

            self.on_main(enter)
            yield

    def map_sharded(
        self, items: Sequence[Item], work: Callable[[Item], Result]
    ) -> Iterator[tuple[Item, Result]]:
        """Apply a function to items, each on one process, without padding.

        Args:
            items: The same on every process.
            work: Its result holds no tensors of a GPU.

        Yields:
            Every item with its result, in order, on every process.
        """
        for start in range(0, len(items), self.size):
            part = items[start : start + self.size]
            result = work(part[self.rank]) if self.rank < len(part) else None
            results: list[Any] = [result]
            if self.size > 1:
                results = [None] * self.size
                dist.all_gather_object(results, result)
            yield from zip(part, results, strict=False)

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Let one process of each machine go first: the others find what it downloads or caches."""
        # All machines share one barrier: first processes meet it after their turn, the others before.
        if self.local_rank:
            self._barrier()
        yield
        if not self.local_rank:
            self._barrier()

    def _barrier(self) -> None:
        # By gloo: nccl's own barrier would have to guess which GPU is this process's.
        self.sum(torch.zeros(1))

    def sync_batch_norm(self, module: nn.Module) -> None:
        """Compute the batch statistics inside a module over all processes' images; its parameters stay."""
        if self.size > 1 and self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        elif self.size > 1:
            convert_sync_batch_norm(module, all_reduce)

    def data_parallel(self, module: nn.Module) -> nn.Module:
        """Return the module to call in training: its gradients are summed over all processes."""
        if self.size == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        replica = DistributedDataParallel(module, device_ids=devices)
        # The loss is a sum over images, so gradients add up; without a hook they would be averaged. A lambda,
        # because DDP checks the type annotations of a named function, and rejects these.
        replica.register_comm_hook(None, lambda _state, bucket: _summed_gradients(bucket))
        return replica


class _AllReduce(torch.autograd.Function):
    # The one in torch.distributed.nn does the same and is deprecated.
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ANN401  (torch's own type)
        return _all_reduced(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401  (torch's own type)
        return _all_reduced(gradients[0])


def all_reduce(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, differentiable: all processes' losses depend on each."""
    summed: Tensor = _AllReduce.apply(values)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return summed


def _all_reduced(values: Tensor) -> Tensor:
    # A copy: all_reduce writes in place, and autograd may still need the values.
    summed = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed)
    return summed


def _summed_gradients(bucket: Any) -> torch.futures.Future[Tensor]:  # noqa: ANN401  (torch's own type)
    values = bucket.buffer()
    summed: torch.futures.Future[Tensor]
    if values.is_cuda:
        summed = dist.all_reduce(values, async_op=True).get_future().then(lambda future: future.value()[0])
        return summed
    # The bits of an all-reduce depend on where in its bucket a gradient lies, which changes when a run is
    # resumed; added in the order of the ranks they do not.
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    gathered = dist.all_gather(parts, values, async_op=True).get_future()
    summed = gathered.then(lambda _: functools.reduce(torch.add, parts))
    return summed


_joined: World | None = None
# Whether this process has not met the others: it alone can tell.
_waited_alone = False


def device_of_process(name: str) -> str:
    """Return the name of this process's own device, where torchrun started several processes.

    Args:
        name: `cpu`, `cuda`, `cuda:N` or `mps`, as asked for.

    Raises:
        UsageError: If the processes of a machine would share one GPU.
    """
    process = launch()
    if process.size == 1 or name == "cpu":
        return name
    started, present = process.local_size, torch.cuda.device_count()
    if name != "cuda" and started > 1:
        raise UsageError(
            f"--device {name} is one device and torchrun started {started} processes here",
            hint="leave out --device: each process takes its own GPU, or the CPU where there is none",
        )
    if name == "cuda" and process.local_rank >= present > 0:
        raise UsageError(
            f"torchrun started {started} processes here, for {present} GPU{'s' * (present != 1)}",
            hint=f"carso run --nproc {present} COMMAND …",
        )
    return f"cuda:{process.local_rank}" if name == "cuda" else name


def join(device: torch.device, reporter: Reporter = SILENT) -> World:
    """Join the processes that torchrun started, once; a single process is a world of its own.

    Args:
        device: Device of this process.
        reporter: Told whom this process waits for, where that takes seconds.

    Raises:
        CarsoError: If they do not find each other.
    """
    global _joined, _waited_alone
    process = launch()
    if process.size == 1:
        return World(device, restarted=process.restarts > 0)
    if _joined is None:
        if device.type == "cuda":
            # Before the group forms: nccl uses the current GPU, which is the first one by default.
            torch.cuda.set_device(device)
        _waited_alone = True
        connect(device, process, reporter)
        _waited_alone = False
        _joined = World(device, process.rank, process.size, process.local_rank)
        # Each machine counts only the restarts that it caused.
        _joined = replace(_joined, restarted=_joined.any(process.restarts > 0))
    return _joined


def leave() -> None:
    """Leave the world at the end of a run without errors."""
    global _joined
    if _joined is not None:
        _joined = None
        dist.destroy_process_group()


def claim_error() -> str | None:
    """Claim the right to show an error: only the first process that fails has it.

    Returns:
        What messages call this process, such as `process 2 of 3`; None where another shows its error.
    """
    process = launch()
    if _joined is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # There is no store yet; an error so early is the same in all processes.
        return process.name if process.rank == 0 or _waited_alone else None
    try:
        # Under the number of restarts, since the store still holds the errors of earlier attempts.
        first = open_store(timedelta(seconds=10)).add(f"carso/errors/{process.restarts}", 1) == 1
    except (RuntimeError, ValueError):
        # The store is gone, with the process that kept it.
        return None
    return process.name if first else None


def is_lost_process(error: RuntimeError) -> bool:
    """Say whether an error only means that another process has ended."""
    # Neither library has a type for such errors.
    return _joined is not None and any(name in str(error) for name in ("gloo", "NCCL"))
