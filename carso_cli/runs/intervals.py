"""Confidence intervals of accuracies, and of the difference between two on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

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
    # Put as `not a <= x <= b`, so that NaN is refused too.
    if trials < 1 or not 0.0 <= successes <= trials or not 0.0 < level < 1.0:
        raise UsageError(f"no interval for {successes} successes in {trials} trials at level {level}")
    # Half of what the interval leaves out lies on either side.
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    share = successes / trials
    scale = 1.0 + z * z / trials
    centre = (share + z * z / (2.0 * trials)) / scale
    reach = z / scale * math.sqrt(share * (1.0 - share) / trials + z * z / (4.0 * trials * trials))
    # At 0 and at `trials` rounding may lead just out of [0, 1].
    return max(0.0, centre - reach), min(1.0, centre + reach)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
    """Return how much more accurate one model is than another on the same images, with its interval.

    The interval is that of Agresti and Min (2005, Statistics in Medicine 24, 729-740) for matched
    proportions: half an image is added to each of the four outcomes of a pair, so that it has a width even
    where no two answers differ. For zeros and ones only the discordant pairs count, as in McNemar's test; a
    share, such as 13 of 20 draws of a random defence, enters by its own difference.

    Args:
        ours: Accuracy of each image, in [0, 1].
        theirs: That of the other model, in the same order.
        level: Coverage, in (0, 1).

    Returns:
        Mean of `ours - theirs`, lower end, upper end; all in [-1, 1].

    Raises:
        UsageError: If there is no image, the lengths differ, or a value or the level is out of range.
    """
    count = len(ours)
    in_range = all(0.0 <= value <= 1.0 for value in (*ours, *theirs))
    if count == 0 or count != len(theirs) or not in_range or not 0.0 < level < 1.0:
        raise UsageError(f"no paired interval for {count} and {len(theirs)} accuracies at level {level}")
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    # `fsum` rounds once, so that the order of the images does not count.
    total, squares = math.fsum(differences), math.fsum(value * value for value in differences)
    # Of the four halves, one has difference +1 and one -1: two pairs more, the squares one more.
    pairs = count + 2
    # The added pairs draw it towards 0: the interval is not centred on the mean that is returned.
    centre = total / pairs
    reach = NormalDist().inv_cdf(0.5 + level / 2.0) * math.sqrt(squares + 1.0 - total * centre) / pairs
    return fmean(differences), max(-1.0, centre - reach), min(1.0, centre + reach)


def resolution(count: int, floor: float) -> int:
    """Return how many of `count` images must differ, one way and wholly, to exceed `tolerance(…, floor)`."""
    for differing in range(1, count):
        # Of zeros and ones the standard error needs no list.
        error = math.sqrt(differing * (count - differing) / (count - 1)) / count
        if differing / count > max(floor, 2.0 * error):
            return differing
    return count


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
