"""Train the purifier: Section 4 and Appendix C, on adversarially-balanced batches.

Beyond the paper, the recipe may choose to train it through the whole defence instead, or as well.

`train_purifier` reads top to bottom: set up, epochs (train, follow the defence's clean accuracy on
held-out images, save), final weights. Every random number is a function of (seed, purpose, epoch, batch),
so a run killed at any moment and resumed ends in the same weights. The processes that torchrun starts share
every batch; the main one writes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from carso_cli import __version__
from carso_cli.build import (
    build_classifier,
    build_second_classifier,
    device_for,
    load_images,
    own_classifier,
)
from carso_cli.data.image_set import epoch_batches, ordered_batches, split_holdout
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.vae import Purifier
from carso_cli.distributed.world import join
from carso_cli.errors import InterruptedRun
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.checkpoints import save_tensors
from carso_cli.runs.description import describe_run
from carso_cli.runs.environment import describe_environment, peak_memory
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import SILENT, Reporter
from carso_cli.runtime.seed import derive_seed, generator
from carso_cli.runtime.signals import StopRequest, stop_requests
from carso_cli.training.adversarial_cache import AdversarialCache
from carso_cli.training.checkpoint import StopTraining
from carso_cli.training.end_to_end import HELD_OUT_STEPS, EndToEnd, perturbed
from carso_cli.training.purifier_state import TrainingState
from carso_cli.training.purifier_step import (
    TrainingSetup,
    balanced_batch,
    figures,
    initial_state,
    train_step,
)
from carso_cli.training.schedules import kl_weight, learning_rate

_UNRECTIFIED_STEPS = 5
"""RAdam's first steps at beta2 = 0.999, before the variance of its rate is tractable."""


def train_purifier(
    recipe: Recipe,
    *,
    run: str | Path | None = None,
    reporter: Reporter = SILENT,
    resume: bool = False,
    device: str = "auto",
    limit: int | None = None,
    classifier: nn.Module | None = None,
) -> dict[str, Any]:
    """Train the recipe's purifier into a run folder.

    Args:
        recipe: The resolved recipe.
        run: Run folder; the recipe's own when None.
        reporter: Where progress goes.
        resume: Go on from the folder's saved state.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        limit: Train on this many images only, class-balanced.
        classifier: The classifier, when it is a module of your own; the recipe's otherwise.

    Returns:
        The last epoch's metrics, with `run`, `seconds` over all epochs and `peak_memory_bytes`.

    Raises:
        UsageError: If the folder holds a run and `resume` is not given.
        RecipeError: If the given classifier does not take the recipe's images or know its classes.
        StateError: If the saved state belongs to another recipe or classifier, or is damaged.
        NumericsError: If the loss stops being finite, naming the term.
        InterruptedRun: On Ctrl-C or SIGTERM; the state after the last step is saved.
    """
    folder, world = RunFolder(Path(run or recipe.run_folder)), join(device_for(recipe, device))
    reporter = world.reporter(reporter)
    resume = world.on_main(lambda: folder.check(resume=resume, restarted=world.restarted))
    setup = _set_up(recipe, world.device, limit, reporter, classifier)
    _check_warmup(setup)
    state = initial_state(setup)
    # Not before weights and images are there: a command that cannot start leaves nothing behind.
    with world.main_holds(lambda: folder.claimed(resume=resume, reporter=reporter)):
        if resume:
            state.load(folder, reporter)
        environment = {**describe_environment(setup.device), "classes": list(setup.train.classes)}
        world.on_main(lambda: describe_run(folder, recipe, environment, reporter))
        _train_epochs(folder, setup, state)
        state.save(folder)
        world.on_main(lambda: _save_purifier(folder, setup, state))
    return {**state.last_metrics, "run": str(folder.path), "seconds_total": state.seconds}


def _train_epochs(folder: RunFolder, setup: TrainingSetup, state: TrainingState) -> None:
    training = setup.recipe.training
    try:
        with stop_requests() as stop:
            for epoch in range(state.epochs_done, training.epochs):
                try:
                    metrics = _train_epoch(setup, state, epoch, stop) | _follow(setup, state)
                except StopTraining:
                    state.save(folder)
                    raise
                state.finish_epoch(folder, metrics)
                if state.epochs_done % training.save_every_epochs == 0:
                    state.save(folder)
    except (StopTraining, KeyboardInterrupt):
        raise InterruptedRun(
            f"stopped; {state.describe_saved(training.epochs)} in {folder.path}",
            hint=f"go on with: carso train-purifier {folder.recipe} --run {folder.path} --resume",
        ) from None


def _set_up(
    recipe: Recipe, device: torch.device, limit: int | None, reporter: Reporter, classifier: nn.Module | None
) -> TrainingSetup:
    frozen = (
        build_classifier(recipe, recipe.representation.kind)
        if classifier is None
        else own_classifier(classifier, recipe)
    )
    frozen = frozen.to(device)
    with join(device).local_main_first():
        images = load_images(recipe, "train", limit=limit, reporter=reporter)
    train, held_out = split_holdout(images, recipe.data.holdout, recipe.seed)
    perturb = balanced_batch(recipe, frozen, reporter)
    through = recipe.training.objective != "elbo"
    # The defence under attack changes with every step: nothing that was made against it is kept.
    pool = AdversarialCache(1 if through else recipe.training.attack_mix.reuse)
    second = build_second_classifier(recipe, device)
    return TrainingSetup(recipe, frozen, train.to(device), held_out, perturb, pool, device, reporter, second)


def _check_warmup(setup: TrainingSetup) -> None:
    """Warn when the learning rate rises before RAdam rectifies its steps (Liu et al., 2020)."""
    training = setup.recipe.training
    batches = len(epoch_batches(len(setup.train), training.batch_size, setup.recipe.seed, 0))
    steps = batches * training.learning_rate.warmup_epochs
    if steps < _UNRECTIFIED_STEPS + 1:
        setup.reporter.warning(
            f"the warm-up lasts {steps} optimiser step{'' if steps == 1 else 's'}; below "
            f"{_UNRECTIFIED_STEPS + 1}, RAdam takes plain gradient steps at the full learning rate and may "
            "diverge"
        )


def _train_epoch(setup: TrainingSetup, state: TrainingState, epoch: int, stop: StopRequest) -> dict[str, Any]:
    """Train what is left of an epoch; return its metrics, losses as means over all of its images."""
    training = setup.recipe.training
    rate = learning_rate(epoch, **training.learning_rate.model_dump())
    beta = kl_weight(epoch, **training.beta_increase.model_dump())
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    # Through the defence, batch normalisation keeps its statistics: see `through_defence`.
    state.purifier.train(training.objective == "elbo")
    batches = setup.pool.batches(len(setup.train), training.batch_size, setup.recipe.seed, epoch)
    sizes = [len(positions) for positions, _ in batches]
    names = figures(setup.recipe)
    sums = torch.tensor(state.open.sums or (0.0,) * len(names), dtype=torch.float64)
    seen, started = sum(sizes[: state.open.batches]), time.perf_counter() - state.open.seconds
    title = f"epoch {epoch + 1}/{training.epochs}"
    with setup.reporter.progress(title, sum(sizes)) as progress:
        if seen:
            progress.advance(seen)
        for number in range(state.open.batches, len(batches)):
            positions, perturbations = batches[number]
            sums += train_step(setup, state, positions, (epoch, number), beta, perturbations)
            seen += sizes[number]
            progress.advance(sizes[number], loss=sums[0].item() / seen)
            state.finish_batch(number + 1, sums, time.perf_counter() - started, stop)
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


def _follow(setup: TrainingSetup, state: TrainingState) -> dict[str, Any]:
    """Return accuracies of the defence, slow weights, on the held-out images; None without any.

    Clean, and where training goes through the defence also under its attack, of `HELD_OUT_STEPS` steps.
    """
    recipe = setup.recipe
    names = ["defence_clean_accuracy"]
    if isinstance(state.trained, EndToEnd):
        names.append("defence_attacked_accuracy")
    count = len(setup.held_out)
    if count == 0:
        return {**dict.fromkeys(names), "held_out_images": 0}
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
    for number, part in parts[setup.world.own(len(parts))]:
        images, labels = setup.held_out.pixels(part).to(setup.device), setup.held_out.labels[part]
        for place, name in enumerate(names):
            if name == "defence_attacked_accuracy":
                seed = derive_seed(recipe.seed, "held-out attack", number)
                images = perturbed(recipe, defence, images, labels.to(setup.device), seed, HELD_OUT_STEPS)
            latents = defence.draw_latents(len(images), generator=generator(recipe.seed, "held out", number))
            with torch.no_grad():
                predicted = defence(images, latents=latents, view="exact").argmax(dim=1).cpu()
            correct[place] += (predicted == labels).sum()
    shares = (setup.world.sum(correct) / count).tolist()
    return {**dict(zip(names, shares, strict=True)), "held_out_images": count}


def _save_purifier(folder: RunFolder, setup: TrainingSetup, state: TrainingState) -> None:
    purifier: Purifier = state.slow_purifier()
    metadata = {
        **state.identity,
        "objective": setup.recipe.training.objective,
        "recipe_name": setup.recipe.name,
        "layers": list(setup.recipe.representation.layers),
        "epochs": state.epochs_done,
        "step": state.lookahead.taken,
        "version": __version__,
    }
    save_tensors(folder.purifier, purifier.state_dict(), metadata)
