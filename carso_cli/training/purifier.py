"""Train the purifier: Section 4 and Appendix C.

`train_purifier` reads top to bottom: set up, loop over epochs (train, validate, save), final weights. Beyond
the paper, the recipe may choose to train through the whole defence instead, or as well. Every random number
is a function of (seed, purpose, epoch, batch), so a run killed at any moment and resumed ends in the same
weights. The processes that torchrun starts share every batch; the main one writes.
"""

from __future__ import annotations

import math
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carso_cli import __version__
from carso_cli.build import (
    build_classifier,
    build_second_classifier,
    classifier_fingerprint,
    device_for,
    load_images,
    user_classifier,
    with_layers,
)
from carso_cli.classifiers.usable import FEW, check_gradient, warn_at_chance
from carso_cli.data.image_set import ImageSet, balanced_subset, ordered_batches
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.representation import RULE
from carso_cli.distributed.world import join
from carso_cli.io.checksum import fingerprint
from carso_cli.recipe.identity import TRAINING_SECTIONS, recipe_hash
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.checkpoints import save_tensors
from carso_cli.runs.description import describe_environment, describe_run, peak_memory, resumed_limit
from carso_cli.runs.folder import STOPPED, RunFolder
from carso_cli.runtime.reporter import Reporter, shown
from carso_cli.runtime.seed import derive_seed, generator
from carso_cli.training.adversarial_cache import AdversarialCache
from carso_cli.training.balanced_batch import BalancedBatch
from carso_cli.training.checkpoint import Checkpoint, OptimiserTensors, Part
from carso_cli.training.end_to_end import HELD_OUT_STEPS, EndToEnd, perturbed, refuse_trades
from carso_cli.training.followed import followed_on, training_and_followed
from carso_cli.training.optim import kl_weight, learning_rate
from carso_cli.training.purifier_step import (
    TrainingSetup,
    TrainingState,
    initial_state,
    term_names,
    train_step,
)
from carso_cli.training.schedule import (
    check_images,
    keep_beta_of_run,
    rates_of_run,
    warn_of_short_schedule,
)
from carso_cli.training.selection import best_epoch, refuse_blind_choice

_PICTURED = 8
"""Images that are shown with their reconstructions after each epoch."""


def train_purifier(
    recipe: Recipe,
    *,
    run: str | Path | None = None,
    reporter: Reporter | None = None,
    resume: bool = False,
    device: str = "auto",
    limit: int | None = None,
    classifier: nn.Module | None = None,
    images: ImageSet | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Train the recipe's purifier into a run folder.

    Args:
        recipe: The resolved recipe.
        run: Run folder; the recipe's own when None.
        reporter: Where progress goes; shown on the terminal or in the notebook when None.
        resume: Continue from the folder's saved state.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        limit: Train on this many images only, class-balanced.
        classifier: The classifier, when it is a module of your own; the recipe's otherwise.
        images: Training images, of which the held-out ones are taken; those of the recipe's data when None.
        seconds: Take no epoch more that would end later than this from now; the first is always taken.

    Returns:
        The metrics of the epoch that is kept, with `run`, and `seconds_total` over all epochs.

    Raises:
        UsageError: If the folder holds a run and `resume` is not given.
        RecipeError: If the classifier does not fit the images, or no training is possible as described.
        WeightsError: If the classifier or the purifier to start from is missing or does not fit.
        StateError: If the saved state belongs to another recipe or classifier, or is damaged.
        NumericsError: If the loss stops being finite, naming the term.
        InterruptedRun: On Ctrl-C or SIGTERM; the state after the last step is saved.
    """
    refuse_trades(recipe)
    world = join(device_for(recipe, device), reporter := shown(reporter))
    folder, reporter = RunFolder(Path(run or recipe.run_folder)), world.reporter(reporter)
    # After a crash torchrun repeats the first command, which has no --resume.
    resume = world.on_main(lambda: folder.check(resume=resume, restarted=world.restarted))
    ends = math.inf if seconds is None else time.monotonic() + seconds
    refuse_blind_choice(recipe, resume=resume)
    if resume:
        recipe = keep_beta_of_run(recipe, folder)
        limit = world.on_main(lambda: resumed_limit(folder, recipe, limit))
    setup = _set_up(recipe, world.device, limit, reporter, classifier, images)
    # With the layers that `auto` stands for, which the run stores.
    recipe, state, rates = setup.recipe, initial_state(setup), rates_of_run(setup.recipe, None)
    checkpoint = _checkpoint(folder, setup, state, rates)
    # Not before weights and images are there: a command that cannot start leaves nothing behind.
    with world.main_holds(lambda: folder.claimed(resume=resume, reporter=reporter)):
        header = checkpoint.load(reporter) if resume else None
        # Interrupted before its first state, a run has no header and starts from step 0.
        state.lookahead.taken = header["steps"] if header else 0
        rates |= rates_of_run(recipe, header)
        environment = describe_environment(setup.device, classes=list(setup.train.classes), limit=limit)
        world.on_main(lambda: describe_run(folder, recipe, environment, reporter))
        with checkpoint.interruptible():
            # The first of them may be the epoch in progress, of which only the rest is trained.
            while not checkpoint.ended:
                _take_epoch(setup, state, checkpoint, rates, ends)
        checkpoint.finish(folder.purifier, lambda: _save_purifier(folder, setup, state, checkpoint))
    kept = checkpoint.metrics[best_epoch(checkpoint.metrics) if recipe.training.keep == "best" else -1]
    return {**kept, "run": str(folder.path), "seconds_total": checkpoint.seconds}


def _take_epoch(
    setup: TrainingSetup, state: TrainingState, checkpoint: Checkpoint, rates: dict[str, Any], ends: float
) -> None:
    """Train and validate what is left of an epoch; say so in its metrics if there is no time for another."""
    began, epoch = time.monotonic(), checkpoint.epochs_done
    metrics = _train_epoch(setup, state, checkpoint, epoch, learning_rate(epoch, **rates))
    metrics |= _validate(setup, state, (epoch + 1) * checkpoint.open.batches)
    if best_epoch([*checkpoint.metrics, metrics]) == epoch:
        state.best.tensors = state.slow_purifier().state_dict()
    late = 2 * time.monotonic() - began > ends
    # The processes agree on it, or some would wait for the others' gradients.
    checkpoint.finish_epoch(metrics | ({STOPPED: True} if setup.world.any(late) else {}))


def _set_up(
    recipe: Recipe,
    device: torch.device,
    limit: int | None,
    reporter: Reporter,
    classifier: nn.Module | None,
    images: ImageSet | None,
) -> TrainingSetup:
    frozen = (
        # The one whose layers are read; Appendix D may classify reconstructions by another.
        build_classifier(recipe, recipe.representation.kind)
        if classifier is None
        else user_classifier(classifier, recipe)
    )
    frozen = frozen.to(device)
    recipe = with_layers(recipe, frozen)
    # Those of libraries and our own have gradients; code of a user may have none.
    if classifier is not None or recipe.classifier.family == "external":
        check_gradient(frozen, channels=recipe.data.channels, image_size=recipe.data.image_size)
    with join(device).local_main_first():
        if images is None:
            images = load_images(recipe, "train", limit=limit, reporter=reporter)
        elif limit is not None:
            images = balanced_subset(images, limit, recipe.seed)
        train, held_out = training_and_followed(recipe, images, reporter)
    check_images(len(train))
    few = train.some(FEW)
    pixels = few.pixels(slice(None)).to(device)
    warn_at_chance(frozen, pixels, few.labels, len(few.classes), reporter)
    perturb = BalancedBatch(recipe, frozen, reporter)
    # The defence under attack changes with every step: examples against it are not reused.
    cache = AdversarialCache(recipe.training.attack_mix.reuse if recipe.training.objective == "elbo" else 1)
    second = build_second_classifier(recipe, device)
    warn_of_short_schedule(recipe, len(train), reporter)
    return TrainingSetup(recipe, frozen, train.to(device), held_out, perturb, cache, device, reporter, second)


def _checkpoint(
    folder: RunFolder, setup: TrainingSetup, state: TrainingState, rates: dict[str, Any]
) -> Checkpoint:
    """Return the run's checkpoint: what is saved, and by what the run is recognised when it is resumed."""
    recipe, second = setup.recipe, setup.second_classifier
    start = recipe.training.initial
    identity = {
        "recipe": recipe_hash(recipe, sections=TRAINING_SECTIONS),
        "classifier": classifier_fingerprint(setup.classifier),
        "images": setup.train.fingerprint(),
        # By content: the path is left out of the recipe's hash.
        "initial": None if start is None else fingerprint(state.purifier.state_dict()),
    }
    if recipe.training.objective != "elbo":
        # They lie outside of the hashed sections, and are trained through here.
        identity |= {
            "aggregation": recipe.evaluation.aggregation,
            "second_classifier": None if second is None else classifier_fingerprint(second),
        }
    parts: dict[str, Part] = {
        "fast": state.purifier,
        "slow": state.lookahead,
        "optimiser": OptimiserTensors(state.optimiser, state.purifier),
    }
    if state.average is not None:
        parts["average"] = state.average
    if recipe.training.keep == "best":
        parts["best"] = state.best
    return Checkpoint(
        folder,
        setup.world,
        identity,
        parts,
        epochs=recipe.training.epochs,
        command=f"carso train-purifier {shlex.quote(str(folder.recipe))}",
        minutes=recipe.training.save_every_minutes,
        reporter=setup.reporter,
        details=lambda: {"steps": state.lookahead.taken, "learning_rate": rates},
    )


def _train_epoch(
    setup: TrainingSetup, state: TrainingState, checkpoint: Checkpoint, epoch: int, rate: float
) -> dict[str, Any]:
    """Train what is left of an epoch; return its metrics, losses as means over all of its images."""
    training, names = setup.recipe.training, term_names(setup.recipe)
    beta = kl_weight(epoch, **training.beta_increase.model_dump())
    for group in state.optimiser.param_groups:
        # Set again in every epoch: a resumed run needs no state of a scheduler.
        group["lr"] = rate
    # Through the defence, batch normalisation keeps its statistics: see `end_to_end`.
    state.purifier.train(training.objective == "elbo")
    batches = setup.cache.batches(len(setup.train), training.batch_size, setup.recipe.seed, epoch)
    sizes = [len(positions) for positions, _ in batches]
    # A resumed epoch goes on from the batches, sums and seconds of its first part.
    done = checkpoint.open
    sums = torch.tensor(done.sums or (0.0,) * len(names), dtype=torch.float64)
    seen, started = sum(sizes[: done.batches]), time.perf_counter() - done.seconds
    with setup.reporter.progress(f"epoch {epoch + 1}/{training.epochs}", sum(sizes)) as progress:
        if seen:
            progress.advance(seen)
        for number in range(done.batches, len(batches)):
            positions, perturbed_at = batches[number]
            step = train_step(setup, state, positions, (epoch, number), beta, perturbed_at)
            sums, seen = sums + step, seen + sizes[number]
            progress.advance(sizes[number], loss=sums[0].item() / seen)
            measured = {
                f"step/{name}": value / sizes[number]
                for name, value in zip(names, step.tolist(), strict=True)
            }
            setup.reporter.measured(measured, epoch * len(batches) + number + 1)
            checkpoint.finish_batch(number + 1, sums, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    return {
        "epoch": epoch,
        **dict(zip(names, (sums / seen).tolist(), strict=True)),
        **({"beta": beta} if "kl" in names else {}),
        "learning_rate": rate,
        "images": seen,
        "seconds": seconds,
        "images_per_second": seen / seconds,
        "peak_memory_bytes": peak_memory(setup.device),
    }


def _validate(setup: TrainingSetup, state: TrainingState, step: int) -> dict[str, Any]:
    """Return accuracies of the defence with the slow weights on the followed images; None without any.

    Clean, and where training goes through the defence also under its attack, of `HELD_OUT_STEPS` steps. Some
    of the images are shown with their reconstructions, as they are after `step` steps.
    """
    recipe, count = setup.recipe, len(setup.held_out)
    attacked = ("defence_attacked_accuracy",) if isinstance(state.trained, EndToEnd) else ()
    names = ("defence_clean_accuracy", *attacked)
    if count == 0:
        return {**dict.fromkeys(names), **_followed(recipe, 0)}
    defence = Defence(
        setup.classifier,
        state.slow_purifier(),
        recipe.representation.layers,
        n_samples=recipe.evaluation.n_samples,
        aggregation=recipe.evaluation.aggregation,
        second_classifier=setup.second_classifier,
        precision=recipe.precision,
    )
    correct = torch.zeros(len(names), dtype=torch.float64)
    parts = list(enumerate(ordered_batches(count, recipe.evaluation.batch_size)))
    for number, part in parts[setup.world.shard(len(parts))]:
        images, labels = setup.held_out.pixels(part).to(setup.device), setup.held_out.labels[part]
        # Clean first: the attack replaces the images.
        for place, name in enumerate(names):
            if name in attacked:
                # Without the epoch: from one epoch to the next only the weights differ.
                seed = derive_seed(recipe.seed, "held-out attack", number)
                images = perturbed(recipe, defence, images, labels.to(setup.device), seed, HELD_OUT_STEPS)
            latents = defence.draw_latents(len(images), generator=generator(recipe.seed, "held out", number))
            with torch.no_grad():
                # The argmax of the exact view has no ties where log P saturates.
                predicted = defence(images, latents=latents, view="exact").argmax(dim=1).cpu()
            correct[place] += (predicted == labels).sum()
    setup.reporter.pictured("reconstructions", lambda: _reconstructions(setup, defence), step)
    accuracies = (setup.world.sum(correct) / count).tolist()
    return {**dict(zip(names, accuracies, strict=True)), **_followed(recipe, count)}


def _reconstructions(setup: TrainingSetup, defence: Defence) -> Tensor:
    """Return followed images side by side, and below each its reconstruction: (channels, 2 H, B W)."""
    images = setup.held_out.pixels(slice(0, _PICTURED)).to(setup.device)
    latents = defence.draw_latents(len(images), 1, generator(setup.recipe.seed, "held out", 0))
    with torch.no_grad():
        rows = torch.stack((images, defence.purify(images, latents=latents)[:, 0]))
    return rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def _followed(recipe: Recipe, count: int) -> dict[str, Any]:
    source = followed_on(recipe)
    held_out = {"held_out_images": count if source == "held-out" else 0}
    # Only where nothing is held out: lines of metrics keep the keys that they had.
    return held_out if source == "held-out" else {**held_out, "followed_on": source, "followed_images": count}


def _save_purifier(
    folder: RunFolder, setup: TrainingSetup, state: TrainingState, checkpoint: Checkpoint
) -> None:
    metadata = {
        # With the classifier's fingerprint, by which `load_purifier` refuses another classifier.
        **checkpoint.identity,
        "objective": setup.recipe.training.objective,
        "recipe_name": setup.recipe.name,
        "layers": list(setup.recipe.representation.layers),
        "representation": RULE,
        "epochs": checkpoint.epochs_done,
        "step": state.lookahead.taken,
        "version": __version__,
    }
    best = setup.recipe.training.keep == "best"
    tensors = state.best.tensors if best else state.slow_purifier().state_dict()
    save_tensors(folder.purifier, tensors, metadata)
