"""The options that commands share, so that each means the same and reads the same everywhere.

Use them as `def command(recipe: options.RecipeArgument = None, run: options.RunOption = None, …)`. Help
texts are Rich markup: square brackets in them would vanish. The parsers raise `typer.BadParameter` with the
value seen, what is allowed and the nearest known name; Typer's own messages lack one or another of these.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from carso_cli.cli.processes import run_line
from carso_cli.errors import UsageError, nearest

if TYPE_CHECKING:
    from carso_cli.recipe.schema import Recipe

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")
_DEVICES = re.compile(r"cuda:(\d{1,3}(?:,\d{1,3})+)")


def _not_allowed(value: str, use: str, known: Sequence[str] = ()) -> typer.BadParameter:
    parts = (f"'{value}' is not allowed", f"use {use}", nearest(value, known, limit=1))
    return typer.BadParameter("; ".join(filter(None, parts)))


def _check_device(context: typer.Context, value: str) -> str:
    if several := _DEVICES.fullmatch(value):
        numbers = several.group(1).split(",")
        # The context's object is the whole command line, see `_call` in `app`.
        raise UsageError(
            f"--device {value} asks for {len(numbers)} devices, and a process uses one",
            hint=f"start one process per device: {run_line(context.obj or (), numbers)}",
        )
    if not _DEVICE.fullmatch(value):
        raise _not_allowed(value, "auto, cpu, cuda, cuda:N or mps", ("auto", "cpu", "cuda", "mps"))
    return value


def parse_eps(value: str) -> float:
    """Read a size such as `8/255`, above 0."""
    # In the function, so that help does not wait for pydantic.
    from carso_cli.recipe.section import parse_number

    try:
        number = parse_number(value)
    except ValueError as error:
        raise typer.BadParameter(f"'{value}' is not allowed ({error}); use a number such as 8/255") from None
    if number <= 0:
        raise _not_allowed(value, "a number above 0, such as 8/255")
    return number


Kind = Literal["at", "clean"]
"""How a classifier was trained: adversarially, or on clean images."""


def optional(*names: str, metavar: str, help: str, **more: Any) -> Any:  # noqa: ANN401  (typer's own type)
    """Return an option whose default is not a value to show; its help says what the default means."""
    return typer.Option(*names, metavar=metavar, help=help, show_default=False, **more)


def whole(name: str, help: str, low: int) -> Any:  # noqa: ANN401  (typer's own type)
    """Return an option that takes a whole number from `low` on, of at most 18 digits (a seed has 64 bits)."""

    def number(value: str) -> int:
        # `int` alone would also take ` 5`, `1_000` and the digits of other scripts.
        if re.fullmatch(r"[0-9]{1,18}", value) and int(value) >= low:
            return int(value)
        raise _not_allowed(value, f"a whole number from {low}")

    return optional(name, metavar="N", help=help, parser=number)


def choice(name: str, help: str, *known: str, default: str) -> Any:  # noqa: ANN401  (typer's own type)
    """Return an option that takes one of the known words; its help lists them and names the default."""

    def word(value: str) -> str:
        if value in known:
            return value
        raise _not_allowed(value, f"{', '.join(known[:-1])} or {known[-1]}", known)

    text = f"{help}: {', '.join(known)} (default: {default})."
    return optional(name, metavar="NAME", help=text, parser=word, autocompletion=among(known))


def among(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return what completes a word in a shell to one of the known words."""
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Return the shipped recipes whose names begin so; a shell adds files by itself."""
    from carso_cli.recipe.shipped import list_recipes

    return among([recipe.name for recipe in list_recipes()])(incomplete)


RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="Path of a recipe, or name of a shipped one, see `carso recipes ls` (default: digits).",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]


def _check_sets(context: typer.Context, values: list[str] | None) -> list[str] | None:
    for text in values or ():
        if "=" not in text:
            # The context's object is the whole command line, see `_call` in `app`.
            words = [*(context.obj or ())]
            after = words[words.index(text) + 1 :] if text in words else []
            meant = f"{text}={after[0]}" if after and not after[0].startswith("-") else f"{text}=VALUE"
            raise UsageError(
                f"--set {text} has no value: key and value are one word",
                hint=f"write --set {shlex.quote(meant)}",
            )
    return values


SetOption = Annotated[
    list[str] | None,
    optional(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe value, as in training.epochs=3; repeatable.",
        callback=_check_sets,
    ),
]
RunOption = Annotated[
    Path | None,
    # torchrun takes `--run` for an abbreviation of options of its own.
    optional("--run", "--run-dir", metavar="DIR", help="Run folder (default: runs/NAME of the recipe)."),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", metavar="DEVICE", callback=_check_device, help="auto, cpu, cuda, cuda:N or mps."
    ),
]
SeedOption = Annotated[int | None, whole("--seed", "Random seed (default: the recipe's).", 0)]
LimitOption = Annotated[
    int | None, whole("--limit", "Use only N images: a class-balanced subset, chosen by the seed.", 1)
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout, everything else on stderr.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show the settings and the predicted time; do nothing else.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue from the state saved in the run folder.")
]
LogOption = Annotated[
    str | None,
    optional(
        "--log",
        metavar="NAMES",
        help="Follow the training live, too: tensorboard, wandb, or both with a comma (extras of carso).",
        autocompletion=among(("tensorboard", "wandb", "tensorboard,wandb")),
    ),
]
NSamplesOption = Annotated[
    int | None, whole("--n-samples", "Reconstructions per image (default: the recipe's).", 1)
]
EpsOption = Annotated[
    float | None,
    optional(
        "--eps",
        metavar="EPS",
        help="Perturbation size in pixel units, such as 8/255 (default: the recipe's).",
        parser=parse_eps,
    ),
]
ClassifierOption = Annotated[
    str | None,
    optional(
        "--classifier",
        metavar="TARGET",
        help="The classifier of a run of `carso harden`, where the run cannot name it: FILE.py:NAME or "
        "PACKAGE.MODULE:NAME (this code is EXECUTED).",
    ),
]
# Words are written out where the module that defines them imports torch: help must not wait for it.
AggregationOption = Annotated[
    str | None,
    choice(
        "--aggregation",
        "Aggregation rule",
        *("doubly-exponential", "logit-mean", "probability-mean", "majority-vote"),
        default="the recipe's",
    ),
]
ViewOption = Annotated[
    str | None,
    choice(
        "--view",
        "View of the defence to attack",
        *("exact", "log-probability", "released"),
        default="the protocol's, otherwise exact",
    ),
]
NormOption = Annotated[
    str | None, choice("--norm", "Norm of the perturbation", "linf", "l2", default="the recipe's")
]
TargetOption = Annotated[
    str | None,
    choice(
        "--target", "Model to attack", "classifier", "defence", default="both, if the attack applies to both"
    ),
]


def read_recipe(reference: str | None, overrides: Sequence[str] | None, seed: int | None = None) -> Recipe:
    """Load the recipe that `RecipeArgument`, `SetOption` and `SeedOption` name.

    Raises:
        RecipeError: See `carso_cli.recipe.load.load_recipe`.
    """
    from carso_cli.recipe.load import load_recipe

    # The seed as an override too, so that the resolved recipe that a run stores has it.
    return load_recipe(reference, [*(overrides or ()), *([] if seed is None else [f"seed={seed}"])])


def read_recipe_to_train(
    reference: str | None, run: Path | None, overrides: Sequence[str] | None, seed: int | None
) -> Recipe:
    """Load the recipe to train with; without a RECIPE, that of the run that is resumed.

    Raises:
        RecipeError: See `carso_cli.recipe.load.load_recipe`.
    """
    from carso_cli.runs.folder import RunFolder

    if reference is None and run is not None and (own := RunFolder(run).recipe).is_file():
        # Absolute, so that it is not taken for the name of a shipped recipe.
        reference = str(own.resolve())
    return read_recipe(reference, overrides, seed)


def run_or_default(run: Path | None) -> Path:
    """Return the run folder, that of the default recipe if none is given."""
    return run or Path(read_recipe(None, None).run_folder)


def find_recipe_of_run(
    reference: str | None, run: Path | None, overrides: Sequence[str] | None
) -> tuple[Recipe, Path]:
    """Return the recipe to use and the run folder.

    A named RECIPE is used as it is; without one, the run's own; without a run, `digits`.

    Raises:
        RecipeError: See `carso_cli.recipe.load.load_recipe`.
        StateError: If a trained run has lost its recipe, or a `--set` contradicts how it was trained.
    """
    from carso_cli.recipe.identity import refuse_other_training
    from carso_cli.runs.folder import RunFolder

    if reference is None:
        folder = RunFolder(run_or_default(run))
        # Checked first: a trained run that has lost its recipe must not pass for `digits`.
        folder.check_recipe()
        run = folder.path
        if folder.recipe.is_file():
            # Absolute, so that it is not taken for the name of a shipped recipe.
            reference = str(folder.recipe.resolve())
    recipe = read_recipe(reference, overrides)
    folder = RunFolder(run or Path(recipe.run_folder))
    if overrides and folder.recipe.is_file():
        trained = read_recipe(str(folder.recipe.resolve()), None)
        refuse_other_training(recipe, trained, overrides, str(folder.path))
    return recipe, folder.path
