"""The learning rate of classifier training."""

from __future__ import annotations


def one_cycle_rate(step: int, steps: int, *, peak: float, warmup_share: float) -> float:
    """Return the learning rate of one step: a linear rise from 0 to `peak`, then a linear fall to 0.

    Each step uses the rate at its middle, so that none is taken at rate 0. (Smith and Topin, 2018;
    https://arxiv.org/abs/1708.07120, with the triangular cycle of Wong, Rice and Kolter, 2020.)

    Args:
        step: Number of the step, from 0.
        steps: Steps in the whole training.
        peak: The largest rate.
        warmup_share: Share of the steps over which the rate rises, in [0, 1].
    """
    position = (step + 0.5) / steps
    if position < warmup_share:
        return peak * position / warmup_share
    return peak * (1.0 - position) / (1.0 - warmup_share)
