"""Prepares an audit: images of any form, probes, gradient sources with their checks, attacks, identity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from carso_cli import __version__
from carso_cli.attacks.attack import LEAVES_AFTER
from carso_cli.attacks.distillation import distil
from carso_cli.attacks.gradient_check import GradientCheck, check_gradient
from carso_cli.attacks.gradient_sources import (
    DISTILLED,
    OUTPUT,
    GradientSource,
    find_sources,
)
from carso_cli.attacks.model_parts import Model
from carso_cli.attacks.random_defence import ExactScores, RandomDefence
from carso_cli.attacks.registry import Budget
from carso_cli.attacks.smoothing import smoothed
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.build import choose_device
from carso_cli.data.image_set import ImageSet, balanced_subset
from carso_cli.errors import DataError, UsageError, nearest
from carso_cli.evaluation.attack_batch import Setting
from carso_cli.evaluation.audit_checks import FAITHFUL, is_right, pixel_radius
from carso_cli.evaluation.models import AuditedModel, all_weights, answers_of
from carso_cli.evaluation.probes import Facts, probe
from carso_cli.evaluation.protocols import GIVEN, UNPERTURBED, Job, Plan
from carso_cli.evaluation.rerun_checks import adequate_draws, spread
from carso_cli.io.checksum import fingerprint
from carso_cli.recipe.section import too_large

SURROGATE = "surrogate"
"""Kind of a source that the caller gives."""
_SAMPLES_PER_PASS = 4096
"""Samples of a random defence in one pass, at most; where memory does not hold them, passes shrink."""
CHECKED = 32
"""Images on which gradients are checked."""


@dataclass(frozen=True)
class AuditBudget:
    """How much an audit computes.

    Args:
        steps: Steps of each Auto-PGD.
        sources: Gradient sources that are attacked, at most.
        eot_samples: Samples of a random model per gradient, at most; where gradients agree, fewer.
        draws: R, calls of a random model per scoring set.
        queries: Queries of Square.
        batch_size: Images per block.
    """

    steps: int
    sources: int
    eot_samples: int
    draws: int
    queries: int
    batch_size: int = 100


BUDGETS = {
    "quick": AuditBudget(steps=10, sources=2, eot_samples=8, draws=20, queries=50),
    "standard": AuditBudget(steps=30, sources=5, eot_samples=16, draws=100, queries=300),
    "full": AuditBudget(steps=100, sources=8, eot_samples=64, draws=200, queries=5000),
}

Images = Tensor | ImageSet | Iterable[tuple[Tensor, Tensor]]


class AuditOptions(TypedDict, total=False):
    """What may be chosen in an audit; each has a default."""

    eps: float
    """Radius in pixel units; 8/255."""
    norm: str
    """`linf`, the default, or `l2`."""
    budget: str
    """`quick`, `standard`, the default, or `full`: see `BUDGETS`."""
    limit: int | None
    """Number of images, class-balanced; all when None."""
    device: str
    """`auto`, the default, `cpu`, `cuda`, `cuda:N` or `mps`."""
    seed: int
    """Seed of attacks and scores; 0."""
    surrogates: Sequence[Model]
    """Differentiable models whose examples are tried on this one."""
    bpda: Sequence[str]
    """Names of modules to be replaced by the identity in the backward pass."""
    adversarial: Tensor | None
    """(M, channels, H, W) examples of the same images made elsewhere; they join the worst case."""
    name: str
    """What the model is called; `model`."""
    out: str | Path | None
    """Folder that keeps the records; they are dropped afterwards when None."""
    resume: bool
    """Resume what is stored in `out`, or return its result."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """An audit before its first attack."""

    setting: Setting
    plan: Plan
    facts: Facts
    sources: dict[str, GradientSource]
    at_start: dict[str, GradientCheck]
    identity: dict[str, Any]
    budget: str


def prepare_audit(
    given_model: Model | RandomDefence, images: Images, labels: Tensor | None, **options: Unpack[AuditOptions]
) -> Prepared:
    """Probe a model, find its gradient sources, and plan the attacks; see `audit`."""
    eps, norm, seed = options.get("eps", 8 / 255), options.get("norm", "linf"), options.get("seed", 0)
    budget = options.get("budget", "standard")
    image_set, given = _limited(as_image_set(images, labels), options, seed)
    _require_allowed(budget, eps, norm, image_set)
    size, threat = BUDGETS[budget], ThreatModel(norm, eps)
    device = choose_device(options.get("device", "auto"))
    model, defence = _on_device(given_model, device)
    pixels, truth = image_set.pixels(slice(None)).to(device), image_set.labels.to(device)
    if given is not None:
        _require_in_ball(given.to(device), pixels, threat)
    radius = pixel_radius(threat, pixels)
    facts = probe(model, pixels, truth, eps=radius, seed=seed, batch_size=size.batch_size)
    few = spread(len(image_set), CHECKED)
    found = find_sources(model, pixels[few], eps=radius, bpda=options.get("bpda", ()), seed=seed)
    surrogates = options.get("surrogates", ())
    found += _surrogate_sources(surrogates, pixels[few], facts.classes)
    checks: dict[str, GradientCheck] = {}

    def check(sources: Sequence[GradientSource]) -> None:
        for source in sources:
            checks[source.name] = check_gradient(source, pixels[few], truth[few], eps=radius, seed=seed)

    check(found)
    added = _last_resorts(found, checks, pixels, radius, seed)
    check(added)
    found += added
    followed = _followed(found, checks, size.sources)
    sources = {source.name: source for source in found}
    per_pass = max(_SAMPLES_PER_PASS, defence.n_samples if defence else 1)
    audited = AuditedModel(model, defence, {}, device, per_pass, sources=sources, is_random=facts.random)
    plan = _plan(followed, facts, given is not None)
    samples = 1
    if facts.random and (job := plan.strongest) is not None:
        agreeing = adequate_draws(
            partial(audited.target, job, seed), pixels[few], truth[few], size.eot_samples
        )
        # Gradients that agree climb; the last points of accuracy take a steadier one.
        samples = min(4 * agreeing, size.eot_samples)
    attack_budget = _attack_budget(size, samples, eps)
    setting = Setting(audited, image_set, threat, attack_budget, seed, size.draws, selects=True, given=given)
    identity = {
        "weights": fingerprint(all_weights(model)),
        "answers": answers_of(model, pixels[few], seed),
        "surrogates": [answers_of(one, pixels[few], seed) for one in surrogates],
    }
    return Prepared(setting, plan, facts, sources, checks, _identity(budget, setting, plan, identity), budget)


def _on_device(model: Model | RandomDefence, device: torch.device) -> tuple[Model, RandomDefence | None]:
    """Return a model as a function of images, and the model itself where it says what of it is random."""
    if isinstance(model, nn.Module):
        model.to(device).eval()
    if isinstance(model, RandomDefence):
        return ExactScores(model), model
    return model, None


def _require_allowed(budget: str, eps: float, norm: str, images: ImageSet) -> None:
    if budget not in BUDGETS:
        raise UsageError(
            f"--budget {budget} is not allowed; use {', '.join(BUDGETS)}", hint=nearest(budget, BUDGETS)
        )
    if problem := too_large(eps, norm):
        raise UsageError(f"--eps: {problem}")
    # No two images of this size lie farther apart.
    longest = float(images.images[0].numel()) ** 0.5
    if norm == "l2" and eps > longest:
        raise UsageError(
            f"--eps: {eps:g} under l2 is more than {longest:.4g}, the distance from black to white of images "
            f"of this size",
            hint="usual is 0.5 for 32x32 pixels, in pixel units of images in [0, 1]",
        )


@torch.no_grad()
def _surrogate_sources(surrogates: Sequence[Model], images: Tensor, classes: int) -> list[GradientSource]:
    found = []
    for number, surrogate in enumerate(surrogates, start=1):
        if isinstance(surrogate, nn.Module):
            surrogate.to(images.device).eval()
        shape = tuple(surrogate(images).shape)
        if shape != (len(images), classes):
            raise UsageError(
                f"a surrogate answers shape {shape} for {len(images)} images; the model has {classes} "
                "classes",
                hint="a surrogate needs the classes of the model that is audited, in the same order",
            )
        found.append(GradientSource(f"{SURROGATE} {number}", SURROGATE, 0.0, surrogate))
    return found


def _identity(budget: str, setting: Setting, plan: Plan, models: dict[str, Any]) -> dict[str, Any]:
    """Return what two audits share whose results are one, field by field."""
    return {
        "attack": "audit",
        "carso": __version__,
        "budget": budget,
        **asdict(setting.budget),
        "eps": float(setting.threat.eps),
        "norm": setting.threat.norm,
        "seed": setting.seed,
        "n_images": len(setting.images),
        "images": setting.images.fingerprint(),
        **models,
        "given": None if setting.given is None else fingerprint({"given": setting.given}),
        "draws": setting.draws,
        "leaves_after": LEAVES_AFTER,
        "jobs": [job.key for job in plan.jobs],
    }


def _limited(images: ImageSet, options: AuditOptions, seed: int) -> tuple[ImageSet, Tensor | None]:
    """Return the images that are audited, and the examples that are given of them.

    Raises:
        DataError: If there is not one example for each image.
    """
    given, limit = options.get("adversarial"), options.get("limit")
    if given is not None and given.shape != images.images.shape:
        raise DataError(
            f"the adversarial examples have shape {tuple(given.shape)}, the images "
            f"{tuple(images.images.shape)}",
            hint="give one example for each image, in the same order",
        )
    if limit is None or limit >= len(images):
        return images, given
    chosen = balanced_subset(images, limit, seed)
    if given is not None:
        places = {index: place for place, index in enumerate(images.indices.tolist())}
        given = given[torch.tensor([places[index] for index in chosen.indices.tolist()])]
    return chosen, given


def _require_in_ball(given: Tensor, images: Tensor, threat: ThreatModel) -> None:
    outside = ~threat.contains(given, images)
    if bool(outside.any()):
        raise DataError(
            f"{int(outside.sum())} of {len(outside)} adversarial examples leave the ball of eps "
            f"{threat.eps:.4g} under {threat.norm}, or the pixel range",
            hint="give the eps and norm that they were made with, and the images that they were made from",
        )


def as_image_set(images: Images, labels: Tensor | None) -> ImageSet:
    """Return images and labels of any form as one set.

    Raises:
        DataError: If they do not fit, or pixels lie outside [0, 1].
    """
    if isinstance(images, ImageSet):
        return images
    if labels is None:
        if isinstance(images, Tensor):
            raise DataError("the images have no labels", hint="audit(model, images, labels)")
        batches = list(images)
        images, labels = torch.cat([one for one, _ in batches]), torch.cat([two for _, two in batches])
    # NumPy arrays and lists are taken too.
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    if images.ndim != 4 or labels.shape != (len(images),):
        raise DataError(
            f"images have shape {tuple(images.shape)} and labels {tuple(labels.shape)}",
            hint="(M, channels, height, width) and (M,) are needed",
        )
    pixels = images.detach().cpu()
    if pixels.is_floating_point():
        low, high = float(pixels.min()), float(pixels.max())
        if low < 0.0 or high > 1.0:
            raise DataError(
                f"pixels run from {low:.4g} to {high:.4g}; [0, 1] is needed",
                hint="divide by 255, or move the standardisation into the model",
            )
        pixels = pixels.float()
    truth = labels.detach().cpu().long()
    classes = tuple(str(label) for label in range(int(truth.max()) + 1))
    return ImageSet(pixels, truth, torch.arange(len(truth)), classes)


def _last_resorts(
    found: Sequence[GradientSource],
    checks: dict[str, GradientCheck],
    images: Tensor,
    eps: float,
    seed: int,
) -> list[GradientSource]:
    """Return sources for a model without a right gradient: its own, smoothed; a network distilled from it."""
    if any(source.kind in FAITHFUL and is_right(checks[source.name]) for source in found):
        return []
    output = found[0]
    if _leads(checks[output.name]):
        return [smoothed(output, eps / 2)]
    if any(_leads(checks[source.name]) for source in found):
        return []
    return [GradientSource(DISTILLED, DISTILLED, 0.0, distil(output, images, eps=eps, seed=seed))]


def _leads(check: GradientCheck) -> bool:
    return check.path and check.nonzero > 0


def _followed(
    sources: Sequence[GradientSource], checks: dict[str, GradientCheck], most: int
) -> list[GradientSource]:
    """Return the sources to attack: those whose gradient leads somewhere, the best first."""
    alive = [source for source in sources if _leads(checks[source.name])]

    def quality(source: GradientSource) -> tuple[bool, float]:
        check = checks[source.name]
        return (source.kind in FAITHFUL, min(check.matches, check.descends) * check.nonzero)

    return sorted(alive, key=quality, reverse=True)[:most]


def _plan(followed: Sequence[GradientSource], facts: Facts, given: bool) -> Plan:
    """Return the jobs: the unperturbed images, noise, every source's attacks, a black box, given examples."""
    attacks: list[tuple[str, str | None]] = [("noise", None)]
    attacks += [("apgd-targeted", source.name) for source in followed]
    # AutoAttack, part by part; for a random model what of it has a version with EoT.
    parts = ["apgd-ce"]
    if not facts.random:
        # As in AutoAttack, the targeted difference of logits ratio needs four classes.
        parts += ["apgd-t", "fab-t"] if facts.classes >= 4 else ["apgd-dlr"] * (facts.classes == 3) + ["fab"]
    attacks += [(part, source.name) for source in followed[:1] for part in parts]
    attacks += [("square", OUTPUT)]
    attacks += [(GIVEN, None)] if given else []
    clean = Job("classifier", UNPERTURBED)
    jobs = [clean]
    waits: tuple[str, ...] = (clean.key,)
    for attack, view in attacks:
        jobs.append(Job("classifier", attack, view, waits))
        if attack != "noise":
            waits = (*waits, jobs[-1].key)
    return Plan("audit", "audit", "exact", tuple(jobs))


def _attack_budget(size: AuditBudget, samples: int, eps: float) -> Budget:
    return Budget(
        pgd_steps=size.steps,
        pgd_step_size=2.5 * eps / size.steps,
        apgd_steps=size.steps,
        eot_draws=samples,
        pgd_eot_steps=size.steps,
        pgd_eot_step_size=2.5 * eps / size.steps,
        square_queries=size.queries,
        restarts=1,
    )
