"""The gradient check tells right gradients from wrong ones, at any scale and precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo_models as models
from torch import Tensor
from torch.nn import functional as F
from zoo_networks import EPS, Network, held_out_images, load

from carso_cli.attacks.gradient_check import check_gradient
from carso_cli.attacks.gradient_sources import OUTPUT, GradientSource, find_sources
from carso_cli.attacks.losses import margin

pytestmark = pytest.mark.slow  # each finds sources and differences many times

Function = Callable[[Tensor], Tensor]

RIGHT: dict[str, Callable[[], Function]] = {
    "plain": lambda: load("plain"),
    "robust": lambda: load("robust"),
    "transformer": lambda: load("transformer"),
    "tiny": lambda: models.Scaled(load("robust"), 1e-4),
    "huge": lambda: models.Scaled(load("plain"), 1e5),
    "noise": lambda: models.Noise(load("robust"), 0.3),
    "dropout": lambda: models.Dropout(load("robust")),
    "dead class": lambda: models.DeadClass(load("robust")),
    "masked classes": lambda: models.MaskedClasses(load("robust")),
}
WRONG: dict[str, Callable[[], Function]] = {
    "decoy": lambda: models.Decoy(load("plain"), Network().eval()),
    "flipped": lambda: models.Flipped(load("plain")),
    "sometimes flipped": lambda: models.SometimesFlipped(load("plain")),
    "leak": lambda: models.QuantisedLeak(load("plain")),
    "half detached": lambda: models.HalfDetached(load("plain"), load("norm")),
    "by gradient mode": lambda: models.ByGradientMode(load("plain"), Network().eval()),
    "winners": lambda: load("winners"),
    "ripple": lambda: models.Ripple(load("plain")),
    "ripple in a quarter": lambda: models.ChannelRipple(load("robust")),
    "saw in two classes": lambda: models.PartSaw(load("robust")),
}


def checked(function: Function, count: int = 40) -> Any:
    images, labels = held_out_images(count)
    return check_gradient(GradientSource(OUTPUT, OUTPUT, 1.0, function), images, labels, eps=EPS)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_gradient_passes(name: str) -> None:
    found = checked(RIGHT[name]())
    assert (found.path, found.finite, found.nonzero) == (True, 1.0, 1.0)
    assert found.judged >= 20
    assert found.matches >= 0.9
    assert found.descends >= 0.8
    assert found.foretold >= 20
    assert found.predicts >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_gradient_fails(name: str) -> None:
    torch.manual_seed(0)
    found = checked(WRONG[name]())
    assert found.path
    assert found.matches < 0.9 or found.descends < 0.8 or found.predicts < 0.8


@pytest.mark.parametrize("kind", [models.Ripple, models.ChannelRipple, models.PartSaw])
def test_blocks_of_pixels_tell_what_whole_images_average_away(kind: Any) -> None:
    found = checked(kind(load("plain")))
    assert found.foretold >= 35
    assert found.predicts <= 0.6


def test_no_path_zero_and_nan_are_told_apart() -> None:
    plain = load("plain")
    assert not checked(lambda images: plain(images.detach())).path
    rounded = checked(models.Quantised(plain))
    assert (rounded.path, rounded.finite, rounded.nonzero, rounded.judged) == (True, 1.0, 0.0, 0)
    broken = checked(lambda images: plain(images) + torch.sqrt(0 * images.sum()))
    assert (broken.finite, broken.matches, broken.descends) == (0.0, 0.0, 0.0)


def test_a_gradient_that_turns_wrong_is_right_at_the_start_and_found_out_later() -> None:
    images, labels = held_out_images(40)
    plain = load("plain")
    model = models.TrueAtTheStart(plain, Network().eval().requires_grad_(False))
    assert check_gradient(model, images, labels, eps=EPS).matches >= 0.9
    leaf, doubtful = images.clone().requires_grad_(), images.clone()
    for _ in range(10):
        scores = plain(leaf)
        (gradient,) = torch.autograd.grad(F.cross_entropy(scores, labels, reduction="sum"), leaf)
        leaf = (leaf + 0.02 * gradient.sign()).detach().requires_grad_()
        with torch.no_grad():
            undecided = margin(plain(leaf), labels).abs() < margin(plain(doubtful), labels).abs()
        doubtful[undecided] = leaf.detach()[undecided]
    assert check_gradient(model, doubtful, labels, eps=EPS).matches < 0.6


def test_low_precision_is_not_judged_rather_than_called_wrong() -> None:
    found = checked(models.InBFloat16(load("robust")))
    assert found.matches >= 0.9 or found.judged < 4
    assert found.descends >= 0.8


def test_a_generator_of_the_models_own_is_held_fixed() -> None:
    images, labels = held_out_images(40)
    model = models.OwnGenerator(load("robust"), 0.1)
    assert check_gradient(model, images, labels, eps=EPS).matches < 0.5
    output = find_sources(model, images, eps=EPS)[0]
    found = check_gradient(output, images, labels, eps=EPS)
    assert found.matches >= 0.9
    assert found.descends >= 0.8


def test_one_image_is_enough() -> None:
    images, labels = held_out_images(1)
    found = check_gradient(GradientSource(OUTPUT, OUTPUT, 1.0, load("plain")), images, labels, eps=EPS)
    assert (found.images, found.nonzero) == (1, 1.0)
