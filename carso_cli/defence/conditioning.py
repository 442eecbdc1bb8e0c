"""Conditioning: the internal representation compressed into the condition c (Section 4.3, Tables 8-10).

Each layer's output goes through its own convolutional network; the flattened results are concatenated and
compressed by one fully-connected layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from carso_cli.defence.representation import IMAGE
from carso_cli.errors import UsageError

LEAKY_SLOPE = 0.2
# Class, distillation and register tokens before those of the image.
_PREFIX_TOKENS = 8
# 8 GiB in float32: four times as much in training, with gradients and the optimiser's two moments.
_MOST_WEIGHTS = 2**31


def convolutions_for(image_size: int) -> int:
    """Return the convolutions per layer encoder: 3 up to 32 pixels (Table 8), 4 above (Table 9)."""
    return 3 if image_size <= 32 else 4


def layer_encoder(channels: int, size: int, convolutions: int) -> tuple[nn.Sequential, int]:
    """Build the encoder of one layer's output (Tables 8 and 9).

    Convolution k has 1/2^k of the layer's channels, rounded up. The paper's have no padding and shrink the
    map by 2 pixels each; here a map that is too small for that is padded.

    Args:
        channels: Channels of the layer's output ([ci] in the tables).
        size: Height and width of the layer's output.
        convolutions: Number of convolutions.

    Returns:
        The module, and the number of features it gives once flattened.
    """
    blocks: list[nn.Module] = []
    width = channels
    for depth in range(1, convolutions + 1):
        halved = math.ceil(channels / 2**depth)
        padding = 0 if size >= 3 else 1
        # Without bias: the batch normalisation behind it would subtract it again.
        convolution = nn.Conv2d(width, halved, 3, padding=padding, bias=False)
        blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(halved), nn.LeakyReLU(LEAKY_SLOPE)))
        width, size = halved, size - 2 + 2 * padding
    return nn.Sequential(*blocks), width * size * size


def image_encoder(channels: int, size: int) -> tuple[nn.Sequential, int]:
    """Build the encoder of the image itself, where it is part of the condition: beyond the paper.

    Three convolutions of stride 2 with a decoder's widths; arguments and result as of `layer_encoder`.
    """
    blocks: list[nn.Module] = []
    for width in (32, 64, 128):
        convolution = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.LeakyReLU(LEAKY_SLOPE)))
        # Kernel 3 with stride 2 and padding 1 halves a size and rounds up.
        channels, size = width, math.ceil(size / 2)
    return nn.Sequential(*blocks), channels * size * size


def map_shape(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Return (channels, size, size) of a layer's output as the encoder reads it; None if it is no square map.

    Tokens (T, D) of a transformer are the largest square map of D channels that T holds; those before it,
    such as the class token, are left out. Of (size, size, channels), as Swin gives, the channels come first.
    """
    if len(shape) == 2 and (side := math.isqrt(shape[0])) > 1 and shape[0] - side**2 <= _PREFIX_TOKENS:
        return shape[1], side, side
    if len(shape) == 3 and shape[1] == shape[2]:
        return shape[0], shape[1], shape[2]
    if len(shape) == 3 and shape[0] == shape[1]:
        return shape[2], shape[0], shape[1]
    return None


def as_map(output: Tensor) -> Tensor:
    """Turn a layer's output (B, ...) into (B, channels, size, size), by the rule of `map_shape`."""
    if output.ndim == 3:
        side = math.isqrt(output.shape[1])
        image = output[:, output.shape[1] - side**2 :].transpose(1, 2)
        return image.reshape(image.shape[0], image.shape[1], side, side)
    return output if output.shape[2] == output.shape[3] else output.permute(0, 3, 1, 2)


class RepresentationEncoder(nn.Module):
    """Compress the internal representation into the condition.

    Args:
        layer_shapes: Layer name to (channels, height, width) of its output, in the order of the recipe.
        condition_features: `fcrepr` of Table 15.
        convolutions: Convolutions per layer encoder.

    Raises:
        UsageError: If a layer's output is not a square multi-channel image.
    """

    def __init__(
        self, layer_shapes: Mapping[str, tuple[int, ...]], condition_features: int, convolutions: int
    ) -> None:
        super().__init__()
        # Names beside a list of modules, since layer names have dots and keys of a ModuleDict must not.
        self.layers = tuple(layer_shapes)
        encoders, features = [], 0
        for layer, shape in layer_shapes.items():
            if (found := map_shape(tuple(shape))) is None:
                raise UsageError(
                    f"layer '{layer}' gives outputs of shape {tuple(shape)} per image; the purifier needs "
                    "square multi-channel maps (channels, size, size), or tokens (T, D) that are one"
                )
            # By halving channels, as for a layer, one channel of an image would be left.
            encoder, encoded = (
                image_encoder(found[0], found[1])
                if layer == IMAGE
                else layer_encoder(found[0], found[1], convolutions)
            )
            encoders.append(encoder)
            features += encoded
        if features * condition_features > _MOST_WEIGHTS:
            raise UsageError(
                f"the layers give {features:,} features, which {condition_features} condition features would "
                f"need {features * condition_features:,} weights to compress; at most {_MOST_WEIGHTS:,} are "
                "possible",
                hint="name layers with smaller maps, or lower purifier.condition_features",
            )
        # 147,040 for the paper's classifier at 32 pixels, 377,600 at 64.
        self.concatenated_features = features
        self.layer_encoders = nn.ModuleList(encoders)
        self.compressor = nn.Sequential(
            nn.Linear(features, condition_features, bias=False),
            nn.BatchNorm1d(condition_features),
            nn.LeakyReLU(LEAKY_SLOPE),
        )

    recompute = False
    """Whether a backward pass computes the layers' encodings again, one after the other: nearly all that
    training keeps in memory lies in them. The result is the same, and so are the batch statistics."""

    def forward(self, representation: Mapping[str, Tensor]) -> Tensor:
        """Map layer name to (B, channels, h, w) into the condition, (B, condition_features)."""

        def encode(layer: str, encoder: nn.Module) -> Tensor:
            encoded: Tensor = encoder(as_map(representation[layer])).flatten(1)
            return encoded

        encoded = [
            self._recomputed(encode, layer, encoder)
            if self.recompute and torch.is_grad_enabled()
            else encode(layer, encoder)
            # In the recipe's order, whatever the mapping's: the compressor's columns belong to it.
            for layer, encoder in zip(self.layers, self.layer_encoders, strict=True)
        ]
        condition: Tensor = self.compressor(torch.cat(encoded, dim=1))
        return condition

    @staticmethod
    def _recomputed(encode: Callable[[str, nn.Module], Tensor], layer: str, encoder: nn.Module) -> Tensor:
        contexts = nullcontext(), kept_statistics(encoder)
        # Nothing in here is random.
        encoded: Tensor = checkpoint(
            encode, layer, encoder, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: contexts
        )
        return encoded


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Leave running statistics as they are, whatever passes are made inside the context."""
    kept = [(part, dict(part._buffers)) for part in module.modules()]
    # Copies in their place: written in place, the originals would change under a graph that holds them.
    for part, buffers in kept:
        part._buffers.update({name: one.clone() for name, one in buffers.items() if one is not None})
    try:
        yield
    finally:
        for part, buffers in kept:
            part._buffers.update(buffers)
