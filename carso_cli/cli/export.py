"""`carso export`: a trained defence as programs that run without carso."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from carso_cli.cli import options
from carso_cli.cli.console import print_plain, print_result, show_table
from carso_cli.cli.progress import RichReporter
from carso_cli.runs.folder import RunFolder


def command(
    run: options.RunOption = None,
    out: Annotated[
        Path | None,
        options.optional("--out", metavar="DIR", help="Folder to write to (default: RUN/export)."),
    ] = None,
    n_samples: options.NSamplesOption = None,
    aggregation: options.AggregationOption = None,
    classifier: options.ClassifierOption = None,
    json: options.JsonOption = False,
) -> None:
    """Export the defence as a torch.export program and, with the onnx extra, as an ONNX program.

    Both take images (batch, channels, H, W) and latents (batch, N, Z), so that they are deterministic, and
    return log-probabilities. Each program's output is compared with the defence's before it is kept.
    """
    source = options.run_or_default(run)
    from carso_cli.tools.export import export_run

    result = export_run(
        source,
        # `inside` refuses a link, which might lead out of the run.
        out=out or RunFolder(source).inside("export"),
        reporter=RichReporter(),
        n_samples=n_samples,
        aggregation=aggregation,
        classifier=classifier,
    )
    print_result(result, _show, as_json=json)


def _show(result: dict[str, Any]) -> None:
    folder = Path(result["out"])
    rows = [
        [str(folder / name), f"{facts['largest_difference']:.1e}"] for name, facts in result["files"].items()
    ]
    show_table(("program", "largest difference"), rows, numeric=("largest difference",))
    for name, facts in (result["inputs"] | result["outputs"]).items():
        print_plain(f"{name}: {' x '.join(map(str, facts['shape']))}, {facts['values']}")
    print_plain(f"inputs, classes and checksums: {folder / 'defence.json'}")
    if "defence.onnx" not in result["files"]:
        print_plain("for ONNX as well: pip install 'carso[onnx]'")
