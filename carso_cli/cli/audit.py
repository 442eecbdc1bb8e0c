"""`carso audit`: the robust accuracy of any PyTorch model, and whether to trust it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from carso_cli.cli.audit_tables import audit_tables
from carso_cli.cli.console import duration, messages, output, print_json, table
from carso_cli.cli.options import (
    ClassifierOption,
    DeviceOption,
    JsonOption,
    LimitOption,
    choice,
    optional,
    parse_eps,
    whole,
)
from carso_cli.cli.progress import RichReporter
from carso_cli.errors import SanityCheckError, UsageError

if TYPE_CHECKING:
    from carso_cli.data.labelled_images import LabelledImages
    from carso_cli.evaluation.audit_report import AuditReport
    from carso_cli.tools.target import Target

BUDGETS = ("quick", "standard", "full")
EPS = {"linf": 8 / 255, "l2": 0.5}
"""Radius where none is given: that of CIFAR-10 in the literature."""


def checked_radius(eps: float, norm: str) -> float:
    """Return a radius; refuse one that no ball in [0, 1] has, such as 8 where 8/255 is meant."""
    from carso_cli.recipe.section import too_large

    if problem := too_large(eps, norm):
        raise UsageError(f"--eps: {problem}")
    return eps


def _in_a_folder(value: Path | None) -> Path | None:
    # Told before hours of attacks, not after them.
    if value is not None and not value.absolute().parent.is_dir():
        raise UsageError(f"{value.parent} does not exist, to write {value.name} into", hint="create it first")
    return value


TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="FILE.py:NAME or PACKAGE.MODULE:NAME (this code is EXECUTED; NAME is a function or class that "
        "returns a module or function from (B, channels, H, W) images in 0 to 1 to (B, classes) scores, or "
        "is one); a run folder; a recipe; or robustbench:NAME.",
    ),
]
DataOption = Annotated[
    str | None,
    optional(
        "--data",
        metavar="IMAGES",
        help="Folder or zip of class folders; .npz, .pt or .safetensors with images and labels; or digits, "
        "mnist, fashion-mnist, cifar10, cifar100, tinyimagenet200. The test images of a run or recipe when "
        "left out.",
    ),
]
BudgetOption = Annotated[
    str, choice("--budget", "How much the attacks may compute", *BUDGETS, default="standard")
]
NormOption = Annotated[str, choice("--norm", "Norm of the perturbation", *EPS, default="linf")]
EpsOption = Annotated[
    float | None,
    optional(
        "--eps",
        metavar="EPS",
        help="Perturbation size in pixel units; 8/255 under linf and 0.5 under l2 when left out.",
        parser=parse_eps,
    ),
]
ResizeOption = Annotated[
    int | None,
    whole("--resize", "Crop images to a square and resize them to NxN pixels.", 1),
]
OutOption = Annotated[
    Path | None,
    optional("--out", metavar="DIR", help="Folder for records and summary; nothing is kept without it."),
]
SurrogateOption = Annotated[
    list[str] | None,
    optional(
        "--surrogate",
        metavar="TARGET",
        help="A differentiable model like the target, whose gradients are used too; may be repeated.",
    ),
]
BpdaOption = Annotated[
    list[str] | None,
    optional(
        "--bpda",
        metavar="MODULE",
        help="A module of the target whose backward pass is replaced by the identity; may be repeated.",
    ),
]
AdversarialOption = Annotated[
    Path | None,
    optional(
        "--adversarial",
        metavar="FILE",
        help="Examples made elsewhere, one for each image of --data in its order, to be scored too.",
    ),
]
SeedOption = Annotated[int | None, whole("--seed", "Seed of everything random (default: 0).", 0)]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Resume what --out holds.")]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Exit with code 4 if the number is not trusted.")
]
HtmlOption = Annotated[
    bool, typer.Option("--html", help="Write the result as a page, too: audit.html in --out, or here.")
]
RobustBenchOption = Annotated[
    Path | None,
    optional(
        "--robustbench-json",
        metavar="FILE",
        help="Write the result as RobustBench's leaderboard keeps it; the paper's title and authors are left "
        "for you to fill in.",
        callback=_in_a_folder,
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Load everything and show the predicted time; attack nothing.")
]


def command(
    target: TargetArgument,
    data: DataOption = None,
    eps: EpsOption = None,
    norm: NormOption = "linf",
    budget: BudgetOption = "standard",
    limit: LimitOption = None,
    resize: ResizeOption = None,
    classifier: ClassifierOption = None,
    out: OutOption = None,
    surrogate: SurrogateOption = None,
    bpda: BpdaOption = None,
    adversarial: AdversarialOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    html: HtmlOption = False,
    robustbench: RobustBenchOption = None,
    strict: StrictOption = False,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Measure the robust accuracy of any PyTorch model, and say whether the number can be trusted.

    Needs no recipe and nothing of carso in the model: `carso audit model.py:build --data images`. The file
    that TARGET names is executed, as by `python model.py`; name only code that you trust.
    """
    if resume and out is None:
        raise UsageError("--resume needs the folder of the records", hint="add --out DIR")
    options: dict[str, Any] = {
        "eps": checked_radius(eps or EPS[norm], norm),
        "norm": norm,
        "budget": budget,
        "seed": seed or 0,
        "device": device,
    }
    chosen = {"limit": limit, "resize": resize, "seed": seed or 0}
    named, images, more = _load(target, data, surrogate or (), adversarial, chosen, norm, device, classifier)
    options |= {"name": named.name, "bpda": tuple(bpda or ()), "out": out, "resume": resume, **more}
    if dry_run:
        _show_cost(named, images, options, as_json=json)
        return
    from carso_cli.evaluation.audit import audit

    report = audit(named.audited, images.pixels, images.labels, reporter=RichReporter(), **_typed(options))
    _write(report, (out or Path()) / "audit.html" if html else None, robustbench, data or images.source)
    if json:
        print_json(report.summary)
    else:
        for part in audit_tables(report):
            # The first line is for programs too: it is never broken into two.
            output().print(part, soft_wrap=isinstance(part, Text))
    if strict and not report.trusted:
        raise SanityCheckError(report.verdict, hint="each failed check says what its failure means")


def _write(report: AuditReport, page: Path | None, robustbench: Path | None, data: str) -> None:
    """Write the files that are asked for, and say where."""
    if page is not None:
        report.to_html(page)
    if robustbench is not None:
        report.to_robustbench(Path(data).stem, robustbench)
    for path in filter(None, (page, robustbench)):
        messages().print(f"{path} written", soft_wrap=True)


def _typed(options: dict[str, Any]) -> Any:  # noqa: ANN401  (the keyword arguments of `audit`)
    return options


def _load(
    target: str,
    data: str | None,
    surrogates: Sequence[str],
    adversarial: Path | None,
    chosen: dict[str, Any],
    norm: str,
    device: str,
    classifier: str | None,
) -> tuple[Target, LabelledImages, dict[str, Any]]:
    """Return the target, its images, and the surrogates and examples that are given beside them."""
    from carso_cli.tools.target import load_target, load_target_examples, load_target_images

    reporter = RichReporter()
    found, *others = (
        load_target(each, reporter=reporter, data=data, norm=norm, device=device, classifier=classifier)
        for each in (target, *surrogates)
    )
    images = load_target_images(data, found, reporter=reporter, **_typed(chosen))
    more: dict[str, Any] = {"surrogates": tuple(other.model for other in others)}
    if adversarial is not None:
        more["adversarial"] = load_target_examples(adversarial, images, reporter=reporter)
    return found, images, more


def _show_cost(target: Target, images: LabelledImages, options: dict[str, Any], *, as_json: bool) -> None:
    """Show the settings and the predicted time; attack nothing."""
    from carso_cli.evaluation.audit import estimate_audit

    cost = estimate_audit(target.audited, images.pixels, images.labels, **_typed(options))
    shown = {
        "target": target.name,
        **{name: value for name, value in target.identity.items() if value is not None},
        "images": f"{len(images)} of {images.source}",
        **{name: options[name] for name in ("eps", "norm", "budget", "seed", "device")},
    }
    if as_json:
        print_json({"settings": shown, "cost": cost})
        return
    settings = [[name, str(value)] for name, value in shown.items()]
    output().print(table(("setting", ""), settings, title="carso audit"))
    rows = [[job["job"], duration(job["seconds"])] for job in cost["jobs"]]
    rows.append(["in all, about", duration(cost["seconds"])])
    output().print(table(("job", "time"), rows, title="predicted time on this device", numeric=("time",)))
