"""Adversarially-balanced batches (Section 4.4, Table 14, Appendix A).

A fixed share of each shuffled batch is perturbed against the frozen classifier: a quarter each by FGSM at
eps/2, PGD at eps/2, FGSM at eps and PGD at eps. What does not divide by four stays clean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from carso_cli.attacks.fgsm import FGSM
from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.target import Model
from carso_cli.attacks.threat_model import ThreatModel

_ALL = slice(None)


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
        classifier: Model,
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

    def __call__(self, images: Tensor, labels: Tensor, seed: int, own: slice = _ALL) -> Tensor:
        """Return a share of the batch with its part of the perturbed images.

        Images are ordered FGSM eps/2, FGSM eps, PGD eps/2, PGD eps, clean; the batch is shuffled already,
        so which image meets which attack is random. Both budgets of an attack share one call. What happens
        to an image does not depend on the share it falls into.

        Args:
            images: (B, channels, H, W) clean, in [0, 1]: the whole batch.
            labels: (B,).
            seed: Seed of PGD's random starts.
            own: The share; all of it unless said otherwise.
        """
        quarter = quarter_size(len(images), self.adversarial_fraction)
        places = torch.arange(len(images), device=images.device)[own]
        budgets = torch.full((2 * quarter,), self.eps, device=images.device)
        budgets[:quarter] /= 2
        parts = []
        for position, perturb in enumerate((self._fgsm, self._pgd)):
            part = slice(2 * quarter * position, 2 * quarter * (position + 1))
            mine = places[(places >= part.start) & (places < part.stop)] - part.start
            if len(mine):
                parts.append(perturb(images[part], labels[part], budgets, mine, seed))
        return torch.cat((*parts, images[places[places >= 4 * quarter]]))

    def _fgsm(self, images: Tensor, labels: Tensor, budgets: Tensor, mine: Tensor, seed: int) -> Tensor:
        attack = FGSM(ThreatModel(self.norm, budgets[mine]))
        return attack(self.classifier, images[mine], labels[mine])

    def _pgd(self, images: Tensor, labels: Tensor, budgets: Tensor, mine: Tensor, seed: int) -> Tensor:
        def attack(eps: Tensor) -> PGD:
            return PGD(
                ThreatModel(self.norm, eps), steps=self.pgd_steps, step_size=self.pgd_step_size, seed=seed
            )

        # Starts are drawn for all, so that an image's does not depend on who else is in its share.
        start = attack(budgets).start(images)[mine]
        return attack(budgets[mine]).run_from(start, self.classifier, images[mine], labels[mine])
