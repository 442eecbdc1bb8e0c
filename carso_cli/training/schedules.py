"""Learning rate and beta by epoch (Table 16). Epochs count from 0; both are constant within one."""

from __future__ import annotations


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
    """Return the learning rate of an epoch: linear warm-up, plateau, linear annealing.

    The first epoch has `initial`, the first after the warm-up `plateau`, the last of the annealing `final`.
    """
    if epoch < warmup_epochs:
        return initial + (plateau - initial) * epoch / warmup_epochs
    annealed = epoch - warmup_epochs - plateau_epochs + 1
    if annealed <= 0 or annealing_epochs == 0:
        return plateau
    return plateau + (final - plateau) * min(annealed / annealing_epochs, 1.0)


def kl_weight(epoch: int, *, first_epoch: int, last_epoch: int) -> float:
    """Return beta for an epoch: 0 up to `first_epoch`, then linear, 1 from `last_epoch` on."""
    if epoch >= last_epoch:
        return 1.0
    if epoch <= first_epoch:
        return 0.0
    return (epoch - first_epoch) / (last_epoch - first_epoch)
