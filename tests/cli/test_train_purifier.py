from __future__ import annotations

import json
from pathlib import Path

import pytest

from carso_cli.cli.app import run
from carso_cli.recipe.load import load_recipe
from carso_cli.training.preflight import estimate_cost, parameter_counts

SHORT = (
    *("--set", "training.epochs=1", "--set", "training.batch_size=10", "--set", "data.holdout=0.1"),
    *("--set", "training.attack_mix.pgd_steps=1", "--set", "purifier.condition_features=8"),
)


def test_trains_and_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    arguments = ["train-purifier", "digits", "--limit", "40", "--run", str(folder), "--device", "cpu", *SHORT]
    assert run(arguments) == 0
    shown = capsys.readouterr()
    assert "clean accuracy of the defence, held out" in shown.out
    assert "next: carso evaluate --run" in shown.out
    assert (folder / "purifier.safetensors").is_file()
    assert run(arguments) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert run([*arguments, "--resume", "--seed", "3"]) == 5
    assert "belongs to another run" in capsys.readouterr().err


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert run(["train-purifier", "digits", "--dry-run", "--json", "--run", str(folder)]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost["images"] == 1442
    assert cost["parameters"]["input encoder"] == 846
    epochs = load_recipe("digits").training.epochs
    assert cost["seconds"] == pytest.approx(cost["seconds_per_image"] * 1442 * epochs)
    assert not folder.exists()


def test_parameter_counts_of_the_paper_from_its_recipes() -> None:
    assert parameter_counts(load_recipe("cifar10")) == {
        "classifier": 36_479_194,
        "input encoder": 846,
        "layer encoders": 28_442_960,
        "representation FC": 75_285_504,
        "joint FC": 164_096,
        "mean and log-variance": 33_024,
        "decoder": 2_455_107,
    }
    wide = parameter_counts(load_recipe("tinyimagenet200"))
    assert wide["representation FC"] == 289_998_336
    assert wide["decoder"] == 4_914_979


def test_missing_weights_name_file_and_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["train-purifier", "cifar10", "--run", str(tmp_path / "run")]) == 3
    message = " ".join(capsys.readouterr().err.split())
    assert "Cui2023Decoupled_WRN-28-10" in message


def test_what_is_beyond_the_paper_is_labelled_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train-purifier", "digits", "--limit", "40", "--device", "cpu", *SHORT]
    assert run([*arguments, "--dry-run"]) == 0
    assert "elbo, as in the paper" in capsys.readouterr().out
    assert run([*arguments, "--run", str(tmp_path / "elbo")]) == 0
    assert "beyond the paper" not in capsys.readouterr().out
    arguments += ["--set", "training.objective=adversarial", "--set", "training.adversarial.steps=1"]
    assert run(arguments) == 2
    assert "starts from a purifier trained on the ELBO" in " ".join(capsys.readouterr().err.split())
    arguments += ["--set", f"training.initial={tmp_path / 'elbo' / 'purifier.safetensors'}"]
    assert run([*arguments, "--dry-run"]) == 0
    assert "adversarial, beyond the paper" in capsys.readouterr().out
    assert run([*arguments, "--run", str(tmp_path / "on")]) == 0
    shown = capsys.readouterr().out
    assert "adversarial, beyond the paper" in shown
    assert "the same, under PGD" in shown
    assert "BCE" not in shown


def test_the_cost_of_an_attack_on_the_defence_grows_with_its_steps() -> None:
    def cost(steps: int) -> float:
        overrides = ("training.objective=adversarial", "training.initial=unread.safetensors")
        recipe = load_recipe("digits", (*overrides, f"training.adversarial.steps={steps}"))
        return float(estimate_cost(recipe, device="cpu")["seconds_per_image"])

    assert cost(8) > 1.5 * cost(1)
