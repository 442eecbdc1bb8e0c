"""A purifier without a latent: nothing is encoded, nothing is drawn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from carso_cli.build import load_defence, load_images
from carso_cli.defence.vae import ENCODER_PARTS
from carso_cli.evaluation.run import evaluate
from carso_cli.io.json_files import read_json_lines
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.reporter import SilentReporter
from carso_cli.tools.export import export_run
from carso_cli.training.purifier import train_purifier


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(
        "digits",
        (
            "representation.layers=[layer.0.block.0.conv_1, layer.2.block.0.conv_1]",
            *("purifier.condition_features=16", "purifier.latent_features=0", "data.holdout=0.1"),
            *("training.epochs=2", "training.batch_size=10", "training.attack_mix.pgd_steps=1"),
            *("evaluation.n_samples=2", "evaluation.pgd_eot_steps=2", "evaluation.eot_draws=1"),
            "evaluation.scoring_draws=2",
        ),
    )


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fixed") / "run"
    train_purifier(recipe, run=folder, reporter=SilentReporter(), device="cpu", limit=30)
    return folder


def test_nothing_is_random(recipe: Recipe, run: Path) -> None:
    assert [line["kl"] for line in read_json_lines(run / "metrics.jsonl")] == [0.0, 0.0]
    defence = load_defence(run, device="cpu")
    assert not any(name.startswith(ENCODER_PARTS) for name in defence.purifier.state_dict())
    images = load_images(recipe, "test", limit=10).pixels(slice(None))
    samples = defence.purify(images, n_samples=3)
    assert torch.equal(samples[:, 0], samples[:, 2])
    one = defence(images, view="exact", n_samples=1)
    # The logsumexp of N equal logits is theirs plus log N.
    torch.testing.assert_close(defence(images, view="exact", n_samples=4), one + math.log(4))
    assert torch.equal(defence(images), defence(images))


def test_it_is_evaluated(recipe: Recipe, run: Path) -> None:
    result = evaluate(recipe, run=run, attack="pgd-eot", reporter=SilentReporter(), limit=10, device="cpu")
    assert [row["attack"] for row in result["results"]] == ["none", "pgd-eot"] * 2


def test_it_is_exported(run: Path, tmp_path: Path) -> None:
    # Each program is held against the defence before it is kept.
    export_run(run, out=tmp_path, reporter=SilentReporter())
    assert (tmp_path / "defence.pt2").is_file()
    assert (tmp_path / "defence.onnx").is_file()
