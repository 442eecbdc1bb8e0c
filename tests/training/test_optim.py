from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import beta
from torch.distributions import Normal, kl_divergence

from carso_cli.defence.elbo import negative_elbo
from carso_cli.recipe.load import load_recipe
from carso_cli.training.mixup import mix_images, mixed_cross_entropy
from carso_cli.training.optim import Lookahead, kl_weight, learning_rate, one_cycle_rate
from carso_cli.training.schedule import classifier_rate


def rate(epoch: int) -> float:
    return learning_rate(
        epoch,
        initial=5e-9,
        plateau=0.064,
        final=4.346e-4,
        warmup_epochs=25,
        plateau_epochs=25,
        annealing_epochs=150,
    )


def test_learning_rate_of_table_16() -> None:
    assert rate(0) == pytest.approx(5e-9)
    assert rate(10) == pytest.approx(5e-9 + (0.064 - 5e-9) * 10 / 25)
    assert [rate(epoch) for epoch in range(25, 50)] == [0.064] * 25
    assert rate(50) == 0.064
    assert rate(51) == pytest.approx(0.064 + (4.346e-4 - 0.064) / 149)
    assert rate(199) == pytest.approx(4.346e-4)


def test_learning_rate_without_warmup_or_annealing() -> None:
    flat = learning_rate(
        7, initial=1e-9, plateau=0.1, final=1e-4, warmup_epochs=0, plateau_epochs=8, annealing_epochs=0
    )
    assert flat == 0.1


def test_kl_weight_of_table_16() -> None:
    weights = [kl_weight(epoch, first_epoch=25, last_epoch=34) for epoch in (0, 25, 26, 33, 34, 199)]
    assert weights == pytest.approx([0, 0, 1 / 9, 8 / 9, 1, 1])
    assert kl_weight(3, first_epoch=3, last_epoch=3) == 1.0


def test_elbo_against_float64_and_torch_distributions() -> None:
    reconstruction = torch.rand(5, 3, 4, 4) * 0.9 + 0.05
    clean = torch.rand(5, 3, 4, 4)
    mean, log_variance = torch.randn(5, 6), torch.randn(5, 6)
    loss = negative_elbo(reconstruction, clean, mean, log_variance, beta=0.3)
    p, t = reconstruction.double(), clean.double()
    bce = -(t * p.log() + (1 - t) * (1 - p).log()).sum()
    posterior = Normal(mean.double(), (0.5 * log_variance.double()).exp())
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(loss.bce.double(), bce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.kl.double(), kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.total.double(), bce + 0.3 * kl, rtol=1e-5, atol=1e-5)


def test_lookahead_moves_slow_weights_every_few_steps() -> None:
    weight = torch.tensor([1.0], requires_grad=True)
    lookahead = Lookahead({"weight": weight}, steps=3, decay=0.8)
    for value in (2.0, 4.0):
        weight.data.fill_(value)
        lookahead.step()
        assert weight.item() == value
        assert lookahead.slow["weight"].item() == 1.0
    weight.data.fill_(6.0)
    lookahead.step()
    assert lookahead.slow["weight"].item() == pytest.approx(1.0 + 0.8 * 5.0)
    assert weight.item() == pytest.approx(5.0)


def test_one_cycle_rises_to_the_peak_and_falls_to_nothing() -> None:
    rates = [one_cycle_rate(step, 10, peak=0.2, warmup_share=0.4) for step in range(10)]
    expected = [0.025, 0.075, 0.125, 0.175, *(0.2 * (5.5 - place) / 6 for place in range(6))]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_cycle_may_only_rise_or_only_fall(share: float) -> None:
    rates = [one_cycle_rate(step, 4, peak=1.0, warmup_share=share) for step in range(4)]
    assert rates == pytest.approx([0.125, 0.375, 0.625, 0.875] if share else [0.875, 0.625, 0.375, 0.125])


def test_one_cycle_rates_add_up_to_half_the_peak_at_every_step() -> None:
    rates = [one_cycle_rate(step, 1000, peak=0.3, warmup_share=0.25) for step in range(1000)]
    assert sum(rates) == pytest.approx(150.0)
    assert max(rates) == pytest.approx(0.3, rel=1e-2)
    assert min(rates) > 0


def test_the_authors_cosine_cycle() -> None:
    # 120 epochs of 10 steps: 40 up from 5e-6, 80 down to 1e-4, as the rates before each of their steps.
    def theirs(step: int) -> float:
        start, end, offset, length = (
            (5e-6, 0.045, step, 400) if step < 400 else (0.045, 1e-4, step - 400, 800)
        )
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * offset / length))

    section = load_recipe("cifar10").classifier.training
    rates = [classifier_rate(section, step, 1200) for step in range(1200)]
    assert rates == pytest.approx([theirs(step) for step in range(1200)])
    assert (rates[0], rates[400]) == pytest.approx((5e-6, 0.045))


def test_mixtures_have_the_losses_of_both_labels_by_their_shares() -> None:
    images, labels = torch.rand(64, 1, 4, 4), torch.arange(64) % 5
    mixed, partners, share = mix_images(images, labels, 0.2, seed=4)
    assert 0 < share <= 0.5
    for row in range(64):
        # The one image of which this share makes up the mixture.
        partner = (mixed[row] - (1 - share) * images[row]) / share
        match = (images - partner).abs().flatten(1).amax(1).argmin()
        torch.testing.assert_close(images[match], partner, rtol=0, atol=1e-4)
        assert partners[row] == labels[match]
    logits = torch.randn(64, 5)
    target = torch.nn.functional.one_hot(labels, 5) * (1 - share)
    target = (target + torch.nn.functional.one_hot(partners, 5) * share) * 0.9 + 0.1 / 5
    expected = -(target * logits.log_softmax(1)).sum()
    torch.testing.assert_close(mixed_cross_entropy(logits, labels, partners, share, 0.1), expected)
    same, _, none = mix_images(images, labels, 0.0, seed=4)
    assert (same is images, none) == (True, 0.0)


def test_shares_of_mixup_are_drawn_from_its_beta_distribution() -> None:
    shares = [mix_images(torch.rand(2, 1, 1, 1), torch.tensor([0, 1]), 0.2, seed)[2] for seed in range(2000)]
    # Folded at a half: E min(x, 1 - x), by quadrature of Beta(0.2, 0.2).
    grid = torch.linspace(1e-6, 0.5, 2_000_001, dtype=torch.float64)
    mass = torch.from_numpy(beta(0.2, 0.2).cdf(grid.numpy()))
    mean = float(((grid[1:] + grid[:-1]) / 2 * mass.diff()).sum() * 2)
    assert sum(shares) / 2000 == pytest.approx(mean, abs=0.015)
