"""`carso evaluate`: clean and robust accuracy by any attack or protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carso_cli.attacks.registry import PROTOCOLS
from carso_cli.cli.display import duration, figure, output, print_json, table
from carso_cli.cli.evaluation_tables import show_evaluation
from carso_cli.cli.options import (
    AggregationOption,
    DeviceOption,
    DryRunOption,
    EpsOption,
    JsonOption,
    LimitOption,
    NormOption,
    NSamplesOption,
    RecipeArgument,
    ResumeOption,
    RunOption,
    SeedOption,
    SetOption,
    StrictOption,
    TargetOption,
    ViewOption,
    find_recipe_of_run,
)
from carso_cli.cli.progress import RichReporter
from carso_cli.errors import TrustError

if TYPE_CHECKING:
    from carso_cli.recipe.schema import Recipe

AttackOption = Annotated[
    str,
    typer.Option(
        "--attack", metavar="NAME", help=f"A protocol ({', '.join(PROTOCOLS)}) or an attack, such as pgd-eot."
    ),
]


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
        "target": target,
        "n_samples": n_samples,
        "aggregation": aggregation,
        "view": view,
        "eps": eps,
        "norm": norm,
        "limit": limit,
        "seed": seed,
        "device": device,
    }
    chosen, folder = find_recipe_of_run(recipe, run, overrides)
    if dry_run:
        _show_cost(chosen, folder, options, as_json=json)
        return
    from carso_cli.evaluation.run import evaluate

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
    from carso_cli.evaluation.preflight import estimate_cost
    from carso_cli.evaluation.setup import prepare_evaluation

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
