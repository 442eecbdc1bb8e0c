"""The models under attack: the bare classifier and, where one is trained, the defence around it.

recipe = run_recipe(recipe, folder)
defence, classifier = load_models(recipe, folder, needs_defence=True)
models = given_models(recipe, device, defence=defence, classifier=classifier)
"""

from __future__ import annotations

import copy
import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from carso_cli.attacks.defence_target import DefenceTarget
from carso_cli.attacks.gradient_sources import OUTPUT, GradientSource, finite_scores
from carso_cli.attacks.model_parts import follow_global_seed, named_modules
from carso_cli.attacks.passes import samples_per_pass
from carso_cli.attacks.random_defence import RandomDefence
from carso_cli.attacks.source_target import SourceTarget
from carso_cli.attacks.target import AttackTarget, ClassifierTarget, Model
from carso_cli.build import build_classifier, build_second_classifier, load_purifier
from carso_cli.classifiers.inference import inference_copy
from carso_cli.defence.defended_model import Defence
from carso_cli.errors import StateError, UsageError
from carso_cli.evaluation.protocols import Job
from carso_cli.evaluation.scoring import ClassifierScorer, DefenceScorer, ModelScorer, Scorer
from carso_cli.io.checksum import fingerprint
from carso_cli.recipe.identity import INFERENCE_SECTIONS, TRAINING_SECTIONS, differing_values
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.precision import in_precision
from carso_cli.runtime.reporter import SILENT, Reporter
from carso_cli.runtime.seed import all_seeded, derive_seed, generator


@dataclass(frozen=True, eq=False)
class Models:
    """The models under attack, on their device.

    Args:
        classifier: The bare classifier, images in [0, 1] to (B, C) logits.
        defence: The defence around it, if it is attacked.
        checksums: SHA-256 of the weights: `classifier`, `purifier`, `second_classifier`.
        device: Where they are.
        samples_per_pass: Most reconstructions in one pass.
        gradient_precision: Precision of the defence whose gradients are followed; its own when None.
    """

    classifier: Model
    defence: RandomDefence | None
    checksums: dict[str, str | None]
    device: torch.device
    samples_per_pass: int
    gradient_precision: str | None = field(default=None, kw_only=True)

    def target(self, job: Job, seed: int, block: int | str) -> AttackTarget:
        """Return the target of a job, its latents drawn for this job and block."""
        if job.target == "classifier":
            return ClassifierTarget(self.classifier)
        defence, precision = self.require_defence(), self.gradient_precision
        return DefenceTarget(
            defence,
            # Surrogates and noise have no view of the target; what they build starts from the exact one.
            job.view if job.view in ("exact", "log-probability", "released") else "exact",
            samples_per_pass=self.samples_per_pass,
            # Not by process or order: a block that is run again after a kill draws the same latents.
            generator=generator(seed, "attack latents", job.key, block),
            followed=None if precision is None else adjusted(defence, precision=precision),
        )

    def scorer(self, job: Job, seed: int, draws: int) -> Scorer:
        """Return what scores a job's examples."""
        if job.target == "classifier":
            return ClassifierScorer(self.classifier)
        return DefenceScorer(self.require_defence(), seed, draws, self.samples_per_pass)

    def require_defence(self) -> RandomDefence:
        """Return the defence.

        Raises:
            UsageError: If there is none.
        """
        if self.defence is None:
            raise UsageError("the defence is attacked, and only a classifier is given")
        return self.defence


@dataclass(frozen=True, eq=False)
class AuditedModel(Models):
    """Any model under audit, as `classifier`, with the sources of gradients that attacks may follow.

    A `defence` beside it is the same model, where it says of itself what is random.

    Args:
        sources: Its gradient sources by name.
        is_random: Whether two calls on the same images may differ.
    """

    sources: Mapping[str, GradientSource]
    is_random: bool

    def target(self, job: Job, seed: int, block: int | str) -> AttackTarget:
        """Return the target of a job: the model, by way of the job's source; its output for a black box."""
        source = self.sources[job.view or OUTPUT]
        # A defence that draws nothing, or whose answers do not depend on it, is attacked as any model.
        if self.is_random and self.defence is not None and source.name == OUTPUT:
            latents = generator(seed, "attack latents", job.key, block)
            return DefenceTarget(self.defence, "exact", self.samples_per_pass, latents)
        return SourceTarget(
            source, stochastic=self.is_random, seed=derive_seed(seed, "model", job.key, str(block))
        )

    def scorer(self, job: Job, seed: int, draws: int) -> Scorer:
        """Return what scores examples on the model itself."""
        return ModelScorer(follow_global_seed(self.classifier), seed, draws if self.is_random else 1)


def run_recipe(recipe: Recipe, folder: RunFolder, reporter: Reporter = SILENT) -> Recipe:
    """Return a trained run's own recipe, with the sections of `recipe` that may differ from training.

    A purifier belongs to the recipe it was trained with; how it is attacked and computed, and where the data
    lie, may be chosen again.

    Args:
        recipe: What is asked for: the run's recipe, or one with the same data and classifier, such as one
            that it extends.
        folder: The run.
        reporter: Warned of values in which the two differ, and the run's own are used.

    Raises:
        StateError: If the run was trained on other data or another classifier by a recipe of another name, or
            has lost its own.
    """
    # No run here yet: the recipe as given, unless a training has left state without its recipe.
    if not folder.recipe.is_file():
        folder.check_recipe()
        return recipe
    trained = load_recipe(str(folder.recipe.resolve()))
    if trained.name != recipe.name and (other := differing_values(trained, recipe, ("data", "classifier"))):
        raise StateError(
            f"{folder.path} was trained with recipe '{trained.name}', not '{recipe.name}': "
            f"{'; '.join(other)}",
            hint="leave out RECIPE to use the run's own: carso evaluate --run "
            f"{shlex.quote(str(folder.path))}",
        )
    own = [section for section in TRAINING_SECTIONS if section not in INFERENCE_SECTIONS]
    if other := differing_values(trained, recipe, own):
        reporter.warning(
            f"{folder.path} was trained with other values than those of recipe '{recipe.name}', and its own "
            f"are used: {'; '.join(other)}"
        )
    # Where the images lie may have changed since training; what they are may not.
    data = trained.data.model_copy(update={"root": recipe.data.root or trained.data.root})
    chosen = {name: getattr(recipe, name) for name in INFERENCE_SECTIONS}
    return trained.model_copy(update={"data": data, **chosen})


def load_models(
    recipe: Recipe, folder: RunFolder, *, needs_defence: bool
) -> tuple[Defence | None, nn.Module | None]:
    """Load the run's defence, or the recipe's classifier alone where no defence is needed.

    Raises:
        StateError: If the defence is needed and the run is absent, unfinished or damaged.
        WeightsError: If weights are missing, or not those of training.
    """
    if not needs_defence:
        # A classifier alone needs no trained run, so its attacks work before any training.
        return None, build_classifier(recipe, recipe.representation.kind)
    option = "" if str(folder.path) == recipe.run_folder else f" --run {folder.path}"
    # Before the classifier is loaded, which may download it: a missing run is reported at once.
    path = folder.require_purifier(f"carso train-purifier {recipe.reference}{option}")
    classifier = build_classifier(recipe, recipe.representation.kind)
    defence = Defence(
        classifier,
        load_purifier(path, recipe, classifier),
        recipe.representation.layers,
        n_samples=recipe.evaluation.n_samples,
        aggregation=recipe.evaluation.aggregation,
        second_classifier=build_second_classifier(recipe),
    )
    return defence, None


def given_models(
    recipe: Recipe,
    device: torch.device,
    *,
    defence: RandomDefence | None = None,
    classifier: Model | None = None,
    n_samples: int | None = None,
    aggregation: str | None = None,
    reporter: Reporter = SILENT,
) -> Models:
    """Put models on their device for attacks; the classifier is the defence's own when None.

    What is attacked computes the same in fewer steps (`carso_cli.classifiers.inference`).

    Raises:
        UsageError: If neither is given.
    """
    bare = classifier
    if defence is not None:
        # A user's own defence without a precision would take no notice of one.
        precision = recipe.precision if hasattr(defence, "precision") else None
        changes = {"n_samples": n_samples, "aggregation": aggregation, "precision": precision}
        defence = adjusted(defence, **{name: value for name, value in changes.items() if value})
        bare = defence.classifier if classifier is None else classifier
    if bare is None:
        raise UsageError("nothing to evaluate: give a defence or a classifier")
    for model in (defence, classifier):
        if isinstance(model, nn.Module):
            # Batch statistics would let the images of a batch change each other's answers.
            model.to(device).eval()
    # Taken before BatchNorms are folded: these name the weights as they are stored.
    checksums: dict[str, str | None] = {"classifier": _checksum(bare)}
    checksums |= dict.fromkeys(("purifier", "second_classifier"))
    if defence is not None:
        checksums["purifier"] = _checksum(getattr(defence, "purifier", defence))
        checksums["second_classifier"] = _checksum(defence.second_classifier)
        if isinstance(defence, Defence):
            # Only the second: the first yields layer outputs, which folding changes.
            second = inference_copy(defence.second_classifier, compile=recipe.compile, reporter=reporter)
            defence = defence.with_second_classifier(second)
    n_samples = 1 if defence is None else defence.n_samples
    # After `n_samples` is changed: a pass holds all N reconstructions of an image or none.
    per_pass = samples_per_pass(
        recipe.evaluation.samples_per_pass,
        device,
        n_samples,
        model=defence,
        forward=None if defence is None else partial(_one_image, defence, recipe, device),
        reporter=reporter,
    )
    quick = in_precision(inference_copy(bare, compile=recipe.compile, reporter=reporter), recipe.precision)
    return Models(quick, defence, checksums, device, per_pass)


def adjusted(defence: RandomDefence, **changes: object) -> RandomDefence:
    """Return the same models with another `n_samples`, `aggregation` or `precision`."""
    # Shallow: the weights are shared, and the caller's defence keeps its own settings.
    changed = copy.copy(defence)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _one_image(defence: RandomDefence, recipe: Recipe, device: torch.device) -> Tensor:
    """Return the logits of the N reconstructions of one image, with the graph back to its condition."""
    size = recipe.data.image_size
    with torch.no_grad():
        condition = defence.condition(torch.zeros(1, recipe.data.channels, size, size, device=device))
    return defence.sample_logits(
        condition.requires_grad_(), defence.draw_latents(1, None, generator(0, "memory"))
    )


def all_weights(model: Model | RandomDefence) -> dict[str, Tensor]:
    """Return every parameter and buffer of a model by name; of a function, those that it refers to."""
    if isinstance(model, nn.Module):
        return dict(model.state_dict())
    found: dict[str, Tensor] = {}
    for name, module in named_modules(cast(Model, model)).items():
        found |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    return found


def _checksum(model: Model | RandomDefence) -> str | None:
    """Return the SHA-256 of a model's weights; None where no weights are found."""
    weights = all_weights(model)
    return fingerprint(weights) if weights else None


@torch.no_grad()
def answers_of(model: Model, images: Tensor, seed: int) -> str:
    """Return a hash of what a model answers on a few images: another temperature or sigma is another model.

    Rounding must not change it, so it holds but the size of the scores and three sums of them, each to three
    digits.
    """
    with all_seeded(seed):
        scores = finite_scores(model(images).detach()).double().cpu().flatten()
    scores = torch.nan_to_num(scores, nan=-1.0, posinf=1e30, neginf=-1e30)
    scale = float(scores.abs().max().clamp_min(1e-300))
    signs = torch.randint(0, 2, (3, len(scores)), generator=generator(0, "answers")).double() * 2 - 1
    sums = signs @ (scores / scale) / len(scores) ** 0.5
    text = f"{scale:.2e} {[round(value, 3) for value in sums.tolist()]}"
    return hashlib.sha256(text.encode()).hexdigest()


def defence_scores(defence: RandomDefence, seed: int, images: Tensor) -> Tensor:
    """Return the (B, C) exact logits of one sample of a defence, its latents those of a seed."""
    latents = defence.draw_latents(len(images), defence.n_samples, generator(seed, "answers"))
    return defence.aggregate(defence.sample_logits(defence.condition(images), latents), "exact")
