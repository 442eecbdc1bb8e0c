"""The processes that torchrun started, and what they do together.

    world = join(device)                                  # one process alone is a world of size 1
    for block, found in world.map_sharded(blocks, attack):  # every process sees every result, in order
        world.on_main(lambda: folder.append(found))        # one writes

- `World`: rank, size and device of this process; sharing out work, sums, one process's answer for all;
  gradients and batch statistics over all processes' images.
- `join` and `leave` a world; `device_of_process` before that.
- `claim_error`: which of several failing processes tells the user.

nccl connects GPUs and gloo everything on CPUs, also beside nccl: small values and Python objects go by gloo.
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
from carso_cli.distributed.sync_batch_norm import share_batch_norm
from carso_cli.errors import CarsoError, UsageError
from carso_cli.runtime.reporter import Reporter, SilentReporter

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
        """Return this process's share of `range(count)`: every `size`-th, so that no kind falls to one."""
        return slice(self.rank, count, self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a CPU tensor over all processes; the same bits on each."""
        return _all_reduced(values) if self.size > 1 else values

    def any(self, condition: bool) -> bool:
        """Say whether a condition holds on some process."""
        return (self.size > 1 and bool(self.sum(torch.tensor(float(condition))) > 0)) or condition

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Do something on the main process alone, and return its result, or raise its error, on all.

        Raises:
            CarsoError: What `work` raises.
        """
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer = [work(), None]
            except CarsoError as error:
                answer = [None, error]
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        result: Result = answer[0]
        return result

    @contextmanager
    def main_holds(self, held: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Hold something, such as a lock, on the main process while all of them work.

        Raises:
            CarsoError: What `held` raises on being entered.
        """
        with ExitStack() as stack:

            def enter() -> None:
                stack.enter_context(held())

            self.on_main(enter)
            yield

    def map_sharded(
        self, items: Sequence[Item], work: Callable[[Item], Result]
    ) -> Iterator[tuple[Item, Result]]:
        """Share out pieces of work, nothing padded and nothing done twice.

        Args:
            items: What is to be done, the same on every process.
            work: Does one piece on one process; its result holds no tensors of a GPU.

        Yields:
            Every item with its result, in order, on every process.
        """
        for start in range(0, len(items), self.size):
            part = items[start : start + self.size]
            own = work(part[self.rank]) if self.rank < len(part) else None
            results: list[Any] = [own]
            if self.size > 1:
                results = [None] * self.size
                dist.all_gather_object(results, own)
            yield from zip(part, results, strict=False)

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Let one process of each machine go first: the others find what it downloads or caches."""
        if self.local_rank:
            self._wait()
        yield
        if not self.local_rank:
            self._wait()

    def _wait(self) -> None:
        """Wait until every process has called this."""
        self.sum(torch.zeros(1))

    def sync_batch_norm(self, module: nn.Module) -> None:
        """Take the batch statistics inside a module over all processes' images; its parameters stay."""
        if self.size > 1 and self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        elif self.size > 1:
            share_batch_norm(module, total)

    def data_parallel(self, module: nn.Module) -> nn.Module:
        """Return what to call in training: its gradients are summed over all processes."""
        if self.size == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        replica = DistributedDataParallel(module, device_ids=devices)
        # The loss is a sum over images, so gradients add up; without a hook they would be averaged.
        # DDP inspects the types of a named hook, and knows its own only.
        replica.register_comm_hook(None, lambda _state, bucket: _summed_gradients(bucket))
        return replica


def total(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, differentiable: the losses of all depend on each."""
    summed: Tensor = _Total.apply(values)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return summed


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ANN401  (torch's own type)
        return _all_reduced(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401  (torch's own type)
        return _all_reduced(gradients[0])


def _all_reduced(values: Tensor) -> Tensor:
    summed = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed)
    return summed


def _summed_gradients(bucket: Any) -> torch.futures.Future[Tensor]:  # noqa: ANN401  (torch's own type)
    own = bucket.buffer()
    if own.is_cuda:
        summed: torch.futures.Future[Tensor] = (
            dist.all_reduce(own, async_op=True).get_future().then(lambda future: future.value()[0])
        )
        return summed
    # The bits of an all-reduce depend on where in its bucket a gradient lies, which changes when a run is
    # resumed; added in the order of the ranks they do not.
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    gathered = dist.all_gather(parts, own, async_op=True).get_future()
    added: torch.futures.Future[Tensor] = gathered.then(lambda _: functools.reduce(torch.add, parts))
    return added


_joined: World | None = None


def device_of_process(name: str) -> str:
    """Return the name of this process's own device, where torchrun started several processes.

    Args:
        name: `cpu`, `cuda`, `cuda:N` or `mps`, as asked for.

    Raises:
        UsageError: If the processes of a machine would share one GPU.
    """
    own = launch()
    if own.size == 1 or name == "cpu":
        return name
    here, present = own.local_size, torch.cuda.device_count()
    if name != "cuda" and here > 1:
        raise UsageError(
            f"--device {name} is one device and torchrun started {here} processes here",
            hint="leave out --device: each process takes a GPU of its own, or the CPU where there is none",
        )
    if name == "cuda" and own.local_rank >= present > 0:
        raise UsageError(
            f"torchrun started {here} processes here, for {present} GPU{'s' * (present != 1)}",
            hint=f"torchrun --nproc-per-node {present} -m carso_cli …",
        )
    return f"cuda:{own.local_rank}" if name == "cuda" else name


def join(device: torch.device) -> World:
    """Join the processes that torchrun started, once; alone, return a world of one process.

    Raises:
        CarsoError: If they do not find each other.
    """
    global _joined
    own = launch()
    if own.size == 1:
        return World(device, restarted=own.restarts > 0)
    if _joined is None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        connect(device, own)
        _joined = World(device, own.rank, own.size, own.local_rank)
        # Each machine counts the restarts that it has seen the need for.
        _joined = replace(_joined, restarted=_joined.any(own.restarts > 0))
    return _joined


def leave() -> None:
    """Leave the world at the end of a run that went well."""
    global _joined
    if _joined is not None:
        _joined = None
        dist.destroy_process_group()


def claim_error() -> str | None:
    """Claim the right to show an error: the first process that fails has it, the others fail of it.

    Returns:
        How this process is called in the message, such as `process 2 of 3`; None where another shows it.
    """
    own = launch()
    if _joined is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # Nobody keeps notes yet; what goes wrong so early goes wrong in all of them.
        return own.name if own.rank == 0 else None
    try:
        # The notes of an earlier attempt are there still.
        first = open_store(timedelta(seconds=10)).add(f"carso/errors/{own.restarts}", 1) == 1
    except (RuntimeError, ValueError):
        # The notes are gone, and whoever kept them with them.
        return None
    return own.name if first else None


def is_lost_process(error: RuntimeError) -> bool:
    """Say whether an error only means that another process has ended."""
    # Neither library gives such errors a type of their own.
    return _joined is not None and any(name in str(error) for name in ("gloo", "NCCL"))
