"""Architectures: WideResNet, torchvision's and timm's, with initial weights and without a network connection.

- `Blueprint`: what a classifier is apart from its weights; `build` makes it;
- `check_architecture`: whether a library has an architecture of a name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from carso_cli.classifiers.wide_resnet import WideResNet
from carso_cli.errors import MissingError, RecipeError, nearest
from carso_cli.runtime.third_party import prepare, quiet

# Beginnings of arguments that load, download or describe weights.
_OF_WEIGHTS = ("pretrained", "weights", "checkpoint", "cache_dir", "hf_", "progress")
LIBRARIES = ("torchvision", "timm")


@dataclass(frozen=True)
class Blueprint:
    """Architecture of a classifier and the form of its images.

    Args:
        family: `wide-resnet`, `torchvision`, `timm`, or `external` for a module that an entry point builds.
        architecture: What torchvision or timm calls it.
        depth: Depth of a WideResNet.
        width: Width of a WideResNet.
        activation: `relu` or `silu`, of a WideResNet.
        classes: C.
        channels: 1 or 3.
        image_size: Height and width of the images.
        mean: Per-channel mean of the training images, in [0, 1].
        std: Per-channel standard deviation of the same.
        options: Arguments of the library's constructor; `cifar_stem` is ours: a ResNet's 7x7 convolution
            becomes 3x3 without stride, and the pooling after it nothing.
    """

    family: str
    architecture: str | None
    depth: int
    width: int
    activation: str
    classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Build the classifier with initial weights, on torch's default device.

        Raises:
            RecipeError: If its library has no such architecture, or none for one channel, or if it comes with
                its weights from an entry point.
            MissingError: If the library that has it is not installed.
        """
        if self.family == "wide-resnet":
            return WideResNet(
                depth=self.depth,
                width=self.width,
                classes=self.classes,
                activation=self.activation,
                mean=self.mean,
                std=self.std,
                channels=self.channels,
            )
        if self.family not in LIBRARIES or self.architecture is None:
            raise RecipeError(f"a classifier of family '{self.family}' is built by its entry point only")
        check_architecture(self.family, self.architecture)
        if self.family == "torchvision" and self.channels != 3:
            raise RecipeError(
                f"torchvision's {self.architecture} takes 3 channels; the recipe says {self.channels}",
                hint="set data.channels=3, which repeats grey images, or use classifier.family=timm",
            )
        network = self._network(_library(self.family))
        # In-place activations would overwrite the layer outputs that the representation records.
        for module in network.modules():
            if hasattr(module, "inplace"):
                setattr(module, "inplace", False)  # noqa: B010  (torch declares no such attribute)
        return Standardised(network, self.mean, self.std)

    def _network(self, library: Any) -> nn.Module:  # noqa: ANN401  (a module)
        options = dict(self.options)
        cifar_stem = options.pop("cifar_stem", False)
        # Never downloaded here, nor read by the library: weights come from the recipe's file.
        if refused := [name for name in options if name.startswith(_OF_WEIGHTS)]:
            raise RecipeError(
                f"classifier.architecture_options: '{refused[0]}' is not allowed; weights come from a file",
                hint="name the file of weights in classifier.at.file",
            )
        try:
            with quiet():
                network: nn.Module = (
                    library.get_model(self.architecture, weights=None, num_classes=self.classes, **options)
                    if self.family == "torchvision"
                    else library.create_model(
                        self.architecture,
                        pretrained=False,
                        num_classes=self.classes,
                        in_chans=self.channels,
                        **options,
                    )
                )
        # Whatever a constructor makes of arguments that it does not take.
        except Exception as error:
            if not self.options:
                raise
            raise RecipeError(
                f"{self.family}'s {self.architecture} cannot be built with classifier.architecture_options "
                f"{dict(self.options)}: {error}",
                hint="they are the arguments of its constructor, such as img_size and patch_size of a ViT",
            ) from error
        return _with_cifar_stem(network, self.architecture or "") if cifar_stem else network


def _with_cifar_stem(network: nn.Module, name: str) -> nn.Module:
    """Replace the stem that quarters an image by one that keeps its size, as is usual for 32 pixels."""
    stem, pool = getattr(network, "conv1", None), getattr(network, "maxpool", None)
    if not isinstance(stem, nn.Conv2d) or not isinstance(pool, nn.Module):
        raise RecipeError(
            f"architecture_options: cifar_stem is for ResNets with conv1 and maxpool; {name} has none"
        )
    network.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=stem.bias is not None)
    network.maxpool = nn.Identity()
    return network


class Standardised(nn.Module):
    """A network for standardised images, made one for images in [0, 1].

    Args:
        network: (B, channels, H, W) standardised images to (B, C) logits.
        mean: Per-channel mean that it was trained with, in [0, 1].
        std: Per-channel standard deviation of the same.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        # Not persistent: the weights files of these architectures do not hold them.
        self.register_buffer("mean", torch.tensor(tuple(mean)).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).reshape(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Classify (B, channels, H, W) images in [0, 1]; return (B, C) logits."""
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


def check_architecture(library: str, name: str) -> None:
    """Check that a library has an architecture.

    Args:
        library: One of `LIBRARIES`.
        name: What the library calls it; timm's may carry the tag of a training (`resnet18.a1_in1k`).

    Raises:
        RecipeError: If it has none of that name; the message names the nearest.
        MissingError: If the library is not installed.
    """
    models = _library(library)
    # torchvision's `list_models` also lists detection and segmentation unless told the module.
    known = set(models.list_models() if library == "timm" else models.list_models(module=models))
    # timm lists architectures without the tags of their trainings.
    if name.partition(".")[0] not in known:
        raise RecipeError(
            f"classifier.architecture: {library} has no '{name}'",
            hint=nearest(name, known)
            or f"it has {len(known)} others, such as {', '.join(sorted(known)[:3])}",
        )


def _library(name: str) -> Any:  # noqa: ANN401  (a module)
    # Imports stay inside: `prepare` must come before torchvision, which timm imports too.
    prepare()
    with quiet():
        if name == "torchvision":
            from torchvision import models

            return models
        try:
            import timm
        except ModuleNotFoundError as error:
            raise MissingError(
                f"classifier.family 'timm' needs timm: {error}", hint="pip install 'carso[timm]'"
            ) from error
    return timm
