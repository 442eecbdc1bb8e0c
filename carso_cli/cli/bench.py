"""`carso bench`: how fast each kind of work is on this device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from carso_cli.cli import options
from carso_cli.cli.console import figure, messages, output, print_result, show_table, table
from carso_cli.cli.progress import RichReporter

BatchSizeOption = Annotated[
    int | None,
    options.whole("--batch-size", "Images in every case, at least 8 (default: the recipe's).", 8),
]
CaseOption = Annotated[
    list[str] | None, options.optional("--case", metavar="NAME", help="Time only this case; repeatable.")
]
CompareOption = Annotated[
    Path | None, options.optional("--compare", metavar="FILE", help="Result of an earlier bench --json.")
]


def command(
    recipe: options.RecipeArgument = None,
    batch_size: BatchSizeOption = None,
    case: CaseOption = None,
    compare: CompareOption = None,
    overrides: options.SetOption = None,
    device: options.DeviceOption = "auto",
    json: options.JsonOption = False,
) -> None:
    """Measure the speed of the recipe's work on this device, beside a naive baseline of the same.

    Needs neither data nor trained weights. On a CPU, batches are cut to 16 images, and 64 in training, unless
    --batch-size is given.
    """
    chosen = options.read_recipe(recipe, overrides)
    from carso_cli.bench import run as workflow

    # Read first, so that a damaged file is met before minutes of timing.
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
    ratios = {} if earlier is None else workflow.compare(result, earlier, reporter)
    print_result(result, _show, as_json=json)
    if earlier is not None:
        columns = ("case", "images/s, now over then")
        compared = table(columns, [[name, f"{ratios[name]:.2f}x"] for name in ratios], numeric=columns[1:])
        # Under --json stdout holds the result alone, so that it can be stored and compared with.
        (messages() if json else output()).print(compared)


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
    caption = (
        f"of peak: share of {figure(result['peak_flops'] / 1e9)} GFLOP/s, measured on a matrix product in "
        "the same rounds; speed-up: over the naive baseline; MiB: peak memory of tensors, without "
        "weights and images"
    )
    title = f"{result['recipe']} on {result['device']}"
    show_table(heading, rows, title=title, caption=caption, numeric=heading[1:])
