"""Auto-PGD takes the steps of the authors' implementation on a deterministic model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli.attacks.apgd import APGD
from carso_cli.attacks.losses import Loss, cross_entropy, dlr, margin
from carso_cli.attacks.pgd_eot import PGDEoT
from carso_cli.attacks.target import ClassifierTarget, LossGradient
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.runtime.seed import generator
from carso_cli.runtime.third_party import prepare

EPS = {"linf": 0.15, "l2": 0.8}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """Wavy enough that steps are halved; float64, so that trajectories stay together."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(36, 32),
            torch.nn.Tanh(),
            torch.nn.Linear(32, 32),
            torch.nn.Tanh(),
            torch.nn.Linear(32, 5),
        )
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.mul_(2)
    return layers.double().requires_grad_(False)


@pytest.fixture(scope="module")
def batch(network: torch.nn.Module) -> tuple[Tensor, Tensor]:
    images = torch.rand((16, 1, 6, 6), generator=generator(2, "apgd"), dtype=torch.float64)
    return images, network(images).argmax(dim=1)


@pytest.mark.parametrize("steps", [7, 50])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_same_start_same_trajectory(
    norm: str, loss: str, steps: int, network: torch.nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    prepare()
    from pyautoattack.autopgd_base import APGDAttack

    images, labels = batch
    threat = ThreatModel(norm, EPS[norm])
    start = threat.random_start(images, generator(0, "start"))
    visited: dict[str, list[Tensor]] = {"theirs": [], "ours": []}

    def spy(name: str) -> Any:
        def model(points: Tensor) -> Tensor:
            visited[name].append(points.detach().clone())
            logits: Tensor = network(points)
            return logits

        return model

    library = APGDAttack(
        spy("theirs"), n_iter=steps, norm={"linf": "Linf", "l2": "L2"}[norm], eps=EPS[norm], loss=loss
    )
    library.init_hyperparam(images)
    expected, _, expected_loss, _ = library.attack_single_run(images, labels, x_init=start)
    ours = APGD(threat, loss=loss, steps=steps)
    found, found_loss = ours.run_from(start, ClassifierTarget(spy("ours")), images, labels)

    assert len(visited["ours"]) == len(visited["theirs"]) == steps + 1
    # Where the label's logit is the third, DLR is constant: its gradient is rounding, and so is its sign.
    flat = torch.stack([dlr(network(points), labels) > 1 - 1e-9 for points in visited["theirs"]]).any(dim=0)
    same = ~flat if loss == "dlr" else torch.ones_like(flat)
    assert same.sum() >= 8
    for our_point, their_point in zip(visited["ours"], visited["theirs"], strict=True):
        torch.testing.assert_close(our_point[same], their_point[same], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_loss[same], expected_loss[same], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[same], expected[same], rtol=1e-5, atol=1e-5)


def test_one_radius_per_image_equals_one_run_per_image(
    network: torch.nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch
    radii = torch.linspace(0.02, 0.2, len(images), dtype=torch.float64)
    target = ClassifierTarget(network)
    threat = ThreatModel("linf", radii)
    start = threat.random_start(images, generator(0))
    together = APGD(threat, loss="ce", steps=30).run_from(start, target, images, labels)
    for index in (0, 7, 15):
        one = slice(index, index + 1)
        alone = APGD(ThreatModel("linf", float(radii[index])), loss="ce", steps=30)
        found, loss = alone.run_from(start[one], target, images[one], labels[one])
        torch.testing.assert_close(together[0][one], found)
        torch.testing.assert_close(together[1][one], loss)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_it_never_loses_to_its_start_and_restarts_never_hurt(
    norm: str, loss: str, network: torch.nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    images, labels = batch
    target = ClassifierTarget(network)
    threat = ThreatModel(norm, EPS[norm])
    losses = {"ce": cross_entropy}.get(loss)
    previous = None
    for restarts in (1, 3):
        attack = APGD(threat, loss=loss, steps=12, restarts=restarts, seed=4)
        found = attack(target, images, labels)
        if losses is not None:
            start = threat.random_start(images, generator(4, attack.name, "start", 0))
            reached = losses(network(found), labels)
            assert (reached >= losses(network(start), labels)).all()
            if previous is not None:
                assert (reached >= previous - 1e-12).all()
            previous = reached
        assert threat.contains(found, images, tolerance=1e-6).all()


def test_restarts_find_better_points_of_a_rugged_loss(wave: Any) -> None:
    rugged = wave(60)
    images = torch.rand(20, 1, 3, 3)
    labels = torch.zeros(20, dtype=torch.long)
    reached = [
        margin(rugged(attack(ClassifierTarget(rugged), images, labels)), labels)
        for attack in (APGD(ThreatModel("linf", 0.1), loss="ce", steps=6, restarts=count) for count in (1, 5))
    ]
    assert (reached[1] >= reached[0] - 1e-4).all()
    assert (reached[1] > reached[0] + 0.1).float().mean() > 0.3


class Counted(ClassifierTarget):
    """Two pixels are the logits of two classes; notes how many images each gradient is asked of."""

    def __init__(self, stochastic: bool) -> None:
        super().__init__(lambda images: images.flatten(1))
        self.stochastic = stochastic
        self.asked: list[int] = []

    def loss_and_gradient(self, images: Tensor, labels: Tensor, loss: Loss, eot_samples: int) -> LossGradient:
        self.asked.append(len(images))
        return super().loss_and_gradient(images, labels, loss, eot_samples)


@pytest.mark.parametrize(("eot_samples", "steps_before_leaving"), [(20, 2), (8, 2), (4, 4)])
@pytest.mark.parametrize("kind", ["apgd", "pgd-eot"])
def test_images_that_are_wrong_again_and_again_leave_the_queue(
    kind: str, eot_samples: int, steps_before_leaving: int
) -> None:
    threat = ThreatModel("linf", 0.1)
    attack = (
        APGD(threat, loss="ce", steps=9, eot_samples=eot_samples)
        if kind == "apgd"
        else PGDEoT(threat, steps=10, eot_samples=eot_samples, step_size=0.05)
    )
    # Wrong everywhere in its ball; right everywhere.
    images = torch.tensor([[0.2, 0.8], [0.8, 0.2]]).reshape(2, 1, 1, 2)
    labels = torch.zeros(2, dtype=torch.long)
    random, certain = Counted(stochastic=True), Counted(stochastic=False)
    found = attack(random, images, labels)
    assert random.asked == [2] * steps_before_leaving + [1] * (10 - steps_before_leaving)
    # The image that stays is attacked as if it were alone, up to its worst point.
    assert found[1].flatten().tolist() == pytest.approx([0.7, 0.3])
    attack(certain, images, labels)
    assert certain.asked == [2] * 10
    broken = Counted(stochastic=True)
    attack(broken, images[:1], labels[:1])
    assert broken.asked == [1] * steps_before_leaving
