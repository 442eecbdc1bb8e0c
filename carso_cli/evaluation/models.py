"""What is evaluated: the bare classifier and, where one is trained, the defence around it.

recipe = run_recipe(recipe, folder)
subject = load_subject(recipe, folder, device, needs_defence=True, n_samples=None, aggregation=None)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from carso_cli.attacks.defence_target import AttackedDefence, DefenceTarget
from carso_cli.attacks.passes import samples_per_pass
from carso_cli.attacks.target import AttackTarget, ClassifierTarget, Model
from carso_cli.build import build_classifier, build_second_classifier, load_purifier
from carso_cli.classifiers.inference import inference_copy
from carso_cli.defence.defended_model import Defence
from carso_cli.errors import StateError, UsageError
from carso_cli.evaluation.protocols import Job
from carso_cli.evaluation.scoring import ClassifierScorer, DefenceScorer, Scorer
from carso_cli.io.checksum import fingerprint
from carso_cli.recipe.identity import INFERENCE_SECTIONS
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.precision import in_precision
from carso_cli.runtime.reporter import SILENT, Reporter
from carso_cli.runtime.seed import generator


@dataclass(frozen=True, eq=False)
class Models:
    """The models under attack, on their device.

    Args:
        classifier: The bare classifier, images in [0, 1] to (B, C) logits.
        defence: The defence around it, if it is attacked.
        checksums: SHA-256 of the weights: `classifier`, `purifier`, `second_classifier`.
        device: Where they are.
        samples_per_pass: Most reconstructions in one pass.
    """

    classifier: Model
    defence: AttackedDefence | None
    checksums: dict[str, str | None]
    device: torch.device
    samples_per_pass: int

    def target(self, job: Job, seed: int, block: int | str) -> AttackTarget:
        """Return the target of a job, its latents drawn for this job and block."""
        if job.target == "classifier":
            return ClassifierTarget(self.classifier)
        return DefenceTarget(
            self.require_defence(),
            job.view if job.view in ("exact", "log-probability", "released") else "exact",
            samples_per_pass=self.samples_per_pass,
            generator=generator(seed, "attack latents", job.key, block),
        )

    def scorer(self, job: Job, seed: int, draws: int) -> Scorer:
        """Return what scores a job's examples."""
        if job.target == "classifier":
            return ClassifierScorer(self.classifier)
        return DefenceScorer(self.require_defence(), seed, draws, self.samples_per_pass)

    def require_defence(self) -> AttackedDefence:
        """Return the defence.

        Raises:
            UsageError: If there is none.
        """
        if self.defence is None:
            raise UsageError("the defence is attacked, and only a classifier is given")
        return self.defence


def run_recipe(recipe: Recipe, folder: RunFolder) -> Recipe:
    """Return the recipe of a trained run with what another says of its use.

    A purifier belongs to the recipe it was trained with; how it is attacked and computed, and where the data
    lie, may be chosen afresh.

    Raises:
        StateError: If the run was trained with a recipe of another name, or has lost its own.
    """
    if not folder.recipe.is_file():
        folder.check_recipe()
        return recipe
    trained = load_recipe(str(folder.recipe.resolve()))
    if trained.name != recipe.name:
        raise StateError(
            f"{folder.path} was trained with recipe '{trained.name}', not '{recipe.name}'",
            hint=f"leave out RECIPE to use the run's own: carso evaluate --run {folder.path}",
        )
    data = trained.data.model_copy(update={"root": recipe.data.root or trained.data.root})
    chosen = {name: getattr(recipe, name) for name in INFERENCE_SECTIONS}
    return trained.model_copy(update={"data": data, **chosen})


def load_models(
    recipe: Recipe,
    folder: RunFolder,
    device: torch.device,
    *,
    needs_defence: bool,
    n_samples: int | None = None,
    aggregation: str | None = None,
    reporter: Reporter = SILENT,
) -> Models:
    """Load the recipe's classifier and the run's defence.

    Raises:
        StateError: If the defence is needed and the run is absent, unfinished or damaged.
        WeightsError: If weights are missing, or not those of training.
    """
    section = recipe.evaluation
    path = (
        folder.require_purifier(f"carso train-purifier {recipe.reference}{_option(recipe, folder)}")
        if needs_defence
        else None
    )
    classifier = build_classifier(recipe, recipe.representation.kind)
    if path is None:
        return given_models(recipe, device, classifier=classifier, reporter=reporter)
    defence = Defence(
        classifier,
        load_purifier(path, recipe, classifier),
        recipe.representation.layers,
        n_samples=n_samples or section.n_samples,
        aggregation=aggregation or section.aggregation,
        second_classifier=build_second_classifier(recipe),
    )
    return given_models(recipe, device, defence=defence, reporter=reporter)


def _option(recipe: Recipe, folder: RunFolder) -> str:
    return "" if str(folder.path) == recipe.run_folder else f" --run {folder.path}"


def given_models(
    recipe: Recipe,
    device: torch.device,
    *,
    defence: AttackedDefence | None = None,
    classifier: Model | None = None,
    n_samples: int | None = None,
    aggregation: str | None = None,
    reporter: Reporter = SILENT,
) -> Models:
    """Wrap models that exist already; the classifier is the defence's own when None.

    What is attacked computes the same in fewer steps (`carso_cli.classifiers.inference`).

    Raises:
        UsageError: If neither is given.
    """
    if defence is None and classifier is None:
        raise UsageError("nothing to evaluate: give a defence or a classifier")
    if defence is not None:
        defence = adjusted(defence, n_samples=n_samples, aggregation=aggregation, precision=recipe.precision)
    for model in (defence, classifier):
        if isinstance(model, nn.Module):
            model.to(device).eval()
    bare = classifier if classifier is not None else cast(AttackedDefence, defence).classifier
    checksums = {"classifier": _checksum(bare), "purifier": None, "second_classifier": None}
    if defence is not None:
        checksums["purifier"] = _checksum(getattr(defence, "purifier", defence))
        checksums["second_classifier"] = _checksum(defence.second_classifier)
        if isinstance(defence, Defence):
            second = inference_copy(defence.second_classifier, compile=recipe.compile, reporter=reporter)
            defence = defence.with_second_classifier(second)
    per_pass = samples_per_pass(
        recipe.evaluation.samples_per_pass, device, 1 if defence is None else defence.n_samples
    )
    quick = in_precision(inference_copy(bare, compile=recipe.compile, reporter=reporter), recipe.precision)
    return Models(quick, defence, checksums, device, per_pass)


def adjusted(
    defence: AttackedDefence,
    *,
    n_samples: int | None = None,
    aggregation: str | None = None,
    precision: str | None = None,
) -> AttackedDefence:
    """Return the same models with another N, aggregation rule or precision; what is None stays as it is."""
    changed = copy.copy(defence)
    changed.n_samples = n_samples or defence.n_samples
    if aggregation is not None:
        cast(Any, changed).aggregation = aggregation
    if precision is not None:
        cast(Any, changed).precision = precision
    return changed


def _checksum(model: object) -> str | None:
    """Return the SHA-256 of a module's weights; None for what is no module."""
    return fingerprint(model.state_dict()) if isinstance(model, nn.Module) else None
