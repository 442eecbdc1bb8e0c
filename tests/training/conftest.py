"""One small purifier, trained once, that the tests of this folder read, resume and start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from carso_cli.errors import InterruptedRun
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.reporter import SILENT
from carso_cli.training import purifier as workflow
from carso_cli.training import purifier_step
from carso_cli.training.purifier import train_purifier

SMALL = (
    "representation.layers=[layer.0.block.0.conv_1, layer.2.block.0.conv_1]",
    *("purifier.condition_features=16", "purifier.latent_features=4", "data.holdout=0.25"),
    *("training.epochs=3", "training.learning_rate.warmup_epochs=1", "training.save_every_minutes=0"),
    *("training.learning_rate.plateau_epochs=1", "training.learning_rate.annealing_epochs=1"),
    *("training.learning_rate.plateau=0.01", "training.learning_rate.final=0.005"),
    *("training.beta_increase.first_epoch=0", "training.beta_increase.last_epoch=2"),
    *("training.batch_size=8", "training.attack_mix.pgd_steps=1", "evaluation.n_samples=2"),
    *("training.adversarial.steps=2", "training.adversarial.n_samples=2"),
)


@pytest.fixture(scope="session")
def small() -> Callable[..., Recipe]:
    """Loads a recipe with a small purifier and three short epochs, and further overrides."""
    return lambda *overrides, base="digits": load_recipe(base, (*SMALL, *overrides))


@pytest.fixture(scope="session")
def train() -> Callable[..., dict[str, Any]]:
    """Trains on 60 of 80 images: eight batches."""

    def train(recipe: Recipe, run: Path, limit: int = 80, **options: Any) -> dict[str, Any]:
        return train_purifier(recipe, run=run, reporter=SILENT, device="cpu", limit=limit, **options)

    return train


@pytest.fixture(scope="session")
def trained(small: Any, train: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole run on the paper's objective, not to be changed, and what training returned."""
    run = tmp_path_factory.mktemp("trained") / "run"
    return run, train(small(), run)


@pytest.fixture(scope="session")
def elbo_run(trained: tuple[Path, dict[str, Any]]) -> Path:
    """The folder of that run."""
    return trained[0]


@pytest.fixture
def kill(train: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Trains until a step is interrupted, and returns the message."""

    def kill(recipe: Recipe, run: Path, step: int, **options: Any) -> str:
        taken, original = 0, purifier_step.train_step

        def interrupted(*arguments: Any) -> torch.Tensor:
            nonlocal taken
            taken += 1
            if taken == step:
                raise KeyboardInterrupt
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(workflow, "train_step", interrupted)
            with pytest.raises(InterruptedRun) as caught:
                train(recipe, run, **options)
        return caught.value.message

    return kill
