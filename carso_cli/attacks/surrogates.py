"""Attacks on a surrogate of the defence, whose examples are then scored on the defence itself.

Titles and links: "Obfuscated Gradients Give a False Sense of Security" (Athalye, Carlini and Wagner,
2018), https://arxiv.org/abs/1802.00420 (straight-through, there BPDA); "On Adaptive Attacks to
Adversarial Example Defenses" (Tramèr et al., 2020), https://arxiv.org/abs/2002.08347.
Distance, defaults and shapes: those of the attack on the surrogate.

    attack = Transfer(threat, surrogate="transfer-logit-mean", attack=APGD(threat, loss="ce", steps=100))
    perturbed = attack(defence_target, images, labels)

`SURROGATES`, at the end, makes each surrogate from the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.attacks.attack import Attack
from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.random_defence import RandomDefence
from carso_cli.attacks.target import AttackTarget, ClassifierTarget
from carso_cli.errors import UsageError


@dataclass(frozen=True, eq=False, kw_only=True)
class Transfer(Attack):
    """An attack on a surrogate.

    Args:
        surrogate: Which surrogate, a key of `SURROGATES`; also the name in results.
        attack: What is run on it.
    """

    surrogate: str
    attack: Attack

    @property
    def name(self) -> str:
        """Name in results."""
        return self.surrogate

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `Attack`.

        Raises:
            UsageError: If the target is not a defence.
        """
        if not isinstance(target, DefenceTarget):
            raise UsageError(f"attack '{self.name}' needs the defence, not a bare classifier")
        return self.attack(SURROGATES[self.surrogate](target), images, labels)


class _StraightThrough:
    """The defence with the image as its own condition, and the identity as the purifier's Jacobian."""

    def __init__(self, defence: RandomDefence) -> None:
        self.defence = defence
        self.classifier = defence.classifier
        self.second_classifier = defence.second_classifier
        self.n_samples = defence.n_samples
        self.draw_latents = defence.draw_latents
        self.aggregate = defence.aggregate

    def condition(self, images: Tensor) -> Tensor:
        return images

    def decode(self, condition: Tensor, latents: Tensor) -> Tensor:
        with torch.no_grad():
            purified = self.defence.decode(self.defence.condition(condition), latents)
        # Adds zero, and carries the gradient.
        return purified + (condition - condition.detach())[:, None]

    def sample_logits(self, condition: Tensor, latents: Tensor) -> Tensor:
        # Written out, as `defence.sample_logits` would call the defence's own decode and not this one.
        logits = self.second_classifier(self.decode(condition, latents).flatten(0, 1))
        return logits.reshape(*latents.shape[:2], -1)


def _logit_mean(sample_logits: Tensor) -> Tensor:
    return sample_logits.mean(dim=1)


def _probability_mean(sample_logits: Tensor) -> Tensor:
    # The mean of the samples' softmax outputs, as a logarithm.
    return F.log_softmax(sample_logits, dim=2).logsumexp(dim=1) - math.log(sample_logits.shape[1])


SURROGATES: dict[str, Callable[[DefenceTarget], AttackTarget]] = {
    # Other aggregations, (B, N, C) sample logits to (B, C).
    "transfer-logit-mean": lambda target: target.seen_as(_logit_mean),
    "transfer-probability-mean": lambda target: target.seen_as(_probability_mean),
    # No aggregation: EoT then averages the losses of reconstructions one by one.
    "transfer-single-sample": lambda target: target.seen_as(_logit_mean, n_samples=1),
    # The view that is log P.
    "transfer-log-probability": lambda target: target.seen_as("log-probability"),
    # Purifies, but differentiates as if every reconstruction were the image itself.
    "transfer-straight-through": lambda target: replace(target, defence=_StraightThrough(target.defence)),
    # Latents drawn once: FAB needs a deterministic model.
    "fab": DefenceTarget.frozen,
    # No purifier.
    "transfer-classifier": lambda target: ClassifierTarget(target.defence.classifier),
}
