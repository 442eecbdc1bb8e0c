"""The options that commands share, so that each means the same and reads the same everywhere.

Use them as `def command(recipe: RecipeArgument = None, overrides: SetOption = None, …)`. Help texts are
Rich markup: square brackets in them would vanish.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carso_cli.cli.processes import torchrun_line
from carso_cli.errors import UsageError, nearest

if TYPE_CHECKING:
    from carso_cli.recipe.schema import Recipe

_WHOLE = re.compile(r"[0-9]{1,18}")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")
_DEVICES = re.compile(r"cuda:(\d{1,3}(?:,\d{1,3})+)")


def _check_device(context: typer.Context, value: str) -> str:
    if _DEVICE.fullmatch(value):
        return value
    if several := _DEVICES.fullmatch(value):
        numbers = several.group(1).split(",")
        raise UsageError(
            f"--device {value} asks for {len(numbers)} devices, and a process uses one",
            hint=f"start a process for each: {torchrun_line(context.obj or (), numbers)}",
        )
    suggestion = nearest(value, ("auto", "cpu", "cuda", "mps"), limit=1)
    allowed = "use auto, cpu, cuda, cuda:N or mps"
    raise typer.BadParameter("; ".join(filter(None, (f"'{value}' is no device", allowed, suggestion))))


def _parse_eps(value: str) -> float:
    # In the function, so that help does not wait for pydantic.
    from carso_cli.recipe.number import parse_number

    try:
        number = parse_number(value)
    except ValueError as error:
        raise typer.BadParameter(f"'{value}' is not allowed ({error}); use a number such as 8/255") from None
    if number <= 0:
        raise typer.BadParameter(f"'{value}' is not allowed; use a number above 0, such as 8/255")
    return number


def whole_from(low: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `low` on."""

    # Typer's own message names neither the value nor, in all releases, the bound.
    def whole_number(value: str) -> int:
        if _WHOLE.fullmatch(value) and int(value) >= low:
            return int(value)
        raise typer.BadParameter(f"'{value}' is not allowed; use a whole number from {low}")

    return whole_number


def optional(
    *names: str,
    metavar: str,
    help: str,
    **more: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401  (typer's own type)
    """Return an option that may be left out and then is None; what that means stands in its help."""
    return typer.Option(*names, metavar=metavar, help=help, show_default=False, **more)


def one_of(name: str, known: Sequence[str]) -> Callable[[str | None], str | None]:
    """Return an option's callback that lets the known words pass, and None.

    Raises:
        UsageError: On the command line, if a word is not among the known ones.
    """

    def check(value: str | None) -> str | None:
        if value is None or value in known:
            return value
        suggestion = nearest(value, known, limit=1)
        message = "; ".join(filter(None, (f"unknown {name} '{value}'", suggestion)))
        raise UsageError(message, hint=f"use {', '.join(known)}")

    return check


RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="Path of a recipe, or name of a shipped one (`carso recipes ls`); digits when left out.",
        show_default=False,
    ),
]
"""`str | None`, default None: give it to `read_recipe`."""

SetOption = Annotated[
    list[str] | None,
    optional(
        "--set",
        metavar="KEY=VALUE",
        help="Override a value of the recipe, such as training.epochs=3; may be repeated.",
    ),
]
"""`list[str] | None`, default None: give it to `read_recipe`."""

RunOption = Annotated[
    Path | None,
    # torchrun takes `--run` for an abbreviation of options of its own.
    optional("--run", "--run-dir", metavar="DIR", help="Folder of the run; runs/NAME when left out."),
]
"""`Path | None`, default None: the recipe's own `run_folder`."""

DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", metavar="DEVICE", callback=_check_device, help="auto, cpu, cuda, cuda:N or mps."
    ),
]
"""`str`, default "auto"; checked for its form, not for presence."""

SeedOption = Annotated[
    int | None,
    optional("--seed", metavar="N", help="Seed; the recipe's when left out.", parser=whole_from(0)),
]
"""`int | None`, default None."""

LimitOption = Annotated[
    int | None,
    optional(
        "--limit",
        metavar="N",
        help="Use only N images: a class-balanced subset, drawn by the seed.",
        parser=whole_from(1),
    ),
]
"""`int | None`, default None: all images."""

JsonOption = Annotated[
    bool, typer.Option("--json", help="Result as JSON on stdout, everything else on stderr.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show the resolved recipe and the cost; do nothing.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the state saved in the run folder.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Exit with code 4 if a trust check fails.")]

NSamplesOption = Annotated[
    int | None,
    optional(
        "--n-samples",
        metavar="N",
        help="Reconstructions per image; the recipe's number when left out.",
        parser=whole_from(1),
    ),
]
"""`int | None`, default None."""

EpsOption = Annotated[
    float | None,
    optional(
        "--eps",
        metavar="EPS",
        help="Perturbation size in pixel units, such as 8/255; the recipe's when left out.",
        parser=_parse_eps,
    ),
]
"""`float | None`, default None."""


def _word(name: str, meaning: str, known: Sequence[str], default: str) -> Any:  # noqa: ANN401  (typer's own type)
    shown = f"{meaning}: {', '.join(known)}; {default} when left out."
    return optional(metavar="NAME", help=shown, callback=one_of(name, known))


_RULES = ("doubly-exponential", "logit-mean", "probability-mean", "majority-vote")
_VIEWS = ("exact", "log-probability", "released")
_TARGETS = ("classifier", "defence")
AggregationOption = Annotated[str | None, _word("aggregation", "Aggregation rule", _RULES, "the recipe's")]
ViewOption = Annotated[
    str | None, _word("view", "View of the defence to attack", _VIEWS, "the protocol's, or exact,")
]
NormOption = Annotated[str | None, _word("norm", "Norm of the perturbation", ("linf", "l2"), "the recipe's")]
TargetOption = Annotated[
    str | None, _word("target", "What is attacked", _TARGETS, "both, where the attack fits,")
]


def read_recipe(reference: str | None, overrides: Sequence[str] | None, seed: int | None = None) -> Recipe:
    """Load the recipe that `RecipeArgument`, `SetOption` and `SeedOption` name.

    Raises:
        RecipeError: See `carso_cli.recipe.load.load_recipe`.
    """
    from carso_cli.recipe.load import load_recipe

    return load_recipe(reference, [*(overrides or ()), *([] if seed is None else [f"seed={seed}"])])


def find_recipe_of_run(
    reference: str | None, run: Path | None, overrides: Sequence[str] | None
) -> tuple[Recipe, Path]:
    """Return the recipe that holds and the run folder.

    A RECIPE that is named holds; without one the run's own does, and without a run `digits`.

    Raises:
        RecipeError: See `carso_cli.recipe.load.load_recipe`.
        StateError: If a trained run has lost the recipe to be taken from it, or cannot follow a `--set`.
    """
    from carso_cli.recipe.identity import refuse_other_training
    from carso_cli.runs.folder import RunFolder

    if reference is None:
        if run is None:
            run = Path(read_recipe(None, None).run_folder)
        folder = RunFolder(run)
        folder.check_recipe()
        if folder.recipe.is_file():
            reference = str(folder.recipe.resolve())
    recipe = read_recipe(reference, overrides)
    folder = RunFolder(run or Path(recipe.run_folder))
    if overrides and folder.recipe.is_file():
        trained = read_recipe(str(folder.recipe.resolve()), None)
        if trained.name == recipe.name:
            refuse_other_training(recipe, trained, overrides, str(folder.path))
    return recipe, folder.path
