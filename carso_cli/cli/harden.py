"""`carso harden`: a purifier for a classifier that nobody may retrain."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from carso_cli.cli.audit import (
    BUDGETS,
    EPS,
    EpsOption,
    NormOption,
    ResizeOption,
    ResumeOption,
    SeedOption,
    TargetArgument,
    checked_radius,
)
from carso_cli.cli.console import accuracy, duration, output, print_json, print_plain, show_table
from carso_cli.cli.options import DeviceOption, JsonOption, LimitOption, choice, optional
from carso_cli.cli.progress import RichReporter

if TYPE_CHECKING:
    from carso_cli.hardening.harden import Hardened

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(value: str) -> float:
    """Read a time such as `90s`, `10m` or `1.5h`."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smh])", value)
    if match is None or not float(match[1]):
        raise typer.BadParameter(f"'{value}' is not allowed; use a time such as 90s, 10m or 1.5h")
    return float(match[1]) * _UNITS[match[2]]


DataOption = Annotated[
    str | None,
    optional(
        "--data",
        metavar="IMAGES",
        help="Images to train on: a folder or zip of class folders; .npz, .pt or .safetensors with images "
        "and labels; or digits, cifar10, cifar100, tinyimagenet200. Those of a recipe when left out. A test "
        "split, or else a fifth of the images, is kept for the audits.",
    ),
]
TimeOption = Annotated[
    float | None,
    optional(
        "--time",
        metavar="TIME",
        help="Time for training and audits together, such as 90s, 10m or 1h (default: 1h).",
        parser=_seconds,
    ),
]
OutOption = Annotated[
    Path | None,
    optional("--out", metavar="DIR", help="Folder of the hardened model (default: runs/NAME-hardened)."),
]
ConditionOption = Annotated[
    str | None,
    choice(
        "--condition",
        "What the purifier sees of an image",
        *("layers", "image"),
        default="layers, where the model has some that give square maps",
    ),
]
BudgetOption = Annotated[
    str | None,
    choice(
        "--budget",
        "How much the attacks of both audits may compute",
        *BUDGETS,
        default="standard, or quick if there is no time for that",
    ),
]


def command(
    target: TargetArgument,
    data: DataOption = None,
    eps: EpsOption = None,
    norm: NormOption = "linf",
    time: TimeOption = None,
    out: OutOption = None,
    condition: ConditionOption = None,
    budget: BudgetOption = None,
    limit: LimitOption = None,
    resize: ResizeOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    json: JsonOption = False,
) -> None:
    """Make a trained classifier robust without changing its weights: put a purifier in front of it.

    Trains the purifier through the frozen model, audits the model before and after with the same attacks, and
    writes a folder that `audit`, `predict` and `export` take. The file that TARGET names is executed, as by
    `python model.py`; name only code that you trust.
    """
    from carso_cli.hardening.harden import run_hardening
    from carso_cli.hardening.images import load_hardening_images
    from carso_cli.tools.target import load_target

    reporter = RichReporter()
    frozen = load_target(target, reporter=reporter, data=data, norm=norm, bare=True)
    # A recipe's radius is that of its images.
    default = EPS[norm] if frozen.recipe is None else frozen.recipe.threat.eps
    radius = checked_radius(eps or default, norm)
    images = load_hardening_images(data, frozen, reporter=reporter, resize=resize, seed=seed or 0)
    name = Path(target).name if frozen.recipe is None else frozen.recipe.name
    folder = out or Path("runs") / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-hardened"
    result = run_hardening(
        frozen.model,
        images,
        frozen.recipe,
        reporter=reporter,
        eps=radius,
        norm=norm,
        seconds=time or 3600.0,
        condition=condition,
        budget=budget,
        limit=limit,
        seed=seed or 0,
        device=device,
        name=target,
        out=folder,
        resume=resume,
    )
    if json:
        print_json(result.summary)
    else:
        _show(result, folder, target if frozen.recipe is None else None)


def _show(result: Hardened, folder: Path, code: str | None) -> None:
    summary = result.summary
    # The first line is for programs too: it is never broken into two.
    style = "bold" if summary["verdict"] == "hardened" else "bold red"
    output().print(Text(summary["headline"], style), soft_wrap=True)
    rows = [
        [
            "classifier alone" if name == "before" else "behind its purifier",
            accuracy(report.clean_accuracy, tuple(report.summary["clean"]["ci95"])),
            accuracy(report.accuracy, report.ci95),
            "trusted" if report.trusted else "not trusted",
        ]
        for name, report in (("before", result.before), ("after", result.after))
    ]
    title = f"{result.after.threat}, budget {result.after.summary['budget']}, {result.after.n_images} images"
    show_table(("", "clean", "robust", "number"), rows, title=title, numeric=("clean", "robust"))
    print_plain(f"time:  {duration(summary['seconds'])}, audits included")
    print_plain(f"page:  {folder / 'harden.html'}")
    print_plain(f"model: {folder}")
    again = "" if code is None or code.startswith("robustbench:") else f" --classifier {code}"
    print_plain(f"next:  carso predict IMAGE --run {folder}{again}")
