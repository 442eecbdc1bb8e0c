"""`carso_cli.attack`: every attack by name, on any model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import carso_cli
from carso_cli import attack
from carso_cli.errors import UsageError

EPS = 0.02


@pytest.mark.parametrize("name", ["pgd", "pgd-eot", "apgd-ce", "apgd-targeted", "fgsm"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_worst_case_of_a_linear_model_is_reached_whatever_its_scale(
    name: str, scale: float, problem: Any
) -> None:
    def model(images: Tensor) -> Tensor:
        scores: Tensor = scale * problem(images)
        return scores

    found = attack(name, model, eps=EPS, pgd_eot_steps=40, eot_draws=1, apgd_steps=40)(
        problem.images, problem.labels
    )
    assert (found - problem.images).abs().max() <= EPS + 1e-6
    torch.testing.assert_close(problem.margin(found), problem.worst_margin("linf", EPS), rtol=0, atol=2e-3)


def test_a_random_model_is_averaged(problem: Any) -> None:
    def noisy(images: Tensor) -> Tensor:
        scores: Tensor = problem(images + 0.02 * torch.randn_like(images))
        return scores

    perturb = attack("pgd-eot", noisy, eps=EPS, random=True, pgd_eot_steps=20, eot_draws=8)
    found = perturb(problem.images, problem.labels)
    # Noise before a linear model changes its gradient by chance only: signs agree but for small weights.
    gained = problem.margin(found) - problem.margin(problem.images)
    most = problem.worst_margin("linf", EPS) - problem.margin(problem.images)
    # An image that is wrong in every sample is left alone, however far it could still be moved.
    assert ((gained > 0.9 * most) | (problem.margin(found) > 0)).all()


def test_a_module_is_put_into_evaluation_mode() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.9), torch.nn.Linear(3072, 10))
    attack("fgsm", model, eps=EPS)
    assert not model.training


def test_errors_name_what_is_known() -> None:
    with pytest.raises(
        UsageError, match="unknown option 'pgd_step' of an attack's budget; did you mean 'pgd_steps'"
    ):
        attack("pgd", torch.nn.Flatten(), eps=EPS, pgd_step=3)
    with pytest.raises(UsageError, match="unknown attack 'pdg'"):
        attack("pdg", torch.nn.Flatten(), eps=EPS)
    with pytest.raises(UsageError, match="deterministic"):
        attack("aa", torch.nn.Flatten(), eps=EPS, random=True)


def test_public_names_are_listed() -> None:
    assert {"attack", "audit", "evaluate", "load_defence"} <= set(dir(carso_cli))
