"""Each probe on a model that fails it and on one that passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo_models as models
from torch import Tensor, nn
from zoo_networks import EPS, Network, held_out_images, load

from carso_cli.errors import UsageError
from carso_cli.evaluation.probes import Facts, probe
from carso_cli.evaluation.sanity_checks import Check


def probed(model: Callable[[Tensor], Tensor], count: int = 100) -> Facts:
    images, labels = held_out_images(count)
    return probe(model, images, labels, eps=EPS)


def check(facts: Facts, name: str) -> Check:
    return next(found for found in facts.checks if found.name == name)


@pytest.mark.parametrize("name", ["robust", "plain", "transformer", "winners"])
def test_a_network_passes_every_probe(name: str) -> None:
    facts = probed(load(name))
    assert (facts.classes, facts.random, facts.seedable) == (10, False, True)
    assert (facts.probabilities, facts.has_gradient) == (False, True)
    assert facts.clean_accuracy >= 0.95
    assert [found.name for found in facts.checks if not found.passed] == []


@pytest.mark.parametrize(
    ("make", "random", "seedable"),
    [
        (lambda: models.Noise(load("robust"), 0.1), True, True),
        (lambda: models.NumpyNoise(load("robust"), 0.1), True, True),
        (lambda: models.OwnGenerator(load("robust"), 0.1), True, True),
        (lambda: models.Dropout(load("robust")), True, True),
        (lambda: models.RandomMember(load("robust"), load("plain")), True, True),
        (lambda: models.NoiseOffClean(load("robust"), 0.3), True, True),
        (lambda: models.EveryFourth(load("plain"), Network().eval()), True, False),
        (lambda: models.SometimesFlipped(load("plain")), False, True),
    ],
    ids=["noise", "numpy", "own-generator", "dropout", "member", "off-clean", "every-fourth", "flipped"],
)
def test_randomness_is_found(make: Callable[[], nn.Module], random: bool, seedable: bool) -> None:
    facts = probed(make())
    assert (facts.random, facts.seedable) == (random, seedable)


def test_probabilities_and_missing_gradients_are_told() -> None:
    assert probed(models.Probabilities(load("robust"))).probabilities
    assert not probed(models.LogProbabilities(load("robust"))).probabilities
    assert not probed(models.ThroughNumpy(load("robust"))).has_gradient


def test_an_answer_that_depends_on_its_batch_fails() -> None:
    found = check(probed(models.BatchStatistics(load("norm"))), "batch-independence")
    assert found.passed is False
    assert found.value is not None
    assert found.value > 0.01
    assert check(probed(load("norm")), "batch-independence").passed


def test_a_model_that_remembers_fails() -> None:
    assert check(probed(models.Remembers(load("plain"))), "no-memory").passed is False


def test_an_input_changed_in_place_fails() -> None:
    class Spoils(models.Around):
        def prepare(self, images: Tensor) -> Tensor:
            return images.mul_(0.9) if not images.requires_grad else images * 0.9

    found = check(probed(Spoils(load("plain"))), "input-kept")
    assert found.passed is False
    assert found.value == pytest.approx(0.1, abs=0.01)


def test_a_model_that_leans_on_rounding_disagrees_with_itself_in_float64() -> None:
    class Rounding(models.Around):
        def finish(self, scores: Tensor) -> Tensor:
            return scores if scores.dtype == torch.float32 else -scores

    assert check(probed(Rounding(load("plain"))), "float64-agreement").passed is False


def test_what_cannot_be_asked_is_unknown_and_not_passed() -> None:
    plain = load("plain")
    facts = probed(lambda images: plain(images))
    assert check(facts, "no-memory").passed is None
    assert check(facts, "float64-agreement").passed is None
    assert check(probed(load("plain"), 1), "batch-independence").passed is None


def sensitive() -> Callable[[Tensor], Tensor]:
    """A classifier by class means that sees bands of brightness, so that a wrong range misleads it."""

    def bands(pixels: Tensor) -> Tensor:
        return ((5 * pixels).floor() % 2).flatten(1)

    images, labels = held_out_images(300)
    means = torch.stack([bands(images[labels == label]).mean(dim=0) for label in range(10)])
    return lambda pixels: -torch.cdist(bands(pixels), means)


MEAN, STD = (float(held_out_images(200)[0].mean()), float(held_out_images(200)[0].std()))
"""Of the digits' pixels."""


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (lambda net, x: net(x / 255), "expect pixels from 0 to 255"),
        (lambda net, x: net(x).roll(1, dims=1), "number the classes in another order"),
        (lambda net, x: net(x * STD + MEAN), "expect standardised images"),
        (lambda net, x: net((x - MEAN) / STD), "standardise images that are standardised"),
    ],
    ids=["bytes", "order", "standardised", "twice"],
)
def test_the_cause_of_chance_accuracy_is_named(model: Any, cause: str) -> None:
    images, labels = held_out_images(200)
    net = sensitive()
    found = check(probe(lambda pixels: model(net, pixels), images, labels, eps=EPS), "above-chance")
    assert found.passed is False
    assert cause in found.meaning


def test_blue_first_images_are_named() -> None:
    plain = load("plain")
    images, labels = held_out_images(100)
    coloured = torch.cat([images, torch.rand_like(images), torch.rand_like(images)], dim=1)
    found = check(probe(lambda x: plain(x[:, 2:]), coloured, labels, eps=EPS), "above-chance")
    assert found.passed is False
    assert "blue, green, red" in found.meaning


def test_chance_without_a_known_cause_names_none() -> None:
    untrained = Network().eval()
    found = check(probed(lambda images: 0 * untrained(images) + torch.eye(10)[0]), "above-chance")
    assert found.passed is False
    assert ":" not in found.meaning


def test_classes_that_are_ruled_out_by_infinity_are_scores() -> None:
    robust = load("robust")
    facts = probed(lambda images: torch.nn.functional.pad(robust(images), (0, 1), value=-torch.inf))
    assert (facts.classes, facts.random, facts.clean_accuracy > 0.9) == (11, False, True)
    with pytest.raises(UsageError, match="32 of 32 answers hold NaN or an infinity"):
        probed(lambda images: torch.full((len(images), 10), -torch.inf))


def test_nan_is_refused_on_clean_images_alone() -> None:
    plain, (images, labels) = load("plain"), held_out_images(100)

    def detector(asked: Any) -> Any:
        known = ((asked[:, None] - images).abs().amax(dim=(2, 3, 4)) < 1e-3).any(dim=1)
        return torch.where(known[:, None], plain(asked), torch.nan)

    facts = probe(detector, images, labels, eps=EPS)
    assert not facts.random
    assert facts.clean_accuracy > 0.9


def test_noise_that_is_there_at_the_edges_alone_is_found() -> None:
    assert probed(models.EdgeNoise(load("plain"), 1)).random


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda images: [images], "answers a value of type list, not a tensor"),
        (lambda images: images.numpy(), "answers a value of type ndarray, not a tensor"),
        (lambda images: images, r"answers shape \(32, 1, 8, 8\) for 32 images"),
        (lambda images: images.flatten(1)[:, :1], r"answers shape \(32, 1\)"),
        (lambda images: torch.zeros(len(images), 10, dtype=torch.long), "answers int64 numbers"),
        (lambda images: torch.full((len(images), 10), torch.nan), "32 of 32 answers hold NaN"),
        (lambda images: images.flatten(1)[:, :5], "the labels go up to 9, and the model has 5 classes"),
        (
            lambda images: images @ torch.zeros(3, 3),
            r"fails on images of shape \(32, 1, 8, 8\): RuntimeError",
        ),
    ],
    ids=["list", "numpy", "images", "one-score", "integers", "nan", "few-classes", "crash"],
)
def test_an_answer_of_another_kind_is_refused(model: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        probed(model)
