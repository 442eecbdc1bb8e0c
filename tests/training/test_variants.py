"""The purifier's variants beyond the paper: a share of the input, and no latent."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.losses import cross_entropy
from carso_cli.build import build_classifier, build_purifier, load_defence, load_images
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.vae import ENCODER_PARTS
from carso_cli.evaluation.run import evaluate
from carso_cli.io.json_files import read_json_lines
from carso_cli.recipe.identity import TRAINING_SECTIONS, recipe_hash
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.reporter import SILENT
from carso_cli.runtime.seed import generator
from carso_cli.tools.export import export_run
from carso_cli.training.end_to_end import EndToEnd

SHARE = 0.25


@pytest.fixture
def recipe(small: Any) -> Recipe:
    loaded: Recipe = small(f"purifier.input_share={SHARE}")
    return loaded


@pytest.fixture
def images(recipe: Recipe) -> torch.Tensor:
    return load_images(recipe, "test", limit=10).pixels(slice(None))


@pytest.fixture
def pair(small: Any, recipe: Recipe) -> tuple[Defence, Defence]:
    """The defence with and without its share, of the same weights."""
    torch.manual_seed(0)
    classifier = build_classifier(recipe, "at")
    purifiers = [build_purifier(one, classifier) for one in (recipe, small())]
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


@pytest.mark.slow
def test_a_share_is_trained_from_the_papers_purifier_and_exported(
    small: Any, train: Any, elbo_run: Path, tmp_path: Path
) -> None:
    start = f"training.initial={elbo_run / 'purifier.safetensors'}"
    skip = small("training.adversarial.steps=1", start, base="digits-skip")
    assert train(skip, tmp_path / "run", limit=30)["loss"] > 0
    defence = load_defence(tmp_path / "run", device="cpu")
    assert defence.purifier.input_share == 0.5
    # Each program is compared with the defence before it is kept.
    export_run(tmp_path / "run", out=tmp_path / "out", reporter=SILENT)


def test_training_sees_the_share(recipe: Recipe, pair: tuple[Defence, Defence], images: torch.Tensor) -> None:
    mixed, plain = pair
    latents = plain.draw_latents(len(images), generator=generator(0, "here"))
    (found,) = EndToEnd(recipe, mixed.classifier, mixed.purifier, None)(images, latents)
    samples = SHARE * images[:, None] + (1 - SHARE) * plain.purify(images, latents=latents)
    logits = torch.stack([plain.second_classifier(samples[:, sample]) for sample in range(2)], dim=1)
    torch.testing.assert_close(found, logits.logsumexp(dim=1), rtol=1e-4, atol=1e-4)


def test_without_a_share_runs_keep_their_hash(small: Any, recipe: Recipe) -> None:
    def hash_of(one: Recipe) -> str:
        return recipe_hash(one, sections=TRAINING_SECTIONS)

    assert hash_of(small("purifier.input_share=0")) == hash_of(small())
    assert hash_of(recipe) != hash_of(small())


@pytest.fixture(scope="module")
def fixed(small: Any) -> Recipe:
    """Without a latent: nothing is encoded, nothing is drawn."""
    loaded: Recipe = small(
        *("purifier.latent_features=0", "evaluation.scoring_draws=2"),
        *("evaluation.pgd_eot_steps=2", "evaluation.eot_draws=1"),
    )
    return loaded


@pytest.fixture(scope="module")
def fixed_run(fixed: Recipe, train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fixed") / "run"
    train(fixed, folder, limit=30)
    return folder


@pytest.mark.slow
def test_without_a_latent_nothing_is_random(fixed: Recipe, fixed_run: Path) -> None:
    assert [line["kl"] for line in read_json_lines(fixed_run / "metrics.jsonl")] == [0.0] * 3
    defence = load_defence(fixed_run, device="cpu")
    assert not any(name.startswith(ENCODER_PARTS) for name in defence.purifier.state_dict())
    images = load_images(fixed, "test", limit=10).pixels(slice(None))
    samples = defence.purify(images, n_samples=3)
    assert torch.equal(samples[:, 0], samples[:, 2])
    one = defence(images, view="exact", n_samples=1)
    # The logsumexp of N equal logits is theirs plus log N.
    torch.testing.assert_close(defence(images, view="exact", n_samples=4), one + math.log(4))
    assert torch.equal(defence(images), defence(images))


@pytest.mark.slow
def test_without_a_latent_it_is_evaluated(fixed: Recipe, fixed_run: Path) -> None:
    result = evaluate(fixed, run=fixed_run, attack="pgd-eot", reporter=SILENT, limit=10, device="cpu")
    assert [row["attack"] for row in result["results"]] == ["none", "pgd-eot"] * 2


@pytest.mark.slow
def test_without_a_latent_it_is_exported(fixed_run: Path, tmp_path: Path) -> None:
    # Each program is compared with the defence before it is kept.
    export_run(fixed_run, out=tmp_path, reporter=SILENT)
    assert (tmp_path / "defence.pt2").is_file()
    assert (tmp_path / "defence.onnx").is_file()
