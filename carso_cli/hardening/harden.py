"""Give a frozen classifier a purifier that makes it robust, and show what that changed.

    defence = harden(model, images, labels, eps=8 / 255, seconds=3600, out="hardened")

The steps, in order: check that the classifier passes gradients on; choose layers; predict from measured steps
what can be trained in the time; train a purifier on the ELBO, then through the frozen classifier, keeping the
epoch that is best on held-out images; audit classifier and defence with the same attacks on the same images;
write the verdict. The classifier's weights are never changed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from carso_cli import __version__
from carso_cli.attacks.gradient_sources import Model
from carso_cli.build import choose_device, load_defence
from carso_cli.data.image_set import ImageSet
from carso_cli.defence.defended_model import Defence
from carso_cli.errors import InterruptedRun, StateError, UsageError
from carso_cli.evaluation.audit import audit
from carso_cli.evaluation.audit_report import AuditReport
from carso_cli.evaluation.audit_setup import Images, as_image_set
from carso_cli.hardening.images import HardeningImages, split_images, with_classes
from carso_cli.hardening.outcome import SUMMARY, audit_size, summarise, write_outcome
from carso_cli.hardening.plan import (
    TRAINING_SHARE,
    Plan,
    base_recipe,
    checked_classifier,
    choose_layers,
    make_plan,
)
from carso_cli.io.json_files import ensure_folder, read_json, read_json_lines, write_json
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter
from carso_cli.tools.target import ExactView
from carso_cli.training.purifier import train_purifier


class HardenOptions(TypedDict, total=False):
    """What may be chosen in a hardening; each has a default."""

    eps: float
    """Radius in pixel units; 8/255."""
    norm: str
    """`linf`, the default, or `l2`."""
    seconds: float
    """Time for training and audits together; an hour."""
    condition: str | None
    """`layers` of the classifier, or the `image` alone; layers where some give square maps when None."""
    budget: str | None
    """Of both audits, as of `audit`; the largest that there is time for when None."""
    limit: int | None
    """Images of both audits; as many as there is time for, at most 1,000, when None."""
    device: str
    """`auto`, the default, `cpu`, `cuda`, `cuda:N` or `mps`."""
    seed: int
    """Seed of training, attacks and scores; 0."""
    name: str
    """What the classifier is called, and on a command line is named by; `model`."""
    out: str | Path | None
    """Folder of the result, a run; dropped afterwards when None."""
    resume: bool
    """Resume what `out` holds, or return its result."""


@dataclass(frozen=True, eq=False)
class Hardened:
    """Result of a hardening.

    Args:
        defence: The classifier behind its purifier.
        summary: As stored in `harden.json`, plain JSON values.
        before: Audit of the classifier.
        after: Audit of the defence.
    """

    defence: Defence
    summary: dict[str, Any]
    before: AuditReport
    after: AuditReport


def harden(
    model: Model,
    train_images: Images,
    labels: Tensor | None = None,
    *,
    test: tuple[Tensor, Tensor] | ImageSet | None = None,
    reporter: Reporter | None = None,
    **options: Unpack[HardenOptions],
) -> Defence:
    """Train a purifier in front of a frozen classifier, and audit both.

    Args:
        model: (B, channels, H, W) images in [0, 1] to (B, C) scores, with gradients; it is frozen, and its
            weights are never changed.
        train_images: (M, channels, H, W) float32 in [0, 1] or uint8; an `ImageSet`; or batches of images and
            labels, such as a DataLoader.
        labels: (M,) int64; None where the images bring theirs.
        test: Images and labels of the audits; a fifth of the training images when None.
        reporter: Where progress goes; shown on the terminal when None.
        options: Radius, time, folder and the rest: see `HardenOptions`.

    Returns:
        The defence, frozen: `defence(images)` gives log P, (B, C). `OUT/harden.html` shows what was found.

    Raises:
        UsageError: If the classifier passes no gradients on, or an option is not allowed.
        DataError: If images do not fit.
        InterruptedRun: On Ctrl-C; what is trained is saved in `out`.
    """
    # By name, since the command line lies above this room, and Python users want its progress bars.
    shown: Reporter = reporter or resolve_name("carso_cli.cli.progress:RichReporter")()
    train = as_image_set(train_images, labels)
    if test is None:
        images = split_images(train, options.get("seed", 0))
    else:
        images = HardeningImages(train, test if isinstance(test, ImageSet) else as_image_set(*test))
    return run_hardening(model, images, None, reporter=shown, **options).defence


def run_hardening(
    model: Model,
    images: HardeningImages,
    target: Recipe | None,
    *,
    reporter: Reporter,
    **options: Unpack[HardenOptions],
) -> Hardened:
    """Harden a model; see `harden`.

    Args:
        model: The classifier.
        images: To train and to audit on.
        target: The recipe that names the classifier, if one does.
        reporter: Where progress goes.
        options: See `HardenOptions`.
    """
    out, began = options.get("out"), time.monotonic()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()) if out is None else out)
        stored = _stored(root, options)
        device = choose_device(options.get("device", "auto"))
        if isinstance(model, nn.Module):
            model.to(device).eval()
        work = _prepare(model, images, target, root, stored, device, options, reporter)
        stack.enter_context(_resumable(options.get("name", "model"), root))
        # As if the earlier starts had been one with this.
        began -= _train(work, root, device, options, reporter, began)
        return _audit_both(work, root, options, reporter, began)


@dataclass(frozen=True, eq=False)
class _Work:
    """A hardening before its training."""

    model: Model
    classifier: nn.Module
    images: HardeningImages
    plan: Plan
    settings: dict[str, Any]


def _settings(images: HardeningImages, options: HardenOptions) -> dict[str, Any]:
    """Return what a resumed hardening must share with its first start."""
    return {
        "target": options.get("name", "model"),
        "eps": float(options.get("eps", 8 / 255)),
        "norm": options.get("norm", "linf"),
        "condition": options.get("condition"),
        "seed": options.get("seed", 0),
        "images": {"train": images.train.fingerprint(), "test": images.test.fingerprint()},
    }


def _stored(root: Path, options: HardenOptions) -> dict[str, Any] | None:
    """Return what the folder holds of an earlier start; None where there is none.

    Raises:
        UsageError: If it holds a run and is not to be resumed.
        StateError: If there is nothing to resume.
    """
    started = (root / SUMMARY).is_file()
    if started and not options.get("resume"):
        raise UsageError(
            f"{root} already holds a hardened model, or a part of one",
            hint="resume it with --resume, or choose another folder with --out DIR",
        )
    if options.get("resume") and not started:
        raise StateError(f"{root} holds nothing to resume", hint="leave out --resume to start")
    return read_json(root / SUMMARY) if started else None


def _prepare(
    model: Model,
    images: HardeningImages,
    target: Recipe | None,
    root: Path,
    stored: dict[str, Any] | None,
    device: torch.device,
    options: HardenOptions,
    reporter: Reporter,
) -> _Work:
    """Check classifier and images, and plan the training, or take the plan that is stored."""
    few = images.train.pixels(slice(0, 2)).to(device)
    with torch.no_grad():
        answer: object = model(few)
    if not isinstance(answer, Tensor) or answer.ndim != 2:
        kind = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise UsageError(f"{options.get('name', 'model')} answers {kind}; (B, classes) scores are needed")
    images = with_classes(images, answer.shape[1], options.get("name", "model"))
    settings = _settings(images, options)
    if stored is None:
        recipe = base_recipe(
            images,
            target=target,
            name=settings["target"],
            eps=settings["eps"],
            norm=settings["norm"],
            seed=settings["seed"],
        )
        classifier = checked_classifier(model, recipe, few)
        recipe = choose_layers(recipe, classifier, options.get("condition"), few[:1])
        layers = recipe.representation.layers
        reporter.info(f"conditions on {'the image alone' if layers == ('image',) else ', '.join(layers)}")
        plan = make_plan(
            recipe,
            classifier,
            count=len(images.train),
            seconds=options.get("seconds", 3600.0) * TRAINING_SHARE,
            start=root / "start" / "purifier.safetensors",
        )
        if plan.warning:
            reporter.warning(plan.warning)
        ensure_folder(root)
        write_json(root / SUMMARY, {"carso": __version__, "settings": settings, "plan": plan.as_dict()})
    else:
        plan = Plan.from_dict(stored["plan"])
        for key, value in settings.items():
            if stored["settings"].get(key) != value:
                raise StateError(
                    f"{root} was started with another {key}: {stored['settings'].get(key)}, not {value}",
                    hint="resume with the first start's arguments, or choose another folder with --out DIR",
                )
        classifier = checked_classifier(model, plan.final, few)
    reporter.info(
        f"{plan.limit} of {len(images.train)} training images; {plan.start.training.epochs} epochs on the "
        f"ELBO, then {plan.final.training.epochs} through the classifier, as far as the time allows"
    )
    return _Work(model, classifier, images, plan, settings)


@contextmanager
def _resumable(name: str, root: Path) -> Iterator[None]:
    """Let an interruption name the command that resumes the hardening, not that of one of its parts."""
    try:
        yield
    except InterruptedRun as stopped:
        raise InterruptedRun(
            stopped.message,
            hint=f"resume with the same command and --resume: carso harden {name} … --out {root} --resume",
        ) from None


def _train(
    work: _Work,
    root: Path,
    device: torch.device,
    options: HardenOptions,
    reporter: Reporter,
    began: float,
) -> float:
    """Train both purifiers, or what is left of them; return the seconds that earlier starts took."""
    parts = ((root / "start", work.plan.start), (root, work.plan.final))
    earlier = sum(
        float(line["seconds"]) for path, _ in parts for line in read_json_lines(RunFolder(path).metrics)
    )
    ends = began - earlier + options.get("seconds", 3600.0) * TRAINING_SHARE
    for path, recipe in parts:
        folder = RunFolder(path)
        if folder.purifier.is_file():
            continue
        reporter.info(
            "training the purifier on the ELBO"
            if recipe.training.objective == "elbo"
            else "training the purifier through the frozen classifier"
        )
        train_purifier(
            recipe,
            run=path,
            reporter=reporter,
            resume=folder.recipe.is_file(),
            device=str(device),
            limit=work.plan.limit,
            classifier=work.classifier,
            images=work.images.train,
            seconds=max(ends - time.monotonic(), 0.0),
        )
    return earlier


def _audit_both(
    work: _Work, root: Path, options: HardenOptions, reporter: Reporter, began: float
) -> Hardened:
    """Audit classifier and defence alike; write and return what was found."""
    defence = load_defence(root, device=options.get("device", "auto"), classifier=work.classifier)
    stored = read_json(root / SUMMARY)
    if "audit" not in stored:
        left = max(began + options.get("seconds", 3600.0) - time.monotonic(), 0.0)
        stored["audit"] = audit_size(defence, work.images.test, left, work.settings["seed"], options)
        write_json(root / SUMMARY, stored)
    budget, limit = stored["audit"]["budget"], stored["audit"]["limit"]
    reports = {}
    for part, model in (("before", work.model), ("after", ExactView(defence))):
        reporter.info(f"auditing {'the classifier' if part == 'before' else 'the defence'}")
        name = work.settings["target"] if part == "before" else f"{work.settings['target']}, hardened"
        reports[part] = audit(
            model,
            work.images.test,
            eps=work.settings["eps"],
            norm=work.settings["norm"],
            budget=budget,
            limit=limit,
            seed=work.settings["seed"],
            device=options.get("device", "auto"),
            name=name,
            out=root / "audit" / part,
            # A part that an earlier start has finished or begun.
            resume=True,
            reporter=reporter,
        )
    before, after = reports["before"], reports["after"]
    summary = stored | summarise(before, after, RunFolder(root), time.monotonic() - began)
    write_outcome(root, summary, before, after, defence, work.images.test)
    return Hardened(defence, summary, before, after)
