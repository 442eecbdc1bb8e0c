"""`carso attack`: make adversarial examples and save them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from carso_cli.cli.display import accuracy, figure, output, print_json, table
from carso_cli.cli.options import (
    AggregationOption,
    DeviceOption,
    EpsOption,
    JsonOption,
    LimitOption,
    NormOption,
    NSamplesOption,
    RecipeArgument,
    RunOption,
    SeedOption,
    SetOption,
    TargetOption,
    ViewOption,
    find_recipe_of_run,
    optional,
)
from carso_cli.cli.progress import RichReporter

DEFAULT_LIMIT = 64
"""Images attacked when no number is asked for."""

AttackOption = Annotated[
    str, typer.Option("--attack", metavar="NAME", help="A single attack, such as pgd-eot or apgd-ce.")
]
ImagesOption = Annotated[
    list[Path] | None,
    typer.Option("--image", help="Image file to attack instead of the test split; may be repeated."),
]
ResizeOption = Annotated[bool, typer.Option("--resize/--no-resize", help="Crop and resize image files.")]
OutOption = Annotated[
    Path | None,
    optional(metavar="FILE", help="safetensors file to write; RUN/attacks/ATTACK-TARGET when left out."),
]


def command(
    recipe: RecipeArgument = None,
    attack: AttackOption = "pgd-eot",
    target: TargetOption = None,
    images: ImagesOption = None,
    resize: ResizeOption = False,
    out: OutOption = None,
    run: RunOption = None,
    n_samples: NSamplesOption = None,
    aggregation: AggregationOption = None,
    view: ViewOption = None,
    eps: EpsOption = None,
    norm: NormOption = None,
    limit: LimitOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Make adversarial examples against the classifier or the whole defence.

    Saves images (64 of the test split unless --limit says otherwise), examples, labels, predictions and
    distances, and a picture beside them. Image files have no labels; the target's own decision on each
    stands in for it.
    """
    from carso_cli.evaluation.attack import attack as make_examples

    chosen, folder = find_recipe_of_run(recipe, run, overrides)
    result = make_examples(
        chosen,
        run=folder,
        reporter=RichReporter(),
        name=attack,
        out=out,
        files=images or (),
        resize=resize,
        target=target,
        n_samples=n_samples,
        aggregation=aggregation,
        view=view,
        eps=eps,
        norm=norm,
        limit=limit or DEFAULT_LIMIT,
        seed=seed,
        device=device,
    )
    if json:
        print_json(result)
        return
    rows = [
        ["images", str(result["n_images"])],
        ["clean accuracy", accuracy(result["clean"])],
        ["accuracy on the examples", accuracy(result["accuracy"], tuple(result["ci95"]))],
        ["largest change", f"{figure(result['largest_distance'])} under {result['norm']}"],
        ["examples", result["out"]],
        ["picture", result["picture"]],
    ]
    output().print(table((f"{result['attack']} on the {result['target']}", ""), rows))
