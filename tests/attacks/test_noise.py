from __future__ import annotations

import pytest
import torch

from carso_cli.attacks.noise import NoPerturbation, RandomNoise
from carso_cli.attacks.target import ClassifierTarget
from carso_cli.attacks.threat_model import ThreatModel

IMAGES = torch.full((400, 1, 8, 8), 0.5)
LABELS = torch.zeros(400, dtype=torch.long)
WEIGHTS = torch.linspace(-1, 2, 64)


def projected(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1) @ WEIGHTS


# Per pixel, noise has mean zero and this variance; so a linear model's logit moves by 0 on average, and
# with the standard deviation sqrt(variance) * |w|.
@pytest.mark.parametrize(("norm", "variance"), [("linf", 0.2**2 / 3), ("l2", 0.2**2 / (64 + 2))])
def test_noise_equals_its_expectation(norm: str, variance: float) -> None:
    threat = ThreatModel(norm, 0.2)
    target = ClassifierTarget(lambda images: images.flatten(1))
    noisy = RandomNoise(threat, seed=0)(target, IMAGES, LABELS)
    assert threat.contains(noisy, IMAGES).all()
    change = noisy - IMAGES
    assert float(change.square().mean()) == pytest.approx(variance, rel=0.02)
    moved = projected(noisy) - projected(IMAGES)
    spread = variance**0.5 * float(WEIGHTS.norm())
    assert abs(float(moved.mean())) < 3 * spread / 400**0.5
    assert float(moved.std()) == pytest.approx(spread, rel=0.15)


def test_noise_is_cut_to_the_range_and_repeats_from_its_seed() -> None:
    target = ClassifierTarget(lambda images: images.flatten(1))
    images = IMAGES.clone()
    images[:, :, :4] = 0.0
    attack = RandomNoise(ThreatModel("linf", torch.linspace(0, 0.2, 400)), seed=1)
    noisy = attack(target, images, LABELS)
    assert noisy.min() == 0.0
    assert (noisy[:, :, :4] == 0).float().mean() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(attack(target, images, LABELS), noisy, rtol=0, atol=0)


def test_no_perturbation_returns_a_copy() -> None:
    unchanged = NoPerturbation(ThreatModel("linf", 0.2))(
        ClassifierTarget(lambda images: images), IMAGES, LABELS
    )
    torch.testing.assert_close(unchanged, IMAGES, rtol=0, atol=0)
    assert unchanged.data_ptr() != IMAGES.data_ptr()
