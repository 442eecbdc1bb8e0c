"""The purifier: a VAE conditional on the classifier's internal representation (Section 4.3, Appendix C.1).

Training uses all of it; inference only `condition` and `decode`, with latents from the prior.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from carso_cli.defence.conditioning import LEAKY_SLOPE, RepresentationEncoder, convolutions_for
from carso_cli.defence.decoder import Decoder
from carso_cli.errors import UsageError
from carso_cli.runtime.precision import to_float32

ENCODER_PARTS = ("input_encoder", "joint_encoder", "to_mean", "to_log_variance")
"""Submodules that only training uses (Tables 6 and 11)."""


class Purifier(nn.Module):
    """Conditional VAE over clean images.

    Args:
        layer_shapes: Layer name to (channels, height, width), in the order of the recipe.
        channels: Channels of the images, 1 or 3.
        image_size: Height and width of the images.
        mean: Per-channel mean of the training images, for the standardisation of the encoder's input.
        std: Per-channel standard deviation of the same.
        condition_features: `fcrepr` of Table 15.
        latent_features: Z, `fjoint` of Table 15; at 0, beyond the paper, nothing is encoded or random.
        layer_convolutions: Convolutions per layer encoder; by image size when None.
        input_share: Share of the input in each image of the defence, the rest being what `decode` returns;
            above 0, beyond the paper.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        layer_shapes: Mapping[str, tuple[int, ...]],
        *,
        channels: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        condition_features: int,
        latent_features: int,
        layer_convolutions: int | None = None,
        input_share: float = 0.0,
    ) -> None:
        super().__init__()
        self.condition_features = condition_features
        self.latent_features = latent_features
        self.input_share = input_share
        # Not persistent: the recipe states them, and published files do not hold them.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.representation_encoder = RepresentationEncoder(
            layer_shapes, condition_features, layer_convolutions or convolutions_for(image_size)
        )
        # Before the decoder: initial weights are drawn in this order, which a seed must keep.
        if latent_features:
            self._add_encoder(channels, image_size, condition_features)
        self.decoder = Decoder(latent_features, condition_features, channels, image_size)

    def _add_encoder(self, channels: int, image_size: int, condition_features: int) -> None:
        """Add what only training uses: the disjoint input encoder (Table 6) and the joint one (Table 11)."""
        latent = self.latent_features
        self.input_encoder = nn.Sequential()
        for before, after in ((channels, 6), (6, 12)):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            self.input_encoder.append(
                nn.Sequential(convolution, nn.BatchNorm2d(after), nn.LeakyReLU(LEAKY_SLOPE))
            )
        # Kernel 3 with stride 2 and padding 1 halves a size and rounds up.
        halved_twice = math.ceil(image_size / 4)
        self.joint_encoder = nn.Sequential(
            nn.Linear(12 * halved_twice**2 + condition_features, latent, bias=False),
            nn.BatchNorm1d(latent),
            nn.LeakyReLU(LEAKY_SLOPE),
        )
        self.to_mean = nn.Linear(latent, latent)
        # Table 11 says standard deviations; the logarithm needs no constraint to stay valid.
        self.to_log_variance = nn.Linear(latent, latent)

    def drop_encoder(self) -> None:
        """Remove what only training uses: the purifiers that the paper's authors publish come without."""
        for part in ENCODER_PARTS if self.has_encoder else ():
            delattr(self, part)

    @property
    def has_encoder(self) -> bool:
        """Whether it holds what only training uses; never so without a latent."""
        return hasattr(self, ENCODER_PARTS[0])

    def condition(self, representation: Mapping[str, Tensor]) -> Tensor:
        """Compress the internal representation: layer name to (B, c, h, w) gives (B, F)."""
        return to_float32(self.representation_encoder(representation))

    def encode(self, images: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images in [0, 1], (B, channels, H, W), jointly with their condition (Tables 6 and 11).

        Returns:
            Mean and log-variance of the approximate posterior, (B, Z) each.

        Raises:
            UsageError: If the encoder was dropped.
        """
        if self.latent_features == 0:
            # Of no latents, so that their KL term is 0.
            return images.new_zeros(len(images), 0), images.new_zeros(len(images), 0)
        if not self.has_encoder:
            raise UsageError("this purifier has no encoder: it can purify, and not be trained")
        # Only the encoder's input is standardised (Appendix C.1): targets stay in [0, 1].
        compressed = self.input_encoder((images - self.mean) / self.std).flatten(1)
        joint = self.joint_encoder(torch.cat((compressed, condition), dim=1))
        return to_float32(self.to_mean(joint)), to_float32(self.to_log_variance(joint))

    def decode(self, latents: Tensor, condition: Tensor) -> Tensor:
        """Decode (M, Z) latents with (M, F) conditions into images (M, channels, H, W) in [0, 1]."""
        images: Tensor = self.decoder(latents, condition)
        return images

    def forward(
        self, images: Tensor, representation: Mapping[str, Tensor], noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct a batch along the training path.

        Args:
            images: (B, channels, H, W) in [0, 1], clean or perturbed.
            representation: Internal representation of the same images.
            noise: (B, Z) standard normal draws for the reparameterisation.

        Returns:
            Reconstructions (B, channels, H, W), mean (B, Z), log-variance (B, Z).
        """
        condition = self.condition(representation)
        mean, log_variance = self.encode(images, condition)
        # Reparameterised: the noise is given, so gradients reach mean and variance and steps repeat.
        latents = mean + noise * torch.exp(0.5 * log_variance)
        return self.decode(latents, condition), mean, log_variance
