from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from carso_cli.classifiers.registry import find_record
from carso_cli.cli.train_purifier import held_out
from carso_cli.errors import StateError
from carso_cli.recipe.load import load_recipe
from carso_cli.runs.folder import RunFolder
from carso_cli.training.preflight import estimate_cost, parameter_counts, require_data

SHORT = (
    *("--set", "training.epochs=1", "--set", "training.batch_size=10", "--set", "data.holdout=0.1"),
    *("--set", "training.attack_mix.pgd_steps=1", "--set", "purifier.condition_features=8"),
)


@pytest.mark.slow
def test_trains_and_says_what_to_do_next(tmp_path: Path, carso: Any) -> None:
    folder = tmp_path / "run"
    arguments = ["train-purifier", "digits", "--limit", "40", "--run", folder, "--device", "cpu", *SHORT]
    shown = carso(*arguments)
    assert "clean accuracy of the defence, held out" in shown.out
    assert "next: carso evaluate --run" in shown.out
    assert (folder / "purifier.safetensors").is_file()
    carso(*arguments, code=2, err="already holds a run")
    # The limit is stored: resuming needs the run alone, and says what differs from its first start.
    resumed = carso("train-purifier", "--run", folder, "--resume", "--device", "cpu", "--json").json
    assert resumed["images"] == 36
    told = "started with other options: seed was 0, now 3; --limit was 40, now 50"
    shown = carso(*arguments, "--limit", "50", "--resume", "--seed", "3", code=5, err=told)
    hint = next(line for line in shown.err.splitlines() if line.startswith("hint: resume with the first"))
    words = shlex.split(hint.partition(": carso ")[2])
    assert words == ["train-purifier", f"{folder}/recipe.yaml", "--run", str(folder), "--resume"]
    carso(*words)


def test_an_accuracy_on_held_out_images_carries_their_number() -> None:
    assert held_out({"a": 1.0, "held_out_images": 1}, "a") == "1.000 [0.21, 1.00] of 1 image"
    assert held_out({"a": 0.5, "held_out_images": 28}, "a") == "0.500 [0.33, 0.67] of 28 images"
    assert held_out({"a": None, "held_out_images": 0}, "a") == "–"


def test_an_unfinished_run_is_finished_with_its_own_recipe(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "my run")
    folder.path.mkdir()
    for file in (folder.recipe, folder.state):
        file.touch()
    with pytest.raises(StateError) as raised:
        folder.require_purifier("carso train-purifier RECIPE")
    own = f"'{folder.recipe}' --run '{folder.path}' --resume"
    assert raised.value.hint == f"finish it with: carso train-purifier {own}"


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path, carso: Any) -> None:
    folder = tmp_path / "run"
    cost = carso("train-purifier", "digits", "--dry-run", "--json", "--run", folder).json["cost"]
    assert cost["images"] == 1413
    assert cost["parameters"]["input encoder"] == 846
    epochs = load_recipe("digits").training.epochs
    assert cost["seconds"] == pytest.approx(cost["seconds_per_image"] * 1413 * epochs)
    assert not folder.exists()


@pytest.mark.parametrize(
    "missing",
    [
        ["classifier.at={source: file, file: absent.safetensors}"],
        [
            *("data.name=image-folder", "data.train=absent", "data.test=absent"),
            f"classifier.at={{source: file, file: {find_record('shipped', 'digits-at', 'digits').file}}}",
        ],
    ],
)
def test_a_dry_run_misses_what_the_training_would_miss(
    missing: list[str], tmp_path: Path, carso: Any
) -> None:
    options = [word for value in missing for word in ("--set", value)]
    command = ["train-purifier", "digits", *options, "--device", "cpu", "--run", tmp_path / "run"]
    real = carso(*command, code=3)
    dry = carso(*command, "--dry-run", "--json", code=3)
    assert "absent" in real.err
    assert dry.err == real.err
    # What it would cost does not depend on them.
    assert dry.json["cost"]["seconds_per_image"] > 0


def test_a_dry_run_names_the_data_that_training_downloads() -> None:
    assert require_data(load_recipe("digits")) == ""
    assert require_data(load_recipe("cifar10")).endswith("carso doctor cifar10 --fetch")


def test_an_unknown_viewer_is_refused_before_any_work(tmp_path: Path, carso: Any) -> None:
    options = ("--log", "tensorbord", "--run", tmp_path / "run")
    shown = carso("train-purifier", "digits", *options, code=2).err
    assert "'tensorbord' shows no training; tensorboard and wandb do" in shown
    assert not (tmp_path / "run").exists()


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


def test_missing_weights_name_file_and_command(carso: Any, tmp_path: Path) -> None:
    message = " ".join(carso("train-purifier", "cifar10", "--run", tmp_path / "run", code=3).err.split())
    assert "Cui2023Decoupled_WRN-28-10" in message


@pytest.mark.slow
def test_what_is_beyond_the_paper_is_labelled_so(tmp_path: Path, carso: Any) -> None:
    arguments = ["train-purifier", "digits", "--limit", "40", "--device", "cpu", *SHORT]
    assert "elbo, as in the paper" in carso(*arguments, "--dry-run").out
    assert "beyond the paper" not in carso(*arguments, "--run", tmp_path / "elbo").out
    arguments += ["--set", "training.objective=adversarial", "--set", "training.adversarial.steps=1"]
    assert "starts from a purifier trained on the ELBO" in " ".join(carso(*arguments, code=2).err.split())
    arguments += ["--set", f"training.initial={tmp_path / 'elbo' / 'purifier.safetensors'}"]
    assert "adversarial, beyond the paper" in carso(*arguments, "--dry-run").out
    shown = carso(*arguments, "--run", tmp_path / "on").out
    assert "adversarial, beyond the paper" in shown
    assert "the same, under PGD" in shown
    assert "BCE" not in shown


@pytest.mark.slow
def test_the_cost_of_an_attack_on_the_defence_grows_with_its_steps() -> None:
    def cost(steps: int) -> float:
        overrides = ("training.objective=adversarial", "training.initial=unread.safetensors")
        recipe = load_recipe("digits", (*overrides, f"training.adversarial.steps={steps}"))
        return float(estimate_cost(recipe, device="cpu")["seconds_per_image"])

    assert cost(8) > 1.5 * cost(1)
