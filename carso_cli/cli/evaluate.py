"""`carso evaluate`: clean and robust accuracy by any attack or protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carso_cli.attacks.names import PROTOCOLS
from carso_cli.cli.display import duration, figure, output, print_json, table
from carso_cli.cli.evaluation_tables import show_evaluation
from carso_cli.cli.options import (
    DeviceOption,
    DryRunOption,
    EpsOption,
    JsonOption,
    LimitOption,
    NSamplesOption,
    RecipeArgument,
    ResumeOption,
    RunOption,
    SeedOption,
    SetOption,
    StrictOption,
    read_recipe,
)
from carso_cli.cli.progress import RichReporter
from carso_cli.errors import TrustError, UsageError, nearest

if TYPE_CHECKING:
    from carso_cli.recipe.schema import Recipe

AGGREGATIONS = ("doubly-exponential", "logit-mean", "probability-mean", "majority-vote")
VIEWS = ("exact", "log-probability", "released")
NORMS = ("linf", "l2")
TARGETS = ("classifier", "defence")


def choice(name: str, value: str | None, known: tuple[str, ...]) -> str | None:
    """Return a chosen word.

    Raises:
        UsageError: If it is not among the known ones.
    """
    if value is None or value in known:
        return value
    suggestion = nearest(value, known, limit=1)
    raise UsageError(
        "; ".join(filter(None, (f"unknown {name} '{value}'", suggestion))), hint=f"use {', '.join(known)}"
    )


def _listed(meaning: str, known: tuple[str, ...], default: str) -> Any:  # noqa: ANN401  (typer's own type)
    return typer.Option(
        metavar="NAME", help=f"{meaning}: {', '.join(known)}; {default} when left out.", show_default=False
    )


AttackOption = Annotated[
    str,
    typer.Option(
        "--attack", metavar="NAME", help=f"A protocol ({', '.join(PROTOCOLS)}) or an attack, such as pgd-eot."
    ),
]
AggregationOption = Annotated[str | None, _listed("Aggregation rule", AGGREGATIONS, "the recipe's")]
ViewOption = Annotated[
    str | None, _listed("View of the defence to attack", VIEWS, "the protocol's, or exact,")
]
NormOption = Annotated[str | None, _listed("Norm of the perturbation", NORMS, "the recipe's")]
TargetOption = Annotated[str | None, _listed("What is attacked", TARGETS, "both, where the attack fits,")]


def find_recipe_of_run(
    reference: str | None, run: Path | None, overrides: list[str] | None
) -> tuple[Recipe, Path]:
    """Return the recipe that holds and the run folder.

    A RECIPE that is named holds; without one the run's own does, and without a run `digits`.
    """
    if reference is None:
        if run is None:
            run = Path(read_recipe(None, None).run_folder)
        stored = run / "recipe.yaml"
        if stored.is_file():
            reference = str(stored.resolve())
    recipe = read_recipe(reference, overrides)
    return recipe, run or Path(recipe.run_folder)


def command(
    recipe: RecipeArgument = None,
    attack: AttackOption = "adaptive",
    target: TargetOption = None,
    run: RunOption = None,
    n_samples: NSamplesOption = None,
    aggregation: AggregationOption = None,
    view: ViewOption = None,
    eps: EpsOption = None,
    norm: NormOption = None,
    limit: LimitOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    force: Annotated[bool, typer.Option("--force", help="Start over where a result is stored.")] = False,
    strict: StrictOption = False,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
    overrides: SetOption = None,
) -> None:
    """Measure what accuracy a competent attacker leaves, with checks that the attack worked.

    Every example is checked again for its size and scored on fresh draws of the defence. Records are written
    as they come to RUN/evaluation; --resume goes on from them.
    """
    options = {
        "attack": attack,
        "target": choice("target", target, TARGETS),
        "n_samples": n_samples,
        "aggregation": choice("aggregation", aggregation, AGGREGATIONS),
        "view": choice("view", view, VIEWS),
        "eps": eps,
        "norm": choice("norm", norm, NORMS),
        "limit": limit,
        "seed": seed,
        "device": device,
    }
    chosen, folder = find_recipe_of_run(recipe, run, overrides)
    if dry_run:
        _show_cost(chosen, folder, options, as_json=json)
        return
    from carso_cli.workflows.evaluate import evaluate

    summary = evaluate(
        chosen, run=folder, reporter=RichReporter(), resume=resume, force=force, **_typed(options)
    )
    if json:
        print_json(summary)
    else:
        show_evaluation(summary)
    if strict and summary["failed"]:
        raise TrustError(
            f"trust checks failed: {', '.join(summary['failed'])}",
            hint="the result is stored; each check says what its failure means",
        )


def _typed(options: dict[str, Any]) -> Any:  # noqa: ANN401  (an EvaluationOptions, whose module loads torch)
    return options


def _show_cost(recipe: Recipe, folder: Path, options: dict[str, Any], *, as_json: bool) -> None:
    """Show the resolved settings and the predicted time; attack nothing."""
    from carso_cli.workflows.evaluation_cost import estimate_cost
    from carso_cli.workflows.evaluation_setup import prepare_evaluation

    evaluation = prepare_evaluation(recipe, run=folder, reporter=RichReporter(), **_typed(options))
    cost = estimate_cost(evaluation)
    if as_json:
        print_json({"recipe": recipe.name, "run": str(folder), "settings": evaluation.identity, "cost": cost})
        return
    shown = [[name, str(value)] for name, value in evaluation.identity.items() if value is not None]
    output().print(table(("setting", ""), shown, title=f"{recipe.name}: {evaluation.plan.label}"))
    rows = [[job["job"], duration(job["seconds"])] for job in cost["jobs"]]
    rows += [[f"trust check {check['check']}", duration(check["seconds"])] for check in cost["checks"]]
    rows.append(["in all, at most about", duration(cost["seconds"])])
    title = f"predicted time for {figure(cost['n_images'])} images on this device"
    output().print(table(("job", "time"), rows, title=title, numeric=("time",)))
