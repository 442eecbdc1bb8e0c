"""Any model as a target, attacked through one of its gradient sources; nothing is known of its inside.

    source = find_sources(model, images, eps=8 / 255)[0]
    target = SourceTarget(source, stochastic=facts.random, seed=0)

A random model draws in its own way. Each call of the target fixes the seeds of torch, numpy and the standard
library to a number of its own, so that an attack can be repeated, and no two samples are the same.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from carso_cli.attacks.gradient_sources import GradientSource
from carso_cli.attacks.losses import Loss
from carso_cli.attacks.target import VJP, ExpectedLoss, LossGradient, vjp_of
from carso_cli.runtime.seed import all_seeded

_SPREAD = 3.0
"""Median of the images' standard deviations of scores after scaling; about that of a trained classifier."""


class SourceTarget:
    """A model, random or not, whose gradients come from a source.

    Scores are multiplied by one number, which the first images attacked give. It decides nothing, and lets
    every loss work on models whose logits are tiny or huge. A number for each image would follow the scores
    as the attack moves them: with two classes no loss but the decision itself would be left.

    Args:
        source: Images to (B, C) scores, differentiably.
        stochastic: Whether two calls on the same images may differ.
        seed: Seed of the model's randomness.
    """

    def __init__(self, source: GradientSource, *, stochastic: bool, seed: int) -> None:
        self.source = source
        self.stochastic = stochastic
        self._seed = seed
        self._scale: Tensor | None = None
        self._calls = itertools.count()

    def _scores(self, images: Tensor) -> Tensor:
        """Return the (B, C) scaled scores of one sample, with a graph where gradients are on."""
        with all_seeded(self._seed, "sample", next(self._calls)):
            scores = self.source(images)
        if self._scale is None:
            spread = scores.detach().std(dim=1).nanmedian()
            self._scale = torch.where(spread > 0, _SPREAD / spread, torch.ones_like(spread))
        # Libraries write what follows from scores into tensors of the images' type.
        return (scores * self._scale).to(images.dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the (B, C) scores of one sample."""
        return self._scores(images)

    def vjp(self, images: Tensor) -> tuple[Tensor, VJP]:
        """Return the scores of one sample and the map of gradients back to the images."""
        return vjp_of(self._scores, images)

    def expected_loss(self, images: Tensor, labels: Tensor, loss: Loss, eot_samples: int) -> ExpectedLoss:
        """Return the mean loss over K = `eot_samples` calls; one, where the model is not random."""
        answers = []
        for _ in range(eot_samples if self.stochastic else 1):
            scores = self(images)
            answers.append(ExpectedLoss.of(loss(scores, labels), scores, labels))
        return ExpectedLoss(
            *(torch.stack([getattr(each, name) for each in answers]).mean(dim=0) for name in _FIELDS)
        )

    def loss_and_gradient(self, images: Tensor, labels: Tensor, loss: Loss, eot_samples: int) -> LossGradient:
        """Return the mean loss over K = `eot_samples` calls and its gradient."""
        answers = []
        for _ in range(eot_samples if self.stochastic else 1):
            leaf = images.detach().clone().requires_grad_()
            with torch.enable_grad():
                scores = self._scores(leaf)
                values = loss(scores, labels)
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
            answer = ExpectedLoss.of(values.detach(), scores.detach(), labels)
            answers.append(LossGradient(answer.loss, answer.correct, answer.saturated, gradient))
        fields = (*_FIELDS, "gradient")
        return LossGradient(
            *(torch.stack([getattr(each, name) for each in answers]).mean(dim=0) for name in fields)
        )


_FIELDS = ("loss", "correct", "saturated")
