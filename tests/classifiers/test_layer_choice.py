"""The default choice of layers: Table 7 of a WideResNet, and the same rule on other architectures."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from carso_cli.build import untrained_classifier
from carso_cli.classifiers.architectures import Blueprint
from carso_cli.classifiers.layer_choice import default_layers
from carso_cli.defence.representation import module_shapes
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.shipped import list_recipes

TABLE_7 = [
    *(f"layer.0.block.{block}.conv_{number}" for block in range(4) for number in range(2)),
    "layer.1.block.0.conv_0",
    "layer.1.block.0.conv_1",
    "layer.1.block.0.shortcut",
    *(f"layer.1.block.{block}.conv_{number}" for block in range(1, 4) for number in range(2)),
    "layer.2.block.0.conv_0",
    "layer.2.block.0.conv_1",
    "layer.2.block.0.shortcut",
    *(f"layer.2.block.{block}.conv_{number}" for block in range(1, 4) for number in range(2)),
]


def choose(classifier: nn.Module, size: int = 64, channels: int = 3) -> Sequence[str]:
    device = next(classifier.parameters()).device
    return default_layers(
        classifier, module_shapes(classifier.eval(), torch.zeros(1, channels, size, size, device=device))
    )


def of(library: str, name: str, size: int = 64) -> list[str]:
    with torch.device("meta"):
        built = Blueprint(library, name, 28, 10, "relu", 10, 3, size, (0.5,) * 3, (0.5,) * 3).build()
    return [layer.removeprefix("network.") for layer in choose(built, size)]


def test_of_the_papers_classifier_they_are_those_of_table_7() -> None:
    with torch.device("meta"):
        classifier = untrained_classifier(load_recipe("cifar10"))
    assert choose(classifier, 32) == tuple(TABLE_7)
    assert load_recipe("cifar10").representation.layers == tuple(TABLE_7)


# Recipes that go on from another's purifier take its layers.
@pytest.mark.parametrize("name", [r.name for r in list_recipes() if not load_recipe(r.name).training.initial])
def test_every_recipe_follows_the_rule(name: str) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"):
        classifier = untrained_classifier(recipe)
    assert choose(classifier, recipe.data.image_size, recipe.data.channels) == recipe.representation.layers


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_resnets(library: str) -> None:
    blocks = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    layers = []
    for block in blocks:
        layers += [f"{block}.conv1", f"{block}.conv2"]
        if block.endswith(".0") and block != "layer1.0":
            layers.append(f"{block}.downsample.0")
    assert of(library, "resnet18") == layers


def test_a_shortcut_that_keeps_the_resolution_is_left_out() -> None:
    layers = of("torchvision", "resnet50")
    assert layers[:2] == ["layer1.0.conv1", "layer1.0.conv2"]
    assert [layer for layer in layers if "downsample" in layer] == [
        f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)
    ]
    assert not any(layer.endswith("conv3") for layer in layers)


def test_a_shortcut_that_pools_first_is_one_all_the_same() -> None:
    # Its 1x1 convolution has stride 1, behind an average pooling of stride 2.
    layers = of("timm", "resnet18d")
    assert [layer for layer in layers if "downsample" in layer] == [
        f"layer{stage}.0.downsample.1" for stage in (2, 3, 4)
    ]


def test_plain_stacks_give_two_of_every_resolution() -> None:
    # Of 64 pixels: 1, 1, 2, 2 and 2 convolutions at 64, 32, 16, 8 and 4.
    assert of("torchvision", "vgg11") == [f"features.{number}" for number in (0, 3, 6, 8, 11, 13, 16, 18)]
    # Of 4 at a resolution, the first two.
    assert "features.14" not in of("torchvision", "vgg19")
    assert "features.12" in of("torchvision", "vgg19")


def test_maps_of_one_pixel_and_no_maps_are_left_out() -> None:
    layers = of("torchvision", "efficientnet_b0")
    assert "features.2.0.block.0.0" in layers
    # The convolutions of squeeze-and-excitation see one pixel.
    assert not any("fc" in layer for layer in layers)
    assert choose(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), 2) == ()
