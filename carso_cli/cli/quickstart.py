"""`carso quickstart`: the whole method on digits, in about three minutes on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from carso_cli.cli import options
from carso_cli.cli.console import accuracy, duration, print_plain, print_result, show_table
from carso_cli.cli.progress import RichReporter

_ATTACKS = {"none": "clean", "noise": "random noise", "pgd": "PGD"}


def command(
    run: options.RunOption = None, device: options.DeviceOption = "auto", json: options.JsonOption = False
) -> None:
    """Train a purifier on digits, attack the classifier and the defence, and draw the reconstructions.

    Needs no data and no network: the images come with scikit-learn, the classifier with carso.
    """
    from carso_cli.tools.quickstart import quickstart

    folder = run or Path("runs") / "digits"
    result = quickstart(run=folder, reporter=RichReporter(), device=device)
    print_result(result, lambda found: _show(found, folder), as_json=json)


def _show(result: dict[str, Any], folder: Path) -> None:
    rows = [
        [
            row["target"],
            _ATTACKS.get(row["attack"], row["attack"]),
            row["view"] or "–",
            accuracy(row["accuracy"], row["ci95"]),
            str(row["n_images"]),
        ]
        for row in result["results"]
    ]
    columns = ("target", "attack", "view", "accuracy [95%]", "images")
    show_table(columns, rows, title="digits, WideResNet-10-1, eps 0.1", numeric=("images",))
    print_plain("the defence is random: its accuracy is a mean over draws")
    if result["training"] is not None:
        print_plain(f"purifier trained in {duration(result['training']['seconds_total'])}")
    print_plain(f"picture: {result['picture']}")
    print_plain(f"next:    carso evaluate --run {folder} --attack pgd-eot --n-samples 8")
