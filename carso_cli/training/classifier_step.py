"""What one step and one check of classifier training do, apart from the run that they belong to.

- `ClassifierSetup` holds what does not change, `untrained_classifier` and `make_optimiser` what does;
- `train_step` takes one optimiser step, `held_out_accuracies` measures where it led.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carso_cli.attacks.pgd import PGD
from carso_cli.attacks.threat_model import ThreatModel
from carso_cli.build import build_classifier, channels_last, untrained_classifier
from carso_cli.data.augmentation import augment
from carso_cli.data.image_set import ImageSet, ordered_batches
from carso_cli.distributed.world import World, join
from carso_cli.errors import NumericsError, RecipeError, UsageError
from carso_cli.recipe.schema import Kind, Recipe
from carso_cli.runtime.nonfinite import find_nonfinite_layer, require_finite_gradients
from carso_cli.runtime.precision import full, in_precision, reduced
from carso_cli.runtime.reporter import Reporter
from carso_cli.runtime.seed import derive_seed, generator, seeded
from carso_cli.training.classifier_state import ClassifierState

HELD_OUT_PGD_STEPS = 10
"""Steps of the PGD that follows robustness while training; each of 2.5 eps / 10."""
_LOWER_RATE = "lower classifier.training.peak_learning_rate; the state of the last whole epoch is saved"


@dataclass(frozen=True)
class ClassifierSetup:
    """What does not change during training."""

    recipe: Recipe
    kind: Kind
    threat: ThreatModel
    train: ImageSet
    held_out: ImageSet
    device: torch.device
    reporter: Reporter

    @property
    def world(self) -> World:
        """The processes that share the training."""
        return join(self.device)


def threat_model(recipe: Recipe) -> ThreatModel:
    """Return the recipe's threat model, the one that adversarial training trains against."""
    return ThreatModel(recipe.threat.norm, recipe.threat.eps)


def initial_classifier(recipe: Recipe) -> nn.Module:
    """Build the recipe's WideResNet with the weights that training starts from.

    They are drawn by the recipe's seed, or those that `classifier.training.initial` names.

    Raises:
        UsageError: If the recipe's classifier is no WideResNet.
        RecipeError: If the named weights belong to images standardised in another way.
        WeightsError: If they are missing, damaged or of another architecture.
    """
    if recipe.classifier.family != "wide-resnet":
        raise UsageError(
            f"recipe '{recipe.name}' has a classifier of family '{recipe.classifier.family}'; "
            "carso trains WideResNets only",
            hint="set classifier.family to wide-resnet, or train your module with your own code",
        )
    with seeded(recipe.seed, "classifier weights"):
        classifier = channels_last(untrained_classifier(recipe))
    kind = recipe.classifier.training.initial
    if kind is not None:
        given = build_classifier(recipe, kind)
        for name, expected in classifier.named_buffers():
            if name in ("mean", "std") and not torch.allclose(given.get_buffer(name), expected):
                raise RecipeError(
                    f"the weights of classifier.{kind} go with another {name} than data.{name}",
                    hint=f"give data.{name} the values {given.get_buffer(name).flatten().tolist()}",
                )
        classifier.load_state_dict(given.state_dict())
    return classifier


def make_optimiser(recipe: Recipe, classifier: nn.Module) -> torch.optim.SGD:
    """Return SGD, with Nesterov momentum where there is momentum at all."""
    section = recipe.classifier.training
    return torch.optim.SGD(
        classifier.parameters(),
        lr=section.peak_learning_rate,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        nesterov=section.momentum > 0,
    )


def train_step(
    setup: ClassifierSetup, state: ClassifierState, positions: Tensor, place: tuple[int, int]
) -> Tensor:
    """Take one optimiser step on one batch, perturbed first for kind `at`.

    Args:
        setup: What does not change.
        state: Classifier, in training mode, and optimiser.
        positions: Places of the batch's images in the training set, int64 (B,); each process takes its share.
        place: Epoch and batch; every random choice of the step depends on them alone.

    Returns:
        Summed (loss, correct answers) of the whole batch, float64 (2,), on the CPU.

    Raises:
        NumericsError: If loss or a gradient is not finite, naming the layer or parameter.
    """
    section, seed = setup.recipe.classifier.training, setup.recipe.seed
    own = setup.world.own(len(positions))
    images = setup.train.pixels(positions)
    if section.augment:
        images = augment(images, flip=section.flip, generator=generator(seed, "augmentation", *place))
    images = images.to(setup.device)
    labels = setup.train.labels[positions].to(setup.device)[own]
    model = in_precision(state.classifier, setup.recipe.precision)
    if setup.kind == "at":
        attack = _training_attack(setup, derive_seed(seed, "training attack", *place))
        start, images = attack.start(images)[own], images[own]
        # In training mode, as published: the attack sees the batch statistics that the step will see.
        images = attack.run_from(start, model, images, labels)
    else:
        images = images[own]
    with reduced(setup.recipe.precision, setup.device):
        logits = full(state.replica(images))
    # Gradients are summed over processes, so each has its images' part of the mean over the whole batch.
    loss = F.cross_entropy(logits, labels, label_smoothing=section.label_smoothing, reduction="sum")
    correct = (logits.argmax(dim=1) == labels).sum()
    sums = setup.world.sum(torch.stack((loss.detach(), correct)).double().cpu())
    value = sums[0].item() / len(positions)
    if not math.isfinite(value):
        where = find_nonfinite_layer(state.classifier, lambda: model(images))
        raise NumericsError(
            f"the loss became {value} in epoch {place[0] + 1}, batch {place[1] + 1}{where}; training stops",
            hint=_LOWER_RATE,
        )
    state.optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss / len(positions))
    require_finite_gradients(state.classifier, place, _LOWER_RATE)
    state.optimiser.step()
    return sums


def _training_attack(setup: ClassifierSetup, seed: int) -> PGD:
    """Return the attack of one training step; its last point is trained on, whether it fools or not."""
    section, eps = setup.recipe.classifier.training, setup.recipe.threat.eps
    steps = 1 if section.method == "fast" else section.steps
    default = 1.25 * eps if section.method == "fast" else 2.5 * eps / steps
    size = default if section.step_size is None else section.step_size
    return PGD(setup.threat, steps=steps, step_size=size, random_start=True, seed=seed, keep_best=False)


def held_out_accuracies(setup: ClassifierSetup, classifier: nn.Module) -> dict[str, float | None]:
    """Return accuracies on the held-out images, clean and under PGD; None without any.

    The classifier is left in evaluation mode.
    """
    count = len(setup.held_out)
    if count == 0:
        return {"clean_accuracy": None, "pgd_accuracy": None}
    step = 2.5 * setup.recipe.threat.eps / HELD_OUT_PGD_STEPS
    classifier.eval()
    model = in_precision(classifier, setup.recipe.precision)
    correct = torch.zeros(2, dtype=torch.float64)
    parts = list(enumerate(ordered_batches(count, setup.recipe.evaluation.batch_size)))
    for number, part in parts[setup.world.own(len(parts))]:
        images = setup.held_out.pixels(part).to(setup.device)
        labels = setup.held_out.labels[part].to(setup.device)
        seed = derive_seed(setup.recipe.seed, "held-out attack", number)
        attack = PGD(setup.threat, steps=HELD_OUT_PGD_STEPS, step_size=step, seed=seed)
        for place, seen in enumerate((images, attack(model, images, labels))):
            correct[place] += (model(seen).argmax(dim=1) == labels).sum().cpu()
    clean, attacked = (setup.world.sum(correct) / count).tolist()
    return {"clean_accuracy": clean, "pgd_accuracy": attacked}
