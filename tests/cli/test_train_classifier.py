"""`carso train-classifier`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

COMMAND = (
    *("train-classifier", "digits", "--limit=34", "--device=cpu"),
    *("--set=classifier.training.epochs=1", "--set=classifier.training.batch_size=16"),
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_trains_into_the_default_folder_and_refuses_to_do_it_twice(carso: Any) -> None:
    shown = carso(*COMMAND, "--kind", "clean", "--json")
    weights = Path("runs/digits-classifier-clean/classifier.safetensors")
    assert shown.json["weights"] == str(weights)
    assert weights.is_file()
    assert "epoch 1/1" in shown.err
    carso(*COMMAND, "--kind", "clean", code=2, err="already holds a run")
    table = carso(*COMMAND, "--kind", "clean", "--resume").out
    assert "clean accuracy, held out" in table
    assert table.count("of 1 image\n") == 2
    assert table.endswith(f"weights: {weights}\n")
    shown = carso(*COMMAND, "--kind", "at", "--resume", "--run", weights.parent, code=5)
    assert "its kind is clean, not at" in shown.err


def test_dry_run_shows_recipe_and_cost_and_writes_nothing(carso: Any, tmp_path: Path) -> None:
    shown = carso(*COMMAND, "--dry-run", "--seed", "7").out
    for words in (
        "seed: 7",
        "epochs: 1",
        "run folder",
        "runs/digits-classifier-at",
        "77,850",
        "time in all, about",
    ):
        assert words in shown
    cost = carso(*COMMAND, "--dry-run", "--json").json
    assert cost["recipe"]["classifier"]["training"]["batch_size"] == 16
    assert cost["cost"]["images"] == 33
    assert list(tmp_path.iterdir()) == []


def test_refuses_another_kind(carso: Any) -> None:
    shown = carso(*COMMAND, "--kind", "robust", code=2).err
    assert "'--kind': 'robust' is not allowed; use at or clean" in shown


def test_missing_data_is_told_before_any_work(carso: Any) -> None:
    zips = ("--set=data.name=image-folder", "--set=data.train=train.zip", "--set=data.test=test.zip")
    shown = carso("train-classifier", "cifar10-small", *zips, "--device", "cpu", code=3).err
    assert "train.zip is not there" in shown
    assert not Path("runs/cifar10-small-classifier-at/recipe.yaml").exists()
