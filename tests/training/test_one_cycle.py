from __future__ import annotations

import pytest

from carso_cli.training.one_cycle import one_cycle_rate


def test_rises_to_the_peak_and_falls_to_nothing() -> None:
    rates = [one_cycle_rate(step, 10, peak=0.2, warmup_share=0.4) for step in range(10)]
    expected = [0.025, 0.075, 0.125, 0.175, *(0.2 * (5.5 - place) / 6 for place in range(6))]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_may_only_rise_or_only_fall(share: float) -> None:
    rates = [one_cycle_rate(step, 4, peak=1.0, warmup_share=share) for step in range(4)]
    assert rates == pytest.approx([0.125, 0.375, 0.625, 0.875] if share else [0.875, 0.625, 0.375, 0.125])


def test_rates_add_up_to_half_the_peak_at_every_step() -> None:
    rates = [one_cycle_rate(step, 1000, peak=0.3, warmup_share=0.25) for step in range(1000)]
    assert sum(rates) == pytest.approx(150.0)
    assert max(rates) == pytest.approx(0.3, rel=1e-2)
    assert min(rates) > 0
