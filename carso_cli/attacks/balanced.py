"""Adversarially-balanced batches (Section 4.4, Table 14, Appendix A).

A fixed share of each shuffled batch is perturbed against the frozen classifier: a quarter each by FGSM at
eps/2, PGD at eps/2, FGSM at eps and PGD at eps. What does not divide by four stays clean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from carso_cli.attacks.fgsm import FGSM
from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.threat import ThreatModel


def quarter_size(batch_size: int, adversarial_fraction: float) -> int:
    """Return how many images of a batch each of the four attacks perturbs."""
    return int(batch_size * adversarial_fraction + 1e-9) // 4


class BalancedBatch:
    """Perturb the leading part of a shuffled batch.

    Args:
        classifier: Frozen classifier under attack.
        norm: `linf` or `l2`.
        eps: Full perturbation budget, in pixel units.
        adversarial_fraction: Share of the batch to perturb, in [0, 1].
        pgd_steps: PGD steps.
        pgd_step_size: PGD step, in pixel units.
    """

    def __init__(
        self,
        classifier: nn.Module,
        *,
        norm: str,
        eps: float,
        adversarial_fraction: float,
        pgd_steps: int,
        pgd_step_size: float,
    ) -> None:
        self.classifier = classifier
        self.norm = norm
        self.eps = eps
        self.adversarial_fraction = adversarial_fraction
        self.pgd_steps = pgd_steps
        self.pgd_step_size = pgd_step_size

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Return the batch with its first images perturbed.

        Images are ordered FGSM eps/2, FGSM eps, PGD eps/2, PGD eps, clean; the batch is shuffled already,
        so which image meets which attack is random. Both budgets of an attack share one call.

        Args:
            images: (B, channels, H, W) clean, in [0, 1].
            labels: (B,).
            seed: Seed of PGD's random starts.
        """
        quarter = quarter_size(len(images), self.adversarial_fraction)
        if quarter == 0:
            return images
        budgets = torch.full((2 * quarter,), self.eps, device=images.device)
        budgets[:quarter] /= 2
        threat = ThreatModel(norm=self.norm, eps=budgets)
        attacks: list[Callable[[nn.Module, Tensor, Tensor], Tensor]] = [
            FGSM(threat),
            PGD(threat, steps=self.pgd_steps, step_size=self.pgd_step_size, random_start=True, seed=seed),
        ]
        parts = []
        for position, attack in enumerate(attacks):
            part = slice(2 * quarter * position, 2 * quarter * (position + 1))
            parts.append(attack(self.classifier, images[part], labels[part]))
        return torch.cat((*parts, images[4 * quarter :]))
