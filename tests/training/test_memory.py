"""A batch that does not fit the memory is computed in parts, with the results of the whole batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli.bench.profiling import peak_bytes
from carso_cli.build import build_classifier, load_images
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.reporter import SILENT
from carso_cli.training import memory
from carso_cli.training.adversarial_cache import AdversarialCache
from carso_cli.training.balanced_batch import BalancedBatch
from carso_cli.training.memory import Fit, fit_batch
from carso_cli.training.purifier_step import (
    TrainingSetup,
    TrainingState,
    _perturbed_shard,
    initial_state,
    train_step,
)

pytestmark = pytest.mark.slow  # each takes training steps

CPU = torch.device("cpu")
COUNT = 32
PARTS = (Fit(recompute_encodings=True), Fit(recompute_encodings=True, recompute_layers=True))


@pytest.fixture(scope="module")
def made(small: Any) -> tuple[Recipe, TrainingSetup]:
    recipe: Recipe = small("training.learning_rate.initial=1e-4", f"training.batch_size={COUNT}")
    images, classifier = load_images(recipe, "train", limit=COUNT), build_classifier(recipe, "at")
    perturb, cache = BalancedBatch(recipe, classifier), AdversarialCache(1)
    return recipe, TrainingSetup(recipe, classifier, images, images, perturb, cache, CPU, SILENT)


def after_two_steps(setup: TrainingSetup, fit: Fit) -> tuple[TrainingState, Tensor]:
    state = replace(initial_state(setup), fit=fit)
    state.purifier.train()
    sums = [train_step(setup, state, torch.arange(COUNT), (0, number), 1.0) for number in range(2)]
    return state, torch.stack(sums)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fit", PARTS, ids=["encodings", "layers"])
def test_the_result_is_that_of_the_whole_batch(made: Any, fit: Fit, precision: str) -> None:
    setup = replace(made[1], recipe=made[0].model_copy(update={"precision": precision}))
    whole, expected = after_two_steps(setup, Fit())
    parts, found = after_two_steps(setup, fit)
    # The same operations on the same numbers: batch statistics, running ones, gradients and moments.
    assert torch.equal(found, expected)
    state = parts.purifier.state_dict()
    for name, tensor in whole.purifier.state_dict().items():
        assert torch.equal(state[name], tensor), name
    for one, other in zip(whole.purifier.parameters(), parts.purifier.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_images_are_perturbed_alike_in_any_number_of_passes(made: Any) -> None:
    setup, labels = made[1], made[1].train.labels
    clean = setup.train.pixels(slice(None))
    whole = _perturbed_shard(setup, Fit(), clean, labels, (0, 0))
    parts = _perturbed_shard(setup, Fit(at_once=5), clean, labels, (0, 0))
    # Where a gradient is next to zero, rounding chooses its sign.
    assert (whole != parts).float().mean() < 1e-3
    torch.testing.assert_close(whole[COUNT // 2 :], parts[COUNT // 2 :], rtol=0, atol=0)


def test_the_parts_take_less_memory(made: Any) -> None:
    def peak(fit: Fit) -> int:
        state = replace(initial_state(made[1]), fit=fit)
        state.purifier.train()
        return peak_bytes(lambda: train_step(made[1], state, torch.arange(COUNT), (0, 0), 1.0), CPU)

    peaks = [peak(fit) for fit in (Fit(), *PARTS)]
    assert peaks[0] > peaks[1] >= peaks[2]


def test_the_way_follows_from_the_free_memory(
    made: Any, monkeypatch: pytest.MonkeyPatch, recorder: Any
) -> None:
    recipe, setup = made
    purifier = initial_state(setup).purifier.train()
    before = {name: tensor.clone() for name, tensor in purifier.state_dict().items()}

    def fit(usable: int | None) -> Fit:
        monkeypatch.setattr(memory, "usable_bytes", lambda _: usable)
        attacked = setup.perturb.model
        return fit_batch(recipe, setup.classifier, attacked, purifier, 5120, recorder)

    assert fit(None) == Fit()
    assert not fit(2**50).recompute_encodings
    assert recorder.said == []
    ways = [(f.recompute_encodings, f.recompute_layers) for f in map(fit, (2**40, 2**31, 2**26))]
    assert ways[0] == (False, False)
    assert ways[2] == (True, True)
    assert sorted(ways) == ways
    assert "5,120 images need" in recorder.said[-1]
    # Looking changes nothing.
    assert all(torch.equal(tensor, before[name]) for name, tensor in purifier.state_dict().items())
