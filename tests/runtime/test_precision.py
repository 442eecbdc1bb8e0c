"""Reduced precision: where it holds, where it does not, and that attacks do not grow weaker by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.losses import margin
from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.pgd_eot import PGDEoT
from carso_cli.attacks.target import ClassifierTarget
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.build import build_classifier, device_for, load_images
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.representation import extract_representation
from carso_cli.defence.vae import Purifier
from carso_cli.errors import StateError, UsageError
from carso_cli.evaluation.run import evaluate
from carso_cli.evaluation.scoring import DefenceScorer
from carso_cli.evaluation.setup import prepare_evaluation
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.intervals import wilson
from carso_cli.runtime.precision import autocast, in_precision, to_float32
from carso_cli.runtime.reporter import SILENT
from carso_cli.runtime.seed import generator
from carso_cli.training.purifier import train_purifier

SETTINGS = (
    "training.epochs=1",
    "training.attack_mix.pgd_steps=2",
    "data.train_limit=120",
    "evaluation.n_samples=2",
)
Runs = dict[str, tuple[Path, dict[str, Any]]]
LAYER = "layer.0.block.0.conv_0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The same training in both precisions."""
    found = {}
    for precision in ("fp32", "bf16"):
        run = tmp_path_factory.mktemp(precision) / "run"
        metrics = train_purifier(recipe_in(precision), run=run, reporter=SILENT, device="cpu")
        found[precision] = run, metrics
    return found


def recipe_in(precision: str) -> Recipe:
    return load_recipe("digits", [*SETTINGS, f"precision={precision}"])


class LeastSquares(nn.Module):
    """A purifier without training: digits by least squares from one layer, noise from the latents."""

    latent_features = 64
    condition_features = 16 * 64
    input_share = 0.0

    def __init__(self, classifier: nn.Module, digits: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(16 * 64, 64)
        self.mean = torch.zeros(1)
        with torch.no_grad():
            seen = self.condition(extract_representation(classifier, digits, [LAYER]))
            seen = torch.cat((seen, torch.ones(len(seen), 1)), dim=1)
            wanted = functional.avg_pool2d(digits[:, :1], 4).flatten(1)
            weights = torch.linalg.solve(seen.T @ seen + 0.1 * torch.eye(seen.shape[1]), seen.T @ wanted)
            self.linear.weight.copy_(weights[:-1].T)
            self.linear.bias.copy_(weights[-1])

    def condition(self, representation: Mapping[str, Tensor]) -> Tensor:
        return to_float32(functional.avg_pool2d(representation[LAYER], 4).flatten(1))

    def decode(self, latents: Tensor, condition: Tensor) -> Tensor:
        grey = to_float32(self.linear(condition)) + 0.1 * latents
        images = functional.interpolate(grey.reshape(-1, 1, 8, 8), scale_factor=4)
        return images.expand(-1, 3, -1, -1).clamp(0, 1)


def test_products_are_in_bfloat16_and_answers_in_float32() -> None:
    factor = torch.full((1, 1), 1.0 + 2.0**-8)
    seen = {}
    for precision in ("fp32", "bf16"):
        answer = in_precision(lambda images: images @ factor, precision)(torch.ones(1, 1))
        assert answer.dtype == torch.float32
        seen[precision] = answer.item()
    # bfloat16 has 8 significant bits: the factor is rounded to 1.
    assert seen == {"fp32": 1.0 + 2.0**-8, "bf16": 1.0}
    with autocast("bf16", torch.device("cpu")):
        assert (torch.ones(1, 1) @ factor).dtype == torch.bfloat16
    assert to_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


def test_tf32_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(UsageError, match="precision tf32 is a mode of NVIDIA GPUs, and the device is cpu"):
        device_for(load_recipe("digits", ["precision=tf32"]), "cpu")


@pytest.mark.slow
def test_training_in_bfloat16_follows_training_in_float32(
    runs: Runs,
) -> None:
    losses = {precision: metrics["loss"] for precision, (_, metrics) in runs.items()}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


@pytest.mark.slow
def test_what_a_defence_aggregates_is_float32(runs: Runs) -> None:
    options: dict[str, Any] = {"run": runs["bf16"][0], "reporter": SILENT, "device": "cpu"}
    evaluation = prepare_evaluation(recipe_in("bf16"), attack="pgd-eot", limit=4, **options)
    defence = evaluation.setting.models.require_defence()
    images, labels, _ = evaluation.setting.batch(range(4))
    condition = defence.condition(images)
    logits = defence.sample_logits(condition, defence.draw_latents(4))
    assert {condition.dtype, logits.dtype, defence.aggregate(logits).dtype} == {torch.float32}
    # bfloat16 numbers, exactly: the last layer of the classifier ran in it.
    assert torch.equal(logits, logits.bfloat16().float())
    target = ClassifierTarget(evaluation.setting.models.classifier)
    answer = target.loss_and_gradient(images, labels, torch.nn.functional.cross_entropy, 1)
    assert answer.gradient.dtype == torch.float32


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_attack_in_bfloat16_is_no_weaker_on_the_defence() -> None:
    recipe = load_recipe("digits")
    digits = load_images(recipe, "train", limit=600).pixels(slice(0, 600))
    images = load_images(recipe, "test", limit=60)
    pixels, labels = images.pixels(slice(0, 60)), images.labels
    classifier = build_classifier(recipe, "at")
    purifier = cast(Purifier, LeastSquares(classifier, digits))
    defences = {
        precision: Defence(classifier, purifier, [LAYER], n_samples=4, precision=precision)
        for precision in ("fp32", "bf16")
    }
    attack = PGDEoT(ThreatModel("linf", 0.1), steps=4, eot_samples=2, step_size=0.04)
    judge = DefenceScorer(defences["fp32"], seed=0, draws=5, samples_per_pass=256)
    found, right = {}, {}
    for precision, defence in defences.items():
        target = DefenceTarget(defence, "exact", samples_per_pass=64, generator=generator(0, "latents"))
        found[precision] = attack(target, pixels, labels)
        score = judge(found[precision], labels, range(60), "report")
        right[precision] = score.correct.sum() / 5
    clean = judge(pixels, labels, range(60), "report").correct.sum() / 5
    assert not torch.equal(found["fp32"], found["bf16"])
    assert right["bf16"] / 60 <= wilson(round(float(right["fp32"])), 60)[1]
    assert right["fp32"] < clean - 15


@pytest.mark.slow
def test_gradients_in_bfloat16_leave_the_scores_in_float32() -> None:
    recipe = load_recipe("digits")
    images = load_images(recipe, "test", limit=6)
    pixels, labels = images.pixels(slice(0, 6)), images.labels
    classifier = build_classifier(recipe, "at")
    digits = load_images(recipe, "train", limit=60).pixels(slice(0, 60))
    purifier = cast(Purifier, LeastSquares(classifier, digits))
    exact, fast = (
        Defence(classifier, purifier, [LAYER], n_samples=2, precision=precision)
        for precision in ("fp32", "bf16")
    )

    def target(defence: Defence, followed: Defence | None = None) -> DefenceTarget:
        latents = generator(0, "latents")
        return DefenceTarget(defence, "exact", 4, latents, followed=followed)

    mixed, plain, reduced = target(exact, fast), target(exact), target(fast)
    assert torch.equal(mixed(pixels), plain(pixels))
    losses = [each.expected_loss(pixels, labels, margin, 2).loss for each in (mixed, plain)]
    assert torch.equal(*losses)
    reduced(pixels)
    reduced.expected_loss(pixels, labels, margin, 2)
    # The three generators have drawn alike so far: the gradients differ by the precision alone.
    gradients = [
        each.loss_and_gradient(pixels, labels, margin, 2).gradient for each in (mixed, plain, reduced)
    ]
    assert torch.equal(gradients[0], gradients[2])
    assert not torch.equal(gradients[0], gradients[1])
    ones = torch.ones(6, 10)
    pulled = [each.vjp(pixels)[1](ones) for each in (mixed, plain, reduced)]
    assert torch.equal(pulled[0], pulled[2])
    assert not torch.equal(pulled[0], pulled[1])
    cosine = functional.cosine_similarity(gradients[0].flatten(1), gradients[1].flatten(1))
    assert cosine.mean() > 0.98


@pytest.mark.slow
def test_results_of_another_precision_are_not_gone_on_with(
    runs: Runs,
) -> None:
    run, _ = runs["fp32"]
    options: dict[str, Any] = {"run": run, "reporter": SILENT, "device": "cpu"}
    options |= {"limit": 10, "target": "classifier"}
    # The precision of an evaluation is chosen apart from that of the training.
    evaluate(recipe_in("bf16"), attack="none", **options)
    with pytest.raises(StateError, match=r"precision was .bf16., now .fp32."):
        evaluate(recipe_in("fp32"), attack="none", resume=True, **options)
    with pytest.raises(StateError, match="started with other options: precision was"):
        train_purifier(recipe_in("bf16"), run=run, reporter=SILENT, device="cpu", resume=True)
