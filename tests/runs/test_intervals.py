from __future__ import annotations

import pytest
from scipy.stats import binomtest

from carso_cli.errors import UsageError
from carso_cli.runs.intervals import tolerance, wilson


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
