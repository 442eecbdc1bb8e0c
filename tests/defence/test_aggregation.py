from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.defence.aggregation import RULES, VIEWS, aggregate
from carso_cli.errors import UsageError
from carso_cli.recipe.schema import Aggregation, View


def doubly_exponential_float64(sample_logits: Tensor) -> Tensor:
    """log_softmax of sum_n exp(l^n), in float64 (Appendix B.1)."""
    return sample_logits.double().exp().sum(dim=1).log_softmax(dim=1)


def test_names_are_those_of_the_recipe() -> None:
    assert get_args(Aggregation) == RULES
    assert get_args(View) == VIEWS


@pytest.mark.parametrize("gap", [0.0, 0.5, 2.0, 8.0, 30.0, 60.0, 80.0])
def test_log_probability_agrees_with_float64(gap: float) -> None:
    logits = torch.rand(16, 8, 10)
    logits[:, :, 3] += gap
    actual = aggregate(logits, "doubly-exponential")
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), doubly_exponential_float64(logits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gap", [0.5, 2.0, 8.0, 30.0, 80.0])
def test_log_probability_gradient_agrees_with_float64(gap: float) -> None:
    logits = torch.rand(4, 8, 5, dtype=torch.float64)
    logits[:, :, 1] += gap
    weights = torch.rand(4, 5, dtype=torch.float64)
    actual = logits.float().requires_grad_()
    torch.autograd.backward((aggregate(actual, "doubly-exponential") * weights.float()).sum())
    expected = logits.float().double().requires_grad_()
    torch.autograd.backward((doubly_exponential_float64(expected) * weights).sum())
    assert actual.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(actual.grad.double(), expected.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0, 80.0, 1e3, 1e10, 3e38])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("view", ["exact", "log-probability"])
def test_finite_for_any_float32_logits(rule: str, view: str, scale: float) -> None:
    logits = (torch.rand(6, 8, 10) * 2 - 1) * scale
    if rule in ("logit-mean", "majority-vote") and scale > 1e38:
        logits /= 16  # the sum itself must stay within float32
    logits.requires_grad_()
    output = aggregate(logits, rule, view)
    torch.autograd.backward(F.cross_entropy(output, torch.zeros(6, dtype=torch.long)))
    assert output.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_ties_are_even_and_have_a_gradient() -> None:
    logits = torch.full((1, 8, 4), 1.5, requires_grad=True)
    output = aggregate(logits, "doubly-exponential")
    torch.testing.assert_close(output, torch.full((1, 4), 0.25).log())
    torch.autograd.backward(output[0, 0])
    assert logits.grad is not None
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) * torch.tensor(1.5).exp()
    torch.testing.assert_close(logits.grad[0, 0], expected)


@pytest.mark.parametrize("rule", RULES)
def test_views_share_their_decision(rule: str) -> None:
    logits = torch.randn(500, 8, 10) * 3
    assert torch.equal(
        aggregate(logits, rule, "exact").argmax(1), aggregate(logits, rule, "log-probability").argmax(1)
    )


def test_released_output_saturates_where_the_exact_view_does_not() -> None:
    logits = torch.zeros(1, 8, 3)
    logits[:, :, 0] = 1.5
    logits.requires_grad_()
    released = aggregate(logits, "doubly-exponential", "released")
    torch.autograd.backward(F.cross_entropy(released, torch.tensor([0])))
    assert logits.grad is not None
    assert released.isinf().any()
    assert logits.grad.isnan().all()


def test_closed_forms_on_two_samples() -> None:
    logits = torch.tensor([[[0.0, 1.0], [2.0, 1.0]]])
    probabilities = logits.softmax(2).mean(1).log()
    torch.testing.assert_close(aggregate(logits, "probability-mean"), probabilities)
    total = aggregate(logits.double(), "probability-mean").exp().sum(dim=1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    torch.testing.assert_close(aggregate(logits, "logit-mean", "exact"), torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(aggregate(logits, "majority-vote", "exact"), torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(aggregate(logits, "doubly-exponential", "exact"), logits.exp().sum(1).log())


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown aggregation 'logit-means'.*did you mean 'logit-mean'"):
        aggregate(torch.zeros(1, 1, 2), "logit-means")
    with pytest.raises(UsageError, match=r"unknown view 'exakt'.*did you mean 'exact'"):
        aggregate(torch.zeros(1, 1, 2), "logit-mean", "exakt")


def test_bfloat16_logits_are_aggregated_in_float32() -> None:
    logits = torch.randn(3, 8, 10).bfloat16()
    assert aggregate(logits, "doubly-exponential", "exact").dtype == torch.float32


@pytest.mark.parametrize("size", [200.0, 1e10, 1e17, 3e18, 1e38])
def test_log_probability_stays_finite_and_in_order_at_any_size(size: float) -> None:
    logits = torch.tensor([0.5, 1.0, -1.0, 0.999]).mul(size).reshape(1, 1, 4).requires_grad_()
    found = aggregate(logits, "doubly-exponential")
    assert found.isfinite().all()
    # The leader's share is 1, and the others' log P saturates at the size of its exponent.
    torch.testing.assert_close(found[0, 1], torch.tensor(0.0))
    assert (found[0, [0, 2, 3]] < -1e30).all()
    F.cross_entropy(found, torch.tensor([1])).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_equal_leaders_share_the_probability_at_any_size() -> None:
    found = aggregate(torch.tensor([[[1e18, 1e18, 0.0]]]), "doubly-exponential")
    torch.testing.assert_close(found[0, :2], torch.tensor([0.5, 0.5]).log())
