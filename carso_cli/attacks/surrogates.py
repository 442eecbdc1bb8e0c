"""Attacks on a stand-in for the defence, whose examples are then scored on the defence itself.

Titles and links: "Obfuscated Gradients Give a False Sense of Security" (Athalye, Carlini and Wagner,
2018), https://arxiv.org/abs/1802.00420 (straight-through, there BPDA); "On Adaptive Attacks to
Adversarial Example Defenses" (Tramèr et al., 2020), https://arxiv.org/abs/2002.08347.
Distance, defaults and shapes: those of the attack that is made on the stand-in.

    attack = Transfer("transfer-logit-mean", logit_mean, APGD(threat, loss="ce", steps=100, draws=20))
    perturbed = attack(defence_target, images, labels)

Stand-ins (N samples per image): `logit_mean` and `probability_mean` replace the aggregation,
`single_sample` drops it, `log_probability` looks at the other view, `straight_through` runs the purifier
but takes its gradient to be the identity, `bare_classifier` has no purifier, `frozen` always draws the
same latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.attacks.attack import Attack
from carso_cli.attacks.defence_target import AttackedDefence, DefenceTarget
from carso_cli.attacks.target import AttackTarget, ClassifierTarget
from carso_cli.errors import UsageError

Surrogate = Callable[[DefenceTarget], AttackTarget]


@dataclass(frozen=True, eq=False)
class Transfer:
    """An attack on a stand-in.

    Args:
        name: Name in results.
        stand_in: Makes the stand-in from the target.
        attack: What is run on it.
    """

    name: str
    surrogate: Surrogate
    attack: Attack

    def __call__(self, target: AttackTarget, images: Tensor, labels: Tensor) -> Tensor:
        """Perturb images; see `carso_cli.attacks.attack.Attack`.

        Raises:
            UsageError: If the target is not a defence.
        """
        if not isinstance(target, DefenceTarget):
            raise UsageError(f"attack '{self.name}' needs the defence, not a bare classifier")
        return self.attack(self.surrogate(target), images, labels)


def logit_mean(target: DefenceTarget) -> AttackTarget:
    """Average the samples' logits."""
    return target.seen_as(lambda sample_logits: sample_logits.mean(dim=1))


def probability_mean(target: DefenceTarget) -> AttackTarget:
    """Average the samples' softmax outputs, as logarithms."""
    return target.seen_as(
        lambda sample_logits: (
            F.log_softmax(sample_logits, dim=2).logsumexp(dim=1) - math.log(sample_logits.shape[1])
        )
    )


def single_sample(target: DefenceTarget) -> AttackTarget:
    """Classify one reconstruction; the mean loss over draws is then that of the samples one by one."""
    return target.seen_as(lambda sample_logits: sample_logits.mean(dim=1), n_samples=1)


def log_probability(target: DefenceTarget) -> AttackTarget:
    """Look at log P."""
    return target.seen_as("log-probability")


def bare_classifier(target: DefenceTarget) -> AttackTarget:
    """Leave the purifier out."""
    return ClassifierTarget(target.defence.classifier)


def frozen(target: DefenceTarget) -> AttackTarget:
    """Draw latents once, for attacks that need a deterministic model."""
    return target.frozen()


def straight_through(target: DefenceTarget) -> AttackTarget:
    """Purify, but differentiate as if every reconstruction were the image itself."""
    return replace(target, defence=_StraightThrough(target.defence))


class _StraightThrough:
    """The defence with the image in the place of the condition."""

    def __init__(self, defence: AttackedDefence) -> None:
        self.defence = defence
        self.classifier = defence.classifier
        self.second_classifier = defence.second_classifier
        self.n_samples = defence.n_samples

    def condition(self, images: Tensor) -> Tensor:
        return images

    def draw_latents(
        self, batch: int, n_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.defence.draw_latents(batch, n_samples, generator)

    def decode(self, condition: Tensor, latents: Tensor) -> Tensor:
        with torch.no_grad():
            purified = self.defence.decode(self.defence.condition(condition), latents)
        # Adds zero, and carries the gradient.
        return purified + (condition - condition.detach())[:, None]

    def sample_logits(self, condition: Tensor, latents: Tensor) -> Tensor:
        logits = self.second_classifier(self.decode(condition, latents).flatten(0, 1))
        return logits.reshape(*latents.shape[:2], -1)

    def aggregate(self, sample_logits: Tensor, view: str = "log-probability") -> Tensor:
        return self.defence.aggregate(sample_logits, view)
