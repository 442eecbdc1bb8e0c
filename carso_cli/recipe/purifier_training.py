"""The recipe's `training` section: how `carso train-purifier` trains (Section 4.4, Tables 14 and 16)."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from carso_cli.recipe.section import Count, NonNegative, Positive, Section, Share, Whole


class AttackMix(Section):
    """Adversarially balanced batches: FGSM and PGD at eps/2 and eps, evenly (Section 4.4, Table 14)."""

    adversarial_fraction: Share = 0.5
    pgd_steps: Count = 40
    pgd_step_size: Positive = 0.01
    reuse: Count = 1
    """Epochs that share their perturbed images; the paper makes them anew for every batch."""


class Optimiser(Section):
    """RAdam and Lookahead (Table 16)."""

    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    lookahead_steps: Count = 6
    lookahead_decay: Share = 0.8


class LearningRate(Section):
    """Linear warm-up, plateau, linear annealing; stepped once an epoch (Table 16)."""

    initial: Positive = 5e-9
    plateau: Positive = 0.064
    final: Positive = 4.346e-4
    warmup_epochs: Whole = 25
    plateau_epochs: Whole = 25
    annealing_epochs: Whole = 150


class BetaIncrease(Section):
    """Weight of the KL term: 0, then a linear increase to 1 between two epochs (Table 16)."""

    first_epoch: Whole = 25
    last_epoch: Whole = 34

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.last_epoch < self.first_epoch:
            raise ValueError(f"last_epoch {self.last_epoch} comes before first_epoch {self.first_epoch}")
        return self


class Training(Section):
    """Training of the purifier (Table 16)."""

    epochs: Count = 200
    batch_size: Count = 5120
    """Global batch size, over all devices."""
    learning_rate: LearningRate = LearningRate()
    beta_increase: BetaIncrease = BetaIncrease()
    optimiser: Optimiser = Optimiser()
    attack_mix: AttackMix = AttackMix()
    save_every_epochs: Count = 1

    @model_validator(mode="after")
    def _epochs_add_up(self) -> Self:
        rate = self.learning_rate
        parts = rate.warmup_epochs + rate.plateau_epochs + rate.annealing_epochs
        if parts != self.epochs:
            raise ValueError(
                f"warm-up, plateau and annealing last {parts} epochs together; epochs is {self.epochs}"
            )
        return self
