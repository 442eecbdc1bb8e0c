"""What a hardening found: size of the audits, the comparison of before and after, pictures and a page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from carso_cli.data.image_set import ImageSet, balanced_subset
from carso_cli.defence.defended_model import Defence
from carso_cli.evaluation.audit_report import AuditReport
from carso_cli.evaluation.audit_setup import BUDGETS, AuditBudget
from carso_cli.evaluation.protocols import UNPERTURBED
from carso_cli.io.json_files import read_json_lines, write_atomically, write_json
from carso_cli.pictures.grids import Row, amplified, render_grid
from carso_cli.recipe.load import load_recipe
from carso_cli.reports.harden_page import harden_page
from carso_cli.runs.folder import RunFolder
from carso_cli.runs.intervals import paired_difference
from carso_cli.runs.records import Record
from carso_cli.runs.summary import worst_case
from carso_cli.runtime.timing import seconds_of
from carso_cli.training.end_to_end import HELD_OUT_STEPS, perturbed
from carso_cli.training.selection import best_epoch

if TYPE_CHECKING:
    from carso_cli.hardening.harden import HardenOptions

SUMMARY = "harden.json"
"""What a hardening stores in its folder: plan, both audits, verdict."""
PAGE = "harden.html"
PICTURE = "examples.png"

_MEASURED = 16
_SOURCES = 2
"""Gradient sources that a defence mostly has."""
_PROBES = 20_000
"""Gradients of an image that an audit takes before its first attack, about."""
_FEWEST, _ENOUGH, _MOST = 50, 100, 1000
_SHOWN = 8


def audit_size(
    defence: Defence, images: ImageSet, seconds: float, seed: int, options: HardenOptions
) -> dict[str, Any]:
    """Choose budget and number of images of both audits, where they are not given.

    Args:
        defence: The slower of both models.
        images: What could be attacked.
        seconds: Time that is left.
        seed: Of the images on which a gradient is timed.
        options: The `budget` and `limit` that were asked for.

    Returns:
        `budget`, the larger one if it has time for `_ENOUGH` images, and `limit`.
    """
    device = defence.purifier.mean.device
    chosen, limit = options.get("budget"), options.get("limit")
    few = balanced_subset(images, _MEASURED, seed).pixels(slice(None)).to(device)

    def gradient() -> None:
        leaf = few.clone().requires_grad_()
        torch.autograd.grad(defence(leaf, view="exact").sum(), leaf)

    cost = seconds_of(gradient, device) / len(few)
    for budget in ("standard", "quick") if chosen is None else (chosen,):
        # Two audits; images that are broken are attacked no more, which makes it an upper bound.
        count = int((seconds / 2.0 / cost - _PROBES) / _passes(BUDGETS[budget], len(images.classes)))
        if count >= min(_ENOUGH, limit or _ENOUGH, len(images)):
            break
    found = min(max(count, _FEWEST), _MOST) if limit is None else limit
    return {"budget": budget, "limit": min(found, len(images))}


def _passes(size: AuditBudget, classes: int) -> float:
    """Return about how many gradients an audit takes of each image."""
    multi_target = _SOURCES * size.steps * min(9, classes - 1)
    # Auto-PGD on the cross-entropy, FAB, and Square, whose queries have no backward pass.
    return multi_target + 4 * size.steps + size.queries / 2


def summarise(before: AuditReport, after: AuditReport, run: RunFolder, seconds: float) -> dict[str, Any]:
    """Compare both audits, image by image.

    Returns:
        `before` and `after` (summaries), `robust_gain` and `clean_gain` (`difference`, `ci95`), `verdict`,
        `headline`, `training` (of the epoch that is kept) and `seconds`.
    """
    gains = {
        name: _gain(choose(after.records), choose(before.records))
        for name, choose in (("robust_gain", _attacked), ("clean_gain", _clean))
    }
    metrics = read_json_lines(run.metrics)
    verdict = _verdict(after, gains["robust_gain"]["ci95"])
    low, high = gains["robust_gain"]["ci95"]
    headline = (
        f"robust accuracy {before.accuracy:.3f} -> {after.accuracy:.3f}, "
        f"{gains['robust_gain']['difference']:+.3f} [{low:+.2f}, {high:+.2f}], clean "
        f"{before.clean_accuracy:.3f} -> {after.clean_accuracy:.3f} on {after.n_images} images: {verdict}"
    )
    return {
        "headline": headline,
        "verdict": verdict,
        **gains,
        "training": metrics[best_epoch(metrics)],
        "seconds": round(seconds, 1),
        "processor_seconds": round(time.process_time(), 1),
        "before": before.summary,
        "after": after.summary,
    }


def _verdict(after: AuditReport, gain: Sequence[float]) -> str:
    if not after.trusted:
        return after.verdict
    if gain[0] > 0:
        return "hardened"
    return "not hardened: these images show no gain"


def _gain(ours: Sequence[Record], theirs: Sequence[Record]) -> dict[str, Any]:
    after, before = (
        [record.correct / record.draws for record in sorted(group, key=lambda record: record.index)]
        for group in (ours, theirs)
    )
    difference, low, high = paired_difference(after, before)
    return {"difference": difference, "ci95": [low, high]}


def _attacked(records: Sequence[Record]) -> list[Record]:
    return list(worst_case(records))


def _clean(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.attack == UNPERTURBED]


def write_outcome(
    root: Path,
    summary: dict[str, Any],
    before: AuditReport,
    after: AuditReport,
    defence: Defence,
    images: ImageSet,
) -> None:
    """Write summary, picture and page into the folder of a hardening."""
    picture = draw_examples(root, defence, images)
    write_atomically(root / PICTURE, picture)
    write_atomically(root / PAGE, harden_page(summary, before, after, picture))
    # Last: it says that the others are there.
    write_json(root / SUMMARY, summary)


def draw_examples(root: Path, defence: Defence, images: ImageSet) -> bytes:
    """Draw images, their perturbation against the defence, and what the purifier makes of both."""
    recipe = load_recipe(str(RunFolder(root).recipe.resolve()))
    device = defence.purifier.mean.device
    few = balanced_subset(images, _SHOWN, recipe.seed)
    clean, labels = few.pixels(slice(None)).to(device), few.labels.to(device)
    attacked = perturbed(recipe, defence, clean, labels, recipe.seed, HELD_OUT_STEPS)
    with torch.no_grad():
        latents = defence.draw_latents(len(few), 1)
        purified = [defence.purify(each, latents=latents)[:, 0] for each in (clean, attacked)]
        decisions = [
            [images.classes[place] for place in defence(each, latents=latents, view="exact").argmax(dim=1)]
            for each in (clean, attacked)
        ]
    # Under l2 a pixel may change by more than a share of the radius that the eye would see.
    largest = max(float((attacked - clean).abs().max()), 1e-6)
    rows = [
        Row("clean", clean, decisions[0]),
        Row("purified", purified[0]),
        Row(f"change\n× {0.5 / largest:.3g}", amplified(attacked - clean, largest)),
        Row("attacked", attacked, decisions[1], perturbed=True),
        Row("purified", purified[1], perturbed=True),
    ]
    return render_grid(rows, [images.classes[label] for label in labels])
