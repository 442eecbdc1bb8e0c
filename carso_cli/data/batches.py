"""How a set of images is cut into batches: shuffled for training, in order for everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from carso_cli.errors import UsageError
from carso_cli.runtime.seed import generator


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Cut one epoch's shuffled positions into batches.

    The order depends on `seed` and `epoch` alone, so a resumed run sees the batches that an
    uninterrupted one would have seen. A short last batch is kept only if it has at least 2
    images: batch normalisation has no variance to divide by in a batch of one.

    Returns:
        int64 tensors of positions in `range(count)`, each of `batch_size` but perhaps the last.

    Raises:
        UsageError: If `count` or `batch_size` is below 1.
    """
    _check(count, batch_size)
    order = torch.randperm(count, generator=generator(seed, "epoch-order", epoch))
    batches = list(torch.split(order, batch_size))
    if batch_size > 1 and len(batches[-1]) == 1:
        batches.pop()
    return batches


def ordered_batches(count: int, batch_size: int) -> list[slice]:
    """Cut `range(count)` into slices of `batch_size`; the last may be shorter.

    Raises:
        UsageError: If `count` or `batch_size` is below 1.
    """
    _check(count, batch_size)
    return [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def _check(count: int, batch_size: int) -> None:
    if count < 1 or batch_size < 1:
        raise UsageError(f"{count} images in batches of {batch_size}: both must be at least 1")
