"""Run an ablation: train the purifiers that are missing, evaluate every variant, store one table.

    ablation = first_and_second(recipe, [("clean", "at")])
    table = ablate(recipe, ablation, run=Path("runs/digits"), reporter=reporter, attack="pgd-eot", limit=100)
    table["rows"][0]["attacked"]["accuracy"]

Trained purifiers and complete evaluations of the same settings are used again; unfinished ones need `resume`.
Every number in the table comes from records in an evaluation folder, which its row names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from carso_cli.ablation.table import find_figures, make_row, store_table
from carso_cli.ablation.transfer import transfer_to_rules, with_transfers
from carso_cli.ablation.variants import Ablation, Variant
from carso_cli.build import build_classifier, choose_device, load_images
from carso_cli.distributed.world import join
from carso_cli.errors import RESUME, InterruptedRun, StateError, UsageError
from carso_cli.evaluation.run import run_evaluation
from carso_cli.evaluation.setup import EvaluationOptions, prepare_evaluation
from carso_cli.io.json_files import ensure_folder
from carso_cli.recipe.identity import differing_values
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.folder import RunFolder
from carso_cli.runs.lock import locked
from carso_cli.runs.records import EvaluationFolder
from carso_cli.runtime.reporter import Reporter
from carso_cli.training.purifier import train_purifier


def ablate(
    recipe: Recipe,
    ablation: Ablation,
    *,
    run: Path,
    reporter: Reporter,
    resume: bool = False,
    note: str = "",
    **options: Unpack[EvaluationOptions],
) -> dict[str, Any]:
    """Run an ablation.

    Args:
        recipe: The resolved recipe that the ablation was made from.
        ablation: One of `carso_cli.ablation.variants`.
        run: Run folder of the recipe itself; the purifiers of variants lie beside it.
        reporter: Where progress goes.
        resume: Resume purifiers and evaluations that were interrupted.
        note: Stored with the table: what the reader must know of its budget.
        options: Attack, images, seed and device of every evaluation.

    Returns:
        The table, as stored; see `carso_cli.ablation.table`.

    Raises:
        RecipeError: If the recipe names no weights of a kind that is needed.
        WeightsError: If a classifier's weights are missing.
        StateError: If a run folder belongs to another configuration.
        UsageError: If something unfinished is stored and `resume` is not given.
        InterruptedRun: On Ctrl-C; whole epochs and blocks are saved.
    """
    # Here and not in the first training: lock, checks and table are the main process's alone.
    world = join(choose_device(options.get("device", "auto")), reporter)
    # After torchrun's restart the unfinished work is this ablation's own, so it is resumed unasked.
    reporter, resume = world.reporter(reporter), resume or world.restarted
    trained = trained_recipes(recipe, ablation, run)
    # Whatever can stop an ablation stops it here, before hours of training.
    with world.local_main_first():
        for kind in ablation.kinds:
            build_classifier(recipe, kind)
    states = world.on_main(
        lambda: {path: check_run(one, path, resume=resume) for path, one in trained.items()}
    )
    options = own_options(recipe, ablation, options, reporter)
    with world.main_holds(lambda: locked(ensure_folder(RunFolder(run).ablations), reporter)):
        for path, state in states.items():
            _train_if_missing(trained[path], path, state, reporter, options.get("device", "auto"))
        rows, summary = _evaluate_all(ablation, run, reporter, resume, options)
        if ablation.with_transfers:
            # As the evaluations recorded them: transferred records are found by this name.
            rules = [str(row["aggregation"]) for row in rows]
            folder = transfer_to_rules(recipe, rules, root=run, reporter=reporter, resume=resume, **options)
            if folder is None:
                reporter.warning(
                    "the chosen attack follows no gradients: no examples are transferred between rules"
                )
            else:
                rows = [with_transfers(row, rule, folder, run) for row, rule in zip(rows, rules, strict=True)]
        _warn_of_unequal_training(rows, reporter)
        return world.on_main(lambda: store_table(run, recipe, ablation, rows, summary, note, reporter))


def own_options(
    recipe: Recipe, ablation: Ablation, options: EvaluationOptions, reporter: Reporter
) -> EvaluationOptions:
    """Return the options of all evaluations; with the recipe's own images and seed where training varies."""
    if not ablation.by_training_alone:
        return options
    seed = options.get("seed")
    # A variant's own seed would draw other test images and other attacks.
    images = options.get("images") or load_images(
        recipe, "test", limit=options.get("limit") or recipe.evaluation.images, reporter=reporter
    )
    return {**options, "images": images, "seed": recipe.seed if seed is None else seed}


def trained_recipes(recipe: Recipe, ablation: Ablation, root: Path) -> dict[Path, Recipe]:
    """Return the run folders of an ablation's purifiers, each with the recipe that it is trained with."""
    # Variants that differ in evaluation alone share a purifier, which must be trained with one recipe.
    own = {"evaluation": recipe.evaluation}
    return {one.run_folder(root): one.recipe.model_copy(update=own) for one in ablation.variants}


def check_run(recipe: Recipe, path: Path, *, resume: bool) -> str:
    """Return the state of a run folder: `trained`, `unfinished` or `missing`.

    Raises:
        StateError: If it was trained with other settings, naming the sections.
        UsageError: If its training is unfinished, or its recipe lost, and `resume` is not given.
    """
    folder = RunFolder(path)
    if not folder.recipe.is_file():
        if not folder.trained_here:
            return "missing"
        if not resume:
            raise UsageError(f"{folder.recipe} is missing beside the state of a training", hint=RESUME)
        # Resuming compares the state with the recipe asked for, and writes the file again.
        return "unfinished"
    # A full path: a bare name would be looked up among the shipped recipes.
    stored = load_recipe(str(folder.recipe.resolve()))
    if other := differing_values(stored, recipe):
        raise StateError(
            f"{path} was trained with another configuration: {'; '.join(other)}",
            hint="give the same options as in training, or another root folder with --run DIR",
        )
    # The purifier is written at the end of training, so its file says that training is complete.
    if folder.purifier.is_file():
        return "trained"
    if not resume:
        raise UsageError(f"{path} holds an unfinished training", hint=RESUME)
    return "unfinished"


def _train_if_missing(recipe: Recipe, path: Path, state: str, reporter: Reporter, device: str) -> None:
    if state == "trained":
        reporter.info(f"using the purifier in {path}")
        return
    reporter.info(f"training the purifier of {path}")
    try:
        # Resumed only where something is unfinished: there is nothing to resume in a missing run.
        train_purifier(recipe, run=path, reporter=reporter, resume=state == "unfinished", device=device)
    except InterruptedRun as error:
        # Training's own hint would resume the training alone.
        raise InterruptedRun(error.message, hint=RESUME) from None


def _evaluate_all(
    ablation: Ablation, root: Path, reporter: Reporter, resume: bool, options: EvaluationOptions
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Evaluate every variant; return the rows, and the summary of one evaluation for what all share."""
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    folder = EvaluationFolder(root)
    for variant in ablation.variants:
        reporter.info(f"{ablation.varies}: {variant.label}")
        # Eps 0 is the clean part of the evaluation before it.
        if variant.eps != 0.0:
            chosen = variant_options(ablation, variant, options)
            summary, folder = _evaluate_variant(variant, root, reporter, resume, chosen)
        row = make_row(variant, root, folder.path, summary)
        # A protocol has noise among its baselines; a single attack needs a run of it.
        if ablation.with_baselines and row["noise"] is None:
            changes: EvaluationOptions = {"target": "defence", "eps": variant.eps, "attack": "noise"}
            noise, _ = _evaluate_variant(variant, root, reporter, resume, {**options, **changes})
            row["noise"] = find_figures(noise, "defence", "noise")
        rows.append(row)
    return rows, summary


def variant_options(ablation: Ablation, variant: Variant, options: EvaluationOptions) -> EvaluationOptions:
    """Return the options of a variant's evaluation, given those of the whole ablation."""
    # Selection draws are needed wherever rows are compared with transferred examples, image by image.
    target, selects = None if ablation.with_baselines else "defence", ablation.with_transfers
    return {**options, "target": target, "eps": variant.eps, "selects": selects}


def _evaluate_variant(
    variant: Variant, root: Path, reporter: Reporter, resume: bool, options: EvaluationOptions
) -> tuple[dict[str, Any], EvaluationFolder]:
    """Evaluate one variant, or bring back its complete evaluation.

    Raises:
        UsageError: If its evaluation is unfinished and `resume` is not given.
    """
    path = variant.run_folder(root)
    evaluation = prepare_evaluation(variant.recipe, run=path, reporter=reporter, **options)
    folder = evaluation.folder
    if folder.exists and not folder.summary.is_file() and not resume:
        raise UsageError(f"{folder.path} holds an unfinished evaluation", hint=RESUME)
    # A complete evaluation is resumed too: that returns its stored summary.
    return run_evaluation(evaluation, reporter=reporter, resume=folder.exists), folder


def _warn_of_unequal_training(rows: list[dict[str, Any]], reporter: Reporter) -> None:
    counts = {row["label"]: row["training"]["images"] for row in rows if row["training"]}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{label}: {count}" for label, count in counts.items())
        reporter.warning(f"the purifiers were trained on different numbers of images ({told})")
