"""`carso bench`: how fast each kind of work is on this device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from carso_cli.cli.display import figure, messages, output, print_json, table
from carso_cli.cli.options import (
    DeviceOption,
    JsonOption,
    RecipeArgument,
    SetOption,
    optional,
    read_recipe,
    whole_from,
)
from carso_cli.cli.progress import RichReporter

BatchSizeOption = Annotated[
    int | None,
    optional(
        "--batch-size",
        metavar="N",
        help="Images of every case, at least 8; the recipe's number when left out.",
        parser=whole_from(8),
    ),
]
CaseOption = Annotated[
    list[str] | None, optional("--case", metavar="NAME", help="Time this case only; may be repeated.")
]
CompareOption = Annotated[
    Path | None, optional("--compare", metavar="FILE", help="Result of an earlier bench --json.")
]


def command(
    recipe: RecipeArgument = None,
    batch_size: BatchSizeOption = None,
    case: CaseOption = None,
    compare: CompareOption = None,
    overrides: SetOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Time the recipe's work on this device, beside a naive baseline of the same.

    Needs neither data nor trained weights. On a CPU, batches are cut to 16 images, and 64 in training, unless
    --batch-size is given.
    """
    chosen = read_recipe(recipe, overrides)
    from carso_cli.bench import run as workflow

    earlier = None if compare is None else workflow.read_bench(compare)
    reporter = RichReporter()
    result = workflow.bench(
        chosen,
        reporter=reporter,
        device=device,
        batch_size=batch_size,
        cases=case or (),
        overrides=overrides or (),
    )
    ratios = None if earlier is None else workflow.compare(result, earlier, reporter)
    if json:
        print_json(result)
        # The result is of a fixed form; the comparison is for the reader.
        if ratios is not None:
            messages().print(_comparison(ratios))
        return
    _show(result)
    if ratios is not None:
        output().print(_comparison(ratios))


def _show(result: dict[str, Any]) -> None:
    rows = [
        [
            case["name"],
            figure(case["images_per_second"]),
            figure(case["peak_memory_bytes"] / 2**20),
            figure(case["flops"] / 1e9),
            figure(case["flops"] / case["seconds"] / 1e9),
            f"{case['share_of_peak']:.2f}",
            f"{case['ratio_to_straightforward']:.2f}x",
        ]
        for case in result["cases"]
    ]
    heading = ("case", "images/s", "MiB", "GFLOP", "GFLOP/s", "of peak", "speed-up")
    output().print(
        table(
            heading,
            rows,
            title=f"{result['recipe']} on {result['device']}",
            caption=f"of peak: share of {figure(result['peak_flops'] / 1e9)} GFLOP/s, measured on a matrix "
            "product in the same rounds; speed-up: over the naive baseline; MiB: most memory "
            "of tensors, on top of weights and images",
            numeric=heading[1:],
        )
    )


def _comparison(ratios: dict[str, float]) -> Table:
    rows = [[name, f"{ratio:.2f}x"] for name, ratio in ratios.items()]
    return table(("case", "images/s, now over then"), rows, numeric=("images/s, now over then",))
