"""Perturbed images kept over epochs: made once a group, the same after a resumed run, and said in reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli.data.image_set import epoch_batches
from carso_cli.errors import InterruptedRun
from carso_cli.recipe.identity import recipe_hash
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.checkpoints import load_tensors
from carso_cli.training import purifier as workflow
from carso_cli.training.adversarial_cache import AdversarialCache
from carso_cli.training.balanced_batch import BalancedBatch
from carso_cli.training.preflight import estimate_cost
from carso_cli.training.purifier import train_purifier
from carso_cli.training.purifier_step import train_step

SETTINGS = (
    "training.epochs=4",
    "training.learning_rate.warmup_epochs=1",
    "training.learning_rate.plateau_epochs=1",
    "training.learning_rate.annealing_epochs=2",
    "training.beta_increase.first_epoch=0",
    "training.beta_increase.last_epoch=2",
    "training.batch_size=8",
    "training.attack_mix.pgd_steps=1",
    "purifier.condition_features=8",
    "purifier.latent_features=4",
)


def reusing(epochs: int) -> Recipe:
    return load_recipe("digits", [*SETTINGS, f"training.attack_mix.reuse={epochs}"])


def positions_of(batches: list[tuple[Tensor, Any]]) -> list[list[int]]:
    return [positions.tolist() for positions, _ in batches]


def test_without_reuse_every_epoch_has_batches_and_perturbations_of_its_own() -> None:
    pool = AdversarialCache(reuse=1)
    for epoch in range(3):
        found = pool.batches(20, 6, 5, epoch)
        assert positions_of(found) == [batch.tolist() for batch in epoch_batches(20, 6, 5, epoch)]
        assert [place for _, place in found] == [(epoch, number) for number in range(4)]


def test_epochs_of_a_group_share_batches_in_another_order() -> None:
    pool = AdversarialCache(reuse=3)
    epochs = [pool.batches(400, 8, 5, epoch) for epoch in range(4)]
    for later in epochs[1:3]:
        assert positions_of(later) != positions_of(epochs[0])
        assert sorted(positions_of(later)) == sorted(positions_of(epochs[0]))
        assert dict(zip(map(tuple, positions_of(later)), [place for _, place in later], strict=True)) == dict(
            zip(map(tuple, positions_of(epochs[0])), [place for _, place in epochs[0]], strict=True)
        )
    assert positions_of(epochs[1]) != positions_of(epochs[2])
    assert sorted(positions_of(epochs[3])) != sorted(positions_of(epochs[0]))


def test_kept_inputs_are_those_made_first_and_clean_images_are_not_kept() -> None:
    pool = AdversarialCache(reuse=2)
    clean = torch.rand(6, 1, 4, 4)
    made = clean.clone()
    made[1] += 0.5
    made[4] -= 0.5
    first = pool.perturbed((0, 3), clean, lambda: made)
    again = pool.perturbed((0, 3), clean, lambda: pytest.fail("made twice in one group"))
    assert torch.equal(first, made)
    assert torch.equal(again, made)
    assert len(pool._kept[3][1]) == 2
    assert torch.equal(pool.perturbed((2, 3), clean, lambda: clean), clean)


class Attacks:
    """Counts the batches that are perturbed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seeds: list[int] = []
        original = BalancedBatch.__call__

        def counted(batch: BalancedBatch, images: Tensor, labels: Tensor, seed: int, own: slice) -> Tensor:
            self.seeds.append(seed)
            return original(batch, images, labels, seed, own)

        monkeypatch.setattr(BalancedBatch, "__call__", counted)


def train(recipe: Recipe, run: Path, **options: Any) -> dict[str, Tensor]:
    train_purifier(recipe, run=run, device="cpu", limit=32, **options)
    return load_tensors(run / "purifier.safetensors")[0]


@pytest.mark.parametrize(("epochs", "attacked"), [(1, 4), (3, 2)])
def test_batches_are_perturbed_once_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, attacked: int
) -> None:
    attacks = Attacks(monkeypatch)
    train(reusing(epochs), tmp_path / "run")
    assert len(attacks.seeds) == len(set(attacks.seeds)) == 4 * attacked
    assert f"reuse: {epochs}" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_a_run_stopped_within_a_group_ends_in_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = reusing(4)
    whole = train(recipe, tmp_path / "whole")
    steps = 0

    def stop_in_the_third_epoch(*arguments: Any) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 10:
            raise KeyboardInterrupt
        return train_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(workflow, "train_step", stop_in_the_third_epoch)
        with pytest.raises(InterruptedRun):
            train(recipe, tmp_path / "stopped")
    resumed = train(recipe, tmp_path / "stopped", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_only_a_real_reuse_makes_another_recipe() -> None:
    plain = load_recipe("digits", list(SETTINGS))
    assert recipe_hash(reusing(1)) == recipe_hash(plain)
    assert recipe_hash(reusing(2)) != recipe_hash(plain)


def test_predicted_time_counts_the_attacks_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    # One second for a gradient at 8 images, one for a training step: half the images, one gradient each.
    monkeypatch.setattr("carso_cli.training.preflight.seconds_of", lambda work, device: 1.0)
    found = [estimate_cost(reusing(epochs), device="cpu")["seconds_per_image"] for epochs in (1, 4)]
    assert found == pytest.approx([(0.5 + 1) / 8, (0.5 / 4 + 1) / 8])
