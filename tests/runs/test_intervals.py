from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from carso_cli.errors import UsageError
from carso_cli.runs.intervals import paired_difference, resolution, tolerance, wilson


@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 1), (1, 1), (3, 10), (97, 100), (100, 100), (613, 1000)]
)
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_is_scipys(successes: int, trials: int, level: float) -> None:
    expected = binomtest(successes, trials).proportion_ci(level, method="wilson")
    assert wilson(successes, trials, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_fraction_lies_between_its_neighbours() -> None:
    low, high = wilson(12.5, 20)
    assert wilson(12, 20)[0] < low < wilson(13, 20)[0]
    assert wilson(12, 20)[1] < high < wilson(13, 20)[1]


@pytest.mark.parametrize(
    ("successes", "trials", "level"), [(1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)]
)
def test_nonsense_is_refused(successes: float, trials: int, level: float) -> None:
    with pytest.raises(UsageError, match=f"{successes} successes in {trials} trials at level {level}"):
        wilson(successes, trials, level)


def test_tolerance_is_two_standard_errors() -> None:
    # Mean 0.25, sample variance 0.25, standard error 0.25.
    assert tolerance([0.0, 0.0, 0.0, 1.0], 0.01) == pytest.approx(0.5)
    assert tolerance([0.2, 0.2, 0.2], 0.01) == 0.01
    assert tolerance([1.0], 0.03) == 0.03


def pairs(both: int, ours: int, theirs: int, neither: int) -> tuple[list[float], list[float]]:
    """Answers of two models by how many images each of them, or both, got right."""
    return (
        [1.0] * (both + ours) + [0.0] * (theirs + neither),
        [1.0] * both + [0.0] * ours + [1.0] * theirs + [0.0] * neither,
    )


@pytest.mark.parametrize(
    ("both", "ours", "theirs", "neither"), [(53, 8, 16, 9), (0, 0, 0, 5), (40, 30, 2, 28), (1, 0, 1, 0)]
)
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_paired_difference_is_wald_with_half_an_image_in_each_cell(
    both: int, ours: int, theirs: int, neither: int, level: float
) -> None:
    # The covariance form of Wald's interval, from the table with its halves: another route to Agresti-Min.
    cells = np.array([[both, ours], [theirs, neither]]) + 0.5
    share = cells / cells.sum()
    first, second = share[0].sum(), share[:, 0].sum()
    covariance = share[0, 0] * share[1, 1] - share[0, 1] * share[1, 0]
    variance = first * (1 - first) + second * (1 - second) - 2 * covariance
    reach = norm.ppf(0.5 + level / 2) * math.sqrt(variance / cells.sum())
    expected = ((ours - theirs) / (both + ours + theirs + neither), first - second - reach)
    found = paired_difference(*pairs(both, ours, theirs, neither), level)
    assert found[:2] == pytest.approx((expected[0], max(-1.0, expected[1])), abs=1e-12)
    assert found[2] == pytest.approx(min(1.0, first - second + reach), abs=1e-12)


def test_pairing_narrows_what_two_separate_intervals_leave_open() -> None:
    ours, theirs = pairs(600, 40, 10, 350)
    _, low, high = paired_difference(ours, theirs)
    separate = wilson(sum(ours), 1000)[0] - wilson(sum(theirs), 1000)[1]
    assert separate < 0.0 < low
    assert high - low < 0.5 * (wilson(sum(ours), 1000)[1] - separate - wilson(sum(theirs), 1000)[0])


def test_paired_difference_of_shares_is_the_bootstraps_over_images() -> None:
    draws = np.random.default_rng(3)
    skill = draws.beta(2, 1, 400)
    ours = draws.binomial(20, skill) / 20
    theirs = (draws.random(400) < 0.9 * skill).astype(float)
    found = paired_difference(list(ours), list(theirs))
    resampled = (ours - theirs)[draws.integers(0, 400, (20000, 400))].mean(axis=1)
    assert found[0] == pytest.approx((ours - theirs).mean(), abs=1e-12)
    assert found[1:] == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.005)
    turned = paired_difference(list(theirs), list(ours))
    assert turned == pytest.approx((-found[0], -found[2], -found[1]), abs=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs", "level"),
    [([], [], 0.95), ([1.0], [1.0, 0.0], 0.95), ([1.5], [0.0], 0.95), ([1.0], [0.0], 1.0)],
)
def test_what_is_no_pair_is_refused(ours: list[float], theirs: list[float], level: float) -> None:
    wanted = f"no paired interval for {len(ours)} and {len(theirs)} accuracies at level {level}"
    with pytest.raises(UsageError, match=wanted):
        paired_difference(ours, theirs, level)


@pytest.mark.parametrize(("count", "floor"), [(1, 0.02), (4, 0.02), (10, 0.02), (60, 0.01), (1000, 0.02)])
def test_resolution_is_the_fewest_images_that_exceed_the_tolerance(count: int, floor: float) -> None:
    def exceeds(differing: int) -> bool:
        values = [1.0] * differing + [0.0] * (count - differing)
        return sum(values) / count > tolerance(values, floor)

    assert resolution(count, floor) == next(number for number in range(count + 1) if exceeds(number))
