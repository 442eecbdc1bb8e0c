"""Robust aggregation: the logits of N reconstructions to one prediction (Section 4.5, Appendix B).

Axes: B images, N samples, C classes. `aggregate(sample_logits, rule, view)` maps (B, N, C) to
(B, C). The rules are those of Tables 4 and 5; the views of one rule share its argmax:

- `log-probability`: log P, finite for any float32 logits;
- `exact`: well-conditioned logits of the same decision, to be attacked;
- `released`: what the authors' release returns, in its float32 arithmetic with its overflows, only to
  reproduce the published protocol.

Majority vote has no useful gradient in any view; its `exact` view is the vote count.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.errors import UsageError, nearest

RULES = ("doubly-exponential", "logit-mean", "probability-mean", "majority-vote")
VIEWS = ("exact", "log-probability", "released")

# The largest whole power of e that float32 holds.
_LARGEST_EXPONENT = 88.0


def aggregate(sample_logits: Tensor, rule: str, view: str = "log-probability") -> Tensor:
    """Aggregate the logits of N reconstructions of each image.

    Args:
        sample_logits: (B, N, C) logits of the classifier on each reconstruction.
        rule: One of `RULES`.
        view: One of `VIEWS`.

    Returns:
        (B, C), in float32 or in the wider type of `sample_logits`.

    Raises:
        UsageError: If the rule or the view is unknown.
    """
    for kind, name, known in (("aggregation", rule, RULES), ("view", view, VIEWS)):
        if name not in known:
            raise UsageError(
                f"unknown {kind} '{name}'; known are {', '.join(known)}. {nearest(name, known)}".rstrip()
            )
    # Sums of bfloat16 keep so few bits that classes which differ would tie.
    if not sample_logits.is_floating_point() or sample_logits.dtype.itemsize < 4:
        sample_logits = sample_logits.float()
    return _FORMULAS[rule, view](sample_logits)


def doubly_exponential_log_probability(sample_logits: Tensor) -> Tensor:
    """Log P with P_i = (1/Z) prod_n exp(exp(l_i^n)) (Appendix B.1): log_softmax of S_i = sum_n exp(l_i^n).

    S is evaluated in float64. Where it would leave float32, i.e. above exp(88), the logits of that image
    are lowered until the leader's sum is exp(88): order and finiteness are kept, and log P saturates at
    -exp(88).
    """
    # Kept as log S: exp of a single logit above 88.7 is beyond float32.
    log_sums = sample_logits.double().logsumexp(dim=1)
    # Detached: otherwise the leader's sum would be a constant and lose its gradient.
    leader = log_sums.detach().amax(dim=1, keepdim=True)
    # The difference first: it is exact, and beyond 1e17 float64 has no room for the 88 beside the logit.
    lowered = (log_sums - leader) + _LARGEST_EXPONENT
    exponents = torch.where(leader > _LARGEST_EXPONENT, lowered, log_sums)
    return F.log_softmax(exponents.exp(), dim=1).to(sample_logits.dtype)


def _doubly_exponential_exact(sample_logits: Tensor) -> Tensor:
    # log S, which has the argmax of S because the logarithm is monotone, and does not saturate.
    return sample_logits.logsumexp(dim=1)


def _doubly_exponential_released(sample_logits: Tensor) -> Tensor:
    probability = sample_logits.float().exp().sum(dim=1).softmax(dim=1)
    # P rounds to 1 in float32: this is then inf, and its gradient NaN. Kept as published.
    return torch.log(probability / (1.0 - probability))


def _logit_mean(sample_logits: Tensor) -> Tensor:
    return sample_logits.mean(dim=1)


def _logit_mean_log_probability(sample_logits: Tensor) -> Tensor:
    return F.log_softmax(sample_logits.mean(dim=1), dim=1)


def _probability_mean(sample_logits: Tensor) -> Tensor:
    # log of the mean softmax, without leaving logarithms: tiny shares keep a gradient.
    return F.log_softmax(sample_logits, dim=2).logsumexp(dim=1) - math.log(sample_logits.shape[1])


def _probability_mean_released(sample_logits: Tensor) -> Tensor:
    # The release averages sigmoids, not softmax outputs.
    return torch.logit(sample_logits.float().sigmoid().mean(dim=1))


def _vote_count(sample_logits: Tensor) -> Tensor:
    votes = F.one_hot(sample_logits.argmax(dim=2), sample_logits.shape[2]).sum(dim=1)
    # The zero term keeps the result in the graph, so that an attack gets a zero gradient and no error.
    return votes.to(sample_logits.dtype) + 0.0 * sample_logits.sum(dim=1)


def _vote_log_probability(sample_logits: Tensor) -> Tensor:
    counts = _vote_count(sample_logits)
    # A class without votes would have log 0.
    return (counts / sample_logits.shape[1]).clamp(min=torch.finfo(counts.dtype).tiny).log()


def _vote_released(sample_logits: Tensor) -> Tensor:
    # The release floors each logit divided by the sample's largest, which is a vote only when positive.
    logits = sample_logits.float()
    return torch.floor(logits / logits.amax(dim=2, keepdim=True)).sum(dim=1)


_FORMULAS: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
    ("doubly-exponential", "log-probability"): doubly_exponential_log_probability,
    ("doubly-exponential", "exact"): _doubly_exponential_exact,
    ("doubly-exponential", "released"): _doubly_exponential_released,
    ("logit-mean", "log-probability"): _logit_mean_log_probability,
    ("logit-mean", "exact"): _logit_mean,
    ("logit-mean", "released"): _logit_mean,
    ("probability-mean", "log-probability"): _probability_mean,
    ("probability-mean", "exact"): _probability_mean,
    ("probability-mean", "released"): _probability_mean_released,
    ("majority-vote", "log-probability"): _vote_log_probability,
    ("majority-vote", "exact"): _vote_count,
    ("majority-vote", "released"): _vote_released,
}
