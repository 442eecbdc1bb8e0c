from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from carso_cli.build import build_classifier, classifier_fingerprint
from carso_cli.errors import (
    DataError,
    InterruptedRun,
    NumericsError,
    RecipeError,
    StateError,
    UsageError,
    WeightsError,
)
from carso_cli.io.json_files import read_json_lines
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Kind, Recipe
from carso_cli.runs.checkpoints import load_tensors
from carso_cli.runtime.reporter import SILENT
from carso_cli.training import classifier as workflow
from carso_cli.training.checkpoint import Checkpoint
from carso_cli.training.classifier import ClassifierState, train_classifier
from carso_cli.training.preflight import estimate_classifier_cost, noise_images

EPOCHS = 3
SMALL = (
    *(f"classifier.training.epochs={EPOCHS}", "classifier.training.batch_size=24", "data.holdout=0.25"),
    "training.save_every_minutes=0",
)


def recipe(*overrides: str) -> Recipe:
    return load_recipe("digits", [*SMALL, *overrides])


def train(run: Path, *overrides: str, kind: Kind = "at", **options: Any) -> dict[str, Any]:
    return train_classifier(
        recipe(*overrides), kind, run=run, reporter=SILENT, device="cpu", **{"limit": 80} | options
    )


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = read_json_lines(run / "metrics.jsonl")
    return [
        {key: value for key, value in line.items() if not key.startswith(("seconds", "images_per"))}
        for line in lines
    ]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, epoch: int, batch: int) -> None:
    original = workflow.train_step

    def step(setup: Any, state: ClassifierState, positions: Tensor, place: tuple[int, int]) -> Tensor:
        if place == (epoch, batch):
            raise KeyboardInterrupt
        return original(setup, state, positions, place)

    monkeypatch.setattr(workflow, "train_step", step)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, train(run)


def test_writes_weights_metrics_and_recipe(finished: tuple[Path, dict[str, Any]]) -> None:
    run, result = finished
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "classifier.safetensors",
        "environment.json",
        "metrics.csv",
        "metrics.jsonl",
        "recipe.yaml",
        "state.safetensors",
    }
    assert load_recipe(str(run / "recipe.yaml")) == recipe()
    lines = metrics_of(run)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert all(0 <= line[key] <= 1 for line in lines for key in ("clean_accuracy", "pgd_accuracy"))
    assert lines[0]["images"] == 60
    assert result["weights"] == str(run / "classifier.safetensors")
    assert result["loss"] == lines[-1]["loss"]
    # Nine steps rise over the first 40% and end near nothing.
    assert lines[-1]["learning_rate"] == pytest.approx(0.2 * (0.5 / 9) / 0.6)


def test_the_state_file_keeps_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # States that are stored already must be resumed: no name in here may change.
    interrupt_at(monkeypatch, 0, 1)
    with pytest.raises(InterruptedRun):
        train(tmp_path / "run")
    tensors, header = load_tensors(tmp_path / "run" / "state.safetensors")
    classifier = workflow.initial_classifier(recipe())
    assert set(tensors) == {
        *(f"weights.{name}" for name in classifier.state_dict()),
        *(f"momentum.{name}" for name, _ in classifier.named_parameters()),
    }
    assert set(header) == {"identity", "metrics", "open"}
    assert set(header["identity"]) == {"recipe", "architecture", "training", "kind", "images", "initial"}
    assert header["open"].keys() == {"batches", "sums", "seconds"}
    assert header["open"]["batches"] == 1


def test_weights_say_what_they_are(finished: tuple[Path, dict[str, Any]]) -> None:
    _, header = load_tensors(finished[0] / "classifier.safetensors")
    clean, robust = header.pop("held_out_clean_accuracy"), header.pop("held_out_pgd_accuracy")
    assert (clean, robust) == (finished[1]["clean_accuracy"], finished[1]["pgd_accuracy"])
    assert header == {
        "architecture": "wide-resnet-10-1",
        "activation": "relu",
        "classes": 10,
        "channels": 3,
        "mean": [0.3051] * 3,
        "std": [0.3238] * 3,
        "kind": "at",
        "recipe_name": "digits",
        "norm": "linf",
        "eps": 0.1,
        "epochs": EPOCHS,
        "initial": None,
        "images": 60,
        "seed": 0,
        "version": "0.1.0",
    }


def test_a_recipe_takes_the_trained_weights(finished: tuple[Path, dict[str, Any]]) -> None:
    path = finished[0] / "classifier.safetensors"
    section = f"classifier.at={{source: file, file: {path}}}"
    classifier = build_classifier(recipe(section), "at")
    assert not classifier.training
    stored = load_file(path)
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, stored[name])


@pytest.mark.slow
@pytest.mark.parametrize(("place", "saved"), [((0, 1), (0, 1)), ((1, 2), (1, 2)), ((2, 0), (1, 3))])
def test_a_killed_and_resumed_run_ends_in_the_same_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: tuple[Path, dict[str, Any]],
    place: tuple[int, int],
    saved: tuple[int, int],
) -> None:
    run = tmp_path / "killed"
    with monkeypatch.context() as patched:
        interrupt_at(patched, *place)
        message = f"{saved[0]} of {EPOCHS} epochs and {saved[1]} batches of the next are saved"
        with pytest.raises(InterruptedRun, match=message) as caught:
            train(run)
    assert caught.value.hint == (
        f"resume with: carso train-classifier {run / 'recipe.yaml'} --kind at --run {run} --resume"
    )
    assert not (run / "classifier.safetensors").exists()
    train(run, resume=True)
    whole = load_file(finished[0] / "classifier.safetensors")
    resumed = load_file(run / "classifier.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert metrics_of(run) == metrics_of(finished[0])


@pytest.mark.slow
def test_an_epoch_logged_but_not_saved_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: tuple[Path, dict[str, Any]]
) -> None:
    run, original = tmp_path / "killed", Checkpoint.save

    def save(checkpoint: Checkpoint) -> None:
        if checkpoint.epochs_done == 2:
            raise KeyboardInterrupt
        original(checkpoint)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", save)
        with pytest.raises(InterruptedRun, match="1 of 3 epochs and 3 batches of the next are saved"):
            train(run)
    assert len(metrics_of(run)) == 2
    train(run, resume=True)
    assert metrics_of(run) == metrics_of(finished[0])


def test_resuming_a_finished_run_changes_nothing(finished: tuple[Path, dict[str, Any]]) -> None:
    before = load_tensors(finished[0] / "classifier.safetensors")[1]
    assert train(finished[0], resume=True)["loss"] == finished[1]["loss"]
    # The header holds a checksum of all tensors.
    assert load_tensors(finished[0] / "classifier.safetensors")[1] == before


def test_refuses_a_folder_that_holds_a_run(finished: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match="already holds a run"):
        train(finished[0])


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {"kind": "clean"}, "its kind is at, not clean"),
        (["classifier.training.weight_decay=0"], {}, "training.weight_decay was 0.0005, now 0"),
        (["classifier.width=2"], {}, "classifier.width was 1, now 2"),
        (["threat.eps=0.2"], {}, "threat.eps was 0.1, now 0.2"),
        ([], {"limit": 60}, "--limit was 80, now 60"),
    ],
)
def test_refuses_the_state_of_another_run(
    finished: tuple[Path, dict[str, Any]], overrides: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(StateError, match=message):
        train(finished[0], *overrides, resume=True, **options)


@pytest.mark.slow
def test_damaged_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "damaged"
    # Before a second state, which would serve.
    interrupt_at(monkeypatch, 0, 1)
    with pytest.raises(InterruptedRun):
        train(run)
    whole = (run / "state.safetensors").read_bytes()
    (run / "state.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StateError, match="is damaged"):
        train(run, resume=True)


def test_stops_when_the_loss_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(
        NumericsError,
        match=r"the loss became (nan|inf) in epoch 1, batch \d, first in layer '[\w.]+'; training stops",
    ):
        train(tmp_path / "run", "classifier.training.peak_learning_rate=1e30", kind="clean")


def test_needs_two_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 training images are too few"):
        train(tmp_path / "run", limit=1)
    assert not (tmp_path / "run").exists()


def test_trains_only_wide_resnets(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has a classifier of family 'external'"):
        train(tmp_path / "run", "classifier.family=external")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_clean_training_learns_without_an_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("clean training attacked its images")

    monkeypatch.setattr(workflow, "training_attack", refuse)
    result = train(tmp_path / "run", "classifier.training.epochs=8", kind="clean", limit=200)
    assert result["clean_accuracy"] > 0.25  # ten classes: 0.1 is chance


@pytest.mark.parametrize(
    ("overrides", "steps", "size"),
    [
        (["classifier.training.method=fast"], 1, 0.125),
        (["classifier.training.method=pgd", "classifier.training.steps=5"], 5, 0.05),
        (["classifier.training.step_size=0.03"], 1, 0.03),
    ],
)
def test_the_training_attack_is_what_the_recipe_says(overrides: list[str], steps: int, size: float) -> None:
    chosen = recipe(*overrides)
    images = noise_images(chosen)
    setup = workflow.ClassifierSetup(chosen, "at", images, images, torch.device("cpu"), SILENT)
    attack = workflow.training_attack(setup, 1)
    assert (attack.steps, attack.random_start) == (steps, True)
    assert attack.step_size == pytest.approx(size)
    classifier = workflow.initial_classifier(chosen)
    clean, labels = images.pixels(slice(0, 8)), images.labels[:8]
    perturbed = attack(classifier, clean, labels)
    assert (perturbed - clean).abs().max() <= 0.1 + 1e-6
    assert perturbed.min() >= 0
    assert perturbed.max() <= 1
    loss = torch.nn.functional.cross_entropy
    assert loss(classifier(perturbed), labels) > loss(classifier(clean), labels)


@pytest.mark.slow
def test_another_seed_trains_another_classifier(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    other = train(tmp_path / "other", "seed=1")
    assert other["loss"] != finished[1]["loss"]


def test_predicts_the_cost() -> None:
    cost = estimate_classifier_cost(recipe(), "at", device="cpu", limit=100)
    assert cost["parameters"] == 77_850
    # A quarter is held out.
    assert cost["images"] == 75
    assert cost["seconds"] == pytest.approx(cost["seconds_per_image"] * 75 * EPOCHS)
    assert "seconds" not in estimate_classifier_cost(
        recipe("data.name=image-folder", "data.train=a.zip", "data.test=b.zip"), "at", device="cpu"
    )


FURTHER = ("classifier.training.initial=at", "classifier.training.method=pgd", "classifier.training.steps=2")


@pytest.mark.slow
def test_starts_from_the_recipes_own_weights(tmp_path: Path) -> None:
    shipped = build_classifier(recipe(), "at")
    started = workflow.initial_classifier(recipe(*FURTHER))
    assert all(parameter.requires_grad for parameter in started.parameters())
    for name, tensor in shipped.state_dict().items():
        assert torch.equal(started.state_dict()[name], tensor)
    gently = ("classifier.training.epochs=1", "classifier.training.peak_learning_rate=0.01")
    result = train(tmp_path / "on", *FURTHER, *gently)
    assert result["clean_accuracy"] >= 0.9
    _, header = load_tensors(tmp_path / "on" / "classifier.safetensors")
    assert header["initial"] == classifier_fingerprint(shipped)


@pytest.mark.slow
def test_resuming_from_other_weights_is_refused(tmp_path: Path) -> None:
    short = (*FURTHER, "classifier.training.epochs=1")
    train(tmp_path / "on", *short)
    trained = f"classifier.at={{source: file, file: {tmp_path / 'on' / 'classifier.safetensors'}}}"
    with pytest.raises(StateError, match="belongs to another run: its initial is"):
        train(tmp_path / "on", *short, trained, resume=True)


def test_weights_to_start_from_are_checked(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"classifier\.at go with another mean than data\.mean"):
        train(tmp_path / "run", *FURTHER, "data.mean=[0.5, 0.5, 0.5]")
    absent = "classifier.at={source: file, file: absent.safetensors}"
    with pytest.raises(WeightsError, match=r"absent\.safetensors"):
        train(tmp_path / "run", *FURTHER, absent)
    assert not (tmp_path / "run").exists()
