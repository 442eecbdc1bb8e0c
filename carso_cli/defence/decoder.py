"""The decoder: latent and condition to a reconstruction in [0, 1] (Section 4.3, Tables 12 and 13)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carso_cli.defence.conditioning import LEAKY_SLOPE
from carso_cli.runtime.precision import to_float32

_WIDTHS = (256, 256, 128, 64, 32)


def upsampling_plan(image_size: int) -> tuple[int, tuple[int, ...], int]:
    """Choose the decoder's sizes for an image size.

    Up to 32 pixels the last convolution has kernel 2 and removes one pixel (Table 12: 3, 5, 9, 17, 33, 32);
    above, it has kernel 3 and keeps the size (Table 13: 4, 8, 16, 32, 64, 64). A transposed convolution of
    stride 2 takes n pixels to 2n - 1, or to 2n with output padding 1, so every size can be reached.

    Returns:
        Height and width of the first feature map, output padding of the 4 blocks, last kernel size.
    """
    last_kernel = 2 if image_size <= 32 else 3
    # Backwards from the image: with kernel 2 and padding 1 the last convolution removes a pixel.
    size = image_size + 1 if last_kernel == 2 else image_size
    paddings: list[int] = []
    for _ in range(len(_WIDTHS) - 1):
        # 2n - 1 is odd, so an even size takes the output padding.
        paddings.append(1 - size % 2)
        size = (size + 1) // 2
    return size, tuple(reversed(paddings)), last_kernel


class Decoder(nn.Module):
    """Decode (latent, condition) pairs.

    Args:
        latent_features: Z, `fjoint` of Table 15.
        condition_features: `fcrepr` of Table 15.
        channels: Channels of the reconstruction, 1 or 3.
        image_size: Height and width of the reconstruction.
    """

    def __init__(self, latent_features: int, condition_features: int, channels: int, image_size: int) -> None:
        super().__init__()
        size, paddings, last_kernel = upsampling_plan(image_size)
        self.stem = nn.Sequential(
            nn.Linear(latent_features + condition_features, _WIDTHS[0] * size * size),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Unflatten(1, (_WIDTHS[0], size, size)),
        )
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.ConvTranspose2d(before, after, 3, 2, padding=1, output_padding=extra, bias=False),
                    nn.BatchNorm2d(after),
                    nn.LeakyReLU(LEAKY_SLOPE),
                )
                for before, after, extra in zip(_WIDTHS[:-1], _WIDTHS[1:], paddings, strict=True)
            )
        )
        # With bias, unlike the blocks: no batch normalisation follows.
        self.last = nn.ConvTranspose2d(_WIDTHS[-1], channels, last_kernel, stride=1, padding=1)

    def forward(self, latents: Tensor, condition: Tensor) -> Tensor:
        """Map (M, Z) and (M, F) to reconstructions (M, channels, H, W) in [0, 1]."""
        features = self.blocks(self.stem(torch.cat((latents, condition), dim=1)))
        # In float32: a bfloat16 sigmoid rounds to 0 or 1, of which the loss takes the logarithm.
        return to_float32(self.last(features)).sigmoid()
