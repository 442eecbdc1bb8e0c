"""AutoAttack's parts find adversarial examples of a linear model exactly where there are any."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli.attacks.autoattack import FAB, AutoAttack, LibraryAPGD, Square
from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.target import ClassifierTarget
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.errors import UsageError

pytestmark = pytest.mark.slow  # each runs the whole library

NORMS = ["linf", "l2"]


def fooled(problem: Any, found: Tensor) -> Tensor:
    wrong: Tensor = problem(found).argmax(dim=1) != problem.labels
    return wrong


@pytest.mark.parametrize("norm", NORMS)
def test_fab_fools_iff_the_boundary_is_nearer_than_eps(norm: str, problem: Any) -> None:
    for factor in (0.98, 1.02):
        threat = ThreatModel(norm, factor * problem.distance(norm))
        found = problem.found_by(FAB(threat, steps=30))
        assert threat.contains(found, problem.images, tolerance=1e-6).all()
        assert bool((fooled(problem, found) == (factor > 1)).all())


@pytest.mark.parametrize("norm", NORMS)
def test_fab_returns_the_surface_of_the_ball_where_it_cannot_fool(norm: str, problem: Any) -> None:
    radii = 0.5 * problem.distance(norm)
    found = problem.found_by(FAB(ThreatModel(norm, radii), steps=30))
    # On a linear model the nearest point of the other class lies along the worst direction.
    torch.testing.assert_close(problem.margin(found), problem.worst_margin(norm, radii), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("norm", NORMS)
def test_square_gains_a_part_of_the_worst_case_and_never_more(norm: str, problem: Any) -> None:
    distance = problem.distance(norm)
    eps = float(distance.median())
    found = problem.found_by(Square(ThreatModel(norm, eps), queries=400))
    wrong = fooled(problem, found)
    assert not wrong[distance > eps].any()
    gain = problem.margin(found) - problem.margin(problem.images)
    possible = problem.worst_margin(norm, eps) - problem.margin(problem.images)
    # 400 queries end with patches of 2x2 pixels, and the library's never start at the last place.
    assert (gain / possible)[~wrong].min() > 0.2
    assert (gain / possible).max() <= 1 + 1e-4


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_the_ensemble_fools_iff_it_can_and_returns_the_best_loss_point_elsewhere(
    norm: str, classes: int, linear: Any
) -> None:
    problem = linear(classes)
    distance = problem.distance(norm)
    eps = float(distance.sort().values[5:7].mean())
    threat = ThreatModel(norm, eps)
    found = problem.found_by(AutoAttack(threat, steps=30, queries=100))
    assert threat.contains(found, problem.images, tolerance=1e-6).all()
    wrong = fooled(problem, found)
    assert wrong.tolist() == (distance < eps).tolist()
    torch.testing.assert_close(
        problem.margin(found)[~wrong], problem.worst_margin(norm, eps)[~wrong], rtol=0, atol=1e-4
    )


def test_the_ensemble_leaves_images_that_are_wrong_already(three_classes: Any) -> None:
    problem = three_classes
    labels = torch.tensor([1, 0] * 6)
    found = AutoAttack(ThreatModel("linf", 0.001), steps=5, queries=5)(
        ClassifierTarget(problem), problem.images, labels
    )
    torch.testing.assert_close(found[::2], problem.images[::2])
    assert not torch.equal(found[1::2], problem.images[1::2])


def test_images_in_any_memory_layout_and_parameters_left_alone(digits: Any) -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 10)
    )
    _, images, labels = digits
    images = images[:6].to(memory_format=torch.channels_last)
    found = AutoAttack(ThreatModel("linf", 0.3), steps=5, queries=5)(
        ClassifierTarget(network), images, labels[:6]
    )
    assert found.shape == images.shape
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    "build",
    [
        lambda threat: LibraryAPGD(threat, loss="ce", steps=5, restarts=2, seed=3),
        lambda threat: FAB(threat, steps=5, restarts=2, seed=3),
        lambda threat: Square(threat, queries=5, seed=3),
        lambda threat: AutoAttack(threat, steps=3, queries=5, seed=3),
    ],
    ids=["apgd", "fab", "square", "aa"],
)
def test_runs_repeat_and_leave_the_global_random_state_alone(
    build: Callable[[ThreatModel], Any], digits: Any
) -> None:
    model, images, labels = digits
    attack = build(ThreatModel("linf", 0.1))
    before = torch.random.get_rng_state()
    first = attack(ClassifierTarget(model), images[:20], labels[:20])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    torch.testing.assert_close(
        attack(ClassifierTarget(model), images[:20], labels[:20]), first, rtol=0, atol=0
    )


def test_the_librarys_warnings_go_to_the_recorder(caplog: pytest.LogCaptureFixture) -> None:
    recorder = GradientRecorder()
    LibraryAPGD(ThreatModel("linf", 0.1), loss="dlr", steps=3, recorder=recorder)(
        ClassifierTarget(lambda images: (100 * images.flatten(1)[:, :4]).round()),
        torch.rand(5, 1, 2, 2),
        torch.zeros(5, dtype=torch.long),
    )
    assert any("5 points with zero gradient" in message for message in recorder.messages)
    assert recorder.summary().zero == 1.0
    assert not caplog.records
    assert not logging.getLogger("auto-attack").handlers


def test_what_cannot_work_is_refused(
    three_classes: Any, attacked: Any, images: Tensor, labels: Tensor
) -> None:
    target = ClassifierTarget(three_classes)
    many = ThreatModel("linf", torch.full((12,), 0.1))
    for attack in (AutoAttack(many, steps=3, queries=3), Square(many, queries=3)):
        with pytest.raises(UsageError, match=f"'{attack.name}' takes one eps for all images, not 12"):
            attack(target, three_classes.images, three_classes.labels)
    with pytest.raises(UsageError, match="'fab' is for deterministic models"):
        FAB(ThreatModel("linf", 0.1), steps=3)(attacked(), images, labels)
    with pytest.raises(UsageError, match="the model has 2"):
        LibraryAPGD(ThreatModel("linf", 0.1), loss="dlr", steps=3)(
            ClassifierTarget(lambda points: points.flatten(1)[:, :2]), images, labels
        )
