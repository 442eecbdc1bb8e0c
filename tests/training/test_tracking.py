"""What a training tells a viewer is what it stored, step by step and epoch by epoch."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carso_cli.errors import InterruptedRun, MissingError, UsageError
from carso_cli.io.json_files import read_json_lines
from carso_cli.recipe.load import load_recipe
from carso_cli.runtime.reporter import SILENT
from carso_cli.training.classifier import train_classifier
from carso_cli.training.purifier import train_purifier
from carso_cli.training.purifier_step import train_step
from carso_cli.training.tracking import tracked
from tests.toys import TINY

RECIPE = load_recipe("digits", (*TINY, "classifier.training.epochs=2", "classifier.training.batch_size=24"))


@pytest.fixture
def events() -> Any:
    """Reads the scalars and images of TensorBoard's files."""
    pytest.importorskip("tensorboard", reason="needs the extra carso[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(run: Path) -> Any:
        found = EventAccumulator(str(run / "tensorboard"))
        found.Reload()
        return found

    return read


def scalars(found: Any, tag: str) -> dict[int, float]:
    values = {event.step: event.value for event in found.Scalars(tag)}
    assert len(values) == len(found.Scalars(tag)), "a step stands there twice"
    return values


@pytest.mark.slow
def test_tensorboard_holds_what_the_log_of_a_resumed_training_holds(
    tmp_path: Path, events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, interrupted = tmp_path / "run", False
    losses: dict[int, float] = {}

    def step(setup: Any, state: Any, positions: Tensor, place: tuple[int, int], *rest: Any) -> Tensor:
        nonlocal interrupted
        if place == (1, 1) and not interrupted:
            interrupted = True
            raise KeyboardInterrupt
        sums = train_step(setup, state, positions, place, *rest)
        losses[2 * place[0] + place[1] + 1] = sums[0].item() / len(positions)
        return sums

    monkeypatch.setattr("carso_cli.training.purifier.train_step", step)
    for resume in (False, True):
        with tracked(SILENT, ["tensorboard"], run, RECIPE) as reporter:
            if resume:
                train_purifier(RECIPE, run=run, reporter=reporter, device="cpu", resume=True)
                break
            with pytest.raises(InterruptedRun):
                train_purifier(RECIPE, run=run, reporter=reporter, device="cpu")
    found, lines = events(run), read_json_lines(run / "metrics.jsonl")
    # 43 of 48 images are trained on, in two batches an epoch; each step stands there once.
    expected = {number: pytest.approx(loss, rel=1e-6) for number, loss in losses.items()}
    assert scalars(found, "step/loss") == expected
    assert sorted(expected) == [1, 2, 3, 4]
    for name in ("loss", "defence_clean_accuracy", "learning_rate", "beta"):
        stored = {2 * (line["epoch"] + 1): pytest.approx(line[name], rel=1e-6) for line in lines}
        assert scalars(found, f"epoch/{name}") == stored
    pictures = found.Images("reconstructions")
    assert [picture.step for picture in pictures] == [2, 4]
    # Five images are held out; digits are 28 pixels wide.
    size = RECIPE.data.image_size
    assert (pictures[0].width, pictures[0].height) == (5 * size, 2 * size)
    with open(run / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["loss"]) for row in rows] == [line["loss"] for line in lines]
    assert rows[0].keys() == lines[0].keys()


@pytest.mark.slow
def test_a_classifier_is_followed_too(tmp_path: Path, events: Any) -> None:
    with tracked(SILENT, ["tensorboard"], tmp_path, RECIPE) as reporter:
        train_classifier(RECIPE, "at", run=tmp_path, reporter=reporter, device="cpu")
    found, lines = events(tmp_path), read_json_lines(tmp_path / "metrics.jsonl")
    assert sorted(scalars(found, "step/loss")) == [1, 2, 3, 4]
    assert list(scalars(found, "epoch/pgd_accuracy").values()) == pytest.approx(
        [line["pgd_accuracy"] for line in lines]
    )


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra carso[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with tracked(SILENT, ["wandb"], tmp_path, RECIPE) as reporter:
        reporter.measured({"epoch/loss": 0.5}, 3)
        reporter.pictured("reconstructions", lambda: torch.rand(1, 4, 6), 3)
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"epoch/loss" in log.read_bytes()
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/reconstructions*.png"))


def test_nothing_is_written_before_the_first_step(tmp_path: Path, events: Any) -> None:
    with tracked(SILENT, ["tensorboard"], tmp_path / "run", RECIPE):
        pass
    assert not (tmp_path / "run").exists()


def test_unknown_and_missing_viewers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'tensorbord' shows no training") as wrong:
        tracked(SILENT, ["tensorbord"], tmp_path, RECIPE).__enter__()
    assert wrong.value.hint == "did you mean 'tensorboard'?"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingError) as missing:
        tracked(SILENT, ["wandb"], tmp_path, RECIPE).__enter__()
    assert missing.value.hint == "pip install 'carso[wandb]'"
