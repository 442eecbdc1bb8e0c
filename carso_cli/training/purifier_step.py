"""One optimiser step of purifier training (Section 4.4, Appendix C): `train_step`.

The loss is the ELBO of one balanced batch, as in the paper, or that of the whole defence, as in
`carso_cli.training.end_to_end`. `TrainingSetup` holds what stays during training, `TrainingState` the
weights and what moves them. Every random number is a function of (seed, purpose, epoch, batch).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from carso_cli.attacks.passes import Passes
from carso_cli.build import build_purifier, channels_last, load_purifier, start_file
from carso_cli.data.augmentation import augment
from carso_cli.data.image_set import ImageSet
from carso_cli.defence.elbo import negative_elbo
from carso_cli.defence.representation import extract_representation
from carso_cli.defence.vae import Purifier
from carso_cli.distributed.world import World, join
from carso_cli.errors import NumericsError, StateError, WeightsError
from carso_cli.recipe.schema import Recipe
from carso_cli.recipe.shipped import start_command
from carso_cli.runtime.nonfinite import find_nonfinite_layer, require_finite_gradients
from carso_cli.runtime.precision import autocast
from carso_cli.runtime.reporter import Reporter
from carso_cli.runtime.seed import derive_seed, generator, seeded
from carso_cli.training.adversarial_cache import AdversarialCache, Place
from carso_cli.training.balanced_batch import BalancedBatch
from carso_cli.training.end_to_end import EndToEnd, adversarial_terms
from carso_cli.training.memory import Fit, LayerOutputs, fit_batch
from carso_cli.training.optim import Lookahead, MovingAverage
from carso_cli.training.selection import BestPurifier

_LOWER_RATE = "lower training.learning_rate.plateau; the last saved state stays"
_SHOWN = {"bce": "BCE", "kl": "KL"}


@dataclass(frozen=True)
class TrainingSetup:
    """What does not change during training."""

    recipe: Recipe
    classifier: nn.Module
    train: ImageSet
    held_out: ImageSet
    perturb: BalancedBatch
    cache: AdversarialCache
    device: torch.device
    reporter: Reporter
    second_classifier: nn.Module | None = None
    """Classifier of the reconstructions, where it is another one."""

    @property
    def world(self) -> World:
        """The processes that share the training."""
        return join(self.device)


@dataclass(frozen=True)
class TrainingState:
    """What changes during training.

    Args:
        purifier: Its parameters are the fast weights.
        trained: What is called: the purifier, or the defence around it.
        replica: The same, to be called where gradients are summed over all processes.
        optimiser: RAdam over the purifier's parameters.
        lookahead: Holds the slow weights.
        average: Moving average of the fast weights, where the recipe asks for one.
        best: The weights of the best epoch so far.
        fit: How a batch fits the memory.
    """

    purifier: Purifier
    trained: nn.Module
    replica: nn.Module
    optimiser: torch.optim.Optimizer
    lookahead: Lookahead
    average: MovingAverage | None = None
    best: BestPurifier = field(default_factory=BestPurifier)
    fit: Fit = field(default_factory=Fit)

    def slow_purifier(self) -> Purifier:
        """Return a copy of the purifier with the slow or averaged weights, the ones to use and to save."""
        # Batch statistics are those of the fast weights: parameters alone are averaged.
        purifier = copy.deepcopy(self.purifier)
        with torch.no_grad():
            for name, parameter in purifier.named_parameters():
                parameter.copy_((self.average.mean if self.average else self.lookahead.slow)[name])
        return purifier.eval()


def initial_state(setup: TrainingSetup) -> TrainingState:
    """Return the weights that training starts from, and a fresh optimiser (Table 16).

    Raises:
        WeightsError: If the file in `training.initial` is missing or damaged, has no encoder, or belongs to
            another classifier, other layers or other sizes.
    """
    recipe, section = setup.recipe, setup.recipe.training.optimiser
    with seeded(recipe.seed, "purifier weights"):
        # Drawn on the CPU, then moved: one seed gives the same weights on every device.
        purifier = initial_purifier(recipe, setup.classifier).to(setup.device)
    channels_last(purifier)
    fit = _fit(setup, purifier)
    # Before the optimiser and DDP see the module: layers are replaced, their parameters stay.
    setup.world.sync_batch_norm(purifier)
    trained: nn.Module = purifier
    if recipe.training.objective != "elbo":
        # Before DDP wraps it, because it decides which parameters get a gradient.
        trained = EndToEnd(recipe, setup.classifier, purifier, setup.second_classifier)
    optimiser = torch.optim.RAdam(
        purifier.parameters(),
        lr=recipe.training.learning_rate.initial,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        weight_decay=section.weight_decay,
    )
    weights = dict(purifier.named_parameters())
    lookahead = Lookahead(weights, steps=section.lookahead_steps, decay=section.lookahead_decay)
    average = MovingAverage(weights, decay=section.average_decay) if section.average_decay else None
    replica = setup.world.data_parallel(trained)
    return TrainingState(purifier, trained, replica, optimiser, lookahead, average, fit=fit)


def _fit(setup: TrainingSetup, purifier: Purifier) -> Fit:
    """Return how a batch fits the memory; the other objectives train in passes of their own."""
    recipe = setup.recipe
    if recipe.training.objective != "elbo":
        return Fit()
    images = math.ceil(min(recipe.training.batch_size, len(setup.train)) / setup.world.size)
    attacked = setup.perturb.model
    return fit_batch(recipe, setup.classifier, attacked, purifier, images, setup.reporter)


def initial_purifier(recipe: Recipe, classifier: nn.Module) -> Purifier:
    """Return the purifier in `training.initial`, or one of fresh weights, from torch's global generator.

    Raises:
        WeightsError: See `initial_state`.
    """
    if recipe.training.initial is None:
        return build_purifier(recipe, classifier)
    path = start_file(recipe)
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
    # Without a latent there is never an encoder, and nothing is missing.
    if purifier.latent_features and not purifier.has_encoder:
        raise WeightsError(
            f"{path} has no encoder, as imported purifiers have none: it cannot be trained further"
        )
    return purifier


def term_names(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the terms that `train_step` adds up, the loss first."""
    accuracy = () if recipe.training.objective == "elbo" else ("accuracy",)
    elbo = () if recipe.training.objective == "adversarial" else ("bce", "kl")
    return ("loss", *accuracy, *elbo)


def train_step(
    setup: TrainingSetup,
    state: TrainingState,
    positions: Tensor,
    place: Place,
    beta: float,
    perturbed_at: Place | None = None,
) -> Tensor:
    """Take one optimiser step on one batch.

    Each process takes its shard of the batch. Random numbers are drawn for the whole batch, so they do not
    depend on the number of processes; only attacks on the defence draw latents of their own in each. Losses
    and gradients are summed over all processes.

    Args:
        setup: What does not change.
        state: What does.
        positions: (B,) positions of the batch's images in the training set.
        place: Epoch and batch.
        beta: Weight of the KL term.
        perturbed_at: Place whose perturbations against the classifier are used; `place` when None.

    Returns:
        Sums over the batch, in the order of `term_names`, float64.

    Raises:
        NumericsError: If the reconstruction, a term of the loss, or a gradient is not finite.
    """
    recipe, clean = setup.recipe, setup.train.pixels(positions)
    if recipe.training.objective != "elbo" and recipe.training.adversarial.augment:
        drawn = generator(recipe.seed, "augmentation", *place)
        # The whole batch, so that the choices do not depend on the number of processes.
        clean = augment(clean, flip=recipe.classifier.training.flip, generator=drawn)
    clean = clean.to(setup.device)
    labels = setup.train.labels[positions].to(setup.device)
    if isinstance(state.trained, EndToEnd):
        terms = adversarial_terms(state.trained, state.replica, clean, labels, place, beta, setup.world)
    else:
        inputs = _perturbed_shard(setup, state.fit, clean, labels, perturbed_at or place)
        terms = _elbo_terms(setup, state, clean, inputs, place, beta)
    names = term_names(recipe)
    # Every process gets the same bits, so that all of them stop below, or none.
    sums = setup.world.sum(torch.stack([terms[name].detach().double().cpu() for name in names]))
    # From the last: a term that is not finite makes the loss so, and is the better name for it.
    for name, value in zip(reversed(names), reversed(sums.tolist()), strict=True):
        if not math.isfinite(value):
            raise _not_finite(f"the {_SHOWN.get(name, name)} term", place, value)
    state.optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(terms["loss"])
    # Before the step: a NaN would stay in the moments and pass on to the slow weights.
    require_finite_gradients(state.purifier, place, _LOWER_RATE)
    state.optimiser.step()
    state.lookahead.step()
    if state.average is not None:
        state.average.step(state.lookahead.taken)
    return sums


def _perturbed_shard(setup: TrainingSetup, fit: Fit, clean: Tensor, labels: Tensor, place: Place) -> Tensor:
    """Return this process's shard of a balanced batch, from the cache where it is there."""
    # `place` is that of the group's first epoch: a cached example and one made again have one seed.
    shard, seed = setup.world.shard(len(clean)), derive_seed(setup.recipe.seed, "perturbation", *place)

    def some(part: slice) -> Tensor:
        # Image k of a shard has place rank + k * size in the batch.
        first, size = shard.start, shard.step
        chosen = slice(first + size * part.start, min(first + size * part.stop, len(clean)), size)
        return setup.perturb(clean, labels, seed, chosen)

    def perturb() -> Tensor:
        # Images do not depend on each other here: any number of passes makes the same.
        passes = Passes(fit.at_once, setup.perturb).over(len(clean[shard]), some)
        # With more processes than images in the last batch, a shard is empty.
        return torch.cat([clean[:0], *passes])

    return setup.cache.perturbed(place, clean[shard], perturb)


def _elbo_terms(
    setup: TrainingSetup, state: TrainingState, clean: Tensor, inputs: Tensor, place: Place, beta: float
) -> dict[str, Tensor]:
    """Return loss, BCE and KL (Section 4.4), summed over this process's shard.

    Args:
        setup: What does not change.
        state: What does.
        clean: (B, channels, H, W), the whole batch: the targets of the reconstruction.
        inputs: The shard of it, partly perturbed.
        place: Epoch and batch.
        beta: Weight of the KL term.
    """
    recipe, shard = setup.recipe, setup.world.shard(len(clean))
    shape = (len(clean), state.purifier.latent_features)
    # Drawn on the CPU for the whole batch: the same on every device and number of processes.
    noise = torch.randn(shape, generator=generator(recipe.seed, "posterior", *place))[shard].to(setup.device)
    with autocast(recipe.precision, setup.device):
        # The classifier is frozen and the inputs are data: nothing before the purifier learns.
        layers = recipe.representation.layers
        representation: Mapping[str, Tensor] = LayerOutputs(setup.classifier, inputs, layers)
        if not state.fit.recompute_layers:
            with torch.no_grad():
                representation = extract_representation(setup.classifier, inputs, layers)
        state.purifier.representation_encoder.recompute = state.fit.recompute_encodings
        reconstruction, mean, log_variance = state.replica(inputs, representation, noise)
    # Checked before the loss: its cross-entropy refuses NaN by an error that names no layer.
    if setup.world.any(not bool(reconstruction.detach().isfinite().all())):
        with autocast(recipe.precision, setup.device):
            # The purifier itself: its replica would wait for a backward pass that does not come.
            where = find_nonfinite_layer(
                state.purifier, lambda: state.purifier(inputs, representation, noise)
            )
        raise _not_finite("the reconstruction", place, math.nan, where)
    # Outside of autocast: losses are in float32.
    terms = negative_elbo(reconstruction, clean[shard], mean, log_variance, beta)
    return {"loss": terms.total, "bce": terms.bce, "kl": terms.kl}


def _not_finite(what: str, place: Place, value: float, where: str = "") -> NumericsError:
    return NumericsError(
        f"{what} became {value} in epoch {place[0] + 1}, batch {place[1] + 1}{where}; training stops",
        hint=_LOWER_RATE,
    )
