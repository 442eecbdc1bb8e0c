"""Adversarially-balanced batches, and the cache that keeps them over several epochs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.data.image_set import epoch_batches
from carso_cli.recipe.identity import recipe_hash
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.purifier_training import AttackMix
from carso_cli.training.adversarial_cache import AdversarialCache
from carso_cli.training.balanced_batch import BalancedBatch, gradients_per_image, part_size
from carso_cli.training.preflight import estimate_cost


def reuse(epochs: int) -> str:
    return f"training.attack_mix.reuse={epochs}"


@pytest.mark.parametrize(
    ("batch", "fraction", "quarter"),
    [(5120, 0.5, 640), (2560, 0.15, 96), (1024, 0.01, 2), (10, 0.3, 0), (400, 0.29, 29)],
)
def test_even_split_of_the_perturbed_share(batch: int, fraction: float, quarter: int) -> None:
    assert part_size(AttackMix(adversarial_fraction=fraction), batch) == quarter


def test_the_release_perturbs_nothing_in_scenario_c() -> None:
    def counts(name: str) -> tuple[int, int]:
        training = load_recipe(name).training
        release = training.attack_mix.model_copy(update={"eps_convention": "release"})
        return part_size(training.attack_mix, training.batch_size), part_size(release, training.batch_size)

    # The release's own: int(batch // world * fraction // 4) on each of 8, 4 and 8 devices.
    assert counts("cifar10") == (640, 8 * (640 // 2 // 4))
    assert counts("cifar100") == (96, 4 * (int(640 * 0.15) // 4))
    assert counts("tinyimagenet200") == (2, 8 * (int(128 * 0.01) // 4)) == (2, 0)


class Linear(torch.nn.Module):
    """Three classes of a fixed linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.randn(3, 3 * 8 * 8, generator=torch.Generator().manual_seed(0))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weights.T


def distances(recipe: Any, count: int = 24, seed: int = 3) -> list[float]:
    images, labels = 0.4 + 0.2 * torch.rand(count, 3, 8, 8), torch.arange(count) % 3
    perturbed = BalancedBatch(recipe, Linear())(images, labels, seed=seed)
    return [round(float(size), 4) for size in (perturbed - images).abs().flatten(1).amax(1)]


def mix(*values: str) -> tuple[str, ...]:
    fixed = ("threat.eps=0.08", "training.attack_mix.pgd_steps=20")
    return (*fixed, *(f"training.attack_mix.{value}" for value in values))


def test_the_release_divides_eps_by_the_mean_deviation(small: Any) -> None:
    recipe = small(*mix("eps_convention=release"), "data.std=[0.4, 0.5, 0.6]")
    # 24 // 8 = 3 images a device, of which half is less than one for each of four attacks.
    assert distances(recipe) == [0.0] * 24
    eps = 0.08 / 0.5
    assert distances(recipe, 64) == pytest.approx(
        [eps / 2] * 8 + [eps] * 8 + [eps / 2] * 8 + [eps] * 8 + [0] * 32
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("attacks=[pgd]",), [0.04] * 6 + [0.08] * 6 + [0.0] * 12),
        (("strengths=[1.0]",), [0.08] * 12 + [0.0] * 12),
        (("attacks=[pgd]", "strengths=[1.0]", "adversarial_fraction=1"), [0.08] * 24),
    ],
)
def test_smaller_mixes_of_appendix_a(small: Any, values: tuple[str, ...], expected: list[float]) -> None:
    assert distances(small(*mix(*values))) == expected


def test_homogeneous_batches_hold_one_attack_or_none(small: Any) -> None:
    recipe = small(*mix("homogeneous=true", "adversarial_fraction=0.5"))
    assert all(len(set(distances(recipe, 6, seed))) == 1 for seed in range(4))
    batch = BalancedBatch(recipe, Linear())
    sizes = [[*itertools.chain(*batch._sizes(6, seed).values())] for seed in range(800)]
    assert all(sorted(found)[:3] == [0, 0, 0] and max(found) in (0, 6) for found in sizes)
    # An eighth of the batches each, the other half clean: within four deviations.
    shares = torch.tensor(sizes, dtype=torch.float32).mean(dim=0) / 6
    torch.testing.assert_close(shares, torch.full((4,), 0.125), rtol=0, atol=0.047)


def test_gradients_are_counted_by_attack() -> None:
    assert gradients_per_image(AttackMix(), 400) == pytest.approx(0.25 + 0.25 * 40)
    assert gradients_per_image(AttackMix(attacks=("pgd",)), 400) == pytest.approx(0.5 * 40)
    assert gradients_per_image(AttackMix(homogeneous=True), 6) == pytest.approx(0.25 + 0.25 * 40)


@pytest.mark.parametrize(
    "value", ["attacks=[pgd]", "strengths=[1.0]", "homogeneous=true", "eps_convention=release"]
)
def test_another_mix_is_another_training(small: Any, value: str) -> None:
    assert recipe_hash(small(f"training.attack_mix.{value}")) != recipe_hash(small())


def test_a_batch_holds_four_attacks_within_their_budgets(small: Any) -> None:
    weights = torch.randn(3, 3 * 8 * 8)

    class Linear(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) @ weights.T

    images, labels = 0.3 + 0.4 * torch.rand(18, 3, 8, 8), torch.arange(18) % 3
    mix = ("pgd_steps=20", "pgd_step_size=0.01", "adversarial_fraction=0.5")
    recipe = small("threat.eps=0.08", *(f"training.attack_mix.{setting}" for setting in mix))
    perturb = BalancedBatch(recipe, Linear())
    perturbed = perturb(images, labels, seed=3)
    distance = (perturbed - images).abs().flatten(1).amax(1)
    expected = torch.tensor([0.04] * 2 + [0.08] * 2 + [0.04] * 2 + [0.08] * 2 + [0.0] * 10)
    torch.testing.assert_close(distance, expected)
    before = F.cross_entropy(Linear()(images[:8]), labels[:8], reduction="none")
    after = F.cross_entropy(Linear()(perturbed[:8]), labels[:8], reduction="none")
    assert (after > before).all()
    assert torch.equal(perturbed, perturb(images, labels, seed=3))


def positions_of(batches: list[tuple[Tensor, Any]]) -> list[list[int]]:
    return [positions.tolist() for positions, _ in batches]


def test_without_reuse_every_epoch_has_batches_and_perturbations_of_its_own() -> None:
    cache = AdversarialCache(reuse=1)
    for epoch in range(3):
        found = cache.batches(20, 6, 5, epoch)
        assert positions_of(found) == [batch.tolist() for batch in epoch_batches(20, 6, 5, epoch)]
        assert [place for _, place in found] == [(epoch, number) for number in range(4)]


def test_epochs_of_a_group_share_batches_in_another_order() -> None:
    cache = AdversarialCache(reuse=3)
    epochs = [cache.batches(400, 8, 5, epoch) for epoch in range(4)]

    def by_positions(batches: list[tuple[Tensor, Any]]) -> dict[tuple[int, ...], Any]:
        return {tuple(positions.tolist()): place for positions, place in batches}

    for later in epochs[1:3]:
        assert positions_of(later) != positions_of(epochs[0])
        assert by_positions(later) == by_positions(epochs[0])
    assert positions_of(epochs[1]) != positions_of(epochs[2])
    assert sorted(positions_of(epochs[3])) != sorted(positions_of(epochs[0]))


def test_cached_inputs_are_those_made_first_and_clean_images_are_not_cached() -> None:
    cache = AdversarialCache(reuse=2)
    clean = torch.rand(6, 1, 4, 4)
    made = clean.clone()
    made[1] += 0.5
    made[4] -= 0.5
    first = cache.perturbed((0, 3), clean, lambda: made)
    again = cache.perturbed((0, 3), clean, lambda: pytest.fail("made twice in one group"))
    assert torch.equal(first, made)
    assert torch.equal(again, made)
    assert len(cache._cached[3][1]) == 2
    assert torch.equal(cache.perturbed((2, 3), clean, lambda: clean), clean)


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "groups"), [(1, 3), (2, 2)])
def test_batches_are_perturbed_once_per_group(
    small: Any, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, groups: int
) -> None:
    seeds: list[int] = []
    original = BalancedBatch.__call__

    def counted(batch: BalancedBatch, images: Tensor, labels: Tensor, seed: int, shard: slice) -> Tensor:
        seeds.append(seed)
        return original(batch, images, labels, seed, shard)

    monkeypatch.setattr(BalancedBatch, "__call__", counted)
    train(small(reuse(epochs)), tmp_path / "run")
    assert len(seeds) == len(set(seeds)) == 8 * groups
    assert f"reuse: {epochs}" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_only_a_real_reuse_makes_another_recipe(small: Any) -> None:
    assert recipe_hash(small(reuse(1))) == recipe_hash(small())
    assert recipe_hash(small(reuse(2))) != recipe_hash(small())


def test_predicted_time_counts_the_attacks_that_are_made(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # One second for a gradient at 8 images, one for a training step: half the images, one gradient each.
    monkeypatch.setattr("carso_cli.training.preflight.seconds_of", lambda work, device: 1.0)
    found = [estimate_cost(small(reuse(epochs)), device="cpu")["seconds_per_image"] for epochs in (1, 4)]
    assert found == pytest.approx([(0.5 + 1) / 8, (0.5 / 4 + 1) / 8])
