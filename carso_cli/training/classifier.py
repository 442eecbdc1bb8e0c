"""Train the classifier that a recipe describes, adversarially or on clean images.

SGD with Nesterov momentum and a one-cycle learning rate. Adversarial training perturbs every image by one
step from a random start (`fast`: Wong, Rice and Kolter, 2020; https://arxiv.org/abs/2001.03994) or by PGD
(`pgd`: Madry et al., 2018; https://arxiv.org/abs/1706.06083). Every random number is a function of (seed,
purpose, epoch, batch), so a run that is killed and resumed ends in the same weights.

`train_classifier` trains into a run folder; `initial_state` and `train_step` are its start and its step.
"""

from __future__ import annotations

import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carso_cli import __version__
from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.build import (
    build_classifier,
    channels_last,
    classifier_fingerprint,
    device_for,
    load_images,
    untrained_classifier,
)
from carso_cli.data.augmentation import augment
from carso_cli.data.image_set import ImageSet, epoch_batches, ordered_batches
from carso_cli.distributed.world import World, join
from carso_cli.errors import DataError, NumericsError, RecipeError, UsageError
from carso_cli.recipe.identity import classifier_training_values, recipe_hash
from carso_cli.recipe.schema import Kind, Recipe
from carso_cli.runs.checkpoints import save_tensors
from carso_cli.runs.description import describe_environment, describe_run, resumed_limit
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.nonfinite import find_nonfinite_layer, require_finite_gradients
from carso_cli.runtime.precision import autocast, in_precision, to_float32
from carso_cli.runtime.reporter import Reporter
from carso_cli.runtime.seed import derive_seed, generator, seeded
from carso_cli.training.checkpoint import Checkpoint, OptimiserTensors
from carso_cli.training.followed import followed_on, training_and_followed
from carso_cli.training.mixup import mix_images, mixed_cross_entropy
from carso_cli.training.schedule import classifier_rate

WEIGHTS_FILE = "classifier.safetensors"
HELD_OUT_PGD_STEPS = 10
"""Steps of the PGD on held-out images; each of 2.5 eps / 10."""
_LOWER_RATE = "lower classifier.training.peak_learning_rate; the last saved state stays"


@dataclass(frozen=True)
class ClassifierSetup:
    """What does not change during training."""

    recipe: Recipe
    kind: Kind
    train: ImageSet
    held_out: ImageSet
    device: torch.device
    reporter: Reporter

    @property
    def world(self) -> World:
        """The processes that share the training."""
        return join(self.device)

    @property
    def threat(self) -> ThreatModel:
        """The threat model of adversarial training and of the accuracies on held-out images."""
        return ThreatModel(self.recipe.threat.norm, self.recipe.threat.eps)


@dataclass(frozen=True)
class ClassifierState:
    """What changes during training.

    Args:
        classifier: The module being trained.
        replica: The same, to be called where gradients are summed over all processes.
        optimiser: SGD over its parameters, with Nesterov momentum where there is momentum at all.
    """

    classifier: nn.Module
    replica: nn.Module
    optimiser: torch.optim.SGD


def train_classifier(
    recipe: Recipe,
    kind: Kind,
    *,
    run: str | Path,
    reporter: Reporter,
    resume: bool = False,
    device: str = "auto",
    limit: int | None = None,
) -> dict[str, Any]:
    """Train the recipe's classifier into a run folder.

    The folder receives `classifier.safetensors`, with architecture, kind, perturbation size and accuracies in
    its header, `metrics.jsonl` with one line per epoch, `recipe.yaml`, and the state to resume from.

    Args:
        recipe: The resolved recipe; `classifier.training` says how to train.
        kind: `at` for adversarial training at the recipe's threat model, `clean` for clean images.
        run: Run folder.
        reporter: Where progress goes.
        resume: Continue from the folder's saved state.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        limit: Train on this many images only, class-balanced.

    Returns:
        The last epoch's metrics, with `run`, `weights` (the file) and `seconds_total` over all epochs.

    Raises:
        UsageError: If the recipe's classifier is no WideResNet, or the folder already holds a run.
        RecipeError, WeightsError: If the weights to start from do not fit; see `initial_classifier`.
        DataError: If fewer than two images are left to train on.
        StateError: If the saved state belongs to another configuration, or is damaged.
        NumericsError: If the loss stops being finite, naming epoch and batch.
        InterruptedRun: On Ctrl-C or SIGTERM; the state after the last step is saved.
    """
    folder, world = RunFolder(Path(run)), join(device_for(recipe, device), reporter)
    reporter = world.reporter(reporter)
    # Before the folder is claimed: a command that cannot start leaves nothing behind.
    classifier = initial_classifier(recipe).to(world.device)
    # After a crash torchrun repeats the first command, which has no --resume.
    resume = world.on_main(lambda: folder.check(resume=resume, restarted=world.restarted))
    limit = world.on_main(lambda: resumed_limit(folder, recipe, limit, kind)) if resume else limit
    with world.local_main_first():
        images = load_images(recipe, "train", limit=limit, reporter=reporter)
        train, held_out = training_and_followed(recipe, images, reporter)
    if len(train) < 2:
        raise DataError(f"{len(train)} training images are too few: batch normalisation needs at least 2")
    # Images and their augmentation stay on the device.
    setup = ClassifierSetup(recipe, kind, train.to(world.device), held_out, world.device, reporter)
    state = initial_state(setup, classifier)
    checkpoint = _checkpoint(folder, setup, state)
    with world.main_holds(lambda: folder.claimed(resume=resume, reporter=reporter)):
        # After the state is built, because its tensors are filled in place.
        if resume:
            checkpoint.load(reporter)
        environment = describe_environment(world.device, limit=limit)
        world.on_main(lambda: describe_run(folder, recipe, environment, reporter))
        with checkpoint.interruptible():
            for epoch in range(checkpoint.epochs_done, recipe.classifier.training.epochs):
                metrics = _train_epoch(setup, state, checkpoint, epoch)
                checkpoint.finish_epoch(metrics | _validate(setup, state.classifier))
        file, about, last = folder.path / WEIGHTS_FILE, _describe(setup, checkpoint), checkpoint.metrics[-1]
        checkpoint.finish(file, lambda: save_tensors(file, classifier.state_dict(), about))
    return {**last, "run": str(run), "weights": str(file), "seconds_total": checkpoint.seconds}


def initial_classifier(recipe: Recipe) -> nn.Module:
    """Build the recipe's WideResNet with the weights that training starts from.

    They are drawn by the recipe's seed, or those that `classifier.training.initial` names.

    Raises:
        UsageError: If the recipe's classifier is no WideResNet.
        RecipeError: If the named weights belong to images standardised in another way.
        WeightsError: If they are missing, damaged or of another architecture.
    """
    if recipe.classifier.family != "wide-resnet":
        raise UsageError(
            f"recipe '{recipe.name}' has a classifier of family '{recipe.classifier.family}'; "
            "carso trains WideResNets only",
            hint="set classifier.family to wide-resnet, or train your module with your own code",
        )
    # torch draws initial weights from its global generator only.
    with seeded(recipe.seed, "classifier weights"):
        classifier = channels_last(untrained_classifier(recipe))
    kind = recipe.classifier.training.initial
    if kind is not None:
        given = build_classifier(recipe, kind)
        for name, expected in classifier.named_buffers():
            # They are in no state dict, and others would change what the same weights compute.
            if name in ("mean", "std") and not torch.allclose(given.get_buffer(name), expected):
                raise RecipeError(
                    f"the weights of classifier.{kind} go with another {name} than data.{name}",
                    hint=f"give data.{name} the values {given.get_buffer(name).flatten().tolist()}",
                )
        classifier.load_state_dict(given.state_dict())
    return classifier


def initial_state(setup: ClassifierSetup, classifier: nn.Module) -> ClassifierState:
    """Return a classifier on the setup's device with a fresh optimiser."""
    section = setup.recipe.classifier.training
    # Before optimiser and DDP see the module: layers are replaced, their parameters stay.
    setup.world.sync_batch_norm(classifier)
    optimiser = torch.optim.SGD(
        classifier.parameters(),
        lr=section.peak_learning_rate,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        # torch refuses Nesterov without momentum.
        nesterov=section.momentum > 0,
    )
    return ClassifierState(classifier, setup.world.data_parallel(classifier), optimiser)


def _checkpoint(folder: RunFolder, setup: ClassifierSetup, state: ClassifierState) -> Checkpoint:
    """Return the run's checkpoint: what is saved, and by what the run is recognised when it is resumed."""
    section = setup.recipe.classifier
    # By content, not by path: the file may move, or change under its name.
    initial = None if section.training.initial is None else classifier_fingerprint(state.classifier)
    identity = {
        "recipe": recipe_hash(setup.recipe, ("data", "threat", "seed", "precision")),
        "architecture": [section.depth, section.width, section.activation],
        "training": classifier_training_values(section.training),
        "kind": setup.kind,
        "images": setup.train.fingerprint(),
        "initial": initial,
    }
    momentum = OptimiserTensors(state.optimiser, state.classifier, sole="momentum_buffer")
    return Checkpoint(
        folder,
        setup.world,
        identity,
        {"weights": state.classifier, "momentum": momentum},
        epochs=section.training.epochs,
        command=f"carso train-classifier {shlex.quote(str(folder.recipe))} --kind {setup.kind}",
        minutes=setup.recipe.training.save_every_minutes,
        reporter=setup.reporter,
    )


def _train_epoch(
    setup: ClassifierSetup, state: ClassifierState, checkpoint: Checkpoint, epoch: int
) -> dict[str, Any]:
    """Train what is left of an epoch; return its metrics, loss and accuracy as means over all its images."""
    section = setup.recipe.classifier.training
    batches = epoch_batches(len(setup.train), section.batch_size, setup.recipe.seed, epoch)

    def rate(number: int) -> float:
        # A function of the step alone: a resumed run needs no state of a scheduler.
        step, steps = epoch * len(batches) + number, section.epochs * len(batches)
        return classifier_rate(section, step, steps)

    # A resumed epoch goes on from the batches, sums and seconds of its first part.
    done = checkpoint.open
    sums = torch.tensor(done.sums or (0.0,) * 2, dtype=torch.float64)
    seen, started = sum(map(len, batches[: done.batches])), time.perf_counter() - done.seconds
    # Validation leaves it in evaluation mode.
    state.classifier.train()
    with setup.reporter.progress(f"epoch {epoch + 1}/{section.epochs}", sum(map(len, batches))) as progress:
        if seen:
            progress.advance(seen)
        for number in range(done.batches, len(batches)):
            for group in state.optimiser.param_groups:
                group["lr"] = rate(number)
            step, size = train_step(setup, state, batches[number], (epoch, number)), len(batches[number])
            sums, seen = sums + step, seen + size
            progress.advance(size, loss=sums[0].item() / seen)
            setup.reporter.measured({"step/loss": step[0].item() / size}, epoch * len(batches) + number + 1)
            checkpoint.finish_batch(number + 1, sums, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    loss, accuracy = (sums / seen).tolist()
    return {
        "epoch": epoch,
        "loss": loss,
        "train_accuracy": accuracy,
        "learning_rate": rate(len(batches) - 1),
        "images": seen,
        "seconds": seconds,
        "images_per_second": seen / seconds,
    }


def train_step(
    setup: ClassifierSetup, state: ClassifierState, positions: Tensor, place: tuple[int, int]
) -> Tensor:
    """Take one optimiser step on one batch, perturbed first for kind `at`.

    Args:
        setup: What does not change.
        state: Classifier, in training mode, and optimiser.
        positions: Positions of the batch's images in the training set, int64 (B,); each process takes its
            shard.
        place: Epoch and batch; every random choice of the step depends on them alone.

    Returns:
        Summed (loss, correct answers) of the whole batch, float64 (2,), on the CPU.

    Raises:
        NumericsError: If loss or a gradient is not finite, naming the layer or parameter.
    """
    section, seed = setup.recipe.classifier.training, setup.recipe.seed
    shard = setup.world.shard(len(positions))
    images = setup.train.pixels(positions)
    # The whole batch, before it is cut into shards: the choices then do not depend on their number.
    if section.augment:
        images = augment(images, flip=section.flip, generator=generator(seed, "augmentation", *place))
    every = setup.train.labels[positions].to(setup.device)
    labels, partners, share = every[shard], every, 0.0
    # Not the replica: DDP expects a backward pass over the weights after each forward.
    model = in_precision(state.classifier, setup.recipe.precision)
    if setup.kind == "at":
        attack = training_attack(setup, derive_seed(seed, "training attack", *place))
        # Starts are drawn for the whole batch, so that an image's does not depend on its shard.
        start, images = attack.start(images)[shard], images[shard]
        # In training mode, as published: the attack sees the batch statistics that the step will see.
        images = attack.run_from(start, model, images, labels)
    else:
        # Before the shards too, since the two images of a mixture may lie in different ones.
        mixing = derive_seed(seed, "mixup", *place)
        images, partners, share = mix_images(images, every, section.mixup, mixing)
        images = images[shard]
    with autocast(setup.recipe.precision, setup.device):
        logits = to_float32(state.replica(images))
    # Gradients are summed over processes, so each has its images' part of the mean over the whole batch.
    loss = mixed_cross_entropy(logits, labels, partners[shard], share, section.label_smoothing)
    correct = (logits.argmax(dim=1) == labels).sum()
    # Every process gets the same bits, so that all of them stop below, or none.
    sums = setup.world.sum(torch.stack((loss.detach(), correct)).double().cpu())
    value = sums[0].item() / len(positions)
    if not math.isfinite(value):
        # All processes come here together: in training mode the pass synchronises batch statistics.
        where = find_nonfinite_layer(state.classifier, lambda: model(images))
        raise NumericsError(
            f"the loss became {value} in epoch {place[0] + 1}, batch {place[1] + 1}{where}; training stops",
            hint=_LOWER_RATE,
        )
    state.optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss / len(positions))
    # Before the step: a NaN would stay in the momentum.
    require_finite_gradients(state.classifier, place, _LOWER_RATE)
    state.optimiser.step()
    return sums


def training_attack(setup: ClassifierSetup, seed: int) -> PGD:
    """Return the attack of one training step; its last point is trained on, whether it fools or not."""
    section, eps = setup.recipe.classifier.training, setup.recipe.threat.eps
    steps = 1 if section.method == "fast" else section.steps
    # Wong et al. (2020) for one step, Madry et al. (2018) for several.
    default = 1.25 * eps if section.method == "fast" else 2.5 * eps / steps
    size = default if section.step_size is None else section.step_size
    return PGD(setup.threat, steps=steps, step_size=size, random_start=True, seed=seed, keep_best=False)


def _validate(setup: ClassifierSetup, classifier: nn.Module) -> dict[str, Any]:
    """Return accuracies on the followed images, clean and under PGD; None without any."""
    count = len(setup.held_out)
    if count == 0:
        return {"clean_accuracy": None, "pgd_accuracy": None}
    step_size = 2.5 * setup.recipe.threat.eps / HELD_OUT_PGD_STEPS
    classifier.eval()
    model = in_precision(classifier, setup.recipe.precision)
    correct = torch.zeros(2, dtype=torch.float64)
    parts = list(enumerate(ordered_batches(count, setup.recipe.evaluation.batch_size)))
    # Whole batches are shared out: an image's start depends on its place in the batch.
    for number, part in parts[setup.world.shard(len(parts))]:
        images = setup.held_out.pixels(part).to(setup.device)
        labels = setup.held_out.labels[part].to(setup.device)
        # Without the epoch: from one epoch to the next only the weights differ.
        seed = derive_seed(setup.recipe.seed, "held-out attack", number)
        attack = PGD(setup.threat, steps=HELD_OUT_PGD_STEPS, step_size=step_size, seed=seed)
        for place, seen in enumerate((images, attack(model, images, labels))):
            correct[place] += (model(seen).argmax(dim=1) == labels).sum().cpu()
    clean, attacked = (setup.world.sum(correct) / count).tolist()
    source = followed_on(setup.recipe)
    followed = {"held_out_images": count} if source == "held-out" else {"followed_on": source}
    return {"clean_accuracy": clean, "pgd_accuracy": attacked, **followed}


def _describe(setup: ClassifierSetup, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the header of the trained weights."""
    recipe, section = setup.recipe, setup.recipe.classifier
    last = checkpoint.metrics[-1] if followed_on(recipe) == "held-out" else {}
    return {
        "architecture": f"wide-resnet-{section.depth}-{section.width}",
        "activation": section.activation,
        "classes": recipe.data.classes,
        "channels": recipe.data.channels,
        "mean": list(recipe.data.mean),
        "std": list(recipe.data.std),
        "kind": setup.kind,
        "recipe_name": recipe.name,
        # A classifier trained on clean images belongs to no threat model.
        "norm": recipe.threat.norm if setup.kind == "at" else None,
        "eps": recipe.threat.eps if setup.kind == "at" else None,
        "epochs": checkpoint.epochs_done,
        "initial": checkpoint.identity["initial"],
        "images": len(setup.train),
        "seed": recipe.seed,
        "held_out_clean_accuracy": last.get("clean_accuracy"),
        "held_out_pgd_accuracy": last.get("pgd_accuracy"),
        "version": __version__,
    }
