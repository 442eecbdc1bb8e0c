from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carso_cli.classifiers.wide_resnet import WideResNet
from carso_cli.defence.answer import classify
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.vae import Purifier
from carso_cli.errors import UsageError

LAYERS = ("layer.0.block.0.conv_0", "layer.1.block.0.conv_1")
SHAPES = {LAYERS[0]: (16, 32, 32), LAYERS[1]: (32, 16, 16)}
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def classifier(seed: int = 0) -> WideResNet:
    torch.manual_seed(seed)
    return WideResNet(depth=10, width=1, classes=5, activation="relu", mean=MEAN, std=STD)


@pytest.fixture
def defence() -> Defence:
    purifier = Purifier(
        SHAPES, channels=3, image_size=32, condition_features=8, latent_features=4, mean=MEAN, std=STD
    )
    return Defence(classifier(), purifier, LAYERS, n_samples=3)


def test_same_latents_same_answer_and_fresh_ones_another(defence: Defence) -> None:
    images = torch.rand(2, 3, 32, 32)
    latents = defence.draw_latents(2, generator=torch.Generator().manual_seed(5))
    assert latents.shape == (2, 3, 4)
    assert torch.equal(defence(images, latents=latents), defence(images, latents=latents))
    assert not torch.equal(defence(images), defence(images))


def test_forward_is_the_composition_of_its_parts(defence: Defence) -> None:
    images = torch.rand(2, 3, 32, 32)
    latents = defence.draw_latents(2)
    samples = defence.purify(images, latents=latents)
    logits = torch.stack([defence.classifier(samples[:, n]) for n in range(3)], dim=1)
    torch.testing.assert_close(defence(images, latents=latents, view="exact"), logits.logsumexp(dim=1))
    torch.testing.assert_close(
        defence(images, latents=latents), logits.double().exp().sum(1).log_softmax(1).float()
    )


def test_another_second_classifier_leaves_the_defence_alone(defence: Defence) -> None:
    images, latents = torch.rand(2, 3, 32, 32), defence.draw_latents(2)
    before, first = defence(images, latents=latents), defence.second_classifier
    second = classifier(seed=9).eval()
    changed = defence.with_second_classifier(second)
    built = Defence(defence.classifier, defence.purifier, LAYERS, n_samples=3, second_classifier=second)
    assert torch.equal(changed(images, latents=latents), built(images, latents=latents))
    assert defence.second_classifier is first
    assert torch.equal(defence(images, latents=latents), before)


def test_each_image_keeps_its_own_latents_and_condition(defence: Defence) -> None:
    images, latents = torch.rand(3, 3, 32, 32), defence.draw_latents(3)
    together = defence(images, latents=latents, view="exact")
    alone = torch.cat(
        [defence(images[i : i + 1], latents=latents[i : i + 1], view="exact") for i in range(3)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_second_classifier_classifies_and_the_first_conditions(defence: Defence) -> None:
    second = classifier(seed=9).eval()
    mixed = Defence(defence.classifier, defence.purifier, LAYERS, n_samples=3, second_classifier=second)
    images, latents = torch.rand(2, 3, 32, 32), defence.draw_latents(2)
    samples = defence.purify(images, latents=latents)
    assert torch.equal(mixed.purify(images, latents=latents), samples)
    expected = torch.stack([second(samples[:, n]) for n in range(3)], dim=1)
    torch.testing.assert_close(mixed.sample_logits(mixed.condition(images), latents), expected)


def test_it_is_frozen_and_stays_so(defence: Defence) -> None:
    assert not any(parameter.requires_grad for parameter in defence.parameters())
    assert not any(module.training for module in defence.modules())
    assert defence.eval() is defence
    with pytest.raises(UsageError, match="a defence is frozen"):
        defence.train()


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 3, 5), (2, 12)])
def test_latents_that_do_not_fit_are_refused(defence: Defence, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"latents have shape .*; \(2, N, 4\) is needed"):
        defence(torch.rand(2, 3, 32, 32), latents=torch.zeros(shape))


def test_an_unknown_layer_is_refused(defence: Defence) -> None:
    with pytest.raises(UsageError, match="no layer 'conv9'"):
        Defence(nn.Sequential(nn.Conv2d(3, 2, 1)), defence.purifier, ["conv9"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 255, "values from 0 to 255; a defence takes pixels in"),
        (lambda x: (x - 0.5) / 0.25, "values from -2 to 2"),
        (lambda x: (x * 255).to(torch.uint8), r"torch.uint8; torch.float32 in \[0, 1\] is needed"),
        (torch.Tensor.double, "torch.float64; torch.float32"),
        (torch.Tensor.half, "torch.float16; torch.float32"),
        (lambda x: x * float("nan"), "values from nan to nan"),
        (lambda x: x.numpy(), "of type ndarray"),
        (lambda x: x[0], r"shape \(3, 32, 32\); \(B, 3, H, W\) is needed"),
        (lambda x: x[:, :1], r"shape \(2, 1, 32, 32\)"),
        (lambda x: x.permute(0, 2, 3, 1), r"shape \(2, 32, 32, 3\)"),
    ],
)
def test_images_in_another_form_are_refused(defence: Defence, change: Any, message: str) -> None:
    images = torch.linspace(0, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    for entry in (defence, defence.purify, lambda given: classify(defence, given, 0)):
        with pytest.raises(UsageError, match=message):
            entry(change(images))


def test_rounding_beyond_the_range_and_no_images_at_all_pass(defence: Defence) -> None:
    images = torch.linspace(-1e-6, 1 + 1e-6, 3 * 32 * 32).reshape(1, 3, 32, 32)
    assert defence(images).shape == (1, 5)
    defence.check_images(images[:0])


class _LeNet(nn.Module):
    """Flattens by `view`, which channels-last tensors refuse, and works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc = nn.Conv2d(3, 6, 5, 4), nn.Linear(6 * 7 * 7, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(nn.functional.relu_(self.conv1(images)).view(-1, 6 * 7 * 7))
        return logits


def test_a_classifier_that_flattens_by_view_is_defended() -> None:
    purifier = Purifier(
        {"conv1": (6, 7, 7)},
        channels=3,
        image_size=32,
        condition_features=8,
        latent_features=4,
        mean=MEAN,
        std=STD,
    )
    purifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    assert Defence(_LeNet(), purifier, ["conv1"], n_samples=3)(images).shape == (2, 5)
