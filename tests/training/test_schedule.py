"""The schedule of a training, that of older states, short ones, and what is followed meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from carso_cli.build import load_images
from carso_cli.data.image_set import split_holdout
from carso_cli.errors import DataError, RecipeError
from carso_cli.io.json_files import read_json_lines
from carso_cli.recipe.identity import TRAINING_SECTIONS, recipe_hash
from carso_cli.recipe.load import load_recipe
from carso_cli.runs.checkpoints import load_tensors, save_tensors
from carso_cli.runs.paper import departures
from carso_cli.runtime.reporter import SILENT
from carso_cli.training.followed import training_and_followed
from carso_cli.training.optim import learning_rate
from carso_cli.training.preflight import training_images
from carso_cli.training.purifier import train_purifier
from carso_cli.training.schedule import rates_of_run, warn_of_short_schedule
from carso_cli.training.selection import refuse_blind_choice

SHAPE = ("training.learning_rate.plateau_epochs=0", "training.learning_rate.annealing_epochs=2")


@pytest.mark.parametrize("name", ["cifar10", "tinyimagenet200", "digits"])
def test_states_of_older_versions_keep_the_rates_they_began_with(name: str) -> None:
    recipe = load_recipe(name)
    rate = recipe.training.learning_rate
    old, new = rates_of_run(recipe, {"steps": 7}), rates_of_run(recipe, None)
    for place in range(rate.annealing_epochs):
        epoch = rate.warmup_epochs + rate.plateau_epochs + place
        before = rate.plateau + (rate.final - rate.plateau) * (place + 1) / rate.annealing_epochs
        assert learning_rate(epoch, **old) == pytest.approx(before)
        after = rate.plateau + (rate.final - rate.plateau) * place / (rate.annealing_epochs - 1)
        assert learning_rate(epoch, **new) == pytest.approx(after)
    for epoch in range(rate.warmup_epochs + rate.plateau_epochs):
        assert learning_rate(epoch, **old) == learning_rate(epoch, **new)
    assert rates_of_run(recipe, {"learning_rate": old}) == old


@pytest.mark.slow
@pytest.mark.parametrize("is_old", [False, True])
def test_a_resumed_run_keeps_the_rates_in_its_state(
    small: Any, train: Any, kill: Any, tmp_path: Path, is_old: bool
) -> None:
    recipe, run = small(*SHAPE), tmp_path / "run"
    kill(recipe, run, 10)
    tensors, header = load_tensors(run / "state.safetensors")
    assert header["learning_rate"] == recipe.training.learning_rate.model_dump()
    if is_old:
        del header["learning_rate"]
        save_tensors(run / "state.safetensors", tensors, header)
    train(recipe, run, resume=True)
    rates = [line["learning_rate"] for line in read_json_lines(run / "metrics.jsonl")]
    assert rates[1:] == pytest.approx([(0.01 + 0.005) / 2 if is_old else 0.01, 0.005])


@pytest.mark.slow
def test_a_run_whose_beta_was_scaled_to_no_ramp_is_resumed_with_it(
    small: Any, train: Any, kill: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    kill(small("training.beta_increase.last_epoch=0"), run, 10)
    train(small("training.beta_increase.last_epoch=1"), run, resume=True)
    assert [line["beta"] for line in read_json_lines(run / "metrics.jsonl")] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["cifar10", "tinyimagenet200", "digits", "cifar10-small"])
def test_the_smallest_useful_number_of_epochs_is_the_one_named(name: str, recorder: Any) -> None:
    def warnings(epochs: int) -> list[str]:
        recorder.warned.clear()
        recipe = load_recipe(name, [f"training.epochs={epochs}"])
        warn_of_short_schedule(recipe, 20 * recipe.training.batch_size, recorder)
        return [text for text in recorder.warned if "hardly train" in text]

    assert [bool(warnings(epochs)) for epochs in (1, 2, 3, 4, 5, 12)] == [True, True, *[False] * 4]
    assert warnings(2)[0].endswith("the smallest useful number is training.epochs=3")


@pytest.mark.parametrize("epochs", range(1, 30))
def test_a_scaled_beta_keeps_a_ramp_of_one_epoch(epochs: int) -> None:
    beta = load_recipe("cifar10", [f"training.epochs={epochs}"]).training.beta_increase
    assert beta.last_epoch - beta.first_epoch >= 1


def test_a_single_image_is_refused(small: Any, train: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 training image left: batch normalisation needs at least 2"):
        train(small("data.holdout=0"), tmp_path / "run", limit=1)
    assert not (tmp_path / "run").exists()


def test_without_holdout_every_image_is_trained_on_and_some_are_followed() -> None:
    recipe = load_recipe("digits", ["data.holdout=0"])
    images = load_images(recipe, "train")
    train, followed = training_and_followed(recipe, images, SILENT)
    assert len(train) == len(images) == training_images(recipe, None) == 1442
    assert len(followed) == 29
    assert set(followed.indices.tolist()) <= set(train.indices.tolist())
    # The very images that a holdout of that share would take.
    assert torch.equal(followed.indices, split_holdout(images, 0.02, recipe.seed)[1].indices)
    on_test = load_recipe("digits", ["data.holdout=0", "data.follow=test"])
    assert len(training_and_followed(on_test, images, SILENT)[1]) == 355
    assert recipe_hash(on_test, TRAINING_SECTIONS) == recipe_hash(recipe, TRAINING_SECTIONS)
    paper = load_recipe("cifar10", ["data.follow=test", "training.save_every_minutes=1"])
    assert departures(paper.model_dump(mode="json")) == ()


@pytest.mark.parametrize(("limit", "left"), [(None, 1413), (100, 98), (3, 3)])
def test_the_images_of_a_dry_run_are_those_trained_on(limit: int | None, left: int) -> None:
    recipe = load_recipe("digits")
    images = load_images(recipe, "train", limit=limit)
    assert training_images(recipe, limit) == left == len(training_and_followed(recipe, images, SILENT)[0])


@pytest.mark.slow
def test_what_is_followed_does_not_change_the_weights(small: Any, train: Any, tmp_path: Path) -> None:
    weights = []
    for source in ("train", "test"):
        run = tmp_path / source
        result = train(small("data.holdout=0", f"data.follow={source}"), run, limit=40)
        assert result["followed_on"] == source
        assert (result["held_out_images"], result["images"]) == (0, 40)
        assert 0.0 <= result["defence_clean_accuracy"] <= 1.0
        weights.append(load_tensors(run / "purifier.safetensors")[0])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_best_epoch_is_not_chosen_by_the_training_images(tmp_path: Path) -> None:
    best = ("training.keep=best", "data.holdout=0")
    with pytest.raises(RecipeError, match="no held-out images to choose by") as caught:
        train_purifier(load_recipe("digits", best), run=tmp_path / "run", device="cpu")
    assert "data.follow=test" in (caught.value.hint or "")
    assert not (tmp_path / "run").exists()
    for allowed in ((*best, "data.follow=test"), best[:1], best[1:]):
        refuse_blind_choice(load_recipe("digits", allowed))
