"""Subsets and hold-outs: balanced, seeded, disjoint, traceable to the full split; batches cover it once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carso_cli.data.image_set import ImageSet, balanced_subset, epoch_batches, ordered_batches, split_holdout
from carso_cli.errors import DataError, UsageError


def image_set(labels: list[int], classes: int = 3) -> ImageSet:
    """Images whose first pixel is their position, so that a mix-up shows."""
    count = len(labels)
    images = torch.arange(count).to(torch.uint8)[:, None, None, None].repeat(1, 3, 2, 2)
    names = tuple(f"class {label}" for label in range(classes))
    return ImageSet(images, torch.tensor(labels), torch.arange(count), names)


def counts(part: ImageSet) -> list[int]:
    return torch.bincount(part.labels, minlength=len(part.classes)).tolist()


def assert_consistent(part: ImageSet, whole: ImageSet) -> None:
    assert torch.equal(part.images, whole.images[part.indices])
    assert torch.equal(part.labels, whole.labels[part.indices])
    assert len(set(part.indices.tolist())) == len(part)


def test_pixels_are_scaled_to_the_unit_interval() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    part = ImageSet(images, torch.zeros(3, dtype=torch.int64), torch.arange(3), ("only",))
    expected = torch.tensor([0.0, 0.2, 1.0])
    assert torch.equal(part.pixels(slice(0, 3)).flatten(), expected)
    assert torch.equal(part.pixels(torch.tensor([2, 0])).flatten(), expected[[2, 0]])
    assert part.pixels(slice(0, 1)).dtype == torch.float32
    assert images.tolist()[2] == [[[255]]]


def test_select_keeps_indices_through_two_selections() -> None:
    whole = image_set([0, 1, 2, 0, 1, 2])
    part = whole.select(torch.tensor([5, 3, 1])).select(torch.tensor([2, 0]))
    assert part.indices.tolist() == [1, 5]
    assert_consistent(part, whole)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("images", torch.zeros(2, 3, 4, 4, dtype=torch.float64), r"torch\.float64 of shape \(2, 3, 4, 4\)"),
        ("labels", torch.zeros(3, dtype=torch.int64), r"labels are torch\.int64 of shape \(3,\)"),
        ("labels", torch.tensor([0, 2]), "labels run from 0 to 2; there are 2 classes"),
        ("labels", torch.tensor([-1, 0]), "labels run from -1 to 0"),
        ("indices", torch.zeros(2), r"indices are torch\.float32"),
    ],
)
def test_tensors_that_disagree_are_refused(field: str, value: Tensor, message: str) -> None:
    tensors = {
        "images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        "labels": torch.zeros(2, dtype=torch.int64),
        "indices": torch.arange(2),
    }
    tensors[field] = value
    with pytest.raises(DataError, match=message):
        ImageSet(tensors["images"], tensors["labels"], tensors["indices"], ("a", "b"))


def test_images_are_batched_where_they_lie() -> None:
    elsewhere = image_set([0, 1, 1]).to("meta")
    assert elsewhere.pixels(torch.tensor([2, 0])).device.type == "meta"
    assert elsewhere.indices.device.type == elsewhere.labels.device.type == "cpu"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10, 29])
def test_every_balanced_subset_differs_by_at_most_one(count: int) -> None:
    whole = image_set([0] * 10 + [1] * 10 + [2] * 10)
    part = balanced_subset(whole, count, seed=3)
    assert len(part) == count
    assert max(counts(part)) - min(counts(part)) <= 1
    assert_consistent(part, whole)


def test_a_small_class_gives_all_it_has() -> None:
    part = balanced_subset(image_set([0] * 2 + [1] * 10 + [2] * 20), 12, seed=0)
    assert counts(part) == [2, 5, 5]


def test_a_smaller_subset_begins_a_larger_one() -> None:
    whole = image_set([0, 1, 2] * 20)
    large = balanced_subset(whole, 30, seed=7)
    assert torch.equal(balanced_subset(whole, 11, seed=7).indices, large.indices[:11])
    assert sorted(large.labels[:3].tolist()) == [0, 1, 2]
    assert torch.equal(
        balanced_subset(large, 11, seed=9).labels.bincount().sort()[0], torch.tensor([3, 4, 4])
    )


def test_the_subset_depends_on_the_seed_alone() -> None:
    whole = image_set([0, 1, 2] * 20)
    first = balanced_subset(whole, 12, seed=1).indices
    torch.rand(5)
    assert torch.equal(first, balanced_subset(whole, 12, seed=1).indices)
    assert not torch.equal(first.sort()[0], balanced_subset(whole, 12, seed=2).indices.sort()[0])


def test_a_count_beyond_the_set_returns_every_image_once() -> None:
    whole = image_set([0, 0, 1])
    assert balanced_subset(whole, 99, seed=0).indices.sort()[0].tolist() == [0, 1, 2]


def test_a_subset_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="subset of 0 images"):
        balanced_subset(image_set([0, 1]), 0, seed=0)


@pytest.mark.parametrize(("share", "expected"), [(0.2, [4, 4, 4]), (0.5, [10, 10, 10]), (0.0, [0, 0, 0])])
def test_the_holdout_is_stratified(share: float, expected: list[int]) -> None:
    whole = image_set([0] * 20 + [1] * 20 + [2] * 20)
    kept, held_out = split_holdout(whole, share, seed=5)
    assert counts(held_out) == expected
    assert torch.equal(torch.cat([kept.indices, held_out.indices]).sort()[0], torch.arange(60))
    assert_consistent(kept, whole)
    assert_consistent(held_out, whole)


def test_holdout_shares_follow_uneven_classes_by_largest_remainders() -> None:
    _, held_out = split_holdout(image_set([0] * 14 + [1] * 17 + [2] * 29), 0.1, seed=0)
    assert counts(held_out) == [1, 2, 3]


def test_the_holdout_takes_one_image_at_least_and_never_a_whole_class() -> None:
    _, one = split_holdout(image_set([0] * 5 + [1] * 5 + [2] * 5), 0.02, seed=0)
    assert len(one) == 1
    kept, held_out = split_holdout(image_set([0, 1, 1, 2, 2]), 0.9, seed=0)
    assert counts(kept) == [1, 1, 1]
    assert counts(held_out) == [0, 1, 1]


def test_the_holdout_depends_on_the_seed_alone() -> None:
    whole = image_set([0, 1, 2] * 20)
    first = split_holdout(whole, 0.2, seed=1)[1].indices
    torch.rand(5)
    assert torch.equal(first, split_holdout(whole, 0.2, seed=1)[1].indices)
    assert not torch.equal(first, split_holdout(whole, 0.2, seed=2)[1].indices)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match=f"share of {share} "):
        split_holdout(image_set([0, 1]), share, seed=0)


# --- batches ---


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


def test_one_image_is_refused_where_a_batch_needs_two() -> None:
    with pytest.raises(UsageError, match="1 image to train on; batch normalisation needs at least 2"):
        epoch_batches(1, 128, seed=0, epoch=0)


def test_classes_of_one_image_do_not_shorten_the_holdout() -> None:
    # 0.5 of each of five classes rounds up for two of them, which have no image to give.
    kept, held_out = split_holdout(image_set([0, 1, 2, 3, 4, *[5] * 20], classes=6), 0.5, seed=0)
    assert len(held_out) == round(0.5 * 25)
    assert set(kept.labels.tolist()) == set(range(6))


def test_the_order_is_another_each_epoch_and_reproducible() -> None:
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
