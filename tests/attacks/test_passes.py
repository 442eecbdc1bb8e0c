"""Where memory runs out, the same answer comes in smaller passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from carso_cli.attacks import passes as passes_module
from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.losses import cross_entropy
from carso_cli.attacks.passes import Passes, samples_per_pass
from carso_cli.runtime.memory import graph_bytes
from carso_cli.runtime.seed import generator

DRAWS = 7
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
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


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:30] or type(error).__name__)
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


@pytest.mark.parametrize("error", ERRORS[:2])
def test_memory_that_runs_out_in_the_backward_pass_of_a_single_pass(
    toy: Any, attacked: Any, images: Tensor, labels: Tensor, error: Exception, recorder: Any
) -> None:
    logits, back = attacked().vjp(images)
    plenty = back(torch.ones_like(logits))
    tried: list[int] = []

    class Cramped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            tried.append(len(gradients[0]))
            if len(gradients[0]) > 3:
                raise error
            return gradients[0]

    cramped, roomy, apply = copy.copy(toy), toy.sample_logits, cast(Any, Cramped).apply
    cramped.sample_logits = lambda condition, latents: roomy(apply(condition), latents)
    # It says so once, for all attacks on this model to come.
    assert samples_per_pass(64, torch.device("meta"), 3, model=cramped, reporter=recorder) == 64
    for _ in range(2):
        target = DefenceTarget(cramped, "exact", 4096, generator(0, "latents"))
        logits, back = target.vjp(images)
        for _ in range(2):
            torch.testing.assert_close(back(torch.ones_like(logits)), plenty)
    assert tried[0] == len(images)
    assert tried.count(len(images)) == 1
    assert len(recorder.warned) == 1
    assert "memory ran out" in recorder.warned[0]


def test_a_pass_on_a_gpu_is_what_its_free_memory_holds(
    monkeypatch: pytest.MonkeyPatch, recorder: Any
) -> None:
    # Each of 2 samples keeps the argument and the result of a square root: 2 x 1000 floats.
    kept = torch.ones(2, 1000, requires_grad=True)
    device = torch.device("meta")

    def most(free: int) -> int:
        monkeypatch.setattr(passes_module, "usable_bytes", lambda _: free)
        forward = lambda: (kept * 1.0).sqrt().exp()  # noqa: E731
        return samples_per_pass(4096, device, 2, forward=forward, reporter=recorder)

    assert graph_bytes(lambda: (kept * 1.0).sqrt().exp()) == 2 * 2 * 1000 * 4
    assert most(2**40) == 4096
    assert recorder.said == []
    assert most(1000 * 8000) == 512
    assert most(1) == 2
    assert "passes of 512 reconstructions" in recorder.said[0]
