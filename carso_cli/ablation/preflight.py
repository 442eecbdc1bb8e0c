"""What an ablation would train and evaluate, and about how long it would take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from carso_cli.ablation.run import check_run, own_options, trained_recipes, variant_options
from carso_cli.ablation.variants import Ablation, Variant
from carso_cli.build import build_classifier, build_purifier, load_images, untrained_classifier
from carso_cli.defence.defended_model import Defence
from carso_cli.errors import DataError, MissingError, RecipeError
from carso_cli.evaluation import preflight as evaluation_cost
from carso_cli.evaluation.setup import EvaluationOptions, prepare_evaluation
from carso_cli.io.download import fetch_command, offline
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.reporter import Reporter
from carso_cli.training import preflight as purifier_cost


@offline()
def plan_ablation(
    recipe: Recipe, ablation: Ablation, *, run: Path, reporter: Reporter, options: EvaluationOptions
) -> dict[str, Any]:
    """Predict an ablation's work without training, attacking or downloading; arguments are those of `ablate`.

    Returns:
        `ablation`, `steps` (`step`, `what`, `state`, `seconds`: 0 where it is done, None where unknown),
        `seconds` in all, an upper bound but for transferred examples, and `missing`: what keeps it from
        running.
    """
    steps: list[dict[str, Any]] = []
    # Variants of the same sizes take the same time, which is measured once.
    speeds: dict[tuple[object, ...], float | None] = {}
    states: dict[Path, str] = {}
    for path, one in trained_recipes(recipe, ablation, run).items():
        # As with --resume: a prediction names what is unfinished and refuses only another configuration.
        states[path] = state = check_run(one, path, resume=True)
        # The two objectives keep their perturbed share in different sections.
        section = one.training.attack_mix if one.training.objective == "elbo" else one.training.adversarial
        mix = (one.representation.layers, section)
        if state != "trained" and mix not in speeds:
            speeds[mix] = purifier_cost.estimate_cost(one, device=options.get("device", "auto"))["seconds"]
        seconds = 0.0 if state == "trained" else speeds[mix]
        steps.append({"step": "train", "what": str(path), "state": state, "seconds": seconds})
    missing = _missing(recipe, ablation)
    try:
        if set(states.values()) != {"trained"}:
            purifier_cost.require_data(recipe)
        # The same for all variants, and loaded once.
        images = load_images(
            recipe, "test", limit=options.get("limit") or recipe.evaluation.images, reporter=reporter
        )
        options = {**options, "images": images}
    except MissingError as error:
        fetching = f"fetch it with: {fetch_command(recipe.reference)}"
        missing.append(f"{error.message} ({error.hint if isinstance(error, DataError) else fetching})")
    own = own_options(recipe, ablation, options, reporter) if options.get("images") else options
    for variant in ablation.variants:
        # Eps 0 is a row of the evaluation before it and costs nothing.
        if variant.eps != 0.0:
            chosen = variant_options(ablation, variant, own)
            # Only a trained run tells its evaluation's folder, whose name hashes the weights.
            loads = not missing and states[variant.run_folder(run)] == "trained"
            steps.append(_evaluation_step(variant, run, reporter, chosen, loads, speeds))
    known = [step["seconds"] for step in steps if step["seconds"] is not None]
    return {
        "ablation": ablation.name,
        "title": ablation.title,
        "steps": steps,
        "seconds": sum(known) if len(known) == len(steps) else None,
        "missing": missing,
    }


def _evaluation_step(
    variant: Variant,
    root: Path,
    reporter: Reporter,
    options: EvaluationOptions,
    loads: bool,
    speeds: dict[tuple[object, ...], float | None],
) -> dict[str, Any]:
    recipe, run, state = variant.recipe, variant.run_folder(root), "missing"
    if loads:
        folder = prepare_evaluation(recipe, run=run, reporter=reporter, **options).folder
        state = "stored" if folder.summary.is_file() else "unfinished" if folder.exists else "missing"
    # What time depends on: eps, rule and training of the second classifier change none of the work.
    key = (recipe.representation.layers, recipe.evaluation.n_samples, options["target"])
    if state != "stored" and not options.get("images"):
        # Without the images of the test split nothing can be measured on them.
        return {"step": "evaluate", "what": variant.label, "state": state, "seconds": None}
    if state != "stored" and key not in speeds:
        # Given as a defence, so that nothing has to be trained or even downloaded to be timed.
        untrained: EvaluationOptions = {**options, "defence": _untrained_defence(recipe)}
        evaluation = prepare_evaluation(recipe, run=run, reporter=reporter, **untrained)
        speeds[key] = evaluation_cost.estimate_cost(evaluation)["seconds"]
    seconds = 0.0 if state == "stored" else speeds[key]
    return {"step": "evaluate", "what": variant.label, "state": state, "seconds": seconds}


def _untrained_defence(recipe: Recipe) -> Defence:
    """Return a defence of the recipe's sizes: time does not depend on weights."""
    # Random weights are drawn from the global generator, which is put back; devices are not used.
    with torch.random.fork_rng(devices=[]):
        classifier = untrained_classifier(recipe).eval().requires_grad_(False)
        purifier = build_purifier(recipe, classifier)
    section = recipe.evaluation
    return Defence(
        classifier,
        purifier,
        recipe.representation.layers,
        n_samples=section.n_samples,
        aggregation=section.aggregation,
    )


def _missing(recipe: Recipe, ablation: Ablation) -> list[str]:
    """Return one sentence for every classifier that cannot be loaded."""
    found = []
    for kind in ablation.kinds:
        try:
            build_classifier(recipe, kind)
        except (MissingError, RecipeError) as error:
            # Collected, so that one dry run names everything that is missing.
            found.append(f"{error.message} ({error.hint})" if error.hint else error.message)
    return found
