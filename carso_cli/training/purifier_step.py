"""One optimiser step of purifier training (Section 4.4, Appendix C).

On the paper's objective, the ELBO of one balanced batch, or through the whole defence, as in
`carso_cli.training.end_to_end`. `TrainingSetup` holds what stays, `balanced_batch` among it.
`TrainingState` holds what moves: `initial_state` makes it, `train_step` moves it. Every random number is a
function of (seed, purpose, epoch, batch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from carso_cli.build import (
    build_purifier,
    channels_last,
    classifier_fingerprint,
    load_purifier,
)
from carso_cli.classifiers.inference import inference_copy
from carso_cli.data.augmentation import augment
from carso_cli.data.image_set import ImageSet
from carso_cli.defence.elbo import negative_elbo
from carso_cli.defence.representation import extract_representation
from carso_cli.defence.vae import Purifier
from carso_cli.distributed.world import World, join
from carso_cli.errors import NumericsError, StateError, WeightsError
from carso_cli.io.checksum import fingerprint
from carso_cli.recipe.identity import TRAINING_SECTIONS, recipe_hash
from carso_cli.recipe.schema import Recipe
from carso_cli.recipe.shipped import start_command
from carso_cli.runtime.nonfinite import find_nonfinite_layer, require_finite_gradients
from carso_cli.runtime.precision import autocast, in_precision
from carso_cli.runtime.reporter import SILENT, Reporter
from carso_cli.runtime.seed import derive_seed, generator, seeded
from carso_cli.training.adversarial_cache import AdversarialCache, Place
from carso_cli.training.balanced_batch import BalancedBatch
from carso_cli.training.end_to_end import EndToEnd, adversarial_terms
from carso_cli.training.purifier_state import TrainingState

_LOWER_RATE = "lower training.learning_rate.plateau; the state of the last whole epoch is saved"


@dataclass(frozen=True)
class TrainingSetup:
    """What does not change during training."""

    recipe: Recipe
    classifier: nn.Module
    train: ImageSet
    held_out: ImageSet
    perturb: BalancedBatch
    pool: AdversarialCache
    device: torch.device
    reporter: Reporter
    second_classifier: nn.Module | None = None
    """Classifier of the reconstructions, where it is another one."""

    @property
    def world(self) -> World:
        """The processes that share the training."""
        return join(self.device)


def balanced_batch(recipe: Recipe, classifier: nn.Module, reporter: Reporter = SILENT) -> BalancedBatch:
    """Return what perturbs the recipe's training batches against a frozen classifier."""
    mix = recipe.training.attack_mix
    return BalancedBatch(
        in_precision(inference_copy(classifier, compile=recipe.compile, reporter=reporter), recipe.precision),
        norm=recipe.threat.norm,
        eps=recipe.threat.eps,
        adversarial_fraction=mix.adversarial_fraction,
        pgd_steps=mix.pgd_steps,
        pgd_step_size=mix.pgd_step_size,
    )


def initial_state(setup: TrainingSetup) -> TrainingState:
    """Return fresh weights, a fresh optimiser, and what the run is recognised by when it is resumed."""
    recipe = setup.recipe
    with seeded(recipe.seed, "purifier weights"):
        purifier = _initial_purifier(recipe, setup.classifier).to(setup.device)
    channels_last(purifier)
    identity = {
        "recipe": recipe_hash(recipe, sections=TRAINING_SECTIONS),
        "classifier": classifier_fingerprint(setup.classifier),
        "images": setup.train.fingerprint(),
        "initial": None if recipe.training.initial is None else fingerprint(purifier.state_dict()),
    }
    setup.world.sync_batch_norm(purifier)
    trained: nn.Module = purifier
    if recipe.training.objective != "elbo":
        second = setup.second_classifier
        trained = EndToEnd(recipe, setup.classifier, purifier, second)
        # Outside of the training's own sections, and part of what is trained here.
        identity |= {
            "aggregation": recipe.evaluation.aggregation,
            "second_classifier": None if second is None else classifier_fingerprint(second),
        }
    section = recipe.training.optimiser
    optimiser = torch.optim.RAdam(
        purifier.parameters(),
        lr=recipe.training.learning_rate.initial,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        weight_decay=section.weight_decay,
    )
    return TrainingState(
        purifier,
        trained,
        optimiser,
        setup.world,
        lookahead_steps=section.lookahead_steps,
        lookahead_decay=section.lookahead_decay,
        identity=identity,
        save_every=recipe.training.save_every_epochs,
    )


def _initial_purifier(recipe: Recipe, classifier: nn.Module) -> Purifier:
    """Return the purifier that training starts from: of fresh weights, or the one in `training.initial`.

    Fresh weights are drawn from torch's global generator.

    Raises:
        WeightsError: If the named file is missing or damaged, has no encoder, or belongs to another
            classifier, other layers or other sizes.
    """
    if recipe.training.initial is None:
        return build_purifier(recipe, classifier)
    path = Path(recipe.training.initial).expanduser()
    if not path.is_file():
        command = start_command(recipe)
        raise WeightsError(
            f"the purifier to start from, {path}, is missing",
            hint=f"next: {command}"
            if command
            else "train it with: carso train-purifier RECIPE, and name its file in training.initial",
        )
    try:
        purifier = load_purifier(path, recipe, classifier)
    except StateError as error:
        raise WeightsError(
            error.message, hint="training.initial takes a purifier of the recipe's own layers and sizes"
        ) from None
    if purifier.latent_features and not purifier.has_encoder:
        raise WeightsError(f"{path} has no encoder, as imported purifiers have none: it cannot be trained on")
    return purifier


def figures(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of what `train_step` adds up, the loss first."""
    elbo = ("bce", "kl")
    if recipe.training.objective == "elbo":
        return ("loss", *elbo)
    return ("loss", "accuracy", *elbo) if recipe.training.objective == "both" else ("loss", "accuracy")


def train_step(
    setup: TrainingSetup,
    state: TrainingState,
    positions: Tensor,
    place: Place,
    beta: float,
    perturbations: Place | None = None,
) -> Tensor:
    """Take one optimiser step on one batch.

    Each process takes its share of the batch; what is random is drawn for the whole of it, whatever their
    number, but for the latents of attacks on the defence. Losses and gradients are summed over all processes.

    Args:
        setup: What does not change.
        state: What does.
        positions: (B,) positions of the batch's images.
        place: Epoch and batch.
        beta: Weight of the KL term.
        perturbations: Place that the perturbations against the classifier belong to; `place` when None.

    Returns:
        What it adds to `figures`, float64.

    Raises:
        NumericsError: If the reconstruction or a term of the loss is not finite.
    """
    recipe, clean = setup.recipe, setup.train.pixels(positions)
    if recipe.training.objective != "elbo" and recipe.training.adversarial.augment:
        drawn = generator(recipe.seed, "augmentation", *place)
        clean = augment(clean, flip=recipe.classifier.training.flip, generator=drawn)
    clean = clean.to(setup.device)
    labels = setup.train.labels[positions].to(setup.device)
    if isinstance(state.trained, EndToEnd):
        terms = adversarial_terms(state.trained, state.replica, clean, labels, place, beta, setup.world)
    else:
        terms = _elbo_terms(setup, state, clean, labels, place, beta, perturbations or place)
    names = figures(recipe)
    sums = setup.world.sum(torch.stack([terms[name].detach().double().cpu() for name in names]))
    for name, value in zip(reversed(names), reversed(sums.tolist()), strict=True):
        if not math.isfinite(value):
            raise _not_finite(f"the {_SHOWN.get(name, name)} term", place, value)
    state.optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(terms["loss"])
    require_finite_gradients(state.purifier, place, _LOWER_RATE)
    state.optimiser.step()
    state.lookahead.step()
    return sums


_SHOWN = {"bce": "BCE", "kl": "KL"}


def _elbo_terms(
    setup: TrainingSetup,
    state: TrainingState,
    clean: Tensor,
    labels: Tensor,
    place: Place,
    beta: float,
    made: Place,
) -> dict[str, Tensor]:
    """Return the summed loss, BCE and KL of this process's share of one balanced batch."""
    seed, own = setup.recipe.seed, setup.world.shard(len(clean))
    inputs = setup.pool.perturbed(
        made, clean[own], lambda: setup.perturb(clean, labels, derive_seed(seed, "perturbation", *made), own)
    )
    noise = torch.randn(
        len(clean), state.purifier.latent_features, generator=generator(seed, "posterior", *place)
    )[own].to(setup.device)
    with autocast(setup.recipe.precision, setup.device):
        with torch.no_grad():
            layers = setup.recipe.representation.layers
            representation = extract_representation(setup.classifier, inputs, layers)
        reconstruction, mean, log_variance = state.replica(inputs, representation, noise)
    if setup.world.any(not bool(reconstruction.detach().isfinite().all())):
        with autocast(setup.recipe.precision, setup.device):
            where = find_nonfinite_layer(
                state.purifier, lambda: state.purifier(inputs, representation, noise)
            )
        raise _not_finite("the reconstruction", place, math.nan, where)
    terms = negative_elbo(reconstruction, clean[own], mean, log_variance, beta)
    return {"loss": terms.total, "bce": terms.bce, "kl": terms.kl}


def _not_finite(what: str, place: Place, value: float, where: str = "") -> NumericsError:
    return NumericsError(
        f"{what} became {value} in epoch {place[0] + 1}, batch {place[1] + 1}{where}; training stops",
        hint=_LOWER_RATE,
    )
