"""What a classifier is, apart from its weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from carso_cli.classifiers.architectures import LIBRARIES, build_architecture
from carso_cli.classifiers.wide_resnet import WideResNet
from carso_cli.errors import RecipeError


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

    def build(self) -> nn.Module:
        """Build the classifier with initial weights, on torch's default device.

        Raises:
            RecipeError: If the architecture is not known, or comes with its weights from an entry point.
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
            raise RecipeError(
                f"a classifier of family '{self.family}' comes with its weights, and not without"
            )
        return build_architecture(
            self.family,
            self.architecture,
            classes=self.classes,
            channels=self.channels,
            mean=self.mean,
            std=self.std,
        )
