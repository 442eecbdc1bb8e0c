"""Resolves an evaluation without attacking: models, images, jobs, budget, identity."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import nn

from carso_cli.attacks.attack import LEAVES_AFTER
from carso_cli.attacks.random_defence import RandomDefence
from carso_cli.attacks.target import Model
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.build import device_for, load_images
from carso_cli.classifiers.usable import FEW, check_gradient, warn_at_chance
from carso_cli.data.image_set import ImageSet, ordered_batches
from carso_cli.defence.defended_model import Defence
from carso_cli.distributed.world import join
from carso_cli.errors import UsageError
from carso_cli.evaluation.attack_batch import Batch, Setting
from carso_cli.evaluation.models import (
    answers_of,
    defence_scores,
    given_models,
    load_models,
    run_recipe,
)
from carso_cli.evaluation.protocols import Job, Plan, plan_budget, plan_evaluation
from carso_cli.evaluation.rerun_checks import IMAGES, adequate_draws, mean_cosine, spread
from carso_cli.recipe.identity import TRAINING_SECTIONS, recipe_hash
from carso_cli.recipe.schema import Recipe
from carso_cli.recipe.section import too_large
from carso_cli.runs.folder import RunFolder
from carso_cli.runs.records import EvaluationFolder, evaluation_id
from carso_cli.runtime.precision import multiplies_bf16
from carso_cli.runtime.reporter import Reporter

_MOST_DRAWS, _QUICK_DRAWS = 32, 4
"""EoT samples per gradient, at most, where they are measured."""
_SAME_GRADIENT = 0.99
"""Cosine with float32's gradient, from which one in bfloat16 takes its place."""


class EvaluationOptions(TypedDict, total=False):
    """What may be chosen beside the recipe; an option left out is the recipe's, or the protocol's."""

    attack: str
    """A protocol (`adaptive`, the default, `published`, `authors`, `quick`) or a single attack."""
    target: str | None
    """`classifier` or `defence`; both, where the attack fits both, when left out."""
    limit: int | None
    """Number of test images, class-balanced; `evaluation.images` of the recipe when left out."""
    device: str
    """`auto`, the default, `cpu`, `cuda`, `cuda:N` or `mps`."""
    seed: int | None
    """Seed of attacks and scoring; which images are taken depends on the recipe's seed alone."""
    eps: float | None
    """Radius in pixel units; step sizes are scaled with it."""
    norm: str | None
    """`linf` or `l2`."""
    n_samples: int | None
    """N, reconstructions per image."""
    aggregation: str | None
    """Aggregation rule."""
    view: str | None
    """View of the defence to attack; `exact` for single attacks when left out."""
    defence: RandomDefence | None
    """Evaluate this defence instead of the run's."""
    classifier: Model | None
    """Evaluate this classifier; the defence's own when left out."""
    images: ImageSet | None
    """Evaluate on these images instead of the recipe's test split."""
    selects: bool
    """Score a single attack on selection draws too, since its examples will be compared with others."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A resolved evaluation, which `evaluate` runs and `--dry-run` shows.

    Args:
        recipe: The recipe, after the run's own and the options.
        run: Run folder.
        plan: What to run.
        setting: Models, images, threat, budget, seed.
        identity: What a resumed evaluation must share.
        gradient_cosine: Mean cosine of the defence's gradients in bfloat16 and float32; None if not measured.
    """

    recipe: Recipe
    run: Path
    plan: Plan
    setting: Setting
    identity: dict[str, Any]
    gradient_cosine: float | None

    @property
    def gradient_precision(self) -> str:
        """The precision of the defence's gradients."""
        return self.setting.models.gradient_precision or self.recipe.precision

    @property
    def folder(self) -> EvaluationFolder:
        """Where it is, or will be, stored."""
        return EvaluationFolder(RunFolder(self.run).evaluation / evaluation_id(self.identity))

    def blocks(self) -> list[range]:
        """Return the positions of each block's images."""
        parts = ordered_batches(len(self.setting.images), self.recipe.evaluation.batch_size)
        return [range(part.start, part.stop) for part in parts]


def prepare_evaluation(
    recipe: Recipe, *, run: Path, reporter: Reporter, **options: Unpack[EvaluationOptions]
) -> Evaluation:
    """Load models and images and resolve every setting, without attacking; see `evaluate`."""
    device = device_for(recipe, options.get("device", "auto"))
    # Before anything is loaded: what follows has to be done by one process of a machine first.
    world = join(device, reporter)
    reporter = world.reporter(reporter)
    defence, classifier = options.get("defence"), options.get("classifier")
    target = options.get("target")
    if target is None and defence is None and classifier is not None:
        # A classifier alone is given, and with it no defence that could be attacked.
        target = "classifier"
    plan = plan_evaluation(options.get("attack", "adaptive"), target=target, view=options.get("view"))
    eps = options.get("eps") or recipe.threat.eps
    norm = options.get("norm") or recipe.threat.norm
    if norm != recipe.threat.norm and not options.get("eps"):
        usual = "0.5" if norm == "l2" else "8/255"
        raise UsageError(
            f"--norm {norm} needs an eps of its own: the recipe's {recipe.threat.eps:.4g} is for "
            f"{recipe.threat.norm}",
            hint=f"add --eps; {usual} is usual for {norm}",
        )
    # A recipe checks its own eps; the option has passed it by.
    if problem := too_large(eps, norm):
        raise UsageError(f"--eps: {problem}")
    # Which images a limit takes depends on the recipe's seed, never on the evaluation's.
    limit = options.get("limit") or recipe.evaluation.images
    # Weights and data may be downloaded and cached: one process of a machine does it for the others.
    with world.local_main_first():
        if defence is None and classifier is None:
            recipe = run_recipe(recipe, RunFolder(run), reporter)
            defence, classifier = _load(recipe, RunFolder(run), plan)
        models = given_models(
            recipe,
            device,
            defence=defence,
            classifier=classifier,
            n_samples=options.get("n_samples"),
            aggregation=options.get("aggregation"),
            reporter=reporter,
        )
        images = options.get("images") or load_images(recipe, "test", limit=limit, reporter=reporter)
    if options.get("classifier") is None and options.get("defence") is None:
        shown = images.some(FEW)
        pixels = shown.pixels(slice(None)).to(device)
        warn_at_chance(models.classifier, pixels, shown.labels, len(shown.classes), reporter)
    seed = options.get("seed")
    setting = Setting(
        models=models,
        images=images,
        threat=ThreatModel(norm, eps),
        budget=plan_budget(recipe, plan, eps=eps, norm=norm),
        # Not `seed or`: 0 is a seed.
        seed=recipe.seed if seed is None else seed,
        draws=1 if plan.follows_authors else recipe.evaluation.scoring_draws,
        selects=(plan.is_protocol and not plan.follows_authors) or options.get("selects", False),
    )
    few = setting.batch(spread(len(images), IMAGES))
    # By one process: rounding on another device must not lead two of them into two folders.
    draws, answers = world.on_main(lambda: (_eot_draws(recipe, plan, setting, few), _answers(setting, few)))
    budget = replace(setting.budget, eot_draws=draws)
    setting = replace(setting, budget=budget)
    reduced, cosine = world.on_main(lambda: _gradient_precision(recipe, plan, setting, few))
    setting = replace(setting, models=replace(models, gradient_precision=reduced))
    return Evaluation(recipe, run, plan, setting, _identity(recipe, plan, setting, answers), cosine)


def _load(recipe: Recipe, folder: RunFolder, plan: Plan) -> tuple[Defence | None, nn.Module | None]:
    """Load what `load_models` does; refuse attacks by gradients on a user's classifier that has none."""
    defence, classifier = load_models(recipe, folder, needs_defence="defence" in plan.targets)
    bare = classifier if defence is None else defence.classifier
    # Those of libraries and our own have gradients.
    external = recipe.classifier.family == "external"
    if bare is not None and external and any(job.is_white_box for job in plan.jobs):
        check_gradient(
            bare,
            channels=recipe.data.channels,
            image_size=recipe.data.image_size,
            hint=f"attacks follow gradients; an audit works without: carso audit {recipe.reference}",
        )
    return defence, classifier


def _eot_draws(recipe: Recipe, plan: Plan, setting: Setting, few: Batch) -> int:
    """Return the recipe's EoT samples per gradient; where it gives none, as many as make two agree."""
    if recipe.evaluation.eot_draws is not None or "defence" not in plan.targets:
        return setting.budget.eot_draws
    # On the exact view, whatever is attacked: where gradients are masked, no number of samples is enough.
    target = partial(setting.models.target, Job("defence", "pgd-eot", "exact"), setting.seed)
    most = _QUICK_DRAWS if plan.attack == "quick" else _MOST_DRAWS
    return adequate_draws(target, few.images, few.labels, most)


def _gradient_precision(
    recipe: Recipe, plan: Plan, setting: Setting, few: Batch
) -> tuple[str | None, float | None]:
    """Return the precision of the defence's gradients where it is not the recipe's, and their cosine."""
    asked, models = recipe.evaluation.gradient_precision, setting.models
    # A user's own defence may have no precision to change.
    own = getattr(models.defence, "precision", "bf16") if "defence" in plan.targets else "bf16"
    if asked == "fp32" or own == "bf16":
        return None, None
    if asked == "auto" and (plan.follows_authors or not multiplies_bf16(models.device)):
        return None, None
    # On the view that is attacked: gradients that saturation hides have no cosine, and stay as they are.
    job = Job("defence", "pgd-eot", plan.view)
    targets = [
        # The same latents twice, so that the two gradients differ by the precision alone.
        replace(models, gradient_precision=precision).target(job, setting.seed, "precision")
        for precision in (None, "bf16")
    ]
    cosine = mean_cosine(targets, few.images, few.labels, setting.budget.eot_draws)
    return ("bf16" if asked == "bf16" or cosine >= _SAME_GRADIENT else None), cosine


def _answers(setting: Setting, few: Batch) -> dict[str, str]:
    """Return what identifies the code of the models, beside their weights: what they answer."""
    models, seed = setting.models, setting.seed
    found = {"classifier": answers_of(models.classifier, few.images, seed)}
    if models.defence is not None:
        found["second_classifier"] = answers_of(models.defence.second_classifier, few.images, seed)
        found["defence"] = answers_of(partial(defence_scores, models.defence, seed), few.images, seed)
    return found


def _identity(recipe: Recipe, plan: Plan, setting: Setting, answers: dict[str, str]) -> dict[str, Any]:
    """Return what a resumed evaluation must share, field by field."""
    defence = setting.models.defence if "defence" in plan.targets else None
    images = setting.images
    # Without the threat: this evaluation's own eps and norm are fields above.
    sections = [section for section in TRAINING_SECTIONS if section != "threat"]
    return {
        "attack": plan.attack,
        "targets": list(plan.targets),
        "view": plan.view,
        "eps": float(setting.threat.eps),
        "norm": setting.threat.norm,
        "seed": setting.seed,
        "n_samples": None if defence is None else defence.n_samples,
        "aggregation": getattr(defence, "aggregation", None),
        "n_images": len(images),
        # By content, so that a data set that was changed on disk is another evaluation.
        "images": images.fingerprint(),
        "recipe": recipe_hash(recipe, sections),
        **{name: setting.models.checksums[name] for name in ("classifier", "purifier", "second_classifier")},
        # Code is no part of a checksum: another temperature or a mended layer is another model.
        **{f"{name}_answers": answer for name, answer in answers.items()},
        "draws": setting.draws,
        # Left out where it is 1: an unchanged protocol keeps its name.
        **({"version": plan.version} if plan.version > 1 else {}),
        # Said beside the number, which variants of one ablation need not share.
        **({} if recipe.evaluation.eot_draws else {"eot_draws_by": "cosine"}),
        # Images once stayed in an attack to its end: an evaluation begun so is not resumed.
        **({} if defence is None else {"leaves_after": LEAVES_AFTER}),
        # Left out where it is the recipe's: evaluations stored before there was a choice keep their name.
        **({"gradient_precision": reduced} if (reduced := setting.models.gradient_precision) else {}),
        # Left out where it is implied: evaluations stored before this field existed keep their name.
        **({"selects": True} if setting.selects and not plan.is_protocol else {}),
        # Blocks are the unit of seeds and of resuming, so their size decides what is found.
        "batch_size": recipe.evaluation.batch_size,
        **asdict(setting.budget),
    }
