"""Reduced precision: where it holds, where it does not, and that attacks do not grow weaker by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.target import ClassifierTarget
from carso_cli.attacks.threat import ThreatModel
from carso_cli.build import build_classifier, device_for, load_images
from carso_cli.errors import StateError, UsageError
from carso_cli.precision import full, in_precision, reduced
from carso_cli.recipe.load import load_recipe
from carso_cli.reporter import SilentReporter
from carso_cli.runs.intervals import wilson
from carso_cli.workflows.evaluate import evaluate
from carso_cli.workflows.evaluation_setup import prepare_evaluation
from carso_cli.workflows.train_purifier import train_purifier

SETTINGS = (
    "training.epochs=4",
    "training.learning_rate.warmup_epochs=1",
    "training.learning_rate.plateau_epochs=2",
    "training.learning_rate.annealing_epochs=1",
    "training.beta_increase.first_epoch=0",
    "training.beta_increase.last_epoch=2",
    "training.attack_mix.pgd_steps=2",
    "data.train_limit=300",
    "evaluation.pgd_eot_steps=5",
    "evaluation.pgd_eot_step_size=0.04",
    "evaluation.eot_draws=2",
    "evaluation.scoring_draws=4",
    "evaluation.n_samples=4",
)
IMAGES = 40


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The same training in both precisions."""
    found = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path_factory.mktemp(precision)
        recipe = load_recipe("digits", [*SETTINGS, f"precision={precision}"])
        metrics = train_purifier(recipe, run=folder / "run", reporter=SilentReporter(), device="cpu")
        found[precision] = folder / "run", metrics
    return found


def attacked(run: Path, precision: str, name: str, **options: Any) -> dict[str, Any]:
    return evaluate(
        load_recipe("digits", [*SETTINGS, f"precision={precision}"]),
        run=run,
        reporter=SilentReporter(),
        attack=name,
        limit=IMAGES,
        device="cpu",
        **options,
    )["headline"]


def test_products_are_in_bfloat16_and_answers_in_float32() -> None:
    factor = torch.full((1, 1), 1.0 + 2.0**-8)
    seen = {}
    for precision in ("fp32", "bf16"):
        answer = in_precision(lambda images: images @ factor, precision)(torch.ones(1, 1))
        assert answer.dtype == torch.float32
        seen[precision] = answer.item()
    # bfloat16 has 8 significant bits: the factor is rounded to 1.
    assert seen == {"fp32": 1.0 + 2.0**-8, "bf16": 1.0}
    with reduced("bf16", torch.device("cpu")):
        assert (torch.ones(1, 1) @ factor).dtype == torch.bfloat16
    assert full(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


def test_tf32_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(UsageError, match="precision tf32 is a mode of NVIDIA GPUs, and the device is cpu"):
        device_for(load_recipe("digits", ["precision=tf32"]), "cpu")


def test_training_in_bfloat16_follows_training_in_float32(
    runs: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    losses = {precision: metrics["loss"] for precision, (_, metrics) in runs.items()}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_what_a_defence_aggregates_is_float32(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    recipe = load_recipe("digits", [*SETTINGS, "precision=bf16"])
    evaluation = prepare_evaluation(
        recipe, run=runs["bf16"][0], reporter=SilentReporter(), attack="pgd-eot", limit=4, device="cpu"
    )
    defence = evaluation.setting.subject.require_defence()
    images, labels, _ = evaluation.setting.pixels(range(4))
    condition = defence.condition(images)
    logits = defence.sample_logits(condition, defence.draw_latents(4))
    assert {condition.dtype, logits.dtype, defence.aggregate(logits).dtype} == {torch.float32}
    # bfloat16 numbers, exactly: the last layer of the classifier ran in it.
    assert torch.equal(logits, logits.bfloat16().float())
    target = ClassifierTarget(evaluation.setting.subject.classifier)
    answer = target.loss_and_gradient(images, labels, torch.nn.functional.cross_entropy, 1)
    assert answer.gradient.dtype == torch.float32


def test_an_attack_in_bfloat16_is_no_weaker_on_the_classifier() -> None:
    recipe = load_recipe("digits")
    images = load_images(recipe, "test", limit=200)
    pixels, labels = images.pixels(slice(0, 200)), images.labels
    classifier = build_classifier(recipe, "at")
    attack = PGD(ThreatModel("linf", 0.1), steps=10, step_size=0.025, seed=0)
    found = {
        precision: attack(in_precision(classifier, precision), pixels, labels)
        for precision in ("fp32", "bf16")
    }
    # All are judged by the classifier in float32: gradients in bfloat16 must lead as far.
    right = {key: int((classifier(examples).argmax(1) == labels).sum()) for key, examples in found.items()}
    assert not torch.equal(found["fp32"], found["bf16"])
    assert right["bf16"] / 200 <= wilson(right["fp32"], 200)[1]
    assert right["fp32"] / 200 < 0.9


def test_an_attack_in_bfloat16_is_no_weaker_on_the_defence(
    runs: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    run, _ = runs["fp32"]
    # The precision of an evaluation is chosen apart from that of the training.
    exact = attacked(run, "fp32", "pgd-eot", target="defence")
    coarse = attacked(run, "bf16", "pgd-eot", target="defence")
    assert coarse["accuracy"] <= exact["ci95"][1]
    assert exact["accuracy"] < 0.6


def test_results_of_another_precision_are_not_gone_on_with(
    runs: dict[str, tuple[Path, dict[str, Any]]],
) -> None:
    run, _ = runs["fp32"]
    attacked(run, "bf16", "none", target="classifier")
    with pytest.raises(StateError, match="recipe was"):
        attacked(run, "fp32", "none", target="classifier", resume=True)
    with pytest.raises(StateError, match="belongs to another run: its recipe is"):
        train_purifier(
            load_recipe("digits", [*SETTINGS, "precision=bf16"]),
            run=run,
            reporter=SilentReporter(),
            device="cpu",
            resume=True,
        )
