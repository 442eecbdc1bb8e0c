"""Batches: every position once, in an order that only seed and epoch decide."""

from __future__ import annotations

import pytest
import torch

from carso_cli.data.batches import epoch_batches, ordered_batches
from carso_cli.errors import UsageError


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (11, 3), (12, 3), (2, 5), (7, 1), (100, 100)])
def test_an_epoch_covers_each_position_once(count: int, batch_size: int) -> None:
    batches = epoch_batches(count, batch_size, seed=0, epoch=0)
    positions = torch.cat(batches)
    dropped = 1 if batch_size > 1 and count % batch_size == 1 else 0
    assert len(positions) == count - dropped
    assert len(set(positions.tolist())) == len(positions)
    assert int(positions.max()) < count
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_a_last_batch_of_one_is_dropped_and_of_two_kept() -> None:
    assert [len(batch) for batch in epoch_batches(9, 4, seed=0, epoch=0)] == [4, 4]
    assert [len(batch) for batch in epoch_batches(10, 4, seed=0, epoch=0)] == [4, 4, 2]


def test_the_order_is_shuffled_anew_each_epoch_and_reproducible() -> None:
    first = torch.cat(epoch_batches(64, 8, seed=1, epoch=0))
    torch.rand(3)
    assert torch.equal(first, torch.cat(epoch_batches(64, 8, seed=1, epoch=0)))
    assert not torch.equal(first, torch.arange(64))
    assert not torch.equal(first, torch.cat(epoch_batches(64, 8, seed=1, epoch=1)))
    assert not torch.equal(first, torch.cat(epoch_batches(64, 8, seed=2, epoch=0)))


def test_ordered_batches_are_consecutive_slices() -> None:
    assert ordered_batches(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert ordered_batches(2, 3) == [slice(0, 2)]


@pytest.mark.parametrize(("count", "batch_size"), [(0, 4), (4, 0), (4, -1)])
def test_sizes_below_one_are_refused(count: int, batch_size: int) -> None:
    message = f"{count} images in batches of {batch_size}"
    with pytest.raises(UsageError, match=message):
        epoch_batches(count, batch_size, seed=0, epoch=0)
    with pytest.raises(UsageError, match=message):
        ordered_batches(count, batch_size)
