"""Confidence intervals of accuracies."""

from __future__ import annotations

import math
from statistics import NormalDist, stdev

from carso_cli.errors import UsageError


def wilson(successes: float, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion.

    `successes` may be fractional: an image that a random defence gets right in 13 of 20 draws counts 0.65.
    The interval is then wider than needed, since a mean of shares varies less than a mean of zeros and ones.

    Args:
        successes: Sum over trials, in [0, trials].
        trials: Number of trials, from 1.
        level: Coverage, in (0, 1).

    Raises:
        UsageError: If the arguments are out of range.
    """
    if trials < 1 or not 0.0 <= successes <= trials or not 0.0 < level < 1.0:
        raise UsageError(f"no interval for {successes} successes in {trials} trials at level {level}")
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    share = successes / trials
    scale = 1.0 + z * z / trials
    centre = (share + z * z / (2.0 * trials)) / scale
    reach = z / scale * math.sqrt(share * (1.0 - share) / trials + z * z / (4.0 * trials * trials))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def tolerance(differences: list[float], floor: float) -> float:
    """Return what a mean difference between two measurements of the same images may come to by chance.

    Args:
        differences: One per image.
        floor: Smallest tolerance.

    Returns:
        Two standard errors of the mean, or `floor` where that is larger.
    """
    count = len(differences)
    if count < 2:
        return floor
    return max(floor, 2.0 * stdev(differences) / math.sqrt(count))
