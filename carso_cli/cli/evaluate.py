"""`carso evaluate`: clean and robust accuracy by any attack or protocol."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carso_cli.attacks.registry import ATTACKS, PROTOCOLS
from carso_cli.cli import options
from carso_cli.cli.console import duration, figure, messages, print_json, print_result, show_table
from carso_cli.cli.evaluation_tables import show_evaluation, verdict_of
from carso_cli.cli.progress import RichReporter
from carso_cli.distributed.launch import launch
from carso_cli.errors import SanityCheckError

if TYPE_CHECKING:
    from carso_cli.recipe.schema import Recipe

AttackOption = Annotated[
    str,
    typer.Option(
        "--attack",
        metavar="NAME",
        help=f"A protocol ({', '.join(PROTOCOLS)}) or an attack, see `carso attacks ls`.",
        autocompletion=options.among((*PROTOCOLS, *ATTACKS)),
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Start over if a result is already stored.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Exit with code 4 if a sanity check failed.")]
TableOption = Annotated[
    bool, typer.Option("--table", help="Show the paper's tables with these figures, and every attack.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show every check.")]


def command(
    recipe: options.RecipeArgument = None,
    attack: AttackOption = "adaptive",
    target: options.TargetOption = None,
    run: options.RunOption = None,
    n_samples: options.NSamplesOption = None,
    aggregation: options.AggregationOption = None,
    view: options.ViewOption = None,
    eps: options.EpsOption = None,
    norm: options.NormOption = None,
    limit: options.LimitOption = None,
    seed: options.SeedOption = None,
    device: options.DeviceOption = "auto",
    resume: options.ResumeOption = False,
    force: ForceOption = False,
    strict: StrictOption = False,
    tables: TableOption = False,
    verbose: VerboseOption = False,
    json: options.JsonOption = False,
    dry_run: options.DryRunOption = False,
    overrides: options.SetOption = None,
) -> None:
    """Measure clean and robust accuracy, and say whether the number can be trusted.

    The norm of every perturbation is checked again, and every example is scored on fresh draws of the
    defence. Records are written to RUN/evaluation as they come; resume with --resume.
    """
    # An EvaluationOptions, whose module loads torch.
    chosen: Any = {
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
    recipe_of_run, folder = options.find_recipe_of_run(recipe, run, overrides)
    if dry_run:
        _show_cost(recipe_of_run, folder, chosen, as_json=json)
        return
    from carso_cli.evaluation.run import evaluate

    summary = evaluate(
        recipe_of_run, run=folder, reporter=RichReporter(), resume=resume, force=force, **chosen
    )
    _draw(summary, folder)
    print_result(summary, partial(show_evaluation, tables=tables, verbose=verbose), as_json=json)
    # After the result is stored and shown: a failed check changes the exit code, not the measurement.
    trusted, verdict = verdict_of(summary)
    if strict and trusted is False:
        raise SanityCheckError(verdict, hint="the result is stored; each check says what its failure means")


def _draw(summary: Mapping[str, Any], run: Path) -> None:
    """Write the picture of the accuracies beside the records, in every format."""
    if launch().rank:
        return
    from carso_cli.reports.plots import accuracy_plot
    from carso_cli.runs.folder import RunFolder
    from carso_cli.runs.records import evaluation_id

    folder = RunFolder(run).inside("evaluation", evaluation_id(summary["settings"]["identity"]))
    written = accuracy_plot(summary).save(folder)
    messages().print(f"picture: {written[0]}, and as SVG and PDF", soft_wrap=True)


def _show_cost(recipe: Recipe, folder: Path, chosen: Any, *, as_json: bool) -> None:  # noqa: ANN401
    """Show the resolved settings and the predicted time; attack nothing."""
    from carso_cli.evaluation.preflight import estimate_cost
    from carso_cli.evaluation.setup import prepare_evaluation

    evaluation = prepare_evaluation(recipe, run=folder, reporter=RichReporter(), **chosen)
    cost = estimate_cost(evaluation)
    if as_json:
        print_json({"recipe": recipe.name, "run": str(folder), "settings": evaluation.identity, "cost": cost})
        return
    shown = [[name, str(value)] for name, value in evaluation.identity.items() if value is not None]
    show_table(("setting", ""), shown, title=f"{recipe.name}: {evaluation.plan.label}")
    rows = [[job["job"], duration(job["seconds"])] for job in cost["jobs"]]
    rows += [[f"sanity check {check['check']}", duration(check["seconds"])] for check in cost["checks"]]
    # At most, since an image that one attack has broken is skipped by the later ones.
    rows.append(["in all, at most about", duration(cost["seconds"])])
    title = f"predicted time for {figure(cost['n_images'])} images on this device"
    show_table(("job", "time"), rows, title=title, numeric=("time",))
