from __future__ import annotations

import math

import pytest
import torch

from carso_cli.training.trades import trades_loss


def test_loss_and_gradients_by_hand() -> None:
    # Two classes: P = sigmoid of the lead. Image 1 perturbed and clean, image 2 as it is.
    lead, clean_lead, other = 0.3, 1.2, -0.4
    logits = torch.tensor([[lead, 0.0], [0.0, other]], dtype=torch.float64, requires_grad=True)
    clean = torch.tensor([[clean_lead, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = trades_loss(logits, clean, torch.tensor([0, 1]), 6.0)
    p, q, r = (1 / (1 + math.exp(-value)) for value in (clean_lead, lead, other))
    divergence = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert loss.item() == pytest.approx(-math.log(p) - math.log(r) + 6.0 * divergence, rel=1e-12)
    of_logits, of_clean = torch.autograd.grad(loss, (logits, clean))
    # d KL/dq-lead = q - p; d KL/dp-lead = p (1 - p) (lead of p - lead of q).
    assert of_logits[0, 0].item() == pytest.approx(6.0 * (q - p), rel=1e-12)
    assert of_logits[1, 1].item() == pytest.approx(r - 1.0, rel=1e-12)
    expected = p - 1.0 + 6.0 * p * (1 - p) * (clean_lead - lead)
    assert of_clean[0, 0].item() == pytest.approx(expected, rel=1e-12)


def test_without_clean_selves_it_is_cross_entropy() -> None:
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    expected = -logits.log_softmax(1).gather(1, labels[:, None]).sum()
    torch.testing.assert_close(trades_loss(logits, logits[:0], labels, 9.0), expected)
