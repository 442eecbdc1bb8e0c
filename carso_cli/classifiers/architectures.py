"""Architectures of torchvision and timm, built without weights and without a network connection.

- `build_architecture`: one by its name, behind the standardisation of its images;
- `check_architecture`: whether there is one of that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from carso_cli.errors import MissingError, RecipeError, nearest
from carso_cli.runtime.third_party import prepare, quiet

LIBRARIES = ("torchvision", "timm")


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
    known = _known(library)
    if name.partition(".")[0] not in known:
        raise RecipeError(
            f"classifier.architecture: {library} has no '{name}'",
            hint=nearest(name, known)
            or f"it has {len(known)} others, such as {', '.join(sorted(known)[:3])}",
        )


def build_architecture(
    library: str, name: str, *, classes: int, channels: int, mean: Sequence[float], std: Sequence[float]
) -> Standardised:
    """Build an architecture with weights as they are initially.

    Args:
        library: One of `LIBRARIES`.
        name: What the library calls it.
        classes: C.
        channels: Channels of the images; torchvision's architectures take 3.
        mean: Per-channel mean of the training images, in [0, 1].
        std: Per-channel standard deviation of the same.

    Raises:
        RecipeError: If the library has no such architecture, or none for one channel.
        MissingError: If the library is not installed.
    """
    check_architecture(library, name)
    if library == "torchvision" and channels != 3:
        raise RecipeError(
            f"torchvision's {name} takes 3 channels; the recipe says {channels}",
            hint="set data.channels=3, which repeats grey images, or use classifier.family=timm",
        )
    with quiet():
        network = (
            _torchvision().get_model(name, weights=None, num_classes=classes)
            if library == "torchvision"
            else _timm().create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
        )
    # What a layer gave is recorded, and must not be written over by the next.
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return Standardised(network, mean, std)


def _known(library: str) -> set[str]:
    if library == "timm":
        return set(_timm().list_models())
    models = _torchvision()
    return set(models.list_models(module=models))


def _torchvision() -> Any:  # noqa: ANN401  (a module)
    prepare()
    with quiet():
        from torchvision import models
    return models


def _timm() -> Any:  # noqa: ANN401  (a module)
    prepare()
    with quiet():
        try:
            import timm
        except ModuleNotFoundError as error:
            raise MissingError(
                f"classifier.family 'timm' needs timm: {error}", hint="pip install 'carso[timm]'"
            ) from error
    return timm
