"""`carso train-classifier`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from carso_cli.cli.app import run

Capture = pytest.CaptureFixture[str]
COMMAND = [
    "train-classifier",
    "digits",
    "--set=classifier.training.epochs=1",
    "--set=classifier.training.batch_size=16",
    "--limit=34",
    "--device=cpu",
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_trains_into_the_default_folder_and_refuses_to_do_it_twice(capsys: Capture) -> None:
    assert run([*COMMAND, "--kind", "clean", "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    weights = Path("runs/digits-classifier-clean/classifier.safetensors")
    assert result["weights"] == str(weights)
    assert weights.is_file()
    assert "epoch 1/1" in shown.err
    assert run([*COMMAND, "--kind", "clean"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert run([*COMMAND, "--kind", "clean", "--resume"]) == 0
    table = capsys.readouterr().out
    assert "clean accuracy, held out" in table
    assert table.endswith(f"weights: {weights}\n")
    assert run([*COMMAND, "--kind", "at", "--resume", "--run", str(weights.parent)]) == 5
    assert "its kind is clean, not at" in capsys.readouterr().err


def test_dry_run_shows_recipe_and_cost_and_writes_nothing(capsys: Capture, tmp_path: Path) -> None:
    assert run([*COMMAND, "--dry-run", "--seed", "7"]) == 0
    shown = capsys.readouterr().out
    assert "seed: 7" in shown
    assert "epochs: 1" in shown
    for line in ("run folder", "runs/digits-classifier-at", "77,850", "time in all, about"):
        assert line in shown
    assert run([*COMMAND, "--dry-run", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["recipe"]["classifier"]["training"]["batch_size"] == 16
    assert cost["cost"]["images"] == 34
    assert list(tmp_path.iterdir()) == []


def test_refuses_another_kind(capsys: Capture) -> None:
    assert run([*COMMAND, "--kind", "robust"]) == 2
    assert "'--kind': 'robust' is not allowed; use at or clean" in capsys.readouterr().err


def test_missing_data_is_told_before_any_work(capsys: Capture) -> None:
    assert run(["train-classifier", "cifar10-small", "--device", "cpu"]) == 3
    assert "cifar10-train.zip is not there" in capsys.readouterr().err
    assert not Path("runs/cifar10-small-classifier-at/recipe.yaml").exists()
