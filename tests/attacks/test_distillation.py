"""A distilled surrogate answers as its model does near the images, and its gradient leads on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.attacks.distillation import distil
from carso_cli.attacks.losses import margin
from carso_cli.attacks.target import ClassifierTarget

EPS = 0.1
WEIGHTS = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def linear(images: Tensor) -> Tensor:
    return (images - 0.5).flatten(1) @ WEIGHTS.T


def through_numpy(images: Tensor) -> Tensor:
    """The same scores, a thousand times as large, without a gradient and NaN where a pixel is black."""
    scores = 1000 * (images.numpy() - 0.5).reshape(len(images), -1) @ WEIGHTS.numpy().T
    scores[images.numpy()[:, 0, 0, 0] == 0] = np.nan
    return torch.from_numpy(scores)


@pytest.mark.slow
def test_the_surrogate_decides_and_leads_as_the_model_does() -> None:
    surrogate = distil(through_numpy, IMAGES, eps=EPS, seed=0)
    assert not surrogate.training
    assert not any(parameter.requires_grad for parameter in surrogate.parameters())
    near = (IMAGES + EPS * torch.randn_like(IMAGES).clamp(-1, 1)).clamp(0, 1)
    answer, truth = surrogate(near), linear(near)
    assert float((answer.argmax(dim=1) == truth.argmax(dim=1)).float().mean()) > 0.9
    # Of one scale whatever the model's.
    assert 0.5 < float(answer.std(dim=1).median()) < 2
    labels = truth.argmax(dim=1)
    own, led = (
        ClassifierTarget(model).loss_and_gradient(near, labels, margin, 1).gradient.flatten(1)
        for model in (linear, surrogate)
    )
    assert float(F.cosine_similarity(own, led).mean()) > 0.7
    again = distil(through_numpy, IMAGES, eps=EPS, seed=0)
    torch.testing.assert_close(again(near), answer)


def test_it_takes_images_of_any_size_and_at_most_512(monkeypatch: pytest.MonkeyPatch) -> None:
    import carso_cli.attacks.distillation as module

    monkeypatch.setattr(module, "_STEPS", 1)
    asked: list[int] = []

    def model(images: Tensor) -> Tensor:
        asked.append(len(images))
        return images.mean(dim=(2, 3))

    surrogate = distil(model, torch.rand(600, 3, 4, 6), eps=EPS)
    assert surrogate(torch.rand(2, 3, 4, 6)).shape == (2, 3)
    # Six kinds of change first, and two more in each of five rounds.
    assert sum(asked) == 512 * (6 + 2 * 5)
    assert distil(model, torch.rand(3, 3, 40, 50), eps=EPS)(torch.rand(1, 3, 40, 50)).shape == (1, 3)
