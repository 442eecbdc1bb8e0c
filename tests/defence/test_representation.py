from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from carso_cli.classifiers.wide_resnet import WideResNet
from carso_cli.defence.representation import extract_representation
from carso_cli.errors import UsageError
from carso_cli.runtime import third_party

LAYERS = ["layer.2.block.0.conv_0", "layer.0.block.0.conv_1", "layer.1.block.0.shortcut"]


@pytest.fixture
def classifier() -> WideResNet:
    model = WideResNet(
        depth=10, width=1, classes=4, activation="relu", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)
    )
    return model.eval()


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_agrees_with_torchvision_in_the_order_asked(classifier: WideResNet) -> None:
    third_party.prepare()
    from torchvision.models.feature_extraction import create_feature_extractor

    images = torch.rand(3, 3, 32, 32)
    ours = extract_representation(classifier, images, LAYERS)
    # torchvision names the first of two similar nodes without its number.
    nodes = {layer.removesuffix("_0"): layer for layer in LAYERS}
    theirs = create_feature_extractor(classifier, return_nodes=nodes)(images)
    assert list(ours) == LAYERS
    for layer in LAYERS:
        torch.testing.assert_close(ours[layer], theirs[layer])


def test_stops_after_the_last_layer_needed(classifier: WideResNet) -> None:
    ran: list[str] = []
    for name in ("layer.0", "layer.1", "logits"):
        classifier.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    extract_representation(classifier, torch.rand(1, 3, 32, 32), ["layer.1.block.0.conv_0"])
    assert ran == ["layer.0"]


def test_gradient_flows_when_wanted(classifier: WideResNet) -> None:
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    outputs = extract_representation(classifier, images, LAYERS)
    (gradient,) = torch.autograd.grad([output.square().sum() for output in outputs.values()], images)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        outputs = extract_representation(classifier, images, LAYERS)
    assert not any(output.requires_grad for output in outputs.values())


def test_hooks_are_removed_after_a_failure(classifier: WideResNet) -> None:
    with pytest.raises(RuntimeError):
        extract_representation(classifier, torch.rand(1, 5, 32, 32), LAYERS)
    assert hook_count(classifier) == 0
    extract_representation(classifier, torch.rand(1, 3, 32, 32), LAYERS)
    assert hook_count(classifier) == 0


def test_unknown_layer_is_refused_with_near_matches(classifier: WideResNet) -> None:
    with pytest.raises(UsageError, match=r"no layer 'layer\.0\.block\.0\.conv_9'; did you mean"):
        extract_representation(classifier, torch.rand(1, 3, 32, 32), ["layer.0.block.0.conv_9"])


def test_repeated_and_absent_layers_are_refused(classifier: WideResNet) -> None:
    with pytest.raises(UsageError, match="named twice"):
        extract_representation(classifier, torch.rand(1, 3, 32, 32), [LAYERS[0], LAYERS[0]])
    with pytest.raises(UsageError, match="at least one"):
        extract_representation(classifier, torch.rand(1, 3, 32, 32), [])


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Conv2d(3, 2, 1)
        self.unused = nn.Conv2d(3, 2, 1)
        self.pair = _Pair()

    def forward(self, images: Tensor) -> Tensor:
        self.pair(images)
        output: Tensor = self.used(images)
        return output


class _Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


def test_layers_that_do_not_run_or_give_no_tensor_are_refused() -> None:
    images = torch.rand(1, 3, 8, 8)
    with pytest.raises(UsageError, match="layer 'unused' did not run"):
        extract_representation(_TwoHeads(), images, ["used", "unused"])
    with pytest.raises(UsageError, match="layer 'pair' returns tuple, not a tensor"):
        extract_representation(_TwoHeads(), images, ["pair"])
