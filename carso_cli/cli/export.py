"""`carso export`: a trained defence as programs that run without carso."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from carso_cli.cli.display import output, print_json, table
from carso_cli.cli.options import (
    AggregationOption,
    JsonOption,
    NSamplesOption,
    RunOption,
    optional,
    read_recipe,
)
from carso_cli.cli.progress import RichReporter
from carso_cli.runs.folder import RunFolder


def command(
    run: RunOption = None,
    out: Annotated[
        Path | None,
        optional("--out", metavar="DIR", help="Folder to write to; RUN/export when left out."),
    ] = None,
    n_samples: NSamplesOption = None,
    aggregation: AggregationOption = None,
    json: JsonOption = False,
) -> None:
    """Write the defence as a torch.export program and, with the onnx extra, as ONNX.

    Both take images (batch, channels, H, W) and latents (batch, N, Z), so that they are deterministic, and
    return log-probabilities. Each is held against the defence before it is kept.
    """
    source = run or Path(read_recipe(None, None).run_folder)
    from carso_cli.tools.export import export_run

    result = export_run(
        source,
        out=out or RunFolder(source).inside("export"),
        reporter=RichReporter(),
        n_samples=n_samples,
        aggregation=aggregation,
    )
    if json:
        print_json(result)
        return
    _show(result)


def _show(result: dict[str, Any]) -> None:
    folder = Path(result["out"])
    rows = [
        [str(folder / name), f"{facts['largest_difference']:.1e}"] for name, facts in result["files"].items()
    ]
    output().print(table(("program", "largest difference"), rows, numeric=("largest difference",)))
    for name, facts in (result["inputs"] | result["outputs"]).items():
        output().print(f"{name}: {' x '.join(map(str, facts['shape']))}, {facts['values']}", soft_wrap=True)
    output().print(f"inputs, classes and checksums: {folder / 'defence.json'}", soft_wrap=True)
    if "defence.onnx" not in result["files"]:
        output().print("for ONNX as well: pip install 'carso[onnx]'")
