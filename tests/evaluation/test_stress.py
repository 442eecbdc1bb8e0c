"""Numbers under stress: what is not finite stops with its place, what is seeded repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from carso_cli.build import (
    build_classifier,
    build_purifier,
    classifier_fingerprint,
    load_images,
    load_purifier,
)
from carso_cli.data.image_set import ImageSet
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.elbo import negative_elbo
from carso_cli.errors import DataError, NumericsError, WeightsError
from carso_cli.evaluation.run import evaluate
from carso_cli.evaluation.scoring import REPORT, DefenceScorer
from carso_cli.io.checksum import fingerprint
from carso_cli.io.json_files import read_json_lines
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.checkpoints import load_tensors, save_tensors
from carso_cli.runtime.reporter import SilentReporter
from carso_cli.training import purifier_step as purifier_steps
from carso_cli.training.purifier import train_purifier

QUIET = SilentReporter()
SMALL = (
    "training.epochs=2",
    "training.learning_rate.warmup_epochs=1",
    "training.learning_rate.plateau_epochs=1",
    "training.learning_rate.annealing_epochs=0",
    "training.beta_increase.first_epoch=0",
    "training.beta_increase.last_epoch=1",
    "training.batch_size=8",
    "training.attack_mix.pgd_steps=1",
    "purifier.condition_features=8",
    "purifier.latent_features=4",
    "evaluation.n_samples=3",
    "evaluation.scoring_draws=4",
    "evaluation.pgd_steps=2",
)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("digits", SMALL)


@pytest.fixture
def defence(recipe: Recipe) -> Defence:
    classifier = build_classifier(recipe, "at")
    torch.manual_seed(0)
    return Defence(classifier, build_purifier(recipe, classifier), recipe.representation.layers, n_samples=3)


def run_once(recipe: Recipe, run: Path) -> tuple[str, list[dict[str, object]]]:
    train_purifier(recipe, run=run, reporter=QUIET, device="cpu", limit=24)
    evaluate(recipe, run=run, reporter=QUIET, device="cpu", attack="pgd", limit=6)
    (records,) = run.glob("evaluation/*/records.jsonl")
    return fingerprint(load_tensors(run / "purifier.safetensors")[0]), read_json_lines(records)


@pytest.mark.slow
def test_the_same_seed_repeats_bit_for_bit_and_another_does_not(recipe: Recipe, tmp_path: Path) -> None:
    first, again = run_once(recipe, tmp_path / "a"), run_once(recipe, tmp_path / "b")
    assert first == again
    other = run_once(recipe.model_copy(update={"seed": 1}), tmp_path / "c")
    assert other[0] != first[0]
    assert [line["margin"] for line in other[1]] != [line["margin"] for line in first[1]]


@pytest.mark.slow
def test_scores_of_a_defence_agree_between_batch_sizes(recipe: Recipe, defence: Defence) -> None:
    images = load_images(recipe, "test", limit=12)
    indices = images.indices.tolist()
    whole = DefenceScorer(defence, 0, 4, 4096)(images.pixels(slice(0, 12)), images.labels, indices, REPORT)
    for size, per_pass in ((5, 4096), (12, 7), (1, 3)):
        scorer = DefenceScorer(defence, 0, 4, per_pass)
        for start in range(0, 12, size):
            part = slice(start, start + size)
            score = scorer(images.pixels(part), images.labels[part], indices[part], REPORT)
            torch.testing.assert_close(score.margin, whole.margin[part], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(score.loss, whole.loss[part], rtol=1e-4, atol=1e-5)
            assert torch.equal(score.correct, whole.correct[part])
            assert torch.equal(score.predicted, whole.predicted[part])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_stops_an_evaluation_with_its_layer(
    recipe: Recipe, defence: Defence, tmp_path: Path, value: float
) -> None:
    with torch.no_grad():
        next(iter(defence.purifier.decoder.parameters())).fill_(value)
    options = {"run": tmp_path, "reporter": QUIET, "device": "cpu", "limit": 2, "attack": "none"}
    with pytest.raises(NumericsError, match=r"not finite, first in layer 'purifier\.decoder"):
        evaluate(recipe, defence=defence, **options)  # type: ignore[arg-type]
    classifier = build_classifier(recipe, "at")
    with torch.no_grad():
        classifier.get_parameter("logits.bias").fill_(value)
    with pytest.raises(
        NumericsError, match=r"logits of the classifier are not finite, first in layer 'logits'"
    ):
        evaluate(recipe, classifier=classifier, **options)  # type: ignore[arg-type]


def test_a_stored_weight_that_is_not_finite_is_named(recipe: Recipe, tmp_path: Path) -> None:
    classifier = build_classifier(recipe, "at")
    state = build_purifier(recipe, classifier).state_dict()
    name = next(name for name in state if name.startswith("decoder"))
    state[name] = torch.full_like(state[name], float("nan"))
    metadata = {
        "layers": list(recipe.representation.layers),
        "classifier": classifier_fingerprint(classifier),
    }
    path = tmp_path / "purifier.safetensors"
    save_tensors(path, state, metadata)
    with pytest.raises(WeightsError, match=rf"\.safetensors: tensor '{name}' holds values that are NaN"):
        load_purifier(path, recipe, classifier)


def test_a_gradient_that_is_not_finite_stops_training_and_is_named(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steep(*arguments: Any) -> Any:
        terms = negative_elbo(*arguments)
        # A finite loss with a gradient that is not: the root's slope at zero.
        return terms._replace(total=terms.total + (terms.total.detach() - terms.total).abs().sqrt())

    monkeypatch.setattr(purifier_steps, "negative_elbo", steep)
    with pytest.raises(NumericsError, match=r"the gradient of '[\w.]+' is not finite in epoch 1, batch 1"):
        train_purifier(recipe, run=tmp_path, reporter=QUIET, device="cpu", limit=24)
    assert not (tmp_path / "state.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.1])
def test_images_cannot_hold_nan_or_leave_the_pixel_range(value: float) -> None:
    pixels = torch.full((1, 1, 28, 28), value)
    with pytest.raises(DataError, match=r"images are torch\.float32"):
        ImageSet(pixels, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), ("a",))
