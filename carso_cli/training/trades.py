"""A loss that trades accuracy for robustness, of the purifier seen through the whole defence.

Title: "Theoretically Principled Trade-off between Robustness and Accuracy" (Zhang et al., 2019),
https://arxiv.org/abs/1901.08573. Beyond the CARSO paper, whose loss is the ELBO.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def trades_loss(logits: Tensor, clean_logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Return the loss of a batch whose first images are perturbed, summed over images.

    Every image counts with its cross-entropy, but the first M, whose clean selves are given: these with that
    of the clean one and with `weight` times KL(P(clean) || P(perturbed)). Gradients go to both.

    Args:
        logits: (B, C) of the batch.
        clean_logits: (M, C) of the first M images unperturbed; with M = 0 the loss is plain cross-entropy.
        labels: (B,) int64.
        weight: Weight of the divergence (1/lambda in the paper).
    """
    count = len(clean_logits)
    unperturbed = torch.cat((clean_logits, logits[count:]))
    clean, perturbed = clean_logits.log_softmax(dim=1), logits[:count].log_softmax(dim=1)
    divergence = F.kl_div(perturbed, clean, reduction="sum", log_target=True)
    return F.cross_entropy(unperturbed, labels, reduction="sum") + weight * divergence
