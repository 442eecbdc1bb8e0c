"""`carso ablate`: the paper's ablations and further ones, one table each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carso_cli.attacks.registry import check_name
from carso_cli.cli import options
from carso_cli.cli.ablation_tables import show_ablation, show_plan
from carso_cli.cli.console import print_json, print_plain
from carso_cli.cli.progress import RichReporter
from carso_cli.errors import UsageError

if TYPE_CHECKING:
    from carso_cli.ablation.variants import Ablation
    from carso_cli.recipe.schema import Recipe

_KINDS = ("clean", "at")
_HINT = "carso ablate --all fills the paper's Table 17; carso ablate --help lists the rest"
Pair = tuple[str | None, str | None]
"""Training of the first and of the second classifier instance; None for the recipe's."""


def _text(text: str) -> str:
    if not text:
        raise ValueError("empty")
    return text


def _number(text: str) -> float:
    # In the function, so that help does not wait for pydantic.
    from carso_cli.recipe.section import parse_number

    return parse_number(text)


def _list(name: str, help: str, read: Callable[[str], Any], wanted: str) -> Any:  # noqa: ANN401  (typer's own type)
    """Return an option that takes a comma-separated list."""

    def entries(value: str) -> list[Any]:
        found = []
        for text in map(str.strip, value.split(",")):
            try:
                found.append(read(text))
            except ValueError:
                raise typer.BadParameter(f"{value}: '{text}' is not allowed; use {wanted}") from None
        return found

    return options.optional(name, metavar="LIST", help=f"{help}: {wanted}.", parser=entries)


def _kind(name: str, help: str) -> Any:  # noqa: ANN401  (typer's own type)
    return options.choice(name, help, *_KINDS, default="the recipe's")


FirstOption = Annotated[
    str | None, _kind("--first", "Training of the first classifier instance, which gives the representation")
]
SecondOption = Annotated[
    str | None, _kind("--second", "Training of the second classifier instance, which classifies")
]
AllOption = Annotated[bool, typer.Option("--all", help="All four combinations of kinds (Table 17).")]
AggregationsOption = Annotated[
    bool, typer.Option("--aggregations", help="The four aggregation rules (Tables 4 and 5).")
]
# `Any`, since Typer takes an option annotated as a list for one that is repeated.
CountsOption = Annotated[
    Any, _list("--n-samples", "Reconstructions per image", int, "whole numbers, such as 1,2,4,8,16")
]
LayersOption = Annotated[
    Any,
    _list(
        *("--layers", "Layers of the representation", _text),
        "all, first, last, groups, a group such as layer.1, or a layer",
    ),
]
FractionsOption = Annotated[
    Any,
    _list(
        *("--adversarial-fraction", "Perturbed fraction of training batches", _number),
        "numbers, such as 0,0.25,0.5",
    ),
]
MixesOption = Annotated[
    Any,
    _list(
        *("--attack-mix", "Attacks in the training batches, beside the balanced ones (Appendix A)", _text),
        "subsets, pgd-only, homogeneous, or one such as fgsm, half or pgd-full",
    ),
]
SeedsOption = Annotated[
    Any,
    _list("--seeds", "Seeds of the purifier's training: mean and deviation", int, "numbers, such as 0,1,2"),
]
SizesOption = Annotated[
    Any, _list("--eps", "Perturbation sizes in pixel units", _number, "numbers, such as 0,2/255,8/255")
]
AttackOption = Annotated[
    str | None,
    options.optional(
        "--attack", metavar="NAME", help="Protocol or attack (default: adaptive; on digits pgd-eot)."
    ),
]


def command(
    recipe: options.RecipeArgument = None,
    first: FirstOption = None,
    second: SecondOption = None,
    every: AllOption = False,
    aggregations: AggregationsOption = False,
    n_samples: CountsOption = None,
    layers: LayersOption = None,
    adversarial_fraction: FractionsOption = None,
    attack_mix: MixesOption = None,
    seeds: SeedsOption = None,
    eps: SizesOption = None,
    attack: AttackOption = None,
    run: options.RunOption = None,
    limit: options.LimitOption = None,
    seed: options.SeedOption = None,
    device: options.DeviceOption = "auto",
    resume: options.ResumeOption = False,
    json: options.JsonOption = False,
    dry_run: options.DryRunOption = False,
    overrides: options.SetOption = None,
) -> None:
    """Measure robust accuracy while varying one setting, in one table (Appendix D).

    Trains the purifiers that are missing, in folders beside the recipe's own run, as runs/digits-first-clean.
    Attacks every variant, and stores the table in RUN/ablations. Results that are stored already are reused.
    """
    chosen, folder = _recipe_with_layers(recipe, run, overrides)
    from carso_cli.ablation import variants as known

    ablations = _ablations(
        chosen,
        first_and_second=_pairs(first, second, every),
        aggregations=aggregations or None,
        sample_counts=n_samples,
        layer_subsets=layers,
        adversarial_fractions=adversarial_fraction,
        attack_mixes=attack_mix,
        seeds=seeds,
        perturbation_sizes=eps,
    )
    attack, limit, note = known.choose_budget(chosen, attack, _told_of(limit))
    settings: Any = {"attack": check_name(attack), "limit": limit, "seed": seed, "device": device}
    if dry_run:
        _show_plan(chosen, ablations, folder, settings, note, as_json=json)
        return
    from carso_cli.ablation.run import ablate
    from carso_cli.ablation.table import table_file

    tables = []
    for ablation in ablations:
        stored = ablate(
            chosen, ablation, run=folder, reporter=RichReporter(), resume=resume, note=note, **settings
        )
        tables.append(stored)
        # Shown one by one, since the next ablation may take hours.
        if not json:
            show_ablation(stored, [variant.label for variant in ablation.variants])
            print_plain(f"stored in {table_file(folder, ablation.name, stored['attack'])}")
    if json:
        print_json({"ablations": tables})


def _recipe_with_layers(
    reference: str | None, run: Path | None, overrides: list[str] | None
) -> tuple[Recipe, Path]:
    """Return recipe and run folder, with the layers that `auto` will stand for: variants need their names."""
    from carso_cli.recipe.schema import AUTO

    recipe, folder = options.find_recipe_of_run(reference, run, overrides)
    if recipe.representation.layers != (AUTO,):
        return recipe, folder
    from carso_cli.build import untrained_classifier, with_layers

    return with_layers(recipe, untrained_classifier(recipe)), folder


def _ablations(recipe: Recipe, **values: Any) -> list[Ablation]:  # noqa: ANN401  (each has its own)
    """Return the ablations of `carso_cli.ablation.variants` whose values are given."""
    from carso_cli.ablation import variants as known

    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        raise UsageError("nothing to vary is chosen", hint=_HINT)
    # The rules are always all four.
    return [
        known.aggregations(recipe) if name == "aggregations" else getattr(known, name)(recipe, value)
        for name, value in given.items()
    ]


def _told_of(limit: int | None) -> int | None:
    """Return `--limit`, and say what it does not cut."""
    if limit is not None:
        RichReporter().info(
            f"--limit {limit} cuts the images that are attacked, not those of a training; to cut these too: "
            f"--set data.train_limit={limit}"
        )
    return limit


def _pairs(first: str | None, second: str | None, every: bool) -> list[Pair] | None:
    """Return the combinations of kinds to measure, None if none was chosen."""
    if every:
        # Beside --all, --first and --second narrow the four combinations down.
        return [
            (one, other)
            for one in _KINDS
            for other in _KINDS
            if first in (None, one) and second in (None, other)
        ]
    return None if first is None and second is None else [(first, second)]


def _show_plan(
    recipe: Recipe,
    ablations: Sequence[Ablation],
    folder: Path,
    settings: Any,  # noqa: ANN401  (an EvaluationOptions, whose module loads torch)
    note: str,
    *,
    as_json: bool,
) -> None:
    from carso_cli.ablation.preflight import plan_ablation

    plans = [
        plan_ablation(recipe, ablation, run=folder, reporter=RichReporter(), options=settings)
        for ablation in ablations
    ]
    if as_json:
        print_json({"recipe": recipe.name, "run": str(folder), **settings, "note": note, "plans": plans})
    else:
        show_plan(plans, note)
