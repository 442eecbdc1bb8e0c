"""Surrogates of the defence compute what their names promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.attacks.apgd import APGD
from carso_cli.attacks.losses import cross_entropy, margin
from carso_cli.attacks.surrogates import SURROGATES, Transfer
from carso_cli.attacks.target import ClassifierTarget
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.errors import UsageError
from carso_cli.runtime.seed import generator


@pytest.fixture
def sample_logits(toy: Any, images: Tensor) -> Tensor:
    """(B, N, C) with the latents of the first draw of seed 0."""
    latents = toy.draw_latents(len(images), generator=generator(0, "latents"))
    logits: Tensor = toy.sample_logits(toy.condition(images), latents).detach()
    return logits


def test_aggregations(attacked: Any, images: Tensor, sample_logits: Tensor) -> None:
    torch.testing.assert_close(
        SURROGATES["transfer-logit-mean"](attacked())(images), sample_logits.mean(dim=1)
    )
    mean_probability = sample_logits.softmax(dim=2).mean(dim=1)
    torch.testing.assert_close(
        SURROGATES["transfer-probability-mean"](attacked())(images), mean_probability.log()
    )
    log_probability = sample_logits.exp().sum(dim=1).log_softmax(dim=1)
    torch.testing.assert_close(SURROGATES["transfer-log-probability"](attacked())(images), log_probability)


def test_single_sample_classifies_one_reconstruction(toy: Any, attacked: Any, images: Tensor) -> None:
    toy.passes.clear()
    SURROGATES["transfer-single-sample"](attacked())(images)
    assert toy.passes == [len(images)]


def test_bare_classifier(toy: Any, attacked: Any, images: Tensor) -> None:
    target = SURROGATES["transfer-classifier"](attacked())
    assert isinstance(target, ClassifierTarget)
    torch.testing.assert_close(target(images), toy.classifier(images).detach())


def test_straight_through_sees_the_defence_but_differentiates_the_classifier(
    toy: Any, attacked: Any, images: Tensor, labels: Tensor, sample_logits: Tensor
) -> None:
    target = SURROGATES["transfer-straight-through"](attacked())
    torch.testing.assert_close(target(images), sample_logits.logsumexp(dim=1))
    answer = SURROGATES["transfer-straight-through"](attacked(samples_per_pass=7)).loss_and_gradient(
        images, labels, cross_entropy, 1
    )
    latents = toy.draw_latents(len(images), generator=generator(0, "latents"))
    purified = toy.decode(toy.condition(images), latents).requires_grad_()
    logits = toy.classifier(purified.flatten(0, 1)).unflatten(0, latents.shape[:2]).logsumexp(dim=1)
    loss = F.cross_entropy(logits, labels, reduction="none")
    (at_samples,) = torch.autograd.grad(loss.sum(), purified)
    torch.testing.assert_close(answer.loss, loss.detach())
    torch.testing.assert_close(answer.gradient, at_samples.sum(dim=1))
    honest = attacked().loss_and_gradient(images, labels, cross_entropy, 1).gradient
    assert not torch.allclose(answer.gradient, honest)


def test_transfer_attacks_the_surrogate(attacked: Any, images: Tensor, labels: Tensor) -> None:
    threat = ThreatModel("linf", 0.1)
    apgd = APGD(threat, loss="ce", steps=15)
    attack = Transfer(threat, surrogate="transfer-classifier", attack=apgd)
    found = attack(attacked(), images, labels)
    bare = SURROGATES["transfer-classifier"](attacked())
    before, after = (bare.expected_loss(points, labels, margin, 1).loss for points in (images, found))
    assert (after > before).all()
    assert threat.contains(found, images).all()
    with pytest.raises(UsageError, match="'transfer-classifier' needs the defence"):
        attack(bare, images, labels)
