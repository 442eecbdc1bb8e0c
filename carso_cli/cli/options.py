"""The options that commands share, so that each means the same and reads the same everywhere.

Use them as `def command(recipe: RecipeArgument = None, overrides: SetOption = None, …)`. Help texts are
Rich markup: square brackets in them would vanish.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from carso_cli.errors import nearest

if TYPE_CHECKING:
    from carso_cli.recipe.schema import Recipe

_WHOLE = re.compile(r"[0-9]{1,18}")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")


def _check_device(value: str) -> str:
    if _DEVICE.fullmatch(value):
        return value
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


def _whole_from(low: int) -> Callable[[str], int]:
    # Typer's own message names neither the value nor, in all releases, the bound.
    def whole_number(value: str) -> int:
        if _WHOLE.fullmatch(value) and int(value) >= low:
            return int(value)
        raise typer.BadParameter(f"'{value}' is not allowed; use a whole number from {low}")

    return whole_number


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
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a value of the recipe, such as training.epochs=3; may be repeated.",
        show_default=False,
    ),
]
"""`list[str] | None`, default None: give it to `read_recipe`."""

RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run", metavar="DIR", help="Folder of the run; runs/NAME when left out.", show_default=False
    ),
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
    typer.Option(
        "--seed",
        parser=_whole_from(0),
        metavar="N",
        help="Seed; the recipe's when left out.",
        show_default=False,
    ),
]
"""`int | None`, default None."""

LimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit",
        parser=_whole_from(1),
        metavar="N",
        help="Use only N images: a class-balanced subset, drawn by the seed.",
        show_default=False,
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
    typer.Option(
        "--n-samples",
        parser=_whole_from(1),
        metavar="N",
        help="Reconstructions per image; the recipe's number when left out.",
        show_default=False,
    ),
]
"""`int | None`, default None."""

EpsOption = Annotated[
    float | None,
    typer.Option(
        "--eps",
        parser=_parse_eps,
        metavar="EPS",
        help="Perturbation size in pixel units, such as 8/255; the recipe's when left out.",
        show_default=False,
    ),
]
"""`float | None`, default None."""


def read_recipe(reference: str | None, overrides: Sequence[str] | None, seed: int | None = None) -> Recipe:
    """Load the recipe that `RecipeArgument`, `SetOption` and `SeedOption` name.

    Raises:
        RecipeError: See `carso_cli.recipe.load.load_recipe`.
    """
    from carso_cli.recipe.load import load_recipe

    return load_recipe(reference, [*(overrides or ()), *([] if seed is None else [f"seed={seed}"])])
