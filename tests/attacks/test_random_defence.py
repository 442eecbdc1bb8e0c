from __future__ import annotations

import textwrap
from typing import Any

import pytest
import torch
from torch import nn

from carso_cli import Defence, audit
from carso_cli.attacks import random_defence
from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.losses import margin
from carso_cli.attacks.random_defence import ExactScores, RandomDefence
from carso_cli.runtime.reporter import SILENT
from carso_cli.runtime.seed import generator


def documented(classifier: nn.Module) -> Any:
    """The defence of the module's docstring, as a reader would copy it."""
    text = str(random_defence.__doc__).partition("a whole defence:\n")[2].partition("    audit(")[0]
    scope: dict[str, Any] = {"torch": torch}
    exec(textwrap.dedent(text), scope)
    return scope["Smoothed"](classifier)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 4)).requires_grad_(False).eval()


def test_the_documented_defence_is_one_and_so_is_ours() -> None:
    assert isinstance(documented(network()), RandomDefence)
    assert not isinstance(network(), RandomDefence)
    names = {name for name in vars(RandomDefence) if not name.startswith("_")} - {"n_samples"}
    assert names <= set(dir(Defence)) | {"classifier", "second_classifier"}


def test_its_gradient_is_that_of_its_answer() -> None:
    defence = documented(network())
    images, labels = torch.rand(5, 3, 32, 32, generator=generator(0, "images")), torch.arange(5) % 4
    answer = DefenceTarget(defence, "exact", 64, generator(1, "z")).loss_and_gradient(
        images, labels, margin, 1
    )
    leaf = images.clone().requires_grad_()
    latents = defence.draw_latents(5, None, generator(1, "z"))
    values = margin(defence.aggregate(defence.sample_logits(defence.condition(leaf), latents)), labels)
    torch.testing.assert_close(answer.loss, values.detach())
    torch.testing.assert_close(answer.gradient, torch.autograd.grad(values.sum(), leaf)[0])


@pytest.mark.slow
def test_an_audit_takes_it_and_finds_what_it_finds_in_a_plain_function() -> None:
    defence = documented(network())
    images = torch.rand(16, 3, 32, 32, generator=generator(0, "images"))
    labels = defence.classifier(images).argmax(dim=1)
    found = [
        audit(model, images, labels, eps=0.1, budget="quick", device="cpu", reporter=SILENT)
        for model in (defence, ExactScores(defence))
    ]
    assert abs(found[0].accuracy - found[1].accuracy) <= 0.1
    assert found[0].accuracy < found[0].clean_accuracy - 0.3
    assert found[0].trusted == found[1].trusted
