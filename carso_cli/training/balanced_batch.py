"""Adversarially-balanced batches (Section 4.4, Appendix A, Table 14).

A fixed share of each shuffled batch is perturbed against the frozen classifier: a quarter each by FGSM at
eps/2, FGSM at eps, PGD at eps/2 and PGD at eps. What does not divide by four stays clean. Other attacks and
strengths, and homogeneous batches, are the ablations of Appendix A.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carso_cli.attacks.fgsm import FGSM
from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.classifiers.inference import inference_copy
from carso_cli.recipe.purifier_training import AttackMix
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.precision import in_precision
from carso_cli.runtime.reporter import SILENT, Reporter
from carso_cli.runtime.seed import generator

_ALL = slice(None)
_RELEASE_DEVICES = 8
"""GPUs of the authors' machine; on the 4 of scenario (b) its batch is split into the same counts."""


def part_size(mix: AttackMix, batch_size: int) -> int:
    """Return how many images of a balanced batch each attack perturbs at each strength."""
    parts = len(mix.attacks) * len(mix.strengths)
    devices = _RELEASE_DEVICES if mix.eps_convention == "release" else 1
    # In floating point 0.58 * 100 is 57.99…
    return devices * (int(batch_size // devices * mix.adversarial_fraction + 1e-9) // parts)


def gradients_per_image(mix: AttackMix, batch_size: int) -> float:
    """Return how many gradients of the classifier the attacks of an epoch take, per image of it."""
    each = part_size(mix, batch_size) * len(mix.strengths) / batch_size
    if mix.homogeneous:
        each = mix.adversarial_fraction / len(mix.attacks)
    return sum(each * (mix.pgd_steps if attack == "pgd" else 1) for attack in mix.attacks)


class BalancedBatch:
    """Perturbs the leading part of a shuffled batch, as `training.attack_mix` says.

    Args:
        recipe: The recipe; the full perturbation budget is that of its threat model.
        classifier: Frozen classifier under attack, copied.
        reporter: Told when it cannot be compiled.
    """

    def __init__(self, recipe: Recipe, classifier: nn.Module, reporter: Reporter = SILENT) -> None:
        self.norm, self.mix = recipe.threat.norm, recipe.training.attack_mix
        deviation = sum(recipe.data.std) / len(recipe.data.std)
        self.eps = recipe.threat.eps / (deviation if self.mix.eps_convention == "release" else 1.0)
        # Attacks need logits alone; the folded copy's layer outputs are not those of the representation.
        copied = inference_copy(classifier, compile=recipe.compile, reporter=reporter)
        self.model = in_precision(copied, recipe.precision)

    def __call__(self, images: Tensor, labels: Tensor, seed: int, shard: slice = _ALL) -> Tensor:
        """Return a shard of the batch with its part of the perturbed images.

        Images are ordered FGSM eps/2, FGSM eps, PGD eps/2, PGD eps, clean; the batch is shuffled already,
        so which image meets which attack is random. A homogeneous batch is all of one of these. An image is
        perturbed in the same way in every shard.

        Args:
            images: (B, channels, H, W) clean, in [0, 1]: the whole batch.
            labels: (B,).
            seed: Seed of PGD's random starts, and of a homogeneous batch's attack.
            shard: Which images to return.
        """
        positions = torch.arange(len(images), device=images.device)[shard]
        parts, first = [], 0
        for attack, sizes in self._sizes(len(images), seed).items():
            # All budgets of an attack share one call: a batch of twice the size is faster than two.
            budgets = torch.cat(
                [
                    torch.full((size,), self.eps * strength, device=images.device)
                    for size, strength in zip(sizes, self.mix.strengths, strict=True)
                ]
            )
            part = slice(first, first + len(budgets))
            # Places within the attack's part of the whole batch.
            chosen = positions[(positions >= part.start) & (positions < part.stop)] - first
            # A small shard may hold no image of an attack.
            if len(chosen):
                perturb = self._pgd if attack == "pgd" else self._fgsm
                parts.append(perturb(images[part], labels[part], budgets, chosen, seed))
            first = part.stop
        # In the order of positions, since the caller pairs them row by row with its clean shard.
        return torch.cat((*parts, images[positions[positions >= first]]))

    def _sizes(self, count: int, seed: int) -> dict[str, list[int]]:
        """Return how many images each attack perturbs at each strength, of a whole batch of `count`."""
        attacks, strengths = self.mix.attacks, self.mix.strengths
        # From the whole batch's size: rounding in each shard would change the mix.
        sizes = [part_size(self.mix, count)] * (len(attacks) * len(strengths))
        if self.mix.homogeneous:
            drawn = float(torch.rand((), generator=generator(seed, "kind of batch")))
            # As many batches as there would be perturbed images, evenly by attack and strength.
            part = self.mix.adversarial_fraction / len(sizes)
            sizes = [count * (place * part <= drawn < (place + 1) * part) for place in range(len(sizes))]
        return {
            attack: sizes[number * len(strengths) : (number + 1) * len(strengths)]
            for number, attack in enumerate(attacks)
        }

    def _fgsm(self, images: Tensor, labels: Tensor, budgets: Tensor, chosen: Tensor, _seed: int) -> Tensor:
        # FGSM draws nothing, so the shard's own images suffice.
        attack = FGSM(ThreatModel(self.norm, budgets[chosen]))
        return attack(self.model, images[chosen], labels[chosen])

    def _pgd(self, images: Tensor, labels: Tensor, budgets: Tensor, chosen: Tensor, seed: int) -> Tensor:
        def attack(eps: Tensor) -> PGD:
            threat = ThreatModel(self.norm, eps)
            return PGD(threat, steps=self.mix.pgd_steps, step_size=self.mix.pgd_step_size, seed=seed)

        # Starts are drawn for all, so that an image's does not depend on who else is in its shard.
        start = attack(budgets).start(images)[chosen]
        return attack(budgets[chosen]).run_from(start, self.model, images[chosen], labels[chosen])
