from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from carso_cli import load_defence
from carso_cli.build import load_images
from carso_cli.errors import InterruptedRun, NumericsError, RecipeError, StateError, UsageError, WeightsError
from carso_cli.io.json_files import read_json, read_json_lines
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.checkpoints import load_tensors
from carso_cli.runtime.reporter import SilentReporter
from carso_cli.training import purifier as workflow
from carso_cli.training import purifier_step as purifier_steps
from carso_cli.training.balanced_batch import BalancedBatch, quarter_size
from carso_cli.training.purifier import train_purifier

SHORT = (
    "training.epochs=3",
    "training.learning_rate.warmup_epochs=1",
    "training.learning_rate.plateau_epochs=1",
    "training.learning_rate.annealing_epochs=1",
    "training.beta_increase.first_epoch=0",
    "training.beta_increase.last_epoch=2",
    "training.batch_size=8",
    "training.attack_mix.pgd_steps=2",
    "purifier.condition_features=16",
    "purifier.latent_features=4",
    "data.holdout=0.25",
)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("digits", SHORT)


@pytest.fixture(scope="module")
def trained(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One whole run, to be read and not changed, and what training returned."""
    run = tmp_path_factory.mktemp("trained") / "run"
    return run, train(recipe, run)


@pytest.fixture
def copied(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return shutil.copytree(trained[0], tmp_path / "run")


def train(recipe: Recipe, run: Path, **options: Any) -> dict[str, Any]:
    return train_purifier(recipe, run=run, reporter=SilentReporter(), device="cpu", limit=80, **options)


def test_run_folder_and_defence(recipe: Recipe, trained: tuple[Path, dict[str, Any]]) -> None:
    run, result = trained
    assert sorted(entry.name for entry in run.iterdir()) == [
        ".lock",
        "environment.json",
        "metrics.jsonl",
        "previous-state.safetensors",
        "purifier.safetensors",
        "recipe.yaml",
        "state.safetensors",
    ]
    metrics = read_json_lines(run / "metrics.jsonl")
    assert [line["epoch"] for line in metrics] == [0, 1, 2]
    assert [line["beta"] for line in metrics] == [0.0, 0.5, 1.0]
    assert metrics[1]["learning_rate"] == recipe.training.learning_rate.plateau
    assert metrics[2]["learning_rate"] == pytest.approx(recipe.training.learning_rate.final)
    assert all(line["images"] == 60 for line in metrics)
    assert all(line["held_out_images"] == 20 for line in metrics)
    assert read_json(run / "environment.json")["classes"] == [str(digit) for digit in range(10)]
    for line in metrics:
        assert line["loss"] == pytest.approx(line["bce"] + line["beta"] * line["kl"])
    assert result["seconds_total"] == pytest.approx(sum(line["seconds"] for line in metrics))
    _, metadata = load_tensors(run / "purifier.safetensors")
    assert tuple(metadata["layers"]) == recipe.representation.layers
    assert metadata["step"] == 3 * 8

    defence = load_defence(run, device="cpu")
    images = load_images(recipe, "test", limit=20).pixels(slice(0, 20))
    latents = defence.draw_latents(20, generator=torch.Generator().manual_seed(1))
    log_probability = defence(images, latents=latents)
    assert log_probability.shape == (20, 10)
    torch.testing.assert_close(log_probability.exp().sum(1), torch.ones(20))
    assert torch.equal(log_probability, defence(images, latents=latents))
    assert defence.purify(images, n_samples=3).shape == (20, 3, 3, 32, 32)
    assert not any(parameter.requires_grad for parameter in defence.parameters())


def test_training_lowers_the_loss(trained: tuple[Path, dict[str, Any]]) -> None:
    losses = [line["bce"] for line in read_json_lines(trained[0] / "metrics.jsonl")]
    assert losses[2] < 0.9 * losses[0]


def test_a_killed_run_resumes_to_the_same_weights(
    recipe: Recipe, trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    original = purifier_steps.train_step

    def stop_in_the_second_epoch(*arguments: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 12:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(workflow, "train_step", stop_in_the_second_epoch)
        with pytest.raises(InterruptedRun, match="1 of 3 epochs are saved"):
            train(recipe, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "purifier.safetensors").exists()
    train(recipe, tmp_path / "stopped", resume=True)
    whole, _ = load_tensors(trained[0] / "purifier.safetensors")
    resumed, _ = load_tensors(tmp_path / "stopped" / "purifier.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [read_json_lines(run / "metrics.jsonl") for run in (trained[0], tmp_path / "stopped")]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_loses_nothing(
    recipe: Recipe,
    trained: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    places: list[tuple[int, int]] = []
    original = purifier_steps.train_step

    def stop_in_the_second_epoch(*arguments: Any) -> torch.Tensor:
        places.append(arguments[3])
        if len(places) == 12:
            # Twice at once, as under torchrun, whose terminal and whose agent both send it.
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(workflow, "train_step", stop_in_the_second_epoch)
    before = signal.getsignal(number)
    with pytest.raises(InterruptedRun, match="1 of 3 epochs and 4 batches of the next are saved"):
        train(recipe, tmp_path / "run")
    assert signal.getsignal(number) is before
    train(recipe, tmp_path / "run", resume=True)
    assert places == [(epoch, batch) for epoch in range(3) for batch in range(8)]
    whole, _ = load_tensors(trained[0] / "purifier.safetensors")
    resumed, _ = load_tensors(tmp_path / "run" / "purifier.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [read_json_lines(run / "metrics.jsonl") for run in (trained[0], tmp_path / "run")]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


def test_an_impatient_second_signal_stops_at_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carso_cli.runtime.signals._SAME_EVENT", 0.0)

    def never_ending(*arguments: Any) -> torch.Tensor:
        while True:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(workflow, "train_step", never_ending)
    with pytest.raises(InterruptedRun, match="0 of 3 epochs are saved"):
        train(recipe, tmp_path / "run")


def test_a_warm_up_too_short_for_radam_is_warned_of(recipe: Recipe, tmp_path: Path) -> None:
    warnings: list[str] = []

    class Listening(SilentReporter):
        def warning(self, message: str) -> None:
            warnings.append(message)

    short = load_recipe("digits", (*SHORT, "training.batch_size=60", "training.learning_rate.plateau=1e-8"))
    train_purifier(short, run=tmp_path / "run", reporter=Listening(), device="cpu", limit=80)
    assert warnings == [
        "the warm-up lasts 1 optimiser step; below 6, RAdam takes plain gradient steps at the full "
        "learning rate and may diverge"
    ]


def test_resuming_another_recipe_is_refused(copied: Path) -> None:
    other = load_recipe("digits", (*SHORT, "seed=7"))
    with pytest.raises(StateError, match="belongs to another run: its recipe is"):
        train(other, copied, resume=True)


def test_starting_over_a_run_is_refused(recipe: Recipe, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already holds a run") as caught:
        train(recipe, copied)
    assert "--resume" in caught.value.hint
    with pytest.raises(StateError, match="holds no run to resume"):
        train(recipe, tmp_path / "empty", resume=True)


def test_missing_weights_leave_no_folder_behind(tmp_path: Path) -> None:
    absent = load_recipe("digits", [*SHORT, "classifier.at={source: file, file: absent.safetensors}"])
    with pytest.raises(WeightsError, match=r"absent\.safetensors"):
        train(absent, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops_and_names_the_term(tmp_path: Path) -> None:
    recipe = load_recipe("digits", (*SHORT, "training.learning_rate.plateau=1e30"))
    with pytest.raises(NumericsError, match=r"became (nan|inf) in epoch \d, batch \d"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "purifier.safetensors").exists()


def test_damaged_purifier_is_refused(copied: Path) -> None:
    path = copied / "purifier.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(StateError, match="do not match the checksum"):
        load_defence(copied, device="cpu")


def test_a_recipe_changed_after_training_is_noticed(copied: Path) -> None:
    recipe = copied / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("condition_features: 16", "condition_features: 20"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml has changed since its run wrote it"):
        load_defence(copied, device="cpu")
    recipe.write_text(recipe.read_text().partition("\n")[2])
    with pytest.raises(StateError, match=r"weight is \(16, \d+\), not \(20, ") as caught:
        load_defence(copied, device="cpu")
    assert "recipe.yaml was changed" in caught.value.hint


def test_missing_run_names_the_command_that_trains_it(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="holds no trained purifier") as caught:
        load_defence(tmp_path / "none")
    assert "carso train-purifier" in caught.value.hint


@pytest.mark.parametrize(
    ("batch", "fraction", "quarter"), [(5120, 0.5, 640), (2560, 0.15, 96), (1024, 0.01, 2), (10, 0.3, 0)]
)
def test_even_split_of_the_perturbed_share(batch: int, fraction: float, quarter: int) -> None:
    assert quarter_size(batch, fraction) == quarter


def test_balanced_batch_holds_four_attacks_within_their_budgets() -> None:
    weights = torch.randn(3, 3 * 8 * 8)

    class Linear(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1) @ weights.T

    images, labels = 0.3 + 0.4 * torch.rand(18, 3, 8, 8), torch.arange(18) % 3
    perturb = BalancedBatch(
        Linear(), norm="linf", eps=0.08, adversarial_fraction=0.5, pgd_steps=20, pgd_step_size=0.01
    )
    perturbed = perturb(images, labels, seed=3)
    distance = (perturbed - images).abs().flatten(1).amax(1)
    expected = torch.tensor([0.04] * 2 + [0.08] * 2 + [0.04] * 2 + [0.08] * 2 + [0.0] * 10)
    torch.testing.assert_close(distance, expected)
    before = torch.nn.functional.cross_entropy(Linear()(images[:8]), labels[:8], reduction="none")
    after = torch.nn.functional.cross_entropy(Linear()(perturbed[:8]), labels[:8], reduction="none")
    assert (after > before).all()
    assert torch.equal(perturbed, perturb(images, labels, seed=3))
