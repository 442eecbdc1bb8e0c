"""A skip connection around the purifier: a share of the input in what is classified."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.losses import cross_entropy
from carso_cli.build import build_classifier, build_purifier, load_defence, load_images
from carso_cli.defence.defended_model import Defence
from carso_cli.recipe.identity import TRAINING_SECTIONS, recipe_hash
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.reporter import SILENT
from carso_cli.runtime.seed import generator
from carso_cli.tools.export import export_run
from carso_cli.training.end_to_end import EndToEnd
from carso_cli.training.purifier import train_purifier

SHARE = 0.25
SMALL = (
    "representation.layers=[layer.0.block.0.conv_1, layer.2.block.0.conv_1]",
    *("purifier.condition_features=16", "purifier.latent_features=4", "evaluation.n_samples=2"),
)


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("digits", (*SMALL, f"purifier.input_share={SHARE}"))


@pytest.fixture
def images(recipe: Recipe) -> torch.Tensor:
    return load_images(recipe, "test", limit=10).pixels(slice(None))


@pytest.fixture
def pair(recipe: Recipe) -> tuple[Defence, Defence]:
    """The defence with and without its share, of the same weights."""
    torch.manual_seed(0)
    classifier = build_classifier(recipe, "at")
    purifiers = [build_purifier(one, classifier) for one in (recipe, load_recipe("digits", SMALL))]
    purifiers[1].load_state_dict(purifiers[0].state_dict())
    found = [
        Defence(classifier, purifier, recipe.representation.layers, n_samples=2) for purifier in purifiers
    ]
    return found[0], found[1]


def test_each_sample_is_a_mean_of_input_and_reconstruction(
    pair: tuple[Defence, Defence], images: torch.Tensor
) -> None:
    mixed, plain = pair
    latents = plain.draw_latents(len(images), generator=generator(0, "here"))
    expected = SHARE * images[:, None] + (1 - SHARE) * plain.purify(images, latents=latents)
    torch.testing.assert_close(mixed.purify(images, latents=latents), expected)
    logits = torch.stack([plain.second_classifier(expected[:, sample]) for sample in range(2)], dim=1)
    torch.testing.assert_close(
        mixed(images, latents=latents, view="exact"), logits.logsumexp(dim=1), rtol=1e-4, atol=1e-4
    )


def test_attacks_take_their_gradient_through_both_ways(
    pair: tuple[Defence, Defence], images: torch.Tensor
) -> None:
    mixed, _ = pair
    labels = torch.arange(len(images)) % 10
    target = DefenceTarget(mixed, "exact", samples_per_pass=4, generator=generator(3, "latents"))
    found = target.loss_and_gradient(images, labels, cross_entropy, eot_samples=2).gradient
    latents = mixed.draw_latents(2 * len(images), 2, generator(3, "latents"))
    leaf = images.clone().requires_grad_()
    for draw in latents.chunk(2):
        loss = cross_entropy(mixed(leaf, latents=draw, view="exact"), labels).sum() / 2
        torch.autograd.backward(loss)
    assert leaf.grad is not None
    torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-6)


def test_it_is_trained_from_the_paper_s_purifier_and_exported(tmp_path: Path) -> None:
    quick = ("training.epochs=2", "training.batch_size=10", "training.attack_mix.pgd_steps=1")
    train_purifier(load_recipe("digits", (*SMALL, *quick)), run=tmp_path / "a", device="cpu", limit=30)
    changes = (
        *SMALL,
        *quick,
        *("training.adversarial.steps=1", f"training.initial={tmp_path / 'a' / 'purifier.safetensors'}"),
    )
    skip = load_recipe("digits-skip", changes)
    assert train_purifier(skip, run=tmp_path / "b", device="cpu", limit=30)["loss"] > 0
    defence = load_defence(tmp_path / "b", device="cpu")
    assert defence.purifier.input_share == 0.5
    # Each program is held against the defence before it is kept.
    export_run(tmp_path / "b", out=tmp_path / "out", reporter=SILENT)


def test_training_sees_the_share(recipe: Recipe, pair: tuple[Defence, Defence], images: torch.Tensor) -> None:
    mixed, plain = pair
    latents = plain.draw_latents(len(images), generator=generator(0, "here"))
    (found,) = EndToEnd(recipe, mixed.classifier, mixed.purifier, None)(images, latents)
    samples = SHARE * images[:, None] + (1 - SHARE) * plain.purify(images, latents=latents)
    logits = torch.stack([plain.second_classifier(samples[:, sample]) for sample in range(2)], dim=1)
    torch.testing.assert_close(found, logits.logsumexp(dim=1), rtol=1e-4, atol=1e-4)


def test_without_a_share_runs_keep_their_hash(recipe: Recipe) -> None:
    plain = load_recipe("digits", SMALL)
    explicit = load_recipe("digits", (*SMALL, "purifier.input_share=0"))
    assert recipe_hash(explicit, sections=TRAINING_SECTIONS) == recipe_hash(plain, sections=TRAINING_SECTIONS)
    assert recipe_hash(recipe, sections=TRAINING_SECTIONS) != recipe_hash(plain, sections=TRAINING_SECTIONS)
