"""Mixup: convex mixtures of images and of their losses (Zhang et al., 2018; https://arxiv.org/abs/1710.09412)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.runtime.seed import derive_seed, generator


def mix_images(images: Tensor, labels: Tensor, alpha: float, seed: int) -> tuple[Tensor, Tensor, float]:
    """Mix each image of a batch with another by one share for the whole batch.

    Args:
        images: (B, channels, H, W).
        labels: (B,).
        alpha: Of the share's distribution, Beta(alpha, alpha); with 0 nothing is mixed.
        seed: Decides share and partners.

    Returns:
        The mixtures, the partners' labels, and the partners' share in [0, 1/2].
    """
    if alpha == 0:
        return images, labels, 0.0
    share = float(np.random.default_rng(derive_seed(seed, "mixup share")).beta(alpha, alpha))
    # The smaller: an image and its partner are drawn alike, so this is the same distribution of mixtures.
    share = min(share, 1.0 - share)
    partners = torch.randperm(len(images), generator=generator(seed, "mixup partners")).to(images.device)
    return images.lerp(images[partners], share), labels[partners], share


def mixed_cross_entropy(
    logits: Tensor, labels: Tensor, partners: Tensor, share: float, smoothing: float
) -> Tensor:
    """Return the sum over images of the cross-entropies to both labels, weighted by their shares."""
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    if share == 0.0:
        return loss
    other = F.cross_entropy(logits, partners, label_smoothing=smoothing, reduction="sum")
    return (1.0 - share) * loss + share * other
