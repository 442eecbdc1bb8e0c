from __future__ import annotations

import math

import pytest
import torch

from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.errors import UsageError
from carso_cli.runtime.seed import generator

NORMS = ["linf", "l2"]


def test_linf_projection_clips_pixel_by_pixel() -> None:
    clean = torch.tensor([0.5, 0.05, 0.97]).view(1, 1, 1, 3)
    moved = ThreatModel("linf", 0.1).project(clean + torch.tensor([0.3, -0.3, 0.02]), clean)
    torch.testing.assert_close(moved.flatten(), torch.tensor([0.6, 0.0, 0.99]))


def test_l2_projection_shortens_and_keeps_direction() -> None:
    clean = torch.full((1, 1, 1, 2), 0.5)
    change = torch.tensor([0.3, 0.4]).view(1, 1, 1, 2)
    moved = ThreatModel("l2", 0.1).project(clean + change, clean)
    torch.testing.assert_close(moved - clean, change / 5)
    inside = clean + 0.1 * change
    torch.testing.assert_close(ThreatModel("l2", 0.1).project(inside, clean), inside)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_takes_one_radius_per_image(norm: str) -> None:
    clean = torch.full((3, 1, 2, 2), 0.5)
    radii = torch.tensor([0.0, 0.1, 0.2])
    threat = ThreatModel(norm, radii)
    moved = threat.project(clean + torch.rand(3, 1, 2, 2) + 0.3, clean)
    torch.testing.assert_close(threat.distance(moved, clean), radii)


def test_contains_sees_ball_range_and_nan() -> None:
    clean = torch.tensor([0.5, 0.5, 0.95, 0.5]).view(4, 1, 1, 1)
    moved = clean + torch.tensor([0.1, 0.11, 0.08, torch.nan]).view(4, 1, 1, 1)
    assert ThreatModel("linf", 0.1).contains(moved, clean).tolist() == [True, False, False, False]


def test_random_start_is_uniform_on_the_linf_ball() -> None:
    clean = torch.full((200, 1, 10, 10), 0.5)
    change = ThreatModel("linf", 0.2).random_start(clean, generator(0)) - clean
    assert change.abs().max() <= 0.2 + 1e-6
    assert abs(change.mean()) < 0.003
    assert change.abs().mean() == pytest.approx(0.1, abs=0.002)
    assert change.var() == pytest.approx(0.2**2 / 3, rel=0.03)


def test_random_start_is_uniform_in_the_l2_ball() -> None:
    clean = torch.full((4000, 1, 1, 3), 0.5)
    change = ThreatModel("l2", 0.2).random_start(clean, generator(0)) - clean
    lengths = change.flatten(1).norm(dim=1)
    # In d dimensions the mean length is eps d / (d + 1).
    assert lengths.mean() == pytest.approx(0.2 * 3 / 4, rel=0.02)
    assert lengths.max() <= 0.2 + 1e-6
    assert change.mean(dim=0).abs().max() < 0.006


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_repeats_and_keeps_the_range(norm: str) -> None:
    clean = torch.rand(6, 1, 4, 4).round()
    threat = ThreatModel(norm, torch.linspace(0.1, 2, 6))
    start = threat.random_start(clean, generator(3))
    assert threat.contains(start, clean).all()
    torch.testing.assert_close(start, threat.random_start(clean, generator(3)), rtol=0, atol=0)
    assert not torch.equal(start, threat.random_start(clean, generator(4)))


def test_ascent_directions() -> None:
    gradient = torch.tensor([3.0, -4.0, 0.0]).view(1, 1, 1, 3)
    assert ThreatModel("linf", 1.0).ascent_direction(gradient).flatten().tolist() == [1, -1, 0]
    torch.testing.assert_close(
        ThreatModel("l2", 1.0).ascent_direction(gradient).flatten(), torch.tensor([0.6, -0.8, 0.0])
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_l2_direction_has_unit_length_for_any_scale_of_the_gradient(scale: float) -> None:
    direction = ThreatModel("l2", 1.0).ascent_direction(torch.randn(4, 1, 3, 3) * scale)
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("norm", NORMS)
def test_unusable_gradients_give_no_direction(norm: str) -> None:
    gradient = torch.tensor([[torch.nan, torch.nan], [0.0, 0.0], [torch.nan, 2.0], [torch.inf, 1.0]])
    direction = ThreatModel(norm, 1.0).ascent_direction(gradient.view(4, 1, 1, 2)).reshape(4, 2)
    assert direction[:3].tolist() == [[0, 0], [0, 0], [0, 1]]
    assert direction[3, 0] == 1
    assert direction.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("l1", 0.1), "unknown norm 'l1'"),
        (("linf", -0.1), "not -0.1"),
        (("linf", math.nan), "not nan"),
    ],
)
def test_nonsense_is_refused(arguments: tuple[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ThreatModel(*arguments)


def test_radii_must_match_the_images() -> None:
    with pytest.raises(UsageError, match="2 radii for 3 images"):
        ThreatModel("linf", torch.tensor([0.1, 0.2])).radii(torch.zeros(3, 1, 1, 1))
