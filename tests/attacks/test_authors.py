"""The authors' attacks against the library's own run and a plain loop, on a saturating defence."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from carso_cli.attacks.authors import AuthorsRandAA
from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.gradient_health import GradientRecorder
from carso_cli.attacks.pgd_eot import PGDEoT
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.data.image_set import ImageSet
from carso_cli.errors import UsageError
from carso_cli.evaluation.run import evaluate
from carso_cli.runtime.seed import derive_seed, generator, seeded
from carso_cli.runtime.third_party import prepare

STEPS, DRAWS, EPS = 8, 3, 0.12
BOUND = ThreatModel("linf", EPS)


class Released:
    """The released output as a plain function of images, for the library and for the authors' loop."""

    def __init__(self, defence: Any) -> None:
        self.defence, self.latents = defence, generator(7, "latents")

    def __call__(self, images: Tensor) -> Tensor:
        latents = self.defence.draw_latents(len(images), None, self.latents)
        logits = self.defence.sample_logits(self.defence.condition(images), latents)
        released: Tensor = self.defence.aggregate(logits, "released")
        return released


@pytest.fixture
def images() -> Tensor:
    scale = torch.linspace(0.3, 1.0, 36)[:, None, None, None]
    return torch.rand((36, 1, 4, 4), generator=generator(3, "images")) * scale


@pytest.fixture
def defence(toys: ModuleType) -> Any:
    """Half of the images saturate it."""
    return toys.LinearDefence(noise=0.3, scale=1.0)


@pytest.fixture
def labels(defence: Any, images: Tensor) -> Tensor:
    """The defence's own decisions, but for every ninth."""
    decided: Tensor = defence.classifier(images).argmax(dim=1)
    decided[::9] = (decided[::9] + 1) % 4
    return decided


def target(defence: Any, view: Any = "released") -> DefenceTarget:
    return DefenceTarget(defence, view, 4096, generator(7, "latents"))


def moved(found: Tensor, images: Tensor) -> Tensor:
    return (found != images).flatten(1).any(dim=1)


@pytest.mark.slow  # imports the library
def test_rand_aa_is_the_library_run_image_by_image(defence: Any, images: Tensor, labels: Tensor) -> None:
    prepare()
    from pyautoattack import AutoAttack
    from pyautoattack.autopgd_base import APGDAttack

    recorder = GradientRecorder()
    attack = AuthorsRandAA(BOUND, steps=STEPS, eot_samples=DRAWS, seed=5, recorder=recorder)
    found = attack(target(defence), images, labels)
    model, seed = Released(defence), derive_seed(5, "authors-rand-aa")
    with seeded(0, "library"):
        library = AutoAttack(model, version="rand", eps=EPS, seed=seed)
        library.apgd = APGDAttack(model, n_iter=STEPS, eot_iter=DRAWS, eps=EPS, seed=seed, device="cpu")
        model(images[:1])  # ours asks once for the number of classes
        expected, _ = library.run_standard_evaluation(images, labels, batch_size=len(images))
    assert torch.equal(moved(found, images), moved(expected, images))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert BOUND.contains(found, images).all()
    # It finds some, and saturation hides others from it that the exact view gives away.
    assert 0.1 < recorder.summary().nan < 0.9
    exact = AuthorsRandAA(BOUND, steps=STEPS, eot_samples=DRAWS, seed=5)(
        target(defence, "exact"), images, labels
    )
    assert 0 < int(moved(found, images).sum()) < int(moved(exact, images).sum())


def test_a_saturated_view_returns_every_image_unperturbed(toys: ModuleType) -> None:
    defence = toys.SaturatingDefence()
    split = toys.images_with_margins(defence, [0.7, 0.8, 0.9])
    clean = split.pixels(slice(None))
    for seen, count in (("released", 0), (lambda logits: logits.mean(dim=1), 3)):
        found = AuthorsRandAA(BOUND, steps=STEPS, eot_samples=DRAWS)(
            target(defence, seen), clean, split.labels
        )
        assert moved(found, clean).sum() == count


def test_pgd_eot_ends_at_the_last_step_of_a_plain_loop(defence: Any, images: Tensor, labels: Tensor) -> None:
    attack = PGDEoT(BOUND, steps=STEPS, eot_samples=DRAWS, step_size=0.07, keep_best=False)
    assert attack.name == "authors-pgd-eot"
    found = attack(target(defence, "log-probability"), images, labels)
    model, current = Released(defence), images
    for _ in range(STEPS):
        gradient = torch.zeros_like(images)
        # The same draws in one call or in three: the generator is read in order.
        for latents in defence.draw_latents(DRAWS * len(images), None, model.latents).split(len(images)):
            leaf = current.clone().requires_grad_()
            logits = defence.aggregate(
                defence.sample_logits(defence.condition(leaf), latents), "log-probability"
            )
            gradient += torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), leaf)[0]
        step = current + 0.07 * gradient.sign()
        current = (images + (step - images).clamp(-EPS, EPS)).clamp(0, 1)
    torch.testing.assert_close(found, current, rtol=0, atol=1e-6)


def test_one_radius_per_image_is_refused(defence: Any, images: Tensor, labels: Tensor) -> None:
    attack = AuthorsRandAA(ThreatModel("linf", torch.full((36,), EPS)), steps=1, eot_samples=1)
    with pytest.raises(UsageError, match="takes one eps for all images"):
        attack(target(defence), images, labels)


def test_two_classes_are_attacked_on_cross_entropy_alone(
    defence: Any, images: Tensor, labels: Tensor
) -> None:
    two = DefenceTarget(defence, lambda logits: logits.mean(dim=1)[:, :2], 4096, generator(7, "latents"))
    labels = two(images).argmax(dim=1)
    found = AuthorsRandAA(BOUND, steps=STEPS, eot_samples=1)(two, images, labels)
    assert moved(found, images).any()


@pytest.mark.slow
def test_the_protocol_counts_one_fresh_draw_and_reports_rand_aa(
    toys: ModuleType, defence: Any, images: Tensor, labels: Tensor, tmp_path: Path, recorder: Any
) -> None:
    split = ImageSet((images * 255).to(torch.uint8), labels, torch.arange(36), ("a", "b", "c", "d"))
    options = {"run": tmp_path, "reporter": recorder, "defence": defence, "images": split, "device": "cpu"}
    result = evaluate(toys.small_recipe(), attack="authors", **options)
    rows = {row["attack"]: row for row in result["results"] if row["target"] == "defence"}
    assert list(rows) == ["none", "authors-rand-aa", "authors-pgd-eot"]
    assert {row["draws"] for row in rows.values()} == {1}
    assert {row["attacked"] for row in rows.values()} == {36}
    assert result["headline"]["accuracy"] == rows["authors-rand-aa"]["accuracy"]
    assert rows["authors-rand-aa"]["view"] == "released"
    assert "nan-gradients" in result["failed"]
    assert result["exact"]["accuracy"] is None
    published = evaluate(toys.small_recipe(), attack="published", **options)
    assert published["headline"]["accuracy"] <= result["headline"]["accuracy"]
