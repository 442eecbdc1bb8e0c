from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli.attacks.losses import margin
from carso_cli.attacks.square import SquareEoT, l2_patch, patch_share
from carso_cli.attacks.target import ClassifierTarget
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.runtime.third_party import prepare

NORMS = ["linf", "l2"]


# Under linf single pixels find the very corner; under l2 the patches' shape costs up to 0.4 of the gain.
@pytest.mark.parametrize(("norm", "share"), [("linf", 0.999), ("l2", 0.6)])
def test_it_gains_a_known_share_of_the_worst_case(norm: str, share: float, problem: Any) -> None:
    radii = torch.linspace(0.2, 0.6, len(problem.images)) * problem.distance(norm)
    threat = ThreatModel(norm, radii)
    found = problem.found_by(SquareEoT(threat, queries=800, eot_samples=1))
    assert threat.contains(found, problem.images, tolerance=1e-6).all()
    before = problem.margin(problem.images)
    gain = (problem.margin(found) - before) / (problem.worst_margin(norm, radii) - before)
    assert gain.min() > share
    assert gain.max() <= 1 + 1e-4


@pytest.mark.parametrize("norm", NORMS)
def test_more_queries_never_hurt_and_the_same_seed_repeats(norm: str, digits: Any) -> None:
    model, images, labels = digits
    target = ClassifierTarget(model)
    threat = ThreatModel(norm, {"linf": 0.02, "l2": 0.1}[norm])
    margins = []
    for queries in (1, 20, 100):
        found = SquareEoT(threat, queries=queries, eot_samples=1)(target, images, labels)
        margins.append(margin(model(found), labels).mean())
    assert margins[0] < margins[1] < margins[2]
    again = SquareEoT(threat, queries=100, eot_samples=1)(target, images, labels)
    torch.testing.assert_close(again, found, rtol=0, atol=0)
    assert not torch.equal(
        SquareEoT(threat, queries=100, eot_samples=1, seed=1)(target, images, labels), found
    )


@pytest.mark.parametrize("norm", NORMS)
def test_it_raises_the_mean_margin_of_a_random_defence(
    norm: str, attacked: Any, images: Tensor, labels: Tensor
) -> None:
    threat = ThreatModel(norm, {"linf": 0.3, "l2": 1.2}[norm])
    found = SquareEoT(threat, queries=150, eot_samples=8)(attacked(), images, labels)
    assert threat.contains(found, images).all()
    judge = attacked(seed=7)
    before = judge.expected_loss(images, labels, margin, 200)
    after = judge.expected_loss(found, labels, margin, 200)
    assert (after.loss > before.loss).all()
    assert after.correct.mean() < before.correct.mean() - 0.2


def test_the_patch_is_the_articles() -> None:
    """Against the authors' code, which builds it rectangle by rectangle."""
    prepare()
    from pyautoattack.square import SquareAttack

    reference = SquareAttack(lambda images: images, norm="L2", eps=1.0, device=torch.device("cpu"))
    for side in (1, 3, 4, 7, 11):
        expected = torch.zeros(side, side)
        expected[: side // 2] = reference.eta_rectangles(side // 2, side)
        expected[side // 2 :] = -reference.eta_rectangles(side - side // 2, side)
        torch.testing.assert_close(l2_patch(side), expected / expected.norm())


def test_the_schedule_is_the_articles() -> None:
    prepare()
    from pyautoattack.square import SquareAttack

    reference = SquareAttack(lambda images: images, eps=1.0, n_queries=5000, resc_schedule=True)
    for query in range(0, 5000, 7):
        assert patch_share(query, 5000) == pytest.approx(reference.p_selection(query))
