from __future__ import annotations

import pytest
import torch

from carso_cli.attacks.losses import cross_entropy, dlr, margin
from carso_cli.errors import UsageError
from carso_cli.runtime.third_party import prepare

LOGITS = torch.tensor([[2.0, 0.5, -1.0, 1.0], [0.0, 3.0, 1.0, 2.0]], dtype=torch.float64)


def test_values_by_hand() -> None:
    labels = torch.tensor([0, 0])
    torch.testing.assert_close(margin(LOGITS, labels), torch.tensor([-1.0, 3.0]).double())
    torch.testing.assert_close(dlr(LOGITS, labels), torch.tensor([-1 / 1.5, 3 / 2]).double())
    expected = -(LOGITS[:, 0] - LOGITS.exp().sum(dim=1).log())
    torch.testing.assert_close(cross_entropy(LOGITS, labels), expected)


def test_dlr_agrees_with_the_authors_code() -> None:
    prepare()
    from pyautoattack.autopgd_base import APGDAttack

    logits = torch.randn(64, 5, dtype=torch.float64)
    labels = torch.randint(5, (64,))
    reference = APGDAttack(lambda images: images, eps=1.0).dlr_loss(logits, labels)
    torch.testing.assert_close(dlr(logits, labels), reference)


def test_dlr_does_not_depend_on_the_scale_of_the_logits() -> None:
    labels = torch.tensor([1, 2])
    torch.testing.assert_close(dlr(LOGITS, labels), dlr(7 * LOGITS + 3, labels))


def test_gradient_of_the_margin_points_from_label_to_rival() -> None:
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(margin(logits, torch.tensor([0, 0])).sum(), logits)
    assert gradient.tolist() == [[-1, 0, 0, 1], [-1, 1, 0, 0]]


def test_dlr_needs_three_classes() -> None:
    with pytest.raises(UsageError, match="at least 3 classes; the model has 2"):
        dlr(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
