"""Every name builds, runs, stays in the ball and in the range, and weakens a trained model as it should."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli.attacks.apgd import APGD
from carso_cli.attacks.attack import Attack
from carso_cli.attacks.autoattack import AutoAttack
from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.fgsm import FGSM
from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.losses import margin
from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.pgd_eot import PGDEoT
from carso_cli.attacks.rand_autoattack import RandAutoAttack
from carso_cli.attacks.registry import (
    ATTACKS,
    BASELINES,
    DEFENCE_ONLY,
    DETERMINISTIC_ONLY,
    PROTOCOLS,
    Budget,
    build_attack,
    check_name,
)
from carso_cli.attacks.square import SquareEoT
from carso_cli.attacks.target import ClassifierTarget
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.errors import UsageError

pytestmark = pytest.mark.slow  # each runs every attack

BUDGET = Budget(
    pgd_steps=10,
    pgd_step_size=0.03,
    apgd_steps=10,
    eot_draws=4,
    pgd_eot_steps=10,
    pgd_eot_step_size=0.03,
    square_queries=120,
    restarts=1,
)
AGAINST_CLASSIFIER = [name for name in ATTACKS if name not in DEFENCE_ONLY]
AGAINST_DEFENCE = [name for name in ATTACKS if name not in DETERMINISTIC_ONLY]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", AGAINST_CLASSIFIER)
def test_every_attack_on_a_trained_classifier(name: str, norm: str, digits: Any) -> None:
    model, images, labels = digits
    threat = ThreatModel(norm, {"linf": 0.12, "l2": 0.7}[norm])
    # A step is in the units of the norm.
    step = 0.25 * float(threat.eps)
    budget = replace(BUDGET, pgd_step_size=step, pgd_eot_step_size=step)
    attack = build_attack(name, threat, budget, stochastic=False, seed=0)
    assert attack.name == name
    found = attack(ClassifierTarget(model), images, labels)
    assert found.shape == images.shape
    assert found.dtype == images.dtype
    assert not found.requires_grad
    assert threat.contains(found, images, tolerance=1e-6).all()
    accuracy = float((model(found).argmax(dim=1) == labels).float().mean())
    if name in BASELINES:
        assert accuracy > 0.8
    else:
        # Square stops at a budget of 120 queries; all others follow gradients.
        assert accuracy < (0.7 if name == "square" else 0.45)


def test_strength_on_a_trained_network(digits: Any) -> None:
    model, images, labels = digits
    near, middle, far = (ThreatModel("linf", eps) for eps in (0.1, 0.15, 0.2))
    apgd = APGD(middle, loss="ce", steps=20)
    at_most: dict[Attack, float] = {
        FGSM(near): 0.5,
        PGD(near, steps=20, step_size=0.02): 0.35,
        PGDEoT(near, steps=20, eot_samples=1, step_size=0.02): 0.35,
        AutoAttack(near, steps=15, queries=50): 0.35,
        apgd: 0.15,
        SquareEoT(far, queries=300, eot_samples=1): 0.2,
    }

    def accuracy(points: Tensor) -> float:
        return float((model(points).argmax(dim=1) == labels).float().mean())

    found = {attack: attack(ClassifierTarget(model), images, labels) for attack in at_most}
    reached = {attack.name: accuracy(points) for attack, points in found.items()}
    assert accuracy(images) > 0.85
    for attack, most in at_most.items():
        assert reached[attack.name] < most, attack.name
    assert reached["pgd"] <= reached["fgsm"]
    assert (margin(model(found[apgd]), labels) > margin(model(images), labels)).float().mean() > 0.98


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", AGAINST_DEFENCE)
def test_every_attack_on_a_random_defence(
    name: str, norm: str, attacked: Any, images: Tensor, labels: Tensor
) -> None:
    threat = ThreatModel(norm, {"linf": 0.3, "l2": 1.2}[norm])
    recorder = GradientRecorder()
    attack = build_attack(name, threat, BUDGET, stochastic=True, seed=0, recorder=recorder)
    offered = attack.candidates(attacked(samples_per_pass=24), images, labels)
    again = attack.candidates(attacked(samples_per_pass=24), images, labels)
    judge = attacked(seed=8)
    clean = judge.expected_loss(images, labels, margin, 200).loss.mean()
    for key, found in offered.items():
        assert threat.contains(found, images, tolerance=1e-6).all()
        torch.testing.assert_close(again[key], found, rtol=0, atol=0)
        # What fools the classifier or passes straight through the purifier need not fool the toy defence.
        if name not in {*BASELINES, "transfer-classifier", "transfer-straight-through"}:
            assert judge.expected_loss(found, labels, margin, 200).loss.mean() > clean + 0.1
    assert (recorder.summary().gradients > 0) == (name not in {*BASELINES, "square"})


@pytest.mark.parametrize(
    "name", ["fgsm", "pgd", "apgd-ce", "square", "rand-aa", "pgd-eot", "transfer-logit-mean", "fab"]
)
def test_one_radius_per_image(name: str, attacked: Any, images: Tensor, labels: Tensor) -> None:
    radii = torch.linspace(0.01, 0.2, len(images))
    threat = ThreatModel("linf", radii)
    found = build_attack(name, threat, BUDGET, stochastic=True, seed=0)(attacked(), images, labels)
    distance = threat.distance(found, images)
    assert (distance <= radii + 1e-6).all()
    assert (distance >= 0.5 * radii).all()


def test_rand_aa_offers_both_losses_and_returns_the_stronger(
    attacked: Any, images: Tensor, labels: Tensor
) -> None:
    attack = RandAutoAttack(ThreatModel("linf", 0.3), steps=5, eot_samples=30)
    offered = attack.candidates(attacked(), images, labels)
    assert set(offered) == {"apgd-ce", "apgd-dlr"}
    found = attack(attacked(), images, labels)
    judge = attacked(seed=3)
    scores = {
        name: judge.expected_loss(example, labels, margin, 400).loss for name, example in offered.items()
    }
    gap = scores["apgd-ce"] - scores["apgd-dlr"]
    for index in range(len(images)):
        assert any(torch.equal(found[index], example[index]) for example in offered.values())
        if abs(gap[index]) > 0.1:
            stronger = offered["apgd-ce" if gap[index] > 0 else "apgd-dlr"]
            assert torch.equal(found[index], stronger[index])
    two = DefenceTarget(attacked().defence, lambda logits: logits.mean(dim=1)[:, :2], 4096, torch.Generator())
    assert set(attack.candidates(two, images, labels.clamp(max=1))) == {"apgd-ce"}


def test_every_protocol_names_attacks_that_exist_and_fit() -> None:
    assert set(PROTOCOLS) == {"adaptive", "published", "authors", "quick"}
    for protocol in PROTOCOLS.values():
        for names, stochastic in ((protocol.classifier, False), (protocol.defence, True)):
            assert names
            for name in names:
                built = build_attack(name, ThreatModel("linf", 0.1), BUDGET, stochastic=stochastic, seed=0)
                assert built.name == name


def test_unknown_names_get_the_nearest_known_one() -> None:
    with pytest.raises(UsageError, match=r"unknown attack 'pgd-eto'\. did you mean 'pgd-eot'"):
        build_attack("pgd-eto", ThreatModel("linf", 0.1), BUDGET, stochastic=True, seed=0)
    with pytest.raises(UsageError, match=r"unknown attack or protocol 'adaptve'; did you mean 'adaptive'\?"):
        check_name("adaptve")
    assert check_name("quick") == "quick"
    assert check_name("square") == "square"


def test_attacks_that_do_not_fit_the_model_are_refused() -> None:
    threat = ThreatModel("linf", 0.1)
    with pytest.raises(UsageError, match="'aa' is for deterministic models"):
        build_attack("aa", threat, BUDGET, stochastic=True, seed=0)
    with pytest.raises(UsageError, match="'transfer-classifier' transfers to the defence"):
        build_attack("transfer-classifier", threat, BUDGET, stochastic=False, seed=0)


@pytest.mark.slow
def test_names_load_no_torch() -> None:
    script = "import sys, carso_cli.attacks.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
