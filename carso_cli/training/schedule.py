"""The learning rates of one training, those that a resumed one began with, and warnings about short ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carso_cli.data.image_set import epoch_batches
from carso_cli.errors import DataError
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import ClassifierTraining, Recipe
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter
from carso_cli.training.optim import learning_rate, one_cycle_rate

_UNRECTIFIED_STEPS = 5
"""RAdam's first steps at beta2 = 0.999, before the variance of its rate is tractable."""


def rates_of_run(recipe: Recipe, header: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of `learning_rate` for a training: the recipe's, or those that it began with.

    Args:
        recipe: The recipe.
        header: That of the state to resume from; None for a new training.
    """
    rates: dict[str, Any] = recipe.training.learning_rate.model_dump()
    if header is None or "learning_rate" in header:
        return dict(header["learning_rate"]) if header else rates
    # States without it are of versions whose annealing began one epoch earlier, in as many epochs.
    plateau, annealing = rates["plateau_epochs"] - 1, rates["annealing_epochs"] + 1
    return rates | {"plateau_epochs": plateau, "annealing_epochs": annealing} if annealing > 1 else rates


def keep_beta_of_run(recipe: Recipe, folder: RunFolder) -> Recipe:
    """Return the recipe with the beta of the run to resume, where that was scaled to a ramp of no epoch."""
    if not folder.recipe.is_file():
        return recipe
    stored = load_recipe(str(folder.recipe.resolve())).training.beta_increase
    asked = recipe.training.beta_increase
    if stored.first_epoch != stored.last_epoch or asked.first_epoch != stored.first_epoch:
        return recipe
    if asked.last_epoch != stored.last_epoch + 1:
        return recipe
    return recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"beta_increase": stored})}
    )


def classifier_rate(section: ClassifierTraining, step: int, steps: int) -> float:
    """Return the classifier's learning rate at a step of so many."""
    return one_cycle_rate(
        step,
        steps,
        peak=section.peak_learning_rate,
        warmup_share=section.warmup_share,
        initial=section.initial_learning_rate,
        final=section.final_learning_rate,
        cosine=section.schedule == "cosine",
    )


def check_images(images: int) -> None:
    """Refuse a training that would have no batch: a last batch of one image is dropped.

    Raises:
        DataError: If fewer than two images are left to train on.
    """
    if images < 2:
        raise DataError(
            f"{images} training image{'s' * (images != 1)} left: batch normalisation needs at least 2",
            hint="give more images: a larger --limit or data.train_limit, or a smaller data.holdout",
        )


def warn_of_short_schedule(recipe: Recipe, images: int, reporter: Reporter) -> None:
    """Warn when the learning rate never gets near its plateau, or rises before RAdam is rectified."""
    training = recipe.training
    section = training.learning_rate
    rates = [learning_rate(epoch, **section.model_dump()) for epoch in range(training.epochs)]
    if max(rates) < section.plateau / 2:
        # The first epoch after the warm-up has the plateau's rate, if another one follows for the final one.
        reporter.warning(
            f"in {training.epochs} epoch{'s' * (training.epochs > 1)} the learning rate reaches "
            f"{max(rates):.3g}, not its plateau of {section.plateau:.3g}: the purifier would hardly train; "
            f"the smallest useful number is training.epochs={section.warmup_epochs + 2}"
        )
    # Counted, not divided: a last batch of one image is dropped.
    batches = len(epoch_batches(images, training.batch_size, recipe.seed, 0))
    # Liu et al. (2020): without the rectification's term RAdam is plain gradient descent.
    steps = batches * section.warmup_epochs
    if steps < _UNRECTIFIED_STEPS + 1:
        reporter.warning(
            f"the warm-up lasts {steps} optimiser step{'' if steps == 1 else 's'}; below "
            f"{_UNRECTIFIED_STEPS + 1}, RAdam takes plain gradient steps at the full learning rate and may "
            "diverge"
        )
