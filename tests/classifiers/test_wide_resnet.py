from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carso_cli.classifiers.inference import folded
from carso_cli.classifiers.wide_resnet import WideResNet
from carso_cli.errors import UsageError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def ours(depth: int = 10, width: int = 2, activation: str = "relu", **changes: Any) -> WideResNet:
    arguments: dict[str, Any] = {"classes": 7, "mean": MEAN, "std": STD} | changes
    return WideResNet(depth=depth, width=width, activation=activation, **arguments)


def theirs(zoo: Any, depth: int, width: int, activation: str) -> nn.Module:
    kinds = {"relu": nn.ReLU, "silu": zoo.Swish}
    model: nn.Module = zoo.DMWideResNet(
        num_classes=7, depth=depth, width=width, activation_fn=kinds[activation], mean=MEAN, std=STD
    )
    return model


def randomise_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean):
                assert value is not None
                nn.init.normal_(value, 0.3, 0.4)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.5, 2.0)


def logits_and_gradient(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    weights = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), leaf)
    return logits.detach(), gradient


@pytest.mark.parametrize(
    ("depth", "width", "activation"), [(10, 1, "relu"), (10, 2, "silu"), (16, 1, "silu"), (16, 2, "relu")]
)
def test_agrees_with_robustbench(wide_resnets: Any, depth: int, width: int, activation: str) -> None:
    reference = theirs(wide_resnets, depth, width, activation).eval()
    randomise_statistics(reference)
    model = ours(depth, width, activation).eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    images = torch.rand(3, 3, 32, 32)
    for actual, expected in zip(
        logits_and_gradient(model, images), logits_and_gradient(reference, images), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_names_are_robustbenchs_for_the_papers_model(wide_resnets: Any) -> None:
    with torch.device("meta"):
        model = ours(28, 10, "silu")
        reference = theirs(wide_resnets, 28, 10, "silu")
    assert list(model.state_dict()) == list(reference.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in reference.named_modules()]


@pytest.mark.parametrize("size", [28, 33, 35, 64])
def test_gives_one_row_an_image_at_any_size(size: int) -> None:
    assert ours().eval()(torch.rand(2, 3, size, size)).shape == (2, 7)


def test_pools_over_the_whole_of_a_larger_image() -> None:
    model = ours().eval()
    seen: list[Tensor] = []
    model.relu.register_forward_hook(lambda _, __, output: seen.append(output))
    logits = model(torch.rand(2, 3, 64, 64))
    assert seen[0].shape[2:] == (16, 16)
    quarters = nn.functional.avg_pool2d(seen[0], 8).mean(dim=(2, 3))
    torch.testing.assert_close(logits, model.logits(quarters))


def test_standardises_inside() -> None:
    model, plain = ours().eval(), ours(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(model(images), plain((images - mean) / std))
    assert not {"mean", "std"} & model.state_dict().keys()


def test_takes_grey_images() -> None:
    assert ours(channels=1, mean=(0.3,), std=(0.2,)).eval()(torch.rand(2, 1, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 27}, "27 is not allowed"),
        ({"depth": 4}, "4 is not allowed"),
        ({"activation": "gelu"}, "unknown activation 'gelu'; known are relu, silu"),
        ({"channels": 1}, "3 means and 3 stds were given for 1 channels"),
    ],
)
def test_refuses_what_is_no_wide_resnet(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ours(**changes)


@pytest.mark.parametrize(
    ("depth", "width", "activation", "left"),
    # Left are those that take a sum with a block's own input, or what a block adds to its output.
    [(10, 2, "relu", 0), (10, 1, "relu", 2), (10, 2, "silu", 0), (16, 2, "relu", 6)],
)
def test_a_folded_copy_computes_the_same(depth: int, width: int, activation: str, left: int) -> None:
    model = ours(depth, width, activation).eval().requires_grad_(False)
    randomise_statistics(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied = folded(folded(model))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in copied.modules()) == left
    images = torch.rand(2, 3, 32, 32)
    for found, expected in zip(
        logits_and_gradient(copied, images), logits_and_gradient(model, images), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_only_a_wide_resnet_is_folded() -> None:
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert folded(other) is other
