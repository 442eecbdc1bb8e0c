"""Projected gradient descent, PGD.

Title: "Towards Deep Learning Models Resistant to Adversarial Attacks" (Madry et al., 2018),
https://arxiv.org/abs/1706.06083; advertorch's implementation.
Distance: linf, l2.
Published setting (Table 14): 40 steps of 0.01 on cross-entropy, eps 4/255 and 8/255.

    attack = PGD(ThreatModel("linf", 8 / 255), steps=40, step_size=0.01, random_start=True, seed=0)
    perturbed = attack(classifier, images, labels)

On a random defence each gradient comes from one sample; `pgd_eot` averages over several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from carso_cli.attacks.attack import Attack, BestPoint, require_finite
from carso_cli.attacks.library_model import LibraryModel
from carso_cli.attacks.target import AttackTarget, Model, as_target
from carso_cli.runtime.seed import seeded
from carso_cli.runtime.third_party import prepare


@dataclass(frozen=True, eq=False, kw_only=True)
class PGD(Attack):
    """Projected gradient ascent on cross-entropy.

    Args:
        steps: Number of steps, from 1.
        step_size: In the norm's units (pixels under linf); one for all images, or (B,).
        random_start: Start from a random point of the ball rather than from the image.
        keep_best: Return the point of largest loss on the way, at the price of one more evaluation;
            otherwise the last point, as training uses.
    """

    name: ClassVar[str] = "pgd"
    steps: int
    step_size: float | Tensor
    random_start: bool = True
    keep_best: bool = False

    def __call__(self, target: AttackTarget | Model, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `Attack`."""
        return self.run_from(self.start(images), target, images, labels)

    def start(self, images: Tensor) -> Tensor:
        """Return the change that each of (B, channels, H, W) images starts with, as advertorch draws it.

        It depends on the seed, on B and on an image's place among the B, and not on the device.
        """
        if not self.random_start:
            return torch.zeros_like(images)
        prepare()
        from advertorch.attacks.utils import rand_init_delta

        # On the CPU: a GPU's generator would draw other numbers from the same seed.
        clean = images.cpu()
        with seeded(self.seed, "pgd-start"):
            radii = self._radii(images).cpu()
            change = rand_init_delta(torch.zeros_like(clean), clean, self._order, radii, 0.0, 1.0)
        # advertorch cuts a second time here; the same rounding keeps the start equal to its own bit for bit.
        inside: Tensor = (clean + change).clamp(0.0, 1.0)
        return (inside - clean).to(images.device)

    def run_from(self, start: Tensor, target: AttackTarget | Model, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images from a given start: the change of each, (B, channels, H, W)."""
        prepare()
        from advertorch.attacks.iterative_projected_gradient import perturb_iterative

        best = BestPoint(images) if self.keep_best else None
        model = LibraryModel(as_target(target), labels, self.recorder, best, direction=self.threat)
        # advertorch takes a float or a (B,) tensor here, and no tensor without axes.
        step_size = torch.as_tensor(self.step_size, dtype=images.dtype, device=images.device)
        perturbed = perturb_iterative(
            images,
            labels,
            model,
            nb_iter=self.steps,
            eps=self._radii(images),
            eps_iter=step_size.expand(len(images)),
            # Summed, so that the gradient of an image does not depend on how many others are in the batch.
            loss_fn=torch.nn.CrossEntropyLoss(reduction="sum"),
            # advertorch writes to it in place, and a caller may run twice from one start.
            delta_init=start.detach().clone(),
            ord=self._order,
        ).detach()
        # advertorch projects the change; added to the image it may round out of the ball.
        perturbed = self.threat.project(perturbed, images)
        if best is not None:
            # The library never asks about its last point.
            model(perturbed)
            perturbed = self.threat.project(best.images, images)
        return require_finite(perturbed, self.name)

    @property
    def _order(self) -> float:
        return math.inf if self.threat.norm == "linf" else 2

    def _radii(self, images: Tensor) -> Tensor:
        # advertorch divides the radius by the distance under l2: zero over zero would be NaN.
        radii = self.threat.radii(images)
        return radii if self.threat.norm == "linf" else radii.clamp(min=1e-12)
