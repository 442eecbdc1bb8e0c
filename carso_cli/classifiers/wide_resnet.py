"""WideResNet with pre-activation blocks (Zagoruyko and Komodakis, 2016; https://arxiv.org/abs/1605.07146).

Module names, hence state-dict keys and the layer names of Table 7, are those of RobustBench's
`DMWideResNet`, whose published weights load without a map of keys. One thing differs: pooling is global, so
images of any size give one row each, where theirs pools by a fixed 8.

Axes: B images, C classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carso_cli.errors import UsageError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}
"""Activations by name; the Swish of the Rebuffi 2021 and Gowal 2020 models is `silu`."""


class WideResNet(nn.Module):
    """A WideResNet for images in [0, 1], which it standardises itself.

    Args:
        depth: Number of layers, 6 k + 4, from 10.
        width: Widening factor: the three groups have 16, 32 and 64 times as many channels.
        classes: C.
        activation: A key of `ACTIVATIONS`.
        mean: Per-channel mean of the training images, in [0, 1].
        std: Per-channel standard deviation of the same.
        channels: Channels of the images.

    Raises:
        UsageError: If the depth is not 6 k + 4, the activation is unknown, or `mean` and `std` do not have
            one value per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        classes: int,
        activation: str,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int = 3,
    ) -> None:
        super().__init__()
        # Two convolutions per block in three groups: k blocks per group.
        blocks, remainder = divmod(depth - 4, 6)
        if remainder or blocks < 1:
            raise UsageError(
                f"a WideResNet has 6 k + 4 layers (10, 16, 22, 28, 34, …); {depth} is not allowed"
            )
        if activation not in ACTIVATIONS:
            raise UsageError(f"unknown activation '{activation}'; known are {', '.join(ACTIVATIONS)}")
        if len(mean) != channels or len(std) != channels:
            raise UsageError(f"{len(mean)} means and {len(std)} stds were given for {channels} channels")
        make = ACTIVATIONS[activation]
        # Not persistent: the published state dicts do not hold them.
        self.register_buffer("mean", _per_channel(mean), persistent=False)
        self.register_buffer("std", _per_channel(std), persistent=False)
        self.init_conv = nn.Conv2d(channels, 16, kernel_size=3, padding=1, bias=False)
        self.layer = nn.Sequential()
        before = 16
        for after, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            self.layer.append(_Group(blocks, before, after, stride, make))
            before = after
        self.batchnorm: nn.Module = nn.BatchNorm2d(before)
        self.relu = make()
        self.logits = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify (B, channels, H, W) images in [0, 1]; return (B, C) logits."""
        features = self.layer(self.init_conv((images - self.mean) / self.std))
        # RobustBench's fixed pool of 8 would return four rows for an image of 64 pixels.
        pooled = self.relu(self.batchnorm(features)).mean(dim=(2, 3))
        logits: Tensor = self.logits(pooled)
        return logits

    def blocks(self) -> Iterator[_Block]:
        """Go through the blocks of all groups, in order."""
        for group in self.layer:
            yield from cast(_Group, group).block  # type: ignore[misc]  # torch does not say of what


class _Group(nn.Module):
    """Blocks of one width; the first changes width and resolution."""

    def __init__(self, blocks: int, before: int, after: int, stride: int, make: type[nn.Module]) -> None:
        super().__init__()
        # A generator, so that the first block draws its initial weights first.
        rest = (_Block(after, after, 1, make) for _ in range(blocks - 1))
        self.block = nn.Sequential(_Block(before, after, stride, make), *rest)

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.block(features)
        return output


class _Block(nn.Module):
    """Two 3x3 convolutions beside an identity, or beside a 1x1 convolution where the width changes."""

    def __init__(self, before: int, after: int, stride: int, make: type[nn.Module]) -> None:
        super().__init__()
        self.stride = stride
        # Of any type: a folded copy has an Identity here.
        self.batchnorm_0: nn.Module = nn.BatchNorm2d(before)
        self.relu_0 = make()
        # Padding within the convolution spares a copy, and is even on all sides at stride 1 only.
        self.conv_0 = nn.Conv2d(before, after, 3, stride=stride, padding=2 - stride, bias=False)
        self.batchnorm_1: nn.Module = nn.BatchNorm2d(after)
        self.relu_1 = make()
        self.conv_1 = nn.Conv2d(after, after, kernel_size=3, padding=1, bias=False)
        widens = before != after
        self.shortcut = nn.Conv2d(before, after, kernel_size=1, stride=stride, bias=False) if widens else None

    def forward(self, features: Tensor) -> Tensor:
        activated = self.relu_0(self.batchnorm_0(features))
        hidden = self.conv_0(activated if self.stride == 1 else _pad_end(activated))
        hidden = self.conv_1(self.relu_1(self.batchnorm_1(hidden)))
        # A widening shortcut starts after the activation, an identity before it.
        beside = features if self.shortcut is None else self.shortcut(activated)
        output: Tensor = beside + hidden
        return output


def _pad_end(features: Tensor) -> Tensor:
    """Pad with zeros for a convolution of kernel 3 and stride 2: an even size at its end only.

    As TensorFlow's `SAME`, for which the published weights were made.
    """
    height, width = features.shape[2:]
    # Left, right, top, bottom: an odd size gets one on each side.
    return F.pad(features, (width % 2, 1, height % 2, 1))


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float32).reshape(-1, 1, 1)
