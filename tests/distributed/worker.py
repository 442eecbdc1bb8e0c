"""What every process of the tests does: the same work, told by nothing but torchrun that it shares it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from carso_cli.build import build_classifier, load_images
from carso_cli.data.image_set import ImageSet, epoch_batches
from carso_cli.distributed.world import World, join, leave
from carso_cli.errors import DataError, InterruptedRun
from carso_cli.evaluation.attack import attack
from carso_cli.io.checksum import fingerprint
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.checkpoints import save_tensors
from carso_cli.runtime.reporter import SilentReporter
from carso_cli.training import classifier as classifier_steps
from carso_cli.training import purifier_step as purifier_steps
from carso_cli.training.adversarial_cache import AdversarialCache
from carso_cli.training.balanced_batch import BalancedBatch
from carso_cli.training.classifier import train_classifier
from carso_cli.training.purifier import train_purifier

# 60 images to train on: batches of 29, 29 and 2, the last of which leaves a third process without any.
SETTINGS = (
    "training.epochs=3",
    "training.learning_rate.warmup_epochs=2",
    "training.learning_rate.plateau_epochs=1",
    "training.learning_rate.annealing_epochs=0",
    "training.beta_increase.first_epoch=0",
    "training.beta_increase.last_epoch=2",
    "training.batch_size=29",
    "training.attack_mix.pgd_steps=2",
    "purifier.condition_features=16",
    "purifier.latent_features=4",
    "data.holdout=0.25",
    "data.train_limit=80",
    "classifier.training.epochs=2",
    "classifier.training.batch_size=29",
    "evaluation.batch_size=8",
)


class Listening(SilentReporter):
    """Counts what it is told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    @contextmanager
    def progress(self, description: str, total: int, unit: str = "images") -> Iterator[Listening]:
        yield self

    def advance(self, steps: int = 1, **figures: float) -> None:
        self.told.append(steps)


class Stopping(SilentReporter):
    """Asks this process to stop at the fifth step, as a scheduler does."""

    def __init__(self) -> None:
        self.steps = 0

    @contextmanager
    def progress(self, description: str, total: int, unit: str = "images") -> Iterator[Stopping]:
        yield self

    def advance(self, steps: int = 1, **figures: float) -> None:
        self.steps += 1
        if self.steps == 5:
            signal.raise_signal(signal.SIGTERM)


def primitives(world: World, out: Path) -> dict[str, Any]:
    def fail() -> None:
        raise DataError("damaged", hint="fetch it again")

    try:
        world.on_main(fail)
        raised = ""
    except DataError as error:
        raised = f"{error.message}; {error.hint}"
    return {
        "rank": world.rank,
        "size": world.size,
        "shared out": list(world.map_sharded(list("abcdefg"), lambda item: [item.upper(), world.rank])),
        "on main": world.on_main(lambda: os.getpid() if world.is_main else -1),
        "raised": raised,
        "sum": world.sum(torch.tensor([1.0, world.rank])).tolist(),
        "epoch": [batch[world.shard(len(batch))].tolist() for batch in epoch_batches(23, 5, 0, 0)],
    }


def batch_norm(world: World) -> float:
    """The largest difference from one process's batch normalisation in float64, of values and gradients."""
    worst, source = 0.0, torch.Generator().manual_seed(0)
    for images, size in ((7, (5, 5)), (2, ()), (2, (1, 1))):
        values = torch.randn(images, 3, *size, dtype=torch.float64, generator=source)
        slope, own = torch.randn(values.shape, generator=source), world.shard(images)
        kind = torch.nn.BatchNorm2d if size else torch.nn.BatchNorm1d
        whole, shared = (torch.nn.Sequential(kind(3)).double() for _ in range(2))
        world.sync_batch_norm(shared)
        weights: list[Any] = [whole[0], shared[0]]
        leaves: list[Any] = [values.clone().requires_grad_(), values[own].clone().requires_grad_()]
        outputs = whole(leaves[0]), shared(leaves[1])
        (outputs[0].sin() * slope).sum().backward()
        (outputs[1].sin() * slope[own]).sum().backward()
        pairs = [
            (outputs[0][own], outputs[1]),
            (leaves[0].grad[own], leaves[1].grad),
            (weights[0].weight.grad, world.sum(weights[1].weight.grad)),
            (weights[0].bias.grad, world.sum(weights[1].bias.grad)),
            *zip(whole.buffers(), shared.buffers(), strict=True),
        ]
        assert len(pairs) == 7
        gaps = [(one - other).detach().abs().max() for one, other in pairs if one.numel()]
        worst = max(worst, *(float(gap) for gap in gaps))
    return worst


class Exact(ImageSet):
    """Images in float64: in float32 a rounding error decides on which side of its kink an activation lies,
    and one process's own gradient is only good to about one part in a thousand."""

    def pixels(self, positions: Any) -> torch.Tensor:
        return super().pixels(positions).double()


def first_step(kind: str, fraction: float) -> Any:
    """The gradients, the sums and a checksum of the weights of the first training step."""
    recipe = load_recipe("digits", [*SETTINGS, f"training.attack_mix.adversarial_fraction={fraction}"])
    found = load_images(recipe, "train")
    train = Exact(found.images, found.labels, found.indices, found.classes)
    common = train, train, torch.device("cpu"), SilentReporter()
    torch.set_default_dtype(torch.float64)
    try:
        if kind == "purifier":
            return _purifier_step(recipe, *common)
        return _classifier_step(recipe, "at" if fraction else "clean", *common)
    finally:
        torch.set_default_dtype(torch.float32)


def _purifier_step(recipe: Recipe, train: Any, held_out: Any, device: torch.device, reporter: Any) -> Any:
    classifier = build_classifier(recipe, "at").double()
    perturb = BalancedBatch(recipe, classifier)
    pool = AdversarialCache(reuse=1)
    setup = purifier_steps.TrainingSetup(recipe, classifier, train, held_out, perturb, pool, device, reporter)
    state = purifier_steps.initial_state(setup)
    state.purifier.train().double()
    sums = purifier_steps.train_step(setup, state, torch.arange(29), (0, 0), 1.0)
    return _gradients(state.purifier), sums.tolist(), fingerprint(state.purifier.state_dict())


def _classifier_step(
    recipe: Recipe, trained_as: Any, train: Any, held_out: Any, device: torch.device, reporter: Any
) -> Any:
    setup = classifier_steps.ClassifierSetup(recipe, trained_as, train, held_out, device, reporter)
    classifier = classifier_steps.initial_classifier(recipe).train().double()
    state = classifier_steps.initial_state(setup, classifier)
    sums = classifier_steps.train_step(setup, state, torch.arange(29), (0, 0))
    return _gradients(classifier), sums.tolist(), fingerprint(classifier.state_dict())


def _gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def train(out: Path, reporter: SilentReporter) -> None:
    recipe = load_recipe("digits", SETTINGS)
    train_purifier(recipe, run=out / "purifier", reporter=reporter, device="cpu")
    train_classifier(recipe, "at", run=out / "classifier", reporter=reporter, device="cpu")


def stopped(out: Path) -> str:
    """Start the purifier's training, stop one of the processes, and return what each says."""
    try:
        train_purifier(
            load_recipe("digits", SETTINGS), run=out / "stopped", reporter=Stopping(), device="cpu"
        )
    except InterruptedRun as error:
        return error.message
    return "not stopped"


def main() -> None:
    out = Path(sys.argv[1])
    sys.path.insert(0, str(Path(__file__).parents[1]))
    toys = importlib.import_module("toys")
    world = join(torch.device("cpu"))
    reporter = Listening()
    answers = primitives(world, out)
    answers["batch norm"] = batch_norm(world)
    answers["sums"], answers["weights"] = {}, []
    for kind in ("purifier", "classifier"):
        for fraction in (0.0, 0.5):
            gradients, answers["sums"][f"{kind} {fraction}"], weights = first_step(kind, fraction)
            answers["weights"].append(weights)
            if world.is_main:
                save_tensors(out / f"gradients-{kind}-{fraction}", gradients, {})
    train(out, reporter)
    answers["stopped"] = stopped(out)
    answers["summary"] = toys.run_toy(out / "evaluation", reporter)
    defence = toys.LinearDefence(noise=0.5)
    images = toys.images_with_margins(defence, [0.3, 0.6, 0.9, 1.1, 1.3, 1.6, 0.5, 1.2, 2.0])
    attack(
        toys.small_recipe(),
        run=out / "attack",
        reporter=reporter,
        name="pgd-eot",
        images=images,
        defence=defence,
        device="cpu",
    )
    answers["told"] = sum(reporter.told)
    (out / f"rank{world.rank}.json").write_text(json.dumps(answers))
    leave()


if __name__ == "__main__":
    main()
