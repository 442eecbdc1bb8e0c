from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli.attacks.apgd import APGD
from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.pgd_eot import PGDEoT
from carso_cli.attacks.target import ExpectedLoss
from carso_cli.attacks.threat_model import ThreatModel

THREAT = ThreatModel("linf", 0.1)


def test_shares_by_hand() -> None:
    rows = [
        [1.0, 2.0],
        [0.0, 0.0],
        [torch.nan, 1.0],
        [torch.nan, torch.nan],
        [torch.inf, 1.0],
        [torch.inf, torch.nan],
    ]
    recorder = GradientRecorder()
    recorder.record(
        0,
        torch.tensor(rows).view(6, 1, 1, 2),
        ExpectedLoss(
            loss=torch.tensor([1.0, 2.0, torch.nan, torch.inf, 3.0, 0.0]),
            correct=torch.ones(6),
            saturated=torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5, 0.5]),
        ),
    )
    second_loss = ExpectedLoss(torch.tensor([5.0, 7.0]), correct=torch.zeros(2), saturated=torch.zeros(2))
    recorder.record(1, torch.ones(2, 1, 1, 2), second_loss)
    first, second = recorder.steps()
    assert (first.gradients, first.nan, first.inf) == (6, 3 / 6, 1 / 6)
    assert first.zero == pytest.approx(1 / 6)
    assert first.unusable == pytest.approx(3 / 6)
    assert (first.saturated, first.loss) == (0.5, 1.5)
    assert (second.nan, second.unusable, second.loss) == (0, 0, 6.0)
    total = recorder.summary()
    assert total.gradients == 8
    assert total.nan == pytest.approx(3 / 8)
    assert total.loss == pytest.approx(18 / 6)
    assert total.as_dict()["unusable"] == pytest.approx(3 / 8)


def test_nothing_recorded_is_not_a_clean_bill() -> None:
    health = GradientRecorder().summary()
    assert health.gradients == 0
    assert health.loss != health.loss
    assert health.saturated != health.saturated


@pytest.mark.parametrize(
    "build",
    [
        lambda recorder: PGDEoT(THREAT, steps=5, eot_samples=2, step_size=0.05, recorder=recorder),
        lambda recorder: APGD(THREAT, loss="ce", steps=5, eot_samples=2, recorder=recorder),
        lambda recorder: PGD(THREAT, steps=5, step_size=0.05, random_start=False, recorder=recorder),
    ],
    ids=["pgd-eot", "apgd", "pgd"],
)
def test_a_masked_output_is_reported_and_an_open_one_is_not(
    build: Callable[[GradientRecorder], Any], attacked: Any, images: Tensor, labels: Tensor
) -> None:
    masked, open_view = GradientRecorder(), GradientRecorder()
    stuck = build(masked)(attacked(view="released"), images, labels)
    build(open_view)(attacked(view="exact"), images, labels)
    assert masked.summary().nan == 1.0
    assert masked.summary().unusable == 1.0
    assert masked.summary().saturated == 1.0
    assert THREAT.contains(stuck, images).all()
    assert open_view.summary().nan == 0.0
    assert open_view.summary().unusable == 0.0
    losses = [health.loss for health in open_view.steps()]
    assert len(losses) >= 5
    assert losses[-1] > losses[0]


def test_messages_are_kept_once() -> None:
    recorder = GradientRecorder()
    for _ in range(2):
        recorder.note("points with zero gradient")
    assert recorder.messages == ["points with zero gradient"]


def test_gradients_of_zero_are_told_from_nan() -> None:
    # The first class leads on the first two images; the others are wrong already, and ask for no gradient.
    images = torch.tensor([0.9, 0.1, 0.1, 0.1]).repeat(4, 1)
    images[2:, :2] = torch.tensor([0.1, 0.9])
    recorder = GradientRecorder()
    PGD(THREAT, steps=3, step_size=0.05, recorder=recorder)(
        lambda images: images.flatten(1)[:, :3].round(),
        images.view(4, 1, 2, 2),
        torch.zeros(4, dtype=torch.long),
    )
    health = recorder.summary()
    assert (health.zero, health.unusable, health.nan, health.gradients) == (0.5, 1.0, 0.0, 12)


def test_parts_are_counted_apart_and_a_margin_does_not_saturate() -> None:
    certain = ExpectedLoss(torch.tensor([0.0]), correct=torch.ones(1), saturated=torch.ones(1))
    recorder = GradientRecorder()
    for part, gradient, saturates in (("ce", 0.0, True), ("dlr", 1.0, False)):
        recorder.part = part
        recorder.record(0, torch.full((1, 1, 1, 1), gradient), certain, saturates=saturates)
    assert [(one.part, one.zero, one.saturated) for one in recorder.steps()] == [
        ("ce", 1.0, 1.0),
        ("dlr", 0.0, 0.0),
    ]
