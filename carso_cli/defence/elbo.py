"""The purifier's loss: the negative evidence lower bound (ELBO), on batches of Section 4.4.

It is L_VAE of Section 3 and Figure 1; Section 5.1 gives the weight beta.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


class Elbo(NamedTuple):
    """Terms of the loss, each a scalar summed over the batch."""

    total: Tensor
    """bce + beta * kl, the quantity minimised."""
    bce: Tensor
    """Binary cross-entropy summed over images, channels and pixels."""
    kl: Tensor
    """KL divergence of the posterior from the standard normal prior, summed over images and latents."""


def negative_elbo(
    reconstruction: Tensor, clean: Tensor, mean: Tensor, log_variance: Tensor, beta: float
) -> Elbo:
    """Compute the summed loss of a batch.

    Args:
        reconstruction: (B, channels, H, W) in [0, 1].
        clean: (B, channels, H, W) in [0, 1], the unperturbed targets.
        mean: (B, Z) posterior mean.
        log_variance: (B, Z) posterior log-variance.
        beta: Weight of the KL term (Higgins et al., 2017).
    """
    # Summed, as the rates of Table 16 are meant for. With grey targets its least value is above 0.
    bce = F.binary_cross_entropy(reconstruction, clean, reduction="sum")
    # Closed form of KL(N(mu, sigma^2) || N(0, 1)), with log_variance = log sigma^2.
    kl = -0.5 * (1.0 + log_variance - mean.square() - log_variance.exp()).sum()
    return Elbo(bce + beta * kl, bce, kl)
