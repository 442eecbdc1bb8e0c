"""Where memory runs out, the same answer comes in smaller passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli.attacks.losses import cross_entropy
from carso_cli.attacks.passes import Passes

DRAWS = 7
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


def short_of_memory(most: int, error: Exception, tried: list[int]) -> Callable[[slice], list[int]]:
    def work(part: slice) -> list[int]:
        tried.append(part.stop - part.start)
        if part.stop - part.start > most:
            raise error
        return list(range(part.start, part.stop))

    return work


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_unit_is_done_once_and_the_size_is_remembered(error: Exception) -> None:
    tried: list[int] = []
    passes = Passes(16)
    found = passes.over(37, short_of_memory(5, error, tried))
    assert [unit for part in found for unit in part] == list(range(37))
    assert tried == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1]
    tried.clear()
    passes.over(8, short_of_memory(5, error, tried))
    assert tried == [4, 4]


def test_a_single_unit_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        Passes(4).over(4, short_of_memory(0, ERRORS[0], []))


def test_other_errors_are_not_retried() -> None:
    tried: list[int] = []
    with pytest.raises(RuntimeError, match="shapes differ"):
        Passes(4).over(4, short_of_memory(0, RuntimeError("shapes differ"), tried))
    assert tried == [4]


@pytest.mark.parametrize("most", [3, 7, 20])
def test_a_defence_answers_the_same_with_little_memory(
    toy: Any, attacked: Any, images: Tensor, labels: Tensor, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers() -> tuple[Tensor, ...]:
        target = attacked()
        step = target.loss_and_gradient(images, labels, cross_entropy, DRAWS)
        logits, back = target.vjp(images)
        return step.loss, step.gradient, logits, back(torch.ones_like(logits)), target(images)

    plenty = answers()
    roomy = toy.sample_logits

    def cramped(condition: Tensor, latents: Tensor) -> Tensor:
        if latents.shape[0] * latents.shape[1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        found: Tensor = roomy(condition, latents)
        return found

    monkeypatch.setattr(toy, "sample_logits", cramped)
    for little, much in zip(answers(), plenty, strict=True):
        torch.testing.assert_close(little, much, rtol=1e-5, atol=1e-6)
