"""A run in which one process works is refused to a second; what does not meet may go side by side."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from carso_cli.ablation.run import ablate
from carso_cli.ablation.variants import sample_counts
from carso_cli.errors import StateError
from carso_cli.io.json_files import ensure_folder
from carso_cli.recipe.load import load_recipe
from carso_cli.runs.lock import locked
from carso_cli.runtime.reporter import SilentReporter
from carso_cli.training.classifier import train_classifier
from carso_cli.training.purifier import train_purifier

QUIET = SilentReporter()
REFUSED = "is in use by another process"


@pytest.mark.slow
def test_training(tmp_path: Path) -> None:
    recipe = load_recipe("digits", ["data.train_limit=40"])
    with locked(tmp_path, QUIET):
        with pytest.raises(StateError, match=REFUSED):
            train_purifier(recipe, run=tmp_path, reporter=QUIET, device="cpu")
        with pytest.raises(StateError, match=REFUSED):
            train_classifier(recipe, "at", run=tmp_path, reporter=QUIET, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_one_evaluation_and_another(toys: ModuleType, tmp_path: Path) -> None:
    toys.run_toy(tmp_path, QUIET, attack="pgd")
    (folder,) = tmp_path.glob("evaluation/pgd-*")
    before = (folder / "records.jsonl").read_bytes()
    with locked(folder, QUIET):
        with pytest.raises(StateError, match=REFUSED):
            toys.run_toy(tmp_path, QUIET, attack="pgd", force=True)
        assert (folder / "records.jsonl").read_bytes() == before
        # What is complete can be read, and another evaluation made.
        toys.run_toy(tmp_path, QUIET, attack="pgd", resume=True)
        toys.run_toy(tmp_path, QUIET, attack="fgsm")


def test_ablations(tmp_path: Path) -> None:
    recipe = load_recipe("digits")
    with locked(ensure_folder(tmp_path / "ablations"), QUIET), pytest.raises(StateError, match=REFUSED):
        ablate(recipe, sample_counts(recipe, [1, 2]), run=tmp_path, reporter=QUIET, device="cpu", limit=2)
