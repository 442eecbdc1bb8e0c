"""Train the classifier that a recipe describes, adversarially or on clean images.

SGD with Nesterov momentum and a one-cycle learning rate. Adversarial training perturbs every image by one
step from a random start (`fast`: Wong, Rice and Kolter, 2020; https://arxiv.org/abs/2001.03994) or by PGD
(`pgd`: Madry et al., 2018; https://arxiv.org/abs/1706.06083). Every random number is a function of (seed,
purpose, epoch, batch), so a run that is killed and resumed ends in the same weights.

- `train_classifier` trains into a run folder;
- `estimate_cost` says how long that would take.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from carso_cli import __version__
from carso_cli.build import classifier_fingerprint, device_for, load_images, training_images
from carso_cli.data.image_set import ImageSet, epoch_batches, split_holdout
from carso_cli.distributed.world import join
from carso_cli.errors import DataError, InterruptedRun
from carso_cli.recipe.identity import recipe_hash
from carso_cli.recipe.schema import Kind, Recipe
from carso_cli.runs.checkpoints import save_tensors
from carso_cli.runs.description import describe_run
from carso_cli.runs.environment import describe_environment
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter, SilentReporter
from carso_cli.runtime.seed import generator
from carso_cli.runtime.signals import StopRequest, stop_requests
from carso_cli.runtime.timing import seconds_of
from carso_cli.training.checkpoint import StopTraining
from carso_cli.training.classifier_state import ClassifierState
from carso_cli.training.classifier_step import (
    ClassifierSetup,
    held_out_accuracies,
    initial_classifier,
    make_optimiser,
    threat_model,
    train_step,
)
from carso_cli.training.one_cycle import one_cycle_rate

WEIGHTS_FILE = "classifier.safetensors"


def train_classifier(
    recipe: Recipe,
    kind: Kind,
    *,
    run: Path,
    reporter: Reporter,
    resume: bool = False,
    device: str = "auto",
    limit: int | None = None,
) -> dict[str, Any]:
    """Train the recipe's classifier into a run folder.

    The folder receives `classifier.safetensors`, with architecture, kind, perturbation size and accuracies in
    its header, `metrics.jsonl` with one line an epoch, `recipe.yaml`, and the state to resume from.

    Args:
        recipe: The resolved recipe; `classifier.training` says how to train.
        kind: `at` for adversarial training at the recipe's threat model, `clean` for clean images.
        run: Run folder.
        reporter: Where progress goes.
        resume: Go on from the folder's saved state.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        limit: Train on this many images only, class-balanced.

    Returns:
        The last epoch's metrics, with `run`, `weights` (the file) and `seconds_total` over all epochs.

    Raises:
        UsageError: If the recipe's classifier is no WideResNet, or the folder already holds a run.
        RecipeError, WeightsError: If the weights to start from do not serve; see `initial_classifier`.
        DataError: If fewer than two images are left to train on.
        StateError: If the saved state belongs to another configuration, or is damaged.
        NumericsError: If the loss stops being finite, naming epoch and batch.
        InterruptedRun: On Ctrl-C or SIGTERM; the state after the last step is saved.
    """
    folder, world = RunFolder(run), join(device_for(recipe, device))
    reporter = world.reporter(reporter)
    classifier = initial_classifier(recipe).to(world.device)
    resume = world.on_main(lambda: folder.check(resume=resume, restarted=world.restarted))
    setup = _set_up(recipe, kind, world.device, limit, reporter)
    identity = _identity(setup, classifier)
    world.synchronise(classifier)
    state = ClassifierState(classifier, make_optimiser(recipe, classifier), world, identity)
    with world.main_holds(lambda: folder.claimed(resume=resume, reporter=reporter)):
        if resume:
            state.load(folder, reporter)
        environment = describe_environment(world.device)
        world.on_main(lambda: describe_run(folder, recipe, environment, reporter))
        _train_epochs(folder, setup, state)
        weights = run / WEIGHTS_FILE
        header = _describe(setup, state)
        world.on_main(lambda: save_tensors(weights, state.classifier.state_dict(), header))
    return {**state.last_metrics, "run": str(run), "weights": str(weights), "seconds_total": state.seconds}


def _train_epochs(folder: RunFolder, setup: ClassifierSetup, state: ClassifierState) -> None:
    epochs = setup.recipe.classifier.training.epochs
    try:
        with stop_requests() as stop:
            for epoch in range(state.epochs_done, epochs):
                try:
                    metrics = _train_epoch(setup, state, epoch, stop)
                except StopTraining:
                    state.save(folder)
                    raise
                state.finish_epoch(folder, metrics)
                state.save(folder)
    except (StopTraining, KeyboardInterrupt):
        raise InterruptedRun(
            f"stopped; {state.describe_saved(epochs)} in {folder.path}",
            hint=f"go on with: carso train-classifier {folder.recipe} --kind {setup.kind} "
            f"--run {folder.path} --resume",
        ) from None


def estimate_cost(
    recipe: Recipe, kind: Kind, *, device: str = "auto", limit: int | None = None
) -> dict[str, Any]:
    """Predict what training costs, from one step on random images; no data is read.

    Returns:
        `parameters`, `seconds_per_image` of training, and, where the recipe, `limit` or the data set's
        definition tells the number of images, `images` and `seconds` for all epochs.

    Raises:
        UsageError: As `train_classifier`.
    """
    target = device_for(recipe, device)
    world = join(target)
    classifier = initial_classifier(recipe).to(target)
    world.synchronise(classifier)
    images = _blank_images(recipe)
    setup = ClassifierSetup(recipe, kind, threat_model(recipe), images, images, target, SilentReporter())
    state = ClassifierState(classifier, make_optimiser(recipe, classifier), world, {})
    positions = torch.arange(len(images))
    each = seconds_of(lambda: train_step(setup, state, positions, (0, 0)), target) / len(images)
    cost: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        "seconds_per_image": each,
    }
    images_known = training_images(recipe, limit)
    if images_known is not None:
        cost["images"] = images_known
        cost["seconds"] = each * images_known * recipe.classifier.training.epochs
    return cost


def _set_up(
    recipe: Recipe, kind: Kind, device: torch.device, limit: int | None, reporter: Reporter
) -> ClassifierSetup:
    with join(device).local_main_first():
        images = load_images(recipe, "train", limit=limit, reporter=reporter)
    train, held_out = split_holdout(images, recipe.data.holdout, recipe.seed)
    if len(train) < 2:
        raise DataError(f"{len(train)} training images are too few: batch normalisation needs at least 2")
    return ClassifierSetup(recipe, kind, threat_model(recipe), train, held_out, device, reporter)


def _train_epoch(
    setup: ClassifierSetup, state: ClassifierState, epoch: int, stop: StopRequest
) -> dict[str, Any]:
    """Train what is left of an epoch; return its metrics, loss and accuracy as means over all its images."""
    section = setup.recipe.classifier.training
    batches = epoch_batches(len(setup.train), section.batch_size, setup.recipe.seed, epoch)
    rates = [
        one_cycle_rate(
            epoch * len(batches) + number,
            section.epochs * len(batches),
            peak=section.peak_learning_rate,
            warmup_share=section.warmup_share,
        )
        for number in range(len(batches))
    ]
    sums = torch.tensor(state.open.sums or (0.0,) * 2, dtype=torch.float64)
    seen, started = sum(map(len, batches[: state.open.batches])), time.perf_counter() - state.open.seconds
    state.classifier.train()
    title = f"epoch {epoch + 1}/{section.epochs}"
    with setup.reporter.progress(title, sum(map(len, batches))) as progress:
        if seen:
            progress.advance(seen)
        for number in range(state.open.batches, len(batches)):
            for group in state.optimiser.param_groups:
                group["lr"] = rates[number]
            sums += train_step(setup, state, batches[number], (epoch, number))
            seen += len(batches[number])
            progress.advance(len(batches[number]), loss=sums[0].item() / seen)
            state.finish_batch(number + 1, sums, time.perf_counter() - started, stop)
    seconds = time.perf_counter() - started
    loss, accuracy = (sums / seen).tolist()
    return {
        "epoch": epoch,
        "loss": loss,
        "train_accuracy": accuracy,
        **held_out_accuracies(setup, state.classifier),
        "learning_rate": rates[-1],
        "images": seen,
        "seconds": seconds,
        "images_per_second": seen / seconds,
    }


def _identity(setup: ClassifierSetup, classifier: nn.Module) -> dict[str, Any]:
    section = setup.recipe.classifier
    goes_on = section.training.initial is not None
    return {
        "recipe": recipe_hash(setup.recipe, ("data", "threat", "seed", "precision")),
        "architecture": [section.depth, section.width, section.activation],
        "training": section.training.model_dump(exclude={"initial"}),
        "kind": setup.kind,
        "images": setup.train.fingerprint(),
        "initial": classifier_fingerprint(classifier) if goes_on else None,
    }


def _describe(setup: ClassifierSetup, state: ClassifierState) -> dict[str, Any]:
    """Return the header of the trained weights."""
    recipe, section = setup.recipe, setup.recipe.classifier
    return {
        "architecture": f"wide-resnet-{section.depth}-{section.width}",
        "activation": section.activation,
        "classes": recipe.data.classes,
        "channels": recipe.data.channels,
        "mean": list(recipe.data.mean),
        "std": list(recipe.data.std),
        "kind": setup.kind,
        "recipe_name": recipe.name,
        "norm": recipe.threat.norm if setup.kind == "at" else None,
        "eps": recipe.threat.eps if setup.kind == "at" else None,
        "epochs": state.epochs_done,
        "initial": state.identity["initial"],
        "images": len(setup.train),
        "seed": recipe.seed,
        "held_out_clean_accuracy": state.last_metrics["clean_accuracy"],
        "held_out_pgd_accuracy": state.last_metrics["pgd_accuracy"],
        "version": __version__,
    }


def _blank_images(recipe: Recipe) -> ImageSet:
    """Return one batch of random images in the recipe's shape."""
    data, count = recipe.data, recipe.classifier.training.batch_size
    shape = (count, data.channels, data.image_size, data.image_size)
    noise = generator(recipe.seed, "cost")
    images = torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8)
    labels = torch.randint(0, data.classes, (count,), generator=noise)
    return ImageSet(images, labels, torch.arange(count), tuple(str(label) for label in range(data.classes)))
