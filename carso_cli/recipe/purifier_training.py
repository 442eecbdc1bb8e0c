"""The recipe's `training` section: how `carso train-purifier` trains (Section 4.4, Tables 14 and 16)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from carso_cli.recipe.section import (
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Section,
    Text,
)


class AttackMix(Section):
    """Adversarially balanced batches: FGSM and PGD at eps/2 and eps, evenly (Section 4.4, Table 14)."""

    adversarial_fraction: Fraction = 0.5
    pgd_steps: PositiveInt = 40
    pgd_step_size: Positive = 0.01
    reuse: PositiveInt = 1
    """Epochs that share their perturbed images; the paper makes new ones for every batch."""
    attacks: Annotated[tuple[Literal["fgsm", "pgd"], ...], Field(min_length=1)] = ("fgsm", "pgd")
    """Attacks, each at every strength; fewer are ablations of the paper's Appendix A."""
    strengths: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 1.0)
    """Perturbation sizes as parts of eps."""
    homogeneous: bool = False
    """Perturb whole batches by one attack of one strength, or none, not a part of each (Appendix A)."""
    eps_convention: Literal["pixels", "release"] = "pixels"
    """`release` follows the authors' code in place of the paper: eps divided by the mean channel deviation,
    and counts of perturbed images rounded down on each of 8 devices."""

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        for key in ("attacks", "strengths"):
            if len(set(getattr(self, key))) != len(getattr(self, key)):
                raise ValueError(f"{key} names an entry twice")
        return self


class AdversarialTraining(Section):
    """Training through the whole defence, for the objectives `adversarial` and `both`; beyond the paper.

    A fraction of each batch is perturbed at the recipe's eps by PGD on the exact view of the whole defence;
    the loss is the cross-entropy of the defence on the batch.
    """

    adversarial_fraction: Fraction = 1.0
    steps: PositiveInt = 5
    """Steps of the attack, each 2.5 eps / steps long; a single one, 1.25 eps."""
    n_samples: PositiveInt = 1
    """N: reconstructions per image, in every step of the attack and in the loss."""
    trades_weight: Positive | None = None
    """Kept for runs that were trained with TRADES (Zhang et al., 2019), where it is 1/lambda: they load and
    evaluate; `train-purifier` refuses it."""
    augment: bool = False
    """Shift the images of a batch, and mirror them where `classifier.training.flip` allows it."""
    targets: Literal["labels", "classifier"] = "labels"
    """What the loss and its attack aim at: the labels, or the frozen classifier's own soft answers on the
    clean images, for which unlabelled images would do."""
    elbo_weight: Positive = 1e-3
    """For `both`: weight of the negative ELBO, which is in the hundreds of nats per image."""


class Optimiser(Section):
    """RAdam and Lookahead (Table 16)."""

    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    lookahead_steps: PositiveInt = 6
    lookahead_decay: Fraction = 0.8
    average_decay: Fraction = 0.0
    """Decay per step of an exponential moving average of the weights, which is then used and saved in place
    of Lookahead's slow weights; 0 leaves it out, as the paper does."""


class LearningRate(Section):
    """Linear warm-up, plateau, linear annealing; stepped once per epoch (Table 16)."""

    # These rates are for losses summed over a batch of 5120, not averaged.
    initial: Positive = 5e-9
    plateau: Positive = 0.064
    final: Positive = 4.346e-4
    warmup_epochs: NonNegativeInt = 25
    plateau_epochs: NonNegativeInt = 25
    annealing_epochs: NonNegativeInt = 150


class BetaIncrease(Section):
    """Weight of the KL term: 0, then a linear increase to 1 between two epochs (Table 16)."""

    first_epoch: NonNegativeInt = 25
    last_epoch: NonNegativeInt = 34

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.last_epoch < self.first_epoch:
            raise ValueError(f"last_epoch {self.last_epoch} comes before first_epoch {self.first_epoch}")
        return self


class Training(Section):
    """Training of the purifier (Table 16)."""

    objective: Literal["elbo", "adversarial", "both"] = "elbo"
    """`elbo` is the paper's; `adversarial`, through the whole defence, and `both` are beyond the paper."""
    initial: Text | None = None
    """A trained purifier.safetensors to start from, for the same classifier and layers."""
    epochs: PositiveInt = 200
    batch_size: Annotated[int, Field(ge=2, strict=True)] = 5120
    """Global batch size, over all devices; batch normalisation needs two images."""
    learning_rate: LearningRate = LearningRate()
    beta_increase: BetaIncrease = BetaIncrease()
    optimiser: Optimiser = Optimiser()
    attack_mix: AttackMix = AttackMix()
    adversarial: AdversarialTraining = AdversarialTraining()
    save_every_minutes: NonNegative = 10.0
    """Time between two saved states of a training, of the classifier's too: what a kill loses at most."""
    save_every_epochs: PositiveInt = 1
    """Kept for recipes that name it; states are saved by time."""
    keep: Literal["last", "best"] = "last"
    """The epoch whose purifier is the result: the last, as in the paper, or the one with the highest mean of
    the accuracies on held-out images, clean and, where training goes through the defence, attacked."""

    @model_validator(mode="after")
    def _starts_from_a_trained_purifier(self) -> Self:
        if self.objective != "elbo" and self.initial is None:
            raise ValueError(
                f"objective '{self.objective}' starts from a purifier trained on the ELBO, whose batch "
                "statistics it keeps; name its purifier.safetensors in 'initial'"
            )
        return self

    @model_validator(mode="after")
    def _epochs_add_up(self) -> Self:
        rate = self.learning_rate
        parts = rate.warmup_epochs + rate.plateau_epochs + rate.annealing_epochs
        if parts != self.epochs:
            raise ValueError(
                f"warm-up, plateau and annealing last {parts} epochs together; epochs is {self.epochs}"
            )
        return self
