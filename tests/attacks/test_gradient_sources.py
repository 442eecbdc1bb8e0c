"""The sources of gradients that are found in a model, and what each leaves out or replaces."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zoo_models as models
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_networks import EPS, Network, Winners, held_out_images, load

from carso_cli.attacks.gradient_sources import (
    GRAFT,
    INNER,
    LAYER,
    OUTPUT,
    STRAIGHT_THROUGH,
    find_sources,
    margin_gradient,
)
from carso_cli.attacks.model_parts import Model, follow_global_seed, named_modules, own_generators
from carso_cli.errors import UsageError
from carso_cli.runtime.seed import all_seeded


def kinds(model: Model, **options: Any) -> list[str]:
    return [source.kind for source in sources(model, **options)]


def sources(model: Model, **options: Any) -> Any:
    return find_sources(model, held_out_images(20)[0], eps=EPS, **options)


def gradient(function: Model) -> Tensor | None:
    images, labels = held_out_images(20)
    return margin_gradient(function, images, labels, seed=0)


def likeness(first: Tensor | None, second: Tensor | None) -> float:
    assert first is not None
    assert second is not None
    return float(F.cosine_similarity(first.flatten(1), second.flatten(1)).min())


def source_of(model: Model, kind: str) -> Model:
    found: Model = next(source for source in sources(model) if source.kind == kind)
    return found


@pytest.mark.parametrize("name", ["robust", "plain", "transformer"])
def test_a_plain_network_has_its_output_alone(name: str) -> None:
    assert kinds(load(name)) == [OUTPUT]


def test_the_output_comes_first_and_probabilities_become_logarithms() -> None:
    plain = load("plain")
    output = sources(models.Probabilities(plain))[0]
    images, _ = held_out_images(20)
    assert (output.name, output.kind, output.agreement) == (OUTPUT, OUTPUT, 1.0)
    torch.testing.assert_close(output(images), plain(images).log_softmax(dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [models.Distilled, models.RoundedScores, models.ClampedLog])
def test_the_layer_before_a_saturating_answer_has_the_gradient(kind: type[models.Around]) -> None:
    plain = load("plain")
    assert likeness(gradient(source_of(kind(plain), LAYER)), gradient(plain)) > 0.999


@pytest.mark.parametrize("kind", [models.ThroughNumpy, models.WithoutGradient, models.Thermometer])
def test_a_graft_has_the_identitys_gradient_before_the_first_module(kind: type[models.Around]) -> None:
    model = kind(load("plain"))
    assert gradient(model) is None
    images, _ = held_out_images(20)
    graft = source_of(model, GRAFT)
    with torch.no_grad():
        torch.testing.assert_close(graft(images), model(images))
    prepared = model.prepare(images)
    assert likeness(gradient(graft), margin_gradient(model.net, prepared, held_out_images(20)[1], 0)) > 0.999


def test_an_inference_mode_leaves_the_network_inside() -> None:
    plain = load("plain")
    assert likeness(gradient(source_of(models.InInferenceMode(plain), INNER)), gradient(plain)) > 0.999


def test_an_inner_network_is_given_the_images_themselves() -> None:
    plain = load("plain")
    assert likeness(gradient(source_of(models.BlockDCT(plain), INNER)), gradient(plain)) > 0.999


def test_a_purifier_with_gradients_of_its_own_is_grafted_at_its_last_call() -> None:
    model = models.AntiAdversary(load("plain"))
    grafts = [source.name for source in sources(model) if source.kind == GRAFT]
    assert not grafts or grafts == ["graft net.features.0, last call"]


def test_own_activations_are_passed_straight_through() -> None:
    found = [source.name for source in sources(load("winners")) if source.kind == STRAIGHT_THROUGH]
    assert found == ["straight-through features.2, features.5, features.9"]
    named = [source.name for source in sources(load("winners"), bpda=["features.5"])]
    assert "straight-through features.5" in named


def test_an_unknown_or_reshaping_bpda_module_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--bpda featurs\.5: the model has no such module") as caught:
        sources(load("winners"), bpda=["featurs.5"])
    assert "features.5" in str(caught.value)
    with pytest.raises(UsageError, match="--bpda head: this module changes the shape"):
        sources(load("winners"), bpda=["head"])


def test_a_layer_that_a_call_leaves_out_answers_as_the_model() -> None:
    first, second = load("plain"), load("norm")
    model = models.RandomMember(first, second)
    for source in sources(model):
        for seed in range(6):
            with all_seeded(seed):
                assert source(held_out_images(4)[0]).shape == (4, 10)


def test_a_module_that_takes_no_images_is_no_source() -> None:
    assert kinds(models.InFloat64(load("robust").double())) == [OUTPUT]


def test_modules_of_functions_methods_and_objects_are_found() -> None:
    plain = load("plain")

    class Holder:
        def __init__(self) -> None:
            self.net = plain

        def scores(self, images: Tensor) -> Tensor:
            scores: Tensor = self.net(images)
            return scores

    def inside(images: Tensor) -> Tensor:
        scores: Tensor = plain(images)
        return scores

    for model in (inside, Holder().scores, lambda images: inside(images)):
        assert any(module is plain.get_submodule("head") for module in named_modules(model).values())
    assert set(named_modules(plain)) >= {"features.0", "head"}
    assert kinds(lambda images: plain(images.detach())) == [OUTPUT, GRAFT]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.Generator(),
        lambda: np.random.default_rng(0),
        lambda: np.random.RandomState(0),
        lambda: random.Random(0),
    ],
    ids=["torch", "numpy", "numpy-legacy", "standard-library"],
)
def test_generators_of_the_models_own_follow_the_global_seed(make: Callable[[], Any]) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source = make()

        def forward(self, images: Tensor) -> Tensor:
            if isinstance(self.source, torch.Generator):
                drawn = float(torch.rand((), generator=self.source))
            elif isinstance(self.source, np.random.Generator):
                drawn = float(self.source.random())
            else:
                drawn = float(self.source.uniform(0, 1))
            return images.flatten(1) + drawn

    model = Own()
    assert own_generators(model) == [model.source]
    images = torch.zeros(1, 1, 1, 3)

    def answer(seed: int) -> float:
        with all_seeded(seed):
            return float(follow_global_seed(model)(images)[0, 0])

    assert answer(1) == answer(1) != answer(2)
    plain = load("plain")
    assert follow_global_seed(plain) is plain


def test_no_hook_is_left_behind() -> None:
    model = models.Quantised(Network(Winners).eval())
    for source in sources(model):
        source(held_out_images(2)[0])
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
