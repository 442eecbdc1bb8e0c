"""WideResNet with pre-activation blocks (Zagoruyko and Komodakis, 2016), as RobustBench's models have it.

Module names, and so state-dict keys and the layer names of Table 7, are those of RobustBench's
`DMWideResNet`. Two differences: the last pooling is global, so that any input size gives one row an image
(theirs pools by a fixed 8), and strides pad by hand in one place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carso_cli.errors import UsageError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class _Block(nn.Module):
    """Two 3x3 convolutions with a residual; the shortcut is a 1x1 convolution where the width changes."""

    def __init__(self, before: int, after: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        # The original is written for TensorFlow's `SAME` padding, which at stride 2 pads below and right only.
        self.padding = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)
        self.batchnorm_0 = nn.BatchNorm2d(before)
        self.relu_0 = activation()
        self.conv_0 = nn.Conv2d(before, after, 3, stride=stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(after)
        self.relu_1 = activation()
        self.conv_1 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, stride=stride, bias=False) if before != after else None

    def forward(self, features: Tensor) -> Tensor:
        activated = self.relu_0(self.batchnorm_0(features))
        residual = features if self.shortcut is None else self.shortcut(activated)
        hidden = self.conv_0(F.pad(activated, self.padding))
        output: Tensor = residual + self.conv_1(self.relu_1(self.batchnorm_1(hidden)))
        return output


class _Group(nn.Module):
    """Blocks of one width; the first one changes width and resolution."""

    def __init__(
        self, blocks: int, before: int, after: int, stride: int, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        first = _Block(before, after, stride, activation)
        self.block = nn.Sequential(
            first, *(_Block(after, after, 1, activation) for _ in range(blocks - 1))
        )

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.block(features)
        return output


class WideResNet(nn.Module):
    """WideResNet for square images in [0, 1], which it standardises itself.

    Args:
        depth: Number of layers, 6 k + 4.
        width: Widening factor.
        classes: C.
        activation: `relu` or `silu`.
        mean: Per-channel mean for the standardisation.
        std: Per-channel standard deviation.
        channels: 1 or 3.

    Raises:
        UsageError: If the depth is not 6 k + 4 or the activation is unknown.
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
        blocks, remainder = divmod(depth - 4, 6)
        if remainder or blocks < 1:
            raise UsageError(f"a WideResNet has 6 k + 4 layers (10, 16, 22, 28, 34); {depth} is not one of these")
        if activation not in ACTIVATIONS:
            raise UsageError(f"unknown activation '{activation}'; known are {', '.join(ACTIVATIONS)}")
        kind = ACTIVATIONS[activation]
        widths = (16, 16 * width, 32 * width, 64 * width)
        # Not persistent: published state dicts do not hold them.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.init_conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            _Group(blocks, widths[0], widths[1], 1, kind),
            _Group(blocks, widths[1], widths[2], 2, kind),
            _Group(blocks, widths[2], widths[3], 2, kind),
        )
        self.batchnorm = nn.BatchNorm2d(widths[3])
        self.relu = kind()
        self.logits = nn.Linear(widths[3], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, channels, H, W) images in [0, 1] to (B, C) logits."""
        features = self.layer(self.init_conv((images - self.mean) / self.std))
        pooled = self.relu(self.batchnorm(features)).mean(dim=(2, 3))
        logits: Tensor = self.logits(pooled)
        return logits


def default_layers(classifier: WideResNet) -> tuple[str, ...]:
    """Return the layers of the paper's rule: every block's convolutions, and the strided shortcuts (Table 7)."""
    layers = []
    for group, stage in enumerate(classifier.layer):
        for number, block in enumerate(stage.block):
            prefix = f"layer.{group}.block.{number}"
            layers += [f"{prefix}.conv_0", f"{prefix}.conv_1"]
            if group and block.shortcut is not None:
                layers.append(f"{prefix}.shortcut")
    return tuple(layers)
