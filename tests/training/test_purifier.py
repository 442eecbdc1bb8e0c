"""Training the purifier: what a run holds, how it stops and resumes, and what it refuses."""

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
from carso_cli.runs.checkpoints import StateFile, load_tensors
from carso_cli.training import purifier as workflow
from carso_cli.training import purifier_step
from carso_cli.training.preflight import estimate_cost
from carso_cli.training.purifier import train_purifier

BOTH = "training.objective=both"


@pytest.fixture
def copied(elbo_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return shutil.copytree(elbo_run, tmp_path / "run")


def assert_same(one: Path, other: Path) -> None:
    """Two runs ended in the same weights, by way of the same losses."""
    first, second = (load_tensors(run / "purifier.safetensors")[0] for run in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [read_json_lines(run / "metrics.jsonl") for run in (one, other)]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


def test_run_folder_and_defence(small: Any, trained: tuple[Path, dict[str, Any]]) -> None:
    recipe, (run, result) = small(), trained
    assert sorted(entry.name for entry in run.iterdir()) == [
        ".lock",
        "environment.json",
        "metrics.csv",
        "metrics.jsonl",
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
    assert metrics[2]["bce"] < 0.9 * metrics[0]["bce"]
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


def test_the_state_file_keeps_its_format(small: Any, kill: Any, elbo_run: Path, tmp_path: Path) -> None:
    # States that are stored already must be resumed: no name in here may change.
    kill(small(), tmp_path / "run", 9)
    tensors, header = load_tensors(tmp_path / "run" / "state.safetensors")
    purifier = load_defence(elbo_run, device="cpu").purifier
    parameters = [name for name, _ in purifier.named_parameters()]
    moments = ("step", "exp_avg", "exp_avg_sq")
    assert set(tensors) == {
        *(f"fast.{name}" for name in purifier.state_dict()),
        *(f"slow.{name}" for name in parameters),
        *(f"optimiser.{name}.{moment}" for name in parameters for moment in moments),
    }
    assert set(header) == {"identity", "metrics", "open", "steps", "learning_rate"}
    assert set(header["identity"]) == {"recipe", "classifier", "images", "initial"}
    assert header["open"].keys() == {"batches", "sums", "seconds"}
    assert (header["open"]["batches"], header["steps"]) == (8, 8)
    # Once training is complete nothing resumes, and the folder holds little more than the purifier.
    tensors, header = load_tensors(elbo_run / "state.safetensors")
    assert not tensors
    assert header["metrics"] == read_json_lines(elbo_run / "metrics.jsonl")
    assert header["open"] == {"batches": 0, "sums": [], "seconds": 0.0}
    assert (header["steps"], header["complete"]) == (3 * 8, True)
    sizes = {path.name: path.stat().st_size for path in elbo_run.iterdir()}
    assert sum(sizes.values()) < 1.1 * sizes["purifier.safetensors"]


def test_a_finished_run_is_verified_and_not_trained_again(small: Any, train: Any, copied: Path) -> None:
    before = (copied / "purifier.safetensors").read_bytes()
    train(small(), copied, resume=True)
    assert (copied / "purifier.safetensors").read_bytes() == before
    (copied / "purifier.safetensors").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(StateError, match=r"purifier\.safetensors is damaged.* training was complete"):
        train(small(), copied, resume=True)
    assert (copied / "purifier.safetensors").read_bytes() != before


@pytest.mark.slow
def test_a_run_killed_between_its_purifier_and_its_last_state_is_no_imported_one(
    small: Any, train: Any, elbo_run: Path, copied: Path
) -> None:
    (copied / "state.safetensors").unlink()
    with pytest.raises(StateError, match=r"is missing, though 3 epochs were trained"):
        train(small(), copied, resume=True)
    train(small("training.save_every_minutes=10"), copied, resume=True)
    assert_same(elbo_run, copied)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "limit", "step", "saved"),
    # Reused perturbations are made again within a group; `both` draws all that `adversarial` draws, and the
    # posterior's noise.
    [
        ((), 80, 12, "1 of 3 epochs and 3 batches of the next"),
        (("training.attack_mix.reuse=3",), 80, 20, "2 of 3 epochs and 3 batches of the next"),
        ((BOTH,), 30, 5, "1 of 3 epochs and 1 batches of the next"),
    ],
)
def test_a_killed_run_resumes_to_the_same_weights(
    small: Any,
    train: Any,
    kill: Any,
    elbo_run: Path,
    tmp_path: Path,
    overrides: tuple[str, ...],
    limit: int,
    step: int,
    saved: str,
) -> None:
    start = (f"training.initial={elbo_run / 'purifier.safetensors'}",) if BOTH in overrides else ()
    recipe, whole, stopped = small(*overrides, *start), tmp_path / "whole", tmp_path / "stopped"
    if overrides:
        train(recipe, whole, limit)
    message = kill(recipe, stopped, step, limit=limit)
    assert message == f"stopped; {saved} are saved in {stopped}"
    assert not (stopped / "purifier.safetensors").exists()
    train(recipe, stopped, limit, resume=True)
    assert_same(whole if overrides else elbo_run, stopped)
    if start:
        tensors, header = load_tensors(whole / "purifier.safetensors")
        before, _ = load_tensors(elbo_run / "purifier.safetensors")
        assert not torch.equal(tensors["decoder.last.weight"], before["decoder.last.weight"])
        assert header["initial"] != header["classifier"]
        last = read_json_lines(whole / "metrics.jsonl")[-1]
        assert {"loss", "accuracy", "bce", "kl", "beta"} <= set(last)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_loses_nothing(
    small: Any,
    train: Any,
    elbo_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    places: list[tuple[int, int]] = []
    original = purifier_step.train_step

    def stop_in_the_second_epoch(*arguments: Any) -> torch.Tensor:
        places.append(arguments[3])
        if len(places) == 12:
            # Twice at once, as under torchrun, whose terminal and whose agent both send it.
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(workflow, "train_step", stop_in_the_second_epoch)
    before, run = signal.getsignal(number), tmp_path / "run"
    with pytest.raises(InterruptedRun, match="1 of 3 epochs and 4 batches of the next are saved") as caught:
        train(small(), run)
    assert caught.value.hint == (
        f"resume with: carso train-purifier {run / 'recipe.yaml'} --run {run} --resume"
    )
    assert signal.getsignal(number) is before
    train(small(), run, resume=True)
    assert places == [(epoch, batch) for epoch in range(3) for batch in range(8)]
    assert_same(elbo_run, run)


def test_an_impatient_second_signal_stops_at_once(
    small: Any, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carso_cli.runtime.signals._SAME_EVENT", 0.0)

    def never_ending(*arguments: Any) -> torch.Tensor:
        while True:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(workflow, "train_step", never_ending)
    with pytest.raises(InterruptedRun, match="0 of 3 epochs are saved"):
        train(small(), tmp_path / "run")


@pytest.mark.slow
def test_a_warm_up_too_short_for_radam_is_warned_of(small: Any, tmp_path: Path, recorder: Any) -> None:
    short = small("training.batch_size=60", "training.learning_rate.plateau=1e-8")
    train_purifier(short, run=tmp_path / "run", reporter=recorder, device="cpu", limit=80)
    assert recorder.warned == [
        "the warm-up lasts 1 optimiser step; below 6, RAdam takes plain gradient steps at the full "
        "learning rate and may diverge"
    ]


@pytest.mark.slow
def test_states_are_saved_by_time(
    small: Any, train: Any, elbo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, saved = 0.0, []
    original = purifier_step.train_step

    def a_minute(*arguments: Any) -> torch.Tensor:
        nonlocal now
        now += 60.0
        return original(*arguments)

    monkeypatch.setattr(workflow, "train_step", a_minute)
    monkeypatch.setattr("carso_cli.training.checkpoint.time.monotonic", lambda: now)
    monkeypatch.setattr(StateFile, "save", lambda _, tensors, header: saved.append(header["steps"]))
    # An older recipe's key is read, and changes neither that nor what a run is recognised by.
    train(small("training.save_every_minutes=10", "training.save_every_epochs=1"), tmp_path / "run")
    assert saved == [10, 20]
    assert_same(elbo_run, tmp_path / "run")


def test_starting_over_a_run_or_resuming_another_is_refused(small: Any, train: Any, copied: Path) -> None:
    with pytest.raises(StateError, match=r"started with other options: seed was \d+, now 7$"):
        train(small("seed=7"), copied, resume=True)
    with pytest.raises(UsageError, match="already holds a run") as caught:
        train(small(), copied)
    assert "--resume" in caught.value.hint
    with pytest.raises(StateError, match="holds no run to resume"):
        train(small(), copied / "empty", resume=True)


def test_missing_weights_leave_no_folder_behind(small: Any, train: Any, tmp_path: Path) -> None:
    absent = small("classifier.at={source: file, file: absent.safetensors}")
    with pytest.raises(WeightsError, match=r"absent\.safetensors"):
        train(absent, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_training_with_trades_is_refused(small: Any, train: Any, tmp_path: Path) -> None:
    overrides = ("training.adversarial.trades_weight=6", "training.initial=any.safetensors")
    asked = small(*overrides, "training.objective=adversarial")
    for refuse in (lambda: train(asked, tmp_path / "run"), lambda: estimate_cost(asked, device="cpu")):
        with pytest.raises(
            RecipeError, match=r"^digits: training\.adversarial\.trades_weight is 6,"
        ) as caught:
            refuse()
        assert "training.objective adversarial" in caught.value.hint
        assert "or both" in caught.value.hint
    assert not (tmp_path / "run").exists()
    # The ELBO never read it.
    with pytest.raises(WeightsError, match=r"any\.safetensors, is missing"):
        train(small(*overrides), tmp_path / "run")


@pytest.mark.slow
def test_a_diverging_run_stops_and_names_the_term(small: Any, train: Any, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match=r"became (nan|inf) in epoch \d, batch \d"):
        train(small("training.learning_rate.plateau=1e30"), tmp_path / "run")
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


def test_a_run_that_was_trained_with_trades_still_loads(copied: Path) -> None:
    recipe = copied / "recipe.yaml"
    text = recipe.read_text().partition("\n")[2]
    for old, new in (
        ("  objective: elbo\n  initial: null", "  objective: adversarial\n  initial: any.safetensors"),
        ("trades_weight: null", "trades_weight: 6.0"),
    ):
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text)
    assert load_recipe(str(recipe)).training.adversarial.trades_weight == 6.0
    assert load_defence(copied, device="cpu").n_samples == 2


def test_missing_run_names_the_command_that_trains_it(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="holds no trained purifier") as caught:
        load_defence(tmp_path / "none")
    assert "carso train-purifier" in caught.value.hint
