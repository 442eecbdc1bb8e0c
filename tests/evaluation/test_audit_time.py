"""The predicted time of an audit, from a gradient that takes a known time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli.evaluation import audit_time
from carso_cli.evaluation.audit_setup import BUDGETS, prepare_audit
from carso_cli.evaluation.audit_time import predict_audit

COUNT = 40
IMAGES = torch.rand(COUNT, 1, 4, 4, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def linear(images: Tensor) -> Tensor:
    return (images - 0.5).flatten(1) @ WEIGHTS.T


def without_gradient(images: Tensor) -> Tensor:
    return linear(images.detach())


LABELS = linear(IMAGES).argmax(dim=1)


def prepared(model: Any = linear, eps: float = 0.01) -> Any:
    return prepare_audit(model, IMAGES, LABELS, eps=eps, budget="quick", device="cpu")


def test_each_job_takes_its_steps_times_the_gradients_of_the_images_that_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gradient of n images takes n seconds, and a quarter of the images withstands."""

    def seconds(*_: Any) -> Callable[[float], float]:
        return lambda images: images

    monkeypatch.setattr(audit_time, "_seconds_of_gradient", seconds)
    monkeypatch.setattr(audit_time, "_share_left", lambda *_: 0.25)
    found = {one["job"]: one["seconds"] / audit_time._OVERHEAD for one in predict_audit(prepared())}
    size, left = BUDGETS["quick"], COUNT / 4
    # Three targets: the first meets all images, the others those that are left.
    assert found["apgd-targeted on output"] == pytest.approx(size.steps * (COUNT + 2 * left))
    assert found["apgd-ce on output"] == pytest.approx(size.steps * left)
    assert found["apgd-t on output"] == pytest.approx(size.steps * 3 * left)
    assert found["fab-t on output"] == pytest.approx(size.steps * 9 * left)
    assert found["square on output"] == pytest.approx(size.queries / 2 * left)
    few = 32
    attack = size.steps * (few + 2 * few / 4)
    assert found["checks"] == pytest.approx(3.5 * attack + audit_time._CHECK_CALLS * few)
    assert found["none on the model"] == found["noise on the model"] == 0


def test_the_pilot_attack_finds_the_share_that_withstands() -> None:
    for eps, share in ((1e-4, 1.0), (0.5, 0.0)):
        one = prepared(eps=eps)
        assert audit_time._share_left(one, one.plan.strongest) == pytest.approx(share, abs=0.1)


def test_times_are_positive_and_of_a_model_without_gradients_too() -> None:
    for model in (linear, without_gradient):
        jobs = predict_audit(prepared(model))
        assert sum(job["seconds"] for job in jobs) > 0
        assert "square on output" in [job["job"] for job in jobs]
