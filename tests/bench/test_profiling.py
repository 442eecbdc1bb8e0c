from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F

from carso_cli.bench.profiling import alternating_seconds, counted_operations, peak_bytes

CPU = torch.device("cpu")


def test_operations_of_a_gradient_are_those_of_its_products() -> None:
    matrix, weights = torch.rand(5, 7, requires_grad=True), torch.rand(7, 11)

    def forward_and_back() -> None:
        torch.autograd.grad((matrix @ weights).sum(), matrix)

    assert counted_operations(forward_and_back) == 2 * (2 * 5 * 7 * 11)


def test_frozen_weights_cost_no_operations() -> None:
    images, kernel = torch.rand(2, 3, 8, 8, requires_grad=True), torch.rand(4, 3, 3, 3)
    forward = 2 * 2 * 4 * 8 * 8 * 3 * 9

    def gradient() -> None:
        torch.autograd.backward(F.conv2d(images, kernel, padding=1).sum())

    assert counted_operations(gradient) == 2 * forward
    kernel.requires_grad_()
    assert counted_operations(gradient) == 3 * forward


def test_peak_counts_what_is_held_at_one_time() -> None:
    block = 4 * 1000

    def three_of_which_two_together() -> None:
        first = torch.empty(1000)
        second = first + 1.0
        del first
        second.add_(1.0)
        second.view(10, 100).exp()

    assert peak_bytes(three_of_which_two_together, CPU) == 2 * block


def test_peak_counts_what_autograd_keeps() -> None:
    start = torch.rand(1000, requires_grad=True)

    def chain() -> None:
        value = start
        for _ in range(5):
            value = value.exp()
        torch.autograd.grad(value.sum(), start)

    # Each exponential is kept for its gradient; beside them stand a sum, its gradient and two of the chain
    assert 5 * 4000 <= peak_bytes(chain, CPU) <= 8 * 4000


def test_inputs_do_not_count() -> None:
    given = torch.rand(1000)
    assert peak_bytes(lambda: given.view(10, 100).t(), CPU) == 0


def test_works_take_turns() -> None:
    calls: list[str] = []

    def quick() -> None:
        calls.append("a")

    def slow() -> None:
        calls.append("b")
        sum(range(1_000_000))

    times = alternating_seconds((quick, slow), CPU, rounds=4, patience=60.0)
    assert calls == ["a", "b"] * 4
    assert [len(found) for found in times] == [4, 4]
    assert min(times[1]) > 10 * max(times[0])


@pytest.mark.parametrize(("threads", "waits_count"), [(1, False), (2, True)])
def test_waiting_counts_only_where_several_threads_work(threads: int, waits_count: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (times,) = alternating_seconds((lambda: time.sleep(0.02),), CPU, rounds=3, patience=60.0)
    finally:
        torch.set_num_threads(before)
    assert (min(times) >= 0.02) is waits_count


def test_patience_ends_the_rounds_after_three() -> None:
    (times,) = alternating_seconds((lambda: time.sleep(0.01),), CPU, rounds=50, patience=0.0)
    assert len(times) == 3
