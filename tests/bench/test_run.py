"""What is timed must be the same work: carso and the naive baseline agree, case by case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.losses import cross_entropy
from carso_cli.bench.cases import CASES, Bench, set_up
from carso_cli.bench.profiling import counted_operations, peak_bytes
from carso_cli.bench.run import bench, compare, read_bench
from carso_cli.errors import DataError, UsageError
from carso_cli.recipe.load import load_recipe
from carso_cli.runtime.reporter import SilentReporter

pytestmark = pytest.mark.slow  # each times work several times

CPU = torch.device("cpu")
# Smooth activations: at a kink of a rectifier, rounding alone moves a gradient.
SMOOTH = ("classifier.activation=silu", "training.learning_rate.initial=1e-6")


def randomise_statistics(module: nn.Module) -> None:
    """Give normalisation something to do: fresh layers hold mean 0 and variance 1."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0.0, 0.1)
            layer.running_var.uniform_(0.5, 2.0)


@pytest.fixture(scope="module")
def models() -> Bench:
    torch.manual_seed(0)
    found = set_up(load_recipe("digits", SMOOTH), CPU, batch_size=8)
    randomise_statistics(found.classifier)
    randomise_statistics(found.purifier)
    return found


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", ["classifier-forward", "classifier-gradient", "defence-forward"])
def test_agrees_with_the_naive_baseline(models: Bench, name: str) -> None:
    case = CASES[name](models)
    assert relative(case.ours(), case.naive()) < 1e-4


def test_the_naive_baseline_computes_the_gradient_of_the_images_alone(models: Bench) -> None:
    forward, gradient = CASES["classifier-forward"](models), CASES["classifier-gradient"](models)
    # Backward to the images costs what forward does; backward to the weights would cost it once more.
    assert counted_operations(gradient.naive) == 2 * counted_operations(forward.naive)
    assert counted_operations(gradient.naive) == counted_operations(gradient.ours)


def test_extraction_agrees(models: Bench) -> None:
    case = CASES["extraction"](models)
    ours, theirs = case.ours(), case.naive()
    assert list(ours) == list(models.recipe.representation.layers)
    assert max(relative(ours[layer], theirs[layer]) for layer in ours) < 1e-4


@pytest.mark.slow
def test_eot_step_agrees(models: Bench) -> None:
    case = CASES["eot-step"](models)
    ours, theirs = case.ours(), case.naive()
    # The sign of a gradient that is next to zero is a matter of rounding.
    apart = (ours - theirs).abs() > 1e-4 * theirs.abs().clamp(min=1e-3)
    assert apart.float().mean() < 1e-3


def test_training_step_agrees_before_and_after_an_update(models: Bench) -> None:
    case = CASES["training-step"](models)
    first = relative(case.ours(), case.naive())
    second_ours, second_theirs = case.ours(), case.naive()
    assert first < 1e-4
    assert relative(second_ours, second_theirs) < 1e-4


def test_training_moves_the_weights(models: Bench) -> None:
    case = CASES["training-step"](models)
    before = float(case.ours()[0])
    assert float(case.ours()[0]) < before


def test_attacks_leave_no_gradient_on_weights(models: Bench) -> None:
    CASES["eot-step"](models).ours()
    weights = (*models.classifier.parameters(), *models.purifier.parameters())
    assert all(parameter.grad is None for parameter in weights)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    recipe = load_recipe("digits", ["seed=3"])
    return bench(
        recipe,
        reporter=SilentReporter(),
        device="cpu",
        batch_size=8,
        cases=("classifier-forward", "extraction"),
        overrides=["seed=3"],
        rounds=3,
    )


def test_result_has_the_fields_that_are_compared_over_time(result: dict[str, Any]) -> None:
    assert list(result) == ["schema", "device", "recipe", "peak_flops", "cases"]
    assert result["recipe"] == "digits --set seed=3"
    assert [case["name"] for case in result["cases"]] == ["classifier-forward", "extraction"]
    for case in result["cases"]:
        figures = (
            "images images_per_second seconds peak_memory_bytes flops share_of_peak ratio_to_straightforward"
        )
        assert set(case) == {"name", *figures.split()}
        assert case["images_per_second"] * case["seconds"] == pytest.approx(8)
        assert case["share_of_peak"] == pytest.approx(case["flops"] / case["seconds"] / result["peak_flops"])


def test_operations_are_those_of_the_architecture(result: dict[str, Any]) -> None:
    # WRN-10-1 on 8 images of 3x32x32; two operations a multiplication.
    convolutions = 32**2 * (9 * 3 * 16 + 9 * 16 * 16 * 2) + 16**2 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32)
    convolutions += 8**2 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64)
    forward, extraction = result["cases"]
    assert forward["flops"] == 2 * 8 * (convolutions + 64 * 10)
    # Extraction needs no logits: the forward pass ends at the last layer asked for.
    assert extraction["flops"] == 2 * 8 * convolutions


def test_compares_with_an_earlier_result(result: dict[str, Any], tmp_path: Path) -> None:
    slower = json.loads(json.dumps(result))
    for case in slower["cases"]:
        case["images_per_second"] /= 2
    stored = tmp_path / "old.json"
    stored.write_text(json.dumps(slower))
    ratios = compare(result, read_bench(stored), SilentReporter())
    assert ratios == pytest.approx({"classifier-forward": 2.0, "extraction": 2.0})


def test_warns_when_the_earlier_result_is_of_another_recipe(result: dict[str, Any], recorder: Any) -> None:
    compare(result, {**result, "recipe": "cifar10"}, recorder)
    assert recorder.warned == ["the recipe was 'cifar10' then and is 'digits --set seed=3' now"]


@pytest.mark.parametrize("content", [None, '{"schema": 99}', '{"schema": 1}'])
def test_refuses_what_is_no_result(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"old\.json") as caught:
        read_bench(path)
    assert "carso bench --json" in caught.value.hint


def test_refuses_to_time_another_objective_as_the_papers() -> None:
    with pytest.raises(UsageError, match="timed on the paper's objective, and the recipe's is adversarial"):
        bench(
            load_recipe("digits-adversarial"),
            cases=["training-step"],
            reporter=SilentReporter(),
            device="cpu",
        )


def test_refuses_an_unknown_case() -> None:
    with pytest.raises(UsageError, match=r"there is no case 'eot'; did you mean 'eot-step'\?"):
        bench(load_recipe("digits"), reporter=SilentReporter(), cases=["eot"])


@pytest.mark.slow
def test_memory_of_an_eot_step_is_bounded_by_the_pass_and_not_by_the_draws(models: Bench) -> None:
    defence = models.models().require_defence()
    images, labels = models.inputs()
    images, labels = images[:4], labels[:4]

    def peak(draws: int, per_pass: int) -> int:
        target = DefenceTarget(defence, "exact", per_pass, torch.Generator().manual_seed(0))
        return peak_bytes(lambda: target.loss_and_gradient(images, labels, cross_entropy, draws), CPU)

    few = peak(draws=2, per_pass=32)
    # Of a draw stay its latents and slopes: a few hundred numbers an image.
    assert peak(draws=12, per_pass=32) < 1.05 * few
    assert peak(draws=12, per_pass=192) > 2 * few
