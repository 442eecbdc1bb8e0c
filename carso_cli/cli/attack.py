"""`carso attack`: make adversarial examples and save them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from carso_cli.attacks.registry import ATTACKS
from carso_cli.cli import options
from carso_cli.cli.console import accuracy, figure, print_result, show_table
from carso_cli.cli.progress import RichReporter

DEFAULT_LIMIT = 64
"""Images attacked without `--limit`."""

AttackOption = Annotated[
    str,
    typer.Option(
        "--attack",
        metavar="NAME",
        help="A single attack, see `carso attacks ls`.",
        autocompletion=options.among((*ATTACKS,)),
    ),
]
ImagesOption = Annotated[
    list[Path] | None,
    typer.Option("--image", help="Image file to attack instead of the test split; repeatable."),
]
ResizeOption = Annotated[bool, typer.Option("--resize/--no-resize", help="Crop and resize image files.")]
OutOption = Annotated[
    Path | None,
    options.optional(
        "--out",
        metavar="FILE",
        help="File to write, .safetensors or .npz (default: RUN/attacks/ATTACK-TARGET.safetensors).",
    ),
]


def command(
    recipe: options.RecipeArgument = None,
    attack: AttackOption = "pgd-eot",
    target: options.TargetOption = None,
    images: ImagesOption = None,
    resize: ResizeOption = False,
    out: OutOption = None,
    run: options.RunOption = None,
    n_samples: options.NSamplesOption = None,
    aggregation: options.AggregationOption = None,
    view: options.ViewOption = None,
    eps: options.EpsOption = None,
    norm: options.NormOption = None,
    limit: options.LimitOption = None,
    seed: options.SeedOption = None,
    device: options.DeviceOption = "auto",
    json: options.JsonOption = False,
    overrides: options.SetOption = None,
) -> None:
    """Make adversarial examples against the classifier or the whole defence, and save them.

    Attacks 64 images of the test split unless --limit says otherwise. Saves images, examples, labels,
    predictions and distances, and a picture beside them. Image files have no labels; the target's prediction
    on the clean image is used instead.
    """
    from carso_cli.evaluation.attack import attack as make_examples

    chosen, folder = options.find_recipe_of_run(recipe, run, overrides)
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
    print_result(result, _show, as_json=json)


def _show(result: dict[str, Any]) -> None:
    rows = [
        ["images", str(result["n_images"])],
        ["clean accuracy", accuracy(result["clean"])],
        ["accuracy on the examples", accuracy(result["accuracy"], result["ci95"])],
        ["largest change", f"{figure(result['largest_distance'])} under {result['norm']}"],
        ["examples", result["out"]],
        ["picture", result["picture"]],
    ]
    show_table((f"{result['attack']} on the {result['target']}", ""), rows)
