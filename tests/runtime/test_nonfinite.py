from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from carso_cli.errors import NumericsError
from carso_cli.runtime.nonfinite import find_nonfinite_layer, require_finite_gradients, require_finite_logits


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_layer_is_blamed(model: nn.Sequential, value: float) -> None:
    images = torch.ones(2, 3)
    assert find_nonfinite_layer(model, lambda: model(images)) == ""
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(1.0)
        model.get_parameter("0.bias").zero_()
        model.get_parameter("2.weight")[0, 0] = value
    assert find_nonfinite_layer(model, lambda: model(images)) == ", first in layer '2'"
    with torch.no_grad():
        model.get_parameter("0.bias")[1] = abs(value)
    assert find_nonfinite_layer(model, lambda: model(images)) == ", first in layer '0'"
    assert not any(module._forward_hooks for module in model.modules())
    assert find_nonfinite_layer(len, lambda: None) == ""


def test_logits_that_decide_nothing_are_not_counted(model: nn.Sequential) -> None:
    images = torch.full((2, 3), 3e38)
    logits: Tensor = model(images * torch.tensor([1.0, -1.0, 1.0])).fill_(float("inf"))
    with pytest.raises(NumericsError, match="the logits of the classifier are not finite"):
        require_finite_logits(logits, "the classifier", model, lambda: model(images))
    assert require_finite_logits(torch.zeros(2), "x", model, lambda: None).shape == (2,)


def test_a_gradient_is_named(model: nn.Sequential) -> None:
    require_finite_gradients(model, (0, 0), "")  # none yet
    model(torch.ones(1, 3)).sum().backward()
    require_finite_gradients(model, (0, 0), "")
    bias = model.get_parameter("2.bias").grad
    assert bias is not None
    bias[1] = float("nan")
    with pytest.raises(NumericsError, match=r"of '2\.bias' is not finite in epoch 3, batch 8") as caught:
        require_finite_gradients(model, (2, 7), "lower the rate")
    assert caught.value.hint == "lower the rate"


def test_gradients_whose_norm_overflows_are_still_gradients(model: nn.Sequential) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e30)
    require_finite_gradients(model, (0, 0), "")
