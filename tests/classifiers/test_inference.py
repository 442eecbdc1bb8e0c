from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from carso_cli.build import untrained_classifier
from carso_cli.classifiers.inference import Compiled, folded, inference_copy
from carso_cli.classifiers.wide_resnet import WideResNet
from carso_cli.recipe.identity import recipe_hash
from carso_cli.recipe.load import load_recipe
from carso_cli.runtime.reporter import Reporter

DIGITS, COMPILING = load_recipe("digits"), load_recipe("digits", ["compile=true"])


class Recorder(Reporter, Protocol):
    warned: list[str]


@pytest.fixture(scope="module")
def classifier() -> WideResNet:
    found = untrained_classifier(DIGITS).eval().requires_grad_(False)
    assert isinstance(found, WideResNet)
    return found


def raising(error: RuntimeError) -> Callable[..., Callable[[Tensor], Tensor]]:
    def compile(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(images: Tensor) -> Tensor:
            raise error

        return run

    return compile


@pytest.mark.slow
def test_compiles_modules_where_the_recipe_says_so(classifier: WideResNet) -> None:
    def function(images: Tensor) -> Tensor:
        return images

    assert isinstance(inference_copy(classifier, compile=True), Compiled)
    assert isinstance(inference_copy(classifier, compile=False), WideResNet)
    assert inference_copy(function, compile=True) is function


@pytest.mark.slow
def test_what_is_compiled_is_one_graph(classifier: WideResNet) -> None:
    # A backend that only traces: to generate code takes 20 seconds.
    traced = torch.compile(folded(classifier).forward, backend="eager", fullgraph=True)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(traced(images), classifier(images), rtol=1e-4, atol=1e-5)


def test_goes_on_without_torch_compile_where_it_fails(
    classifier: WideResNet, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    monkeypatch.setattr(torch, "compile", raising(TorchDynamoException("no C++ compiler found\nat line 7")))
    images = torch.rand(2, 3, 32, 32)
    compiled = inference_copy(classifier, compile=True, reporter=recorder)
    first, second = compiled(images), compiled(images)
    torch.testing.assert_close(first, classifier(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(first, second)
    assert recorder.warned == ["torch.compile failed, and attacks run without it: no C++ compiler found"]


def test_lets_other_errors_through(classifier: WideResNet, monkeypatch: pytest.MonkeyPatch) -> None:
    # Running out of memory has a remedy of its own: smaller passes.
    monkeypatch.setattr(torch, "compile", raising(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        inference_copy(classifier, compile=True)(torch.rand(1, 3, 32, 32))


def test_compiling_makes_no_other_configuration() -> None:
    assert recipe_hash(COMPILING) == recipe_hash(DIGITS)
