"""`carso quickstart`: the whole method on digits, in under three minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from carso_cli.cli.display import accuracy, duration, output, print_json, table
from carso_cli.cli.options import DeviceOption, JsonOption, RunOption
from carso_cli.cli.progress import RichReporter

_ATTACKS = {"none": "clean", "noise": "random noise", "pgd": "PGD"}


def command(run: RunOption = None, device: DeviceOption = "auto", json: JsonOption = False) -> None:
    """Train the purifier on digits, attack classifier and defence, and draw what the purifier makes of it.

    Needs no data and no network: the images come with scikit-learn, the classifier with carso.
    """
    from carso_cli.tools.quickstart import quickstart

    folder = run or Path("runs") / "digits"
    result = quickstart(run=folder, reporter=RichReporter(), device=device)
    if json:
        print_json(result)
        return
    _show(result, folder)


def _show(result: dict[str, Any], folder: Path) -> None:
    rows = [
        [
            row["target"],
            _ATTACKS.get(row["attack"], row["attack"]),
            row["view"] or "–",
            accuracy(row["accuracy"], tuple(row["ci95"])),
            str(row["n_images"]),
        ]
        for row in result["results"]
    ]
    columns = ("target", "attack", "view", "accuracy [95%]", "images")
    output().print(table(columns, rows, title="digits, WideResNet-10-1, eps 0.1", numeric=("images",)))
    if result["training"] is not None:
        output().print(f"purifier trained in {duration(result['training']['seconds_total'])}")
    output().print(f"picture: {result['picture']}", soft_wrap=True)
    output().print(f"next:    carso evaluate --run {folder} --attack pgd-eot --n-samples 8", soft_wrap=True)
