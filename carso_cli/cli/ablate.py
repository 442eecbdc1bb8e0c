"""`carso ablate`: the paper's ablations and further ones, each one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from carso_cli.attacks.registry import check_name
from carso_cli.cli.ablation_tables import show_ablation, show_plan
from carso_cli.cli.display import output, print_json
from carso_cli.cli.options import (
    DeviceOption,
    DryRunOption,
    JsonOption,
    LimitOption,
    RecipeArgument,
    ResumeOption,
    RunOption,
    SeedOption,
    SetOption,
    find_recipe_of_run,
    one_of,
    optional,
)
from carso_cli.cli.progress import RichReporter
from carso_cli.errors import UsageError

if TYPE_CHECKING:
    from carso_cli.ablation.variants import Ablation
    from carso_cli.recipe.schema import Recipe

_KINDS = ("clean", "at")


def _split(value: str, option: str, read: Callable[[str], Any], wanted: str) -> list[Any]:
    """Read a comma-separated list.

    Raises:
        UsageError: If an entry cannot be read.
    """
    entries = []
    for text in value.split(","):
        try:
            entries.append(read(text.strip()))
        except ValueError:
            raise UsageError(f"{option} {value}: '{text.strip()}' is not allowed; use {wanted}") from None
    return entries


def _word(text: str) -> str:
    if not text:
        raise ValueError
    return text


def _list(option: str, meaning: str) -> Any:  # noqa: ANN401  (typer's own type)
    return optional(option, metavar="LIST", help=meaning)


def _kind(option: str, meaning: str) -> Any:  # noqa: ANN401  (typer's own type)
    return optional(option, metavar="KIND", help=meaning, callback=one_of("kind", _KINDS))


FirstOption = Annotated[
    str | None, _kind("--first", "Training of the first instance, clean or at: the representation's.")
]
SecondOption = Annotated[
    str | None, _kind("--second", "Training of the second instance, clean or at: it classifies.")
]
AllOption = Annotated[bool, typer.Option("--all", help="All four combinations: Table 17.")]
AggregationsOption = Annotated[
    bool, typer.Option("--aggregations", help="The four aggregation rules: Tables 4 and 5.")
]
CountsOption = Annotated[str | None, _list("--n-samples", "Reconstructions per image, such as 1,2,4,8,16.")]
LayersOption = Annotated[
    str | None, _list("--layers", "Of all, first, last, groups, a group such as layer.1, a layer.")
]
FractionsOption = Annotated[
    str | None, _list("--adversarial-fraction", "Perturbed share of batches, such as 0,0.25,0.5.")
]
SizesOption = Annotated[
    str | None, _list("--eps", "Perturbation sizes in pixel units, such as 0,2/255,8/255.")
]
AttackOption = Annotated[
    str | None,
    optional(
        "--attack",
        metavar="NAME",
        help="Protocol or attack; adaptive when left out, pgd-eot on digits.",
    ),
]


def command(
    recipe: RecipeArgument = None,
    first: FirstOption = None,
    second: SecondOption = None,
    every: AllOption = False,
    aggregations: AggregationsOption = False,
    n_samples: CountsOption = None,
    layers: LayersOption = None,
    adversarial_fraction: FractionsOption = None,
    eps: SizesOption = None,
    attack: AttackOption = None,
    run: RunOption = None,
    limit: LimitOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
    overrides: SetOption = None,
) -> None:
    """Vary one thing, train what is missing, attack every variant, print one table (Appendix D).

    Purifiers of variants lie beside the recipe's own run, as in runs/digits-first-clean. The table is stored
    in RUN/ablations. What is trained or evaluated already is used again.
    """
    chosen, folder = find_recipe_of_run(recipe, run, overrides)
    from carso_cli.ablation.variants import choose_budget

    ablations = _ablations(
        chosen,
        pairs=_pairs(first, second, every),
        rules=aggregations,
        counts=n_samples,
        layers=layers,
        fractions=adversarial_fraction,
        sizes=eps,
    )
    attack, limit, note = choose_budget(chosen, attack, limit)
    options: Any = {"attack": check_name(attack), "limit": limit, "seed": seed, "device": device}
    if dry_run:
        _show_plan(chosen, ablations, folder, options, note, as_json=json)
        return
    from carso_cli.ablation.run import ablate
    from carso_cli.ablation.table import table_file

    tables = []
    for ablation in ablations:
        stored = ablate(
            chosen, ablation, run=folder, reporter=RichReporter(), resume=resume, note=note, **options
        )
        tables.append(stored)
        if not json:
            show_ablation(stored, [variant.label for variant in ablation.variants])
            file = table_file(folder, ablation.name, stored["attack"])
            output().print(f"stored in {file}", soft_wrap=True)
    if json:
        print_json({"ablations": tables})


def _pairs(first: str | None, second: str | None, every: bool) -> list[tuple[str | None, str | None]] | None:
    """Return the combinations asked for, None if none is."""
    if every:
        return [
            (one, other)
            for one in _KINDS
            for other in _KINDS
            if first in (None, one) and second in (None, other)
        ]
    return None if first is None and second is None else [(first, second)]


def _ablations(
    recipe: Recipe,
    *,
    pairs: Sequence[tuple[str | None, str | None]] | None,
    rules: bool,
    counts: str | None,
    layers: str | None,
    fractions: str | None,
    sizes: str | None,
) -> list[Ablation]:
    """Return the ablations asked for, in the order of the options.

    Raises:
        UsageError: If none is, or a list cannot be read.
    """
    from carso_cli.ablation import variants as known
    from carso_cli.recipe.number import parse_number

    found = []
    if pairs is not None:
        found.append(known.first_and_second(recipe, pairs))
    if rules:
        found.append(known.aggregations(recipe))
    if counts is not None:
        whole = _split(counts, "--n-samples", int, "whole numbers, such as 1,2,4,8")
        found.append(known.sample_counts(recipe, whole))
    if layers is not None:
        words = _split(layers, "--layers", _word, "names, such as all,first,last,groups")
        found.append(known.layer_subsets(recipe, words))
    if fractions is not None:
        shares = _split(fractions, "--adversarial-fraction", parse_number, "numbers, such as 0,0.25,0.5")
        found.append(known.adversarial_fractions(recipe, shares))
    if sizes is not None:
        numbers = _split(sizes, "--eps", parse_number, "numbers, such as 0,2/255,8/255")
        found.append(known.perturbation_sizes(recipe, numbers))
    if not found:
        raise UsageError(
            "nothing to vary is chosen",
            hint="carso ablate --all fills the paper's Table 17; carso ablate --help lists the rest",
        )
    return found


def _show_plan(
    recipe: Recipe,
    ablations: Sequence[Ablation],
    folder: Path,
    options: Any,  # noqa: ANN401  (an EvaluationOptions, whose module loads torch)
    note: str,
    *,
    as_json: bool,
) -> None:
    from carso_cli.ablation.preflight import plan_ablation

    plans = [
        plan_ablation(recipe, ablation, run=folder, reporter=RichReporter(), options=options)
        for ablation in ablations
    ]
    if as_json:
        print_json({"recipe": recipe.name, "run": str(folder), **options, "note": note, "plans": plans})
    else:
        show_plan(plans, note)
