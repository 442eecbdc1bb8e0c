"""Adversarially-balanced batches (Section 4.4, Appendix A, Table 14).

A fixed share of each shuffled batch is perturbed against the frozen classifier: a quarter each by FGSM at
eps/2, FGSM at eps, PGD at eps/2 and PGD at eps. What does not divide by four stays clean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carso_cli.attacks.fgsm import FGSM
from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.classifiers.inference import inference_copy
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.precision import in_precision
from carso_cli.runtime.reporter import SILENT, Reporter

_ALL = slice(None)


def quarter_size(batch_size: int, adversarial_fraction: float) -> int:
    """Return how many images of a batch each of the four attacks perturbs."""
    # In floating point 0.58 * 100 is 57.99…
    return int(batch_size * adversarial_fraction + 1e-9) // 4


class BalancedBatch:
    """Perturbs the leading part of a shuffled batch, as `training.attack_mix` says.

    Args:
        recipe: The recipe; the full perturbation budget is that of its threat model.
        classifier: Frozen classifier under attack, copied.
        reporter: Told when it cannot be compiled.
    """

    def __init__(self, recipe: Recipe, classifier: nn.Module, reporter: Reporter = SILENT) -> None:
        self.threat = recipe.threat
        self.mix = recipe.training.attack_mix
        # Attacks need logits alone; the folded copy's layer outputs are not those of the representation.
        copied = inference_copy(classifier, compile=recipe.compile, reporter=reporter)
        self.model = in_precision(copied, recipe.precision)

    def __call__(self, images: Tensor, labels: Tensor, seed: int, shard: slice = _ALL) -> Tensor:
        """Return a shard of the batch with its part of the perturbed images.

        Images are ordered FGSM eps/2, FGSM eps, PGD eps/2, PGD eps, clean; the batch is shuffled already,
        so which image meets which attack is random. An image is perturbed in the same way in every shard.

        Args:
            images: (B, channels, H, W) clean, in [0, 1]: the whole batch.
            labels: (B,).
            seed: Seed of PGD's random starts.
            shard: Which images to return.
        """
        # From the whole batch's size: rounding in each shard would change the mix.
        half = 2 * quarter_size(len(images), self.mix.adversarial_fraction)
        positions = torch.arange(len(images), device=images.device)[shard]
        # Both budgets of an attack share one call: a batch of twice the size is faster than two.
        budgets = torch.full((half,), self.threat.eps, device=images.device)
        budgets[: half // 2] /= 2
        parts = []
        for first, perturb in ((0, self._fgsm), (half, self._pgd)):
            # Places within the attack's part of the whole batch.
            chosen = positions[(positions >= first) & (positions < first + half)] - first
            # A small shard may hold no image of an attack.
            if len(chosen):
                part = slice(first, first + half)
                parts.append(perturb(images[part], labels[part], budgets, chosen, seed))
        # In the order of positions, since the caller pairs them row by row with its clean shard.
        return torch.cat((*parts, images[positions[positions >= 2 * half]]))

    def _fgsm(self, images: Tensor, labels: Tensor, budgets: Tensor, chosen: Tensor, _seed: int) -> Tensor:
        # FGSM draws nothing, so the shard's own images suffice.
        attack = FGSM(ThreatModel(self.threat.norm, budgets[chosen]))
        return attack(self.model, images[chosen], labels[chosen])

    def _pgd(self, images: Tensor, labels: Tensor, budgets: Tensor, chosen: Tensor, seed: int) -> Tensor:
        def attack(eps: Tensor) -> PGD:
            threat = ThreatModel(self.threat.norm, eps)
            return PGD(threat, steps=self.mix.pgd_steps, step_size=self.mix.pgd_step_size, seed=seed)

        # Starts are drawn for all, so that an image's does not depend on who else is in its shard.
        start = attack(budgets).start(images)[chosen]
        return attack(budgets[chosen]).run_from(start, self.model, images[chosen], labels[chosen])
