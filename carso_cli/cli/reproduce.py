"""`carso reproduce`: a row of the paper, from the files that its authors publish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from carso_cli.cli import options
from carso_cli.cli.console import duration, print_json, print_plain, print_result, show_table
from carso_cli.cli.progress import RichReporter

_KINDS = ("at", "clean")
FirstOption = Annotated[
    str | None, options.choice("--first", "Training of the first classifier instance", *_KINDS, default="at")
]
SecondOption = Annotated[
    str | None,
    options.choice("--second", "Training of the second classifier instance", *_KINDS, default="at"),
]
AttackOption = Annotated[
    str | None, options.choice("--attack", "Only one procedure", "authors", "adaptive", default="both")
]
RunOption = Annotated[
    Path | None,
    options.optional("--run", "--run-dir", metavar="DIR", help="Run folder (default: runs/RECIPE-authors)."),
]


def command(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A row of Table 2 or 18: cifar10, cifar100, tinyimagenet200, cifar10-gowal2020, …",
            autocompletion=options.complete_recipe,
        ),
    ],
    first: FirstOption = None,
    second: SecondOption = None,
    attack: AttackOption = None,
    run: RunOption = None,
    limit: options.LimitOption = None,
    device: options.DeviceOption = "auto",
    json: options.JsonOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show sizes, predicted time and commands; do nothing else.")
    ] = False,
    overrides: options.SetOption = None,
) -> None:
    """Fetch the authors' files for a row of the paper, import them, evaluate, and show the row beside theirs.

    Evaluated by the authors' procedure (`authors`) and by ours (`adaptive`). Each stage takes up what an
    earlier call has left: run the command again after an interruption. --first and --second give the rows of
    Table 17.
    """
    from carso_cli.tools.reproduce import ATTACKS, describe, plan_reproduction, reproduce

    plan = plan_reproduction(recipe, overrides or (), first=first or "at", second=second or "at", run=run)
    reporter = RichReporter()
    chosen: Any = {"attacks": (attack,) if attack else ATTACKS, "limit": limit, "device": device}
    if dry_run:
        print_result(describe(plan, reporter=reporter, **chosen), _show_plan, as_json=json)
        return
    result = reproduce(plan, reporter=reporter, **chosen)
    if json:
        print_json(result)
    else:
        _show_row(plan.run, plan.table)


def _show_row(run: Path, table: str) -> None:
    from carso_cli.cli.report import show_tables
    from carso_cli.reports.report import report

    show_tables(report([run], reporter=RichReporter(), tables=[table]).tables)


def _show_plan(found: dict[str, Any]) -> None:
    rows = [[file["what"], file["state"], _size(file["bytes"])] for file in found["files"]]
    rows.append(["to download", "", _size(found["bytes"])])
    show_table(("file", "state", "size"), rows, numeric=("size",))
    for file in found["files"]:
        print_plain(f"from {file['url']}")
    if not found["listed"]:
        print_plain("The authors' evaluation names this purifier; their lists of downloads do not.")
    times = [[one["attack"], duration(one["seconds"])] for one in found["evaluations"]]
    print_plain(f"\npredicted time for {found['n_images']:,} images on this device, at most about")
    show_table(("evaluation", "time"), times, numeric=("time",))
    print_plain("\nstage by stage:")
    for line in found["commands"]:
        print_plain(f"  {line}")


def _size(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:,.0f} MiB"
