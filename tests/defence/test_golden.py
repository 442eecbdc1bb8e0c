"""Against tensors computed with the authors' released implementation on a tiny model.

Tolerances are those of float32 arithmetic in another order: rtol 1e-4, atol 1e-5.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from carso_cli.classifiers.wide_resnet import WideResNet
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.elbo import negative_elbo
from carso_cli.defence.release_format import PUBLISHED_PARTS, TRAINING_PARTS, from_release, to_release
from carso_cli.defence.representation import extract_representation
from carso_cli.defence.vae import Purifier

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def golden(golden_folder: Path) -> dict[str, Tensor]:
    return load_file(golden_folder / "tensors.safetensors")


@pytest.fixture(scope="module")
def layers(golden_folder: Path) -> list[str]:
    with safe_open(golden_folder / "tensors.safetensors", framework="pt") as stream:
        names: list[str] = json.loads(stream.metadata()["layers"])
    return names


@pytest.fixture(scope="module")
def defence(golden_folder: Path, golden: dict[str, Tensor], layers: list[str]) -> Defence:
    classifier = WideResNet(depth=10, width=1, classes=10, activation="silu", mean=MEAN, std=STD)
    classifier.load_state_dict(load_file(golden_folder / "classifier.safetensors"))
    shapes = {layer: tuple(golden[f"representation.{layer}"].shape[1:]) for layer in layers}
    purifier = Purifier(
        shapes,
        channels=3,
        image_size=32,
        mean=MEAN,
        std=STD,
        condition_features=48,
        latent_features=16,
    )
    state: dict[str, Tensor] = {}
    for part in PUBLISHED_PARTS + TRAINING_PARTS:
        state |= from_release(part, load_file(golden_folder / f"wrn_10_1_golden_{part}.safetensors"))
    purifier.load_state_dict(state)
    return Defence(classifier, purifier, layers, n_samples=8)


def latents(golden: dict[str, Tensor]) -> Tensor:
    return golden["z"].transpose(1, 2)


def test_classifier_logits(defence: Defence, golden: dict[str, Tensor]) -> None:
    close(defence.classifier(golden["x"]), golden["classifier_logits"])


def test_representation(defence: Defence, golden: dict[str, Tensor], layers: list[str]) -> None:
    for layer, output in extract_representation(defence.classifier, golden["x"], layers).items():
        close(output, golden[f"representation.{layer}"])


def test_condition_and_reconstructions(defence: Defence, golden: dict[str, Tensor]) -> None:
    condition = defence.condition(golden["x"])
    close(condition, golden["condition"])
    close(defence.decode(condition, latents(golden)), golden["reconstructions"])
    close(defence.sample_logits(condition, latents(golden)), golden["sample_logits"])


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        ("doubly-exponential", "peel"),
        ("logit-mean", "logit"),
        ("probability-mean", "prob"),
        ("majority-vote", "count"),
    ],
)
def test_released_outputs(defence: Defence, golden: dict[str, Tensor], rule: str, key: str) -> None:
    logits = defence.sample_logits(defence.condition(golden["x"]), latents(golden))
    defence.aggregation, before = rule, defence.aggregation
    close(defence.aggregate(logits, "released"), golden[f"released_output.{key}"])
    defence.aggregation = before


def test_input_gradient(defence: Defence, golden: dict[str, Tensor]) -> None:
    images = golden["x"].clone().requires_grad_()
    defence.aggregation, before = "logit-mean", defence.aggregation
    output = defence(images, latents=latents(golden), view="exact")
    defence.aggregation = before
    torch.autograd.backward(F.cross_entropy(output, golden["labels"], reduction="sum"))
    expected = golden["input_grad.logit_mean_ce_sum"]
    # The gradient is of order 1e-8, below the general absolute tolerance: compare it in its own units.
    scale = expected.abs().max()
    assert images.grad is not None
    torch.testing.assert_close(images.grad / scale, expected / scale, rtol=1e-3, atol=1e-3)


def test_training_path(defence: Defence, golden: dict[str, Tensor], layers: list[str]) -> None:
    representation = extract_representation(defence.classifier, golden["x"], layers)
    reconstruction, mean, log_variance = defence.purifier(golden["x"], representation, golden["eps"])
    close(mean, golden["mu"])
    close(log_variance, golden["log_var"])
    close(reconstruction, golden["train_reconstruction"])
    loss = negative_elbo(reconstruction, golden["x"], mean, log_variance, beta=0.5)
    close(loss.bce.reshape(1), golden["loss_bce_sum"])
    close(0.5 * loss.kl.reshape(1), golden["loss_beta_kl"])
    close(loss.total.reshape(1), golden["loss_total"])


def test_release_form_goes_both_ways(defence: Defence, golden_folder: Path) -> None:
    state = defence.purifier.state_dict()
    seen: set[str] = set()
    for part in PUBLISHED_PARTS + TRAINING_PARTS:
        published = load_file(golden_folder / f"wrn_10_1_golden_{part}.safetensors")
        ours = to_release(part, state)
        assert ours.keys() == published.keys()
        assert all(torch.equal(ours[key], published[key]) for key in ours)
        seen |= from_release(part, ours).keys()
    assert seen == state.keys()
