"""Learning rates, the weight of the KL term, Lookahead (Table 16), and a moving average of the weights.

Steps and epochs count from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def learning_rate(
    epoch: int,
    *,
    initial: float,
    plateau: float,
    final: float,
    warmup_epochs: int,
    plateau_epochs: int,
    annealing_epochs: int,
) -> float:
    """Return the purifier's learning rate in an epoch: linear warm-up, plateau, linear annealing.

    The first epoch has `initial`, the first after the warm-up and the first of the annealing `plateau`, the
    last of the annealing `final`.
    """
    if epoch < warmup_epochs:
        return initial + (plateau - initial) * epoch / warmup_epochs
    annealed = epoch - warmup_epochs - plateau_epochs
    if annealed < 0 or annealing_epochs == 0:
        return plateau
    # - 1: the last epoch of the annealing has the rate `final`, not the one after it; so has a sole one.
    share = annealed / (annealing_epochs - 1) if annealing_epochs > 1 else 1.0
    return plateau + (final - plateau) * min(share, 1.0)


def kl_weight(epoch: int, *, first_epoch: int, last_epoch: int) -> float:
    """Return beta in an epoch: 0 up to `first_epoch`, then linear, 1 from `last_epoch`."""
    # In this order: where both epochs are the same, there is no line to divide by.
    if epoch >= last_epoch:
        return 1.0
    if epoch <= first_epoch:
        return 0.0
    return (epoch - first_epoch) / (last_epoch - first_epoch)


def one_cycle_rate(
    step: int,
    steps: int,
    *,
    peak: float,
    warmup_share: float,
    initial: float = 0.0,
    final: float = 0.0,
    cosine: bool = False,
) -> float:
    """Return the classifier's learning rate at a step: a rise to `peak`, then a fall.

    Linear, the triangular cycle of Wong, Rice and Kolter (2020), after Smith and Topin (2018),
    https://arxiv.org/abs/1708.07120; or along half a cosine each way, as the paper's authors train.

    Args:
        step: Number of the step.
        steps: Steps in the whole training.
        peak: The largest rate.
        warmup_share: Share of the steps over which the rate rises, in [0, 1].
        initial: Rate at the start.
        final: Rate at the end.
        cosine: Rise and fall along a cosine.
    """
    # The middle of the step: its start would be rate 0 for the first one. The cosine is the authors'.
    position = (step + (0.0 if cosine else 0.5)) / steps
    end, part = (initial, position) if position < warmup_share else (final, 1.0 - position)
    length = warmup_share if position < warmup_share else 1.0 - warmup_share
    if cosine:
        return end + (peak - end) * (1.0 - math.cos(math.pi * part / length)) / 2.0
    return end + (peak - end) * part / length


class MovingAverage:
    """Exponential moving average of weights.

    Args:
        parameters: The weights by name.
        decay: Share of the average that a step keeps, in [0, 1]. Early on it keeps less, (1 + t) / (10 + t)
            at step t, so that the initial weights are soon forgotten.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, decay: float) -> None:
        self.weights = dict(parameters)
        self.mean = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.decay = decay

    @torch.no_grad()
    def step(self, taken: int) -> None:
        """Move towards the weights after `taken` steps of the whole training."""
        decay = min(self.decay, (1 + taken) / (10 + taken))
        for name, weight in self.weights.items():
            self.mean[name].lerp_(weight.detach(), 1.0 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by name."""
        return self.mean

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy averages in place, onto the device of the weights."""
        for name, mean in self.mean.items():
            mean.copy_(tensors[name])


class Lookahead:
    """Slow weights that follow the optimiser's fast ones (Zhang et al., 2019b, Algorithm 1; Table 16).

    Every `steps` calls of `step`, slow <- slow + decay * (fast - slow), and the fast weights restart from
    there. Call it after the inner optimiser's own step.

    Args:
        parameters: The fast weights by name, updated in place.
        steps: Inner steps between two synchronisations.
        decay: Share of the way that the slow weights move, in [0, 1]; alpha in the source, `averaging decay`
            in Table 16.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, steps: int, decay: float) -> None:
        self.fast = dict(parameters)
        self.slow = {name: parameter.detach().clone() for name, parameter in self.fast.items()}
        self.steps = steps
        self.decay = decay
        # Of the whole training: a resumed run must synchronise at the same steps.
        self.taken = 0

    @torch.no_grad()
    def step(self) -> None:
        """Count one inner step, and synchronise when it is due."""
        self.taken += 1
        if self.taken % self.steps:
            return
        for name, fast in self.fast.items():
            self.slow[name].lerp_(fast.detach(), self.decay)
            # In place: the inner optimiser finds its moments, which stay as they are, by these tensors.
            fast.copy_(self.slow[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the slow weights by name; `taken` is stored apart, since it is no tensor."""
        return self.slow

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy slow weights in place, onto the device of the fast ones."""
        for name, slow in self.slow.items():
            slow.copy_(tensors[name])
