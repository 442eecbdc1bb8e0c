from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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


class _Reused(nn.Module):
    """One activation after each of two convolutions, in place or not, and once more at the end."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.act = nn.ReLU(inplace=kind == "module")
        self.kind = kind

    def forward(self, images: Tensor) -> Tensor:
        maps = self.first(images)
        if self.kind == "function":
            maps = nn.functional.relu_(maps)
        elif self.kind == "operator":
            maps *= maps > 0
        elif self.kind == "view":
            maps.flatten(1).clamp_(min=0.0)
        else:
            maps = self.act(maps)
        features: Tensor = self.act(self.second(maps))
        return features.mean((2, 3))


@pytest.mark.parametrize("kind", ["module", "function", "operator", "view"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_an_output_is_what_the_layer_returned_whatever_is_written_into_it(kind: str, mode: Any) -> None:
    images = torch.rand(2, 3, 8, 8)
    plain, written = _Reused("none").eval(), _Reused(kind).eval()
    expected = plain.first(images)
    assert expected.min() < 0
    # Twice: what the first call has learned, the second uses.
    for _ in range(2):
        with mode():
            found = extract_representation(written, images, ["first", "second"])
        torch.testing.assert_close(found["first"], expected)
        torch.testing.assert_close(found["second"], plain.second(expected.relu()))


def test_gradients_through_an_overwritten_output_are_those_without_it() -> None:
    gradients = []
    for kind in ("none", "module"):
        images = torch.linspace(0, 1, 192).reshape(1, 3, 8, 8).requires_grad_()
        found = extract_representation(_Reused(kind), images, ["first", "second"])
        gradients.append(
            torch.autograd.grad([found["first"].square().sum(), found["second"].sum()], images)[0]
        )
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("layers", [["act"], ["act", "second"], ["first", "act"]])
def test_the_first_output_of_a_layer_that_runs_twice_counts_in_a_trace_too(layers: list[str]) -> None:
    model, images = _Reused("none").eval(), torch.rand(2, 3, 8, 8)

    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> list[Tensor]:
            return list(extract_representation(self.model, images, layers).values())

    found = extract_representation(model, images, layers)
    torch.testing.assert_close(found["act"], model.first(images).relu())
    traced = torch.export.export(Recording(), (images,)).module()(images)
    for one, other in zip(found.values(), traced, strict=True):
        torch.testing.assert_close(one, other)


def test_threads_that_share_a_classifier_get_their_own_outputs(classifier: WideResNet) -> None:
    batches = [torch.rand(2, 3, 32, 32) for _ in range(4)]
    layers = [LAYERS[:2], LAYERS, LAYERS[1:], LAYERS[:1]]
    alone = [extract_representation(classifier, *pair) for pair in zip(batches, layers, strict=True)]
    interval = sys.getswitchinterval()
    # Threads take turns ten thousand times as often, so that what can go wrong does.
    sys.setswitchinterval(1e-6)

    def work(place: int) -> list[bool]:
        together = []
        for _ in range(12):
            with torch.no_grad():
                found = extract_representation(classifier, batches[place], layers[place])
            together.append(all(torch.allclose(found[name], alone[place][name]) for name in layers[place]))
        return together

    try:
        with ThreadPoolExecutor(4) as pool:
            results = [right for together in pool.map(work, range(4)) for right in together]
    finally:
        sys.setswitchinterval(interval)
    assert len(results) == 48
    assert all(results)
    assert hook_count(classifier) == 0
