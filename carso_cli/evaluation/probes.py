"""Probes of a model before the first attack: what kind of function it is, in a second or two.

    facts = probe(model, images, labels, seed=0)
    facts.random, facts.clean_accuracy, [check.name for check in facts.checks]

A robust accuracy means something for a function from one image to scores. A model whose answer depends on the
other images of its batch, or on what it was asked before, is no such function; a model that is random,
declared or not, has to be attacked with Expectation over Transformation and scored on fresh draws.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from carso_cli.attacks.gradient_sources import are_probabilities, finite_scores, margin_gradient
from carso_cli.attacks.model_parts import Model, follow_global_seed
from carso_cli.errors import CarsoError, UsageError
from carso_cli.evaluation.sanity_checks import Check, at_least, at_most, not_run
from carso_cli.runtime.seed import all_seeded, generator

IMAGES = 32
"""Images that a probe asks about, at most."""
_REPEATS = 6
"""Calls that must agree with the first."""
_ROUNDING = 1e-3
"""Largest difference of two answers, as a share of the largest score, that may come from rounding."""


@dataclass(frozen=True)
class Facts:
    """What the probes found.

    Args:
        classes: C.
        random: Whether two calls on the same images differ.
        seedable: Whether the seeds of torch, numpy and the standard library decide what is random.
        probabilities: Whether it answers probabilities rather than logits.
        has_gradient: Whether its output has a gradient path to the images.
        clean_accuracy: Share of all the images that were given whose class is right.
        checks: What speaks for or against trusting a number about it.
    """

    classes: int
    random: bool
    seedable: bool
    probabilities: bool
    has_gradient: bool
    clean_accuracy: float
    checks: tuple[Check, ...]


def probe(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 8 / 255,
    seed: int = 0,
    batch_size: int = 100,
) -> Facts:
    """Ask a model a few questions.

    Args:
        model: (B, channels, H, W) images in [0, 1] to (B, C) scores.
        images: (M, channels, H, W).
        labels: (M,) int64.
        eps: Size of the noise on the images near them, in pixel units.
        seed: Seed of the probes.
        batch_size: Images per call for the clean accuracy.

    Raises:
        UsageError: If the model does not answer one finite (B, C) tensor of floating-point scores.
    """
    few = images[:: max(len(images) // IMAGES, 1)][:IMAGES]
    own = labels[:: max(len(labels) // IMAGES, 1)][:IMAGES]
    untouched = _copy(model)
    scores = _ask(model, few, seed)
    classes = scores.shape[1]
    if int(labels.max()) >= classes:
        raise UsageError(
            f"the labels go up to {int(labels.max())}, and the model has {classes} classes",
            hint="give labels from 0, in the order of the model's classes",
        )
    # Near the images too, where decisions change, and several times: a model may be random there only, or now
    # and then.
    signs = torch.randint(0, 2, few.shape, generator=generator(seed, "near")).to(few) * 2 - 1
    asked = torch.cat([few, (few + eps * signs).clamp(0, 1), _at_edges(model, few, seed)])

    def near(number: int) -> Tensor:
        return _ask(model, asked, seed + number, changed=True)

    reference = near(0)
    seedable = all([_alike(reference, near(0)) for _ in range(_REPEATS)])
    is_random = not all([_alike(reference, near(number)) for number in range(1, 1 + _REPEATS)])
    # A random model may draw once per call, for the whole batch.
    calls = 10 if is_random else 1
    accuracy = sum(_accuracy(model, images, labels, batch_size) for _ in range(calls)) / calls
    gradient = margin_gradient(model, few, own, seed)
    checks = (
        _input_kept(model, few, seed),
        _own_image_only(model, few, seed, seedable),
        _no_memory(untouched, few, seed, is_random and not seedable),
        _above_chance(model, images, labels, accuracy, classes, batch_size),
        _double_precision(model, few, scores, is_random),
    )
    probabilities, has_gradient = are_probabilities(scores), gradient is not None
    return Facts(classes, is_random, seedable, probabilities, has_gradient, accuracy, checks)


@torch.no_grad()
def _ask(model: Model, images: Tensor, seed: int, *, changed: bool = False) -> Tensor:
    """Return a model's scores, (B, C), with its random numbers fixed.

    `changed` says that the images are no clean ones: to these a detector may answer NaN, which becomes 0.

    Raises:
        UsageError: If the answer is of another kind, naming it and what to do.
    """
    try:
        with all_seeded(seed):
            answer: object = follow_global_seed(model)(images.clone())
    except CarsoError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"the model fails on images of shape {tuple(images.shape)}: {type(error).__name__}: {first}",
            hint="it must map (B, channels, height, width) images in [0, 1] to (B, classes) scores",
        ) from error
    scores = _require_scores(answer, len(images))
    # A class may be ruled out by -infinity, but not all of them.
    bad = (scores.isnan() | (scores == torch.inf)).any(dim=1) | (scores == -torch.inf).all(dim=1)
    if bool(bad.any()) and not changed:
        raise UsageError(
            f"{int(bad.sum())} of {len(images)} answers hold NaN or an infinity",
            hint="the model must give finite scores on unperturbed images; -infinity may rule classes out",
        )
    return torch.where(bad[:, None], 0.0, finite_scores(scores))


def _require_scores(answer: object, batch: int) -> Tensor:
    if not isinstance(answer, Tensor):
        kind = type(answer).__name__
        hint = "return the (B, classes) tensor alone, for example with lambda images: model(images)[0]"
        if isinstance(answer, np.ndarray):
            hint = "return torch.from_numpy(scores); without a gradient the model is attacked in other ways"
        elif isinstance(answer, nn.Module):
            hint = "a function that makes the model must take no argument; one that takes images is the model"
        raise UsageError(f"the model answers a value of type {kind}, not a tensor of scores", hint=hint)
    if answer.ndim != 2 or len(answer) != batch or answer.shape[1] < 2:
        raise UsageError(
            f"the model answers shape {tuple(answer.shape)} for {batch} images; ({batch}, classes) is needed",
            hint="a score for each class: a binary classifier needs two",
        )
    if not answer.is_floating_point():
        raise UsageError(
            f"the model answers {str(answer.dtype).removeprefix('torch.')} numbers",
            hint="return floating-point scores: decisions alone, or integers, leave nothing to attack",
        )
    return answer.detach()


def _at_edges(model: Model, images: Tensor, seed: int) -> Tensor:
    """Return points between neighbouring images at which the decision changes, where it does."""
    other, share = images.roll(1, dims=0), torch.full((len(images), 1, 1, 1), 0.5).to(images)
    own = _ask(model, images, seed).argmax(dim=1)
    for halving in range(2, 10):
        stays = _ask(model, torch.lerp(images, other, share), seed, changed=True).argmax(dim=1) == own
        share += torch.where(stays, 1.0, -1.0)[:, None, None, None].to(share) / 2**halving
    return torch.lerp(images, other, share)


def _copy(model: Model) -> Model | None:
    """Return a copy of a model as it is before its first call; None where it cannot be copied."""
    try:
        # A function would be copied by reference, and remember all the same.
        return copy.deepcopy(model) if isinstance(model, nn.Module) else None
    except Exception:
        return None


def _alike(first: Tensor, second: Tensor) -> bool:
    """Say whether scores differ by rounding at most."""
    scale = torch.maximum(first.abs().max(), second.abs().max()).clamp_min(1e-30)
    return bool((first - second).abs().max() <= _ROUNDING * scale)


def _accuracy(model: Model, images: Tensor, labels: Tensor, batch_size: int) -> float:
    return float((_decisions(model, images, batch_size) == labels).float().mean())


@torch.no_grad()
def _decisions(model: Model, images: Tensor, batch_size: int) -> Tensor:
    parts = [model(images[at : at + batch_size]).argmax(dim=1) for at in range(0, len(images), batch_size)]
    return torch.cat(parts)


@torch.no_grad()
def _input_kept(model: Model, images: Tensor, seed: int) -> Check:
    given = images.clone()
    with all_seeded(seed):
        model(given)
    change = float((given - images).abs().max())
    return at_most(
        "input-kept", change, 0.0, "largest change that the model makes to the images that it is given"
    )


def _own_image_only(model: Model, images: Tensor, seed: int, seedable: bool) -> Check:
    """Return whether an image's answer stays when the other half of its batch is replaced."""
    name = "batch-independence"
    if not seedable:
        return not_run(name, "the model's randomness cannot be held fixed by a seed")
    if len(images) < 2:
        return not_run(name, "one image has no others beside it")
    half = len(images) // 2
    noise = torch.rand(images[half:].shape, generator=generator(seed, "probe"), dtype=images.dtype)
    mixed = torch.cat([images[:half], noise.to(images)])
    own, beside = (_ask(model, asked, seed, changed=True)[:half] for asked in (images, mixed))
    scale = own.abs().max().clamp_min(1e-30)
    return at_most(
        name,
        float((own - beside).abs().max() / scale),
        _ROUNDING,
        "largest change of an image's scores when the other images of its batch are replaced, as a share of "
        "the largest score; a model in training mode, or with statistics of the batch, is no function of the "
        "image",
    )


def _no_memory(untouched: Model | None, images: Tensor, seed: int, unknown: bool) -> Check:
    """Return whether the answer on nearby images stays when the images themselves were asked before."""
    name = "no-memory"
    fresh, asked = _copy(untouched) if untouched is not None else None, untouched
    if fresh is None or asked is None or unknown:
        return not_run(name, "it takes a copy of a module whose randomness a seed decides")
    signs = torch.randint(0, 2, images.shape, generator=generator(seed, "memory")).to(images) * 2 - 1
    near = (images + 0.02 * signs).clamp(0, 1)
    _ask(asked, images, seed)
    first, later = (_ask(one, near, seed, changed=True) for one in (fresh, asked))
    scale = first.abs().max().clamp_min(1e-30)
    return at_most(
        name,
        float((first - later).abs().max() / scale),
        _ROUNDING,
        "largest change of the scores on images after the model was asked about images close to them, as a "
        "share of the largest score; a model that remembers is no function of the image",
    )


def _above_chance(
    model: Model, images: Tensor, labels: Tensor, accuracy: float, classes: int, batch_size: int
) -> Check:
    """Return whether the clean accuracy is above chance; where it is not, with a cause that was tried."""
    chance = 1.0 / classes
    threshold = chance + 3.0 * (chance * (1.0 - chance) / len(images)) ** 0.5
    meaning = "accuracy on the unperturbed images; at chance nothing is left to attack"
    if accuracy < max(threshold, 2.0 * chance) and accuracy < 0.9:
        meaning += _cause(model, images, labels, accuracy, batch_size)
    return at_least("above-chance", accuracy, threshold, meaning)


def _cause(model: Model, images: Tensor, labels: Tensor, accuracy: float, batch_size: int) -> str:
    """Return a usual cause of a low accuracy whose remedy raises it, as the end of a sentence."""
    mean, std = images.mean(dim=(0, 2, 3), keepdim=True), images.std(dim=(0, 2, 3), keepdim=True)
    remedies: dict[str, Callable[[Tensor], Tensor]] = {
        "the model seems to expect pixels from 0 to 255": lambda pixels: pixels * 255.0,
        "the model seems to expect standardised images": lambda pixels: (pixels - mean) / std,
        "the model seems to standardise images that are standardised already": lambda pixels: (
            pixels * std + mean
        ),
        "the model seems to expect channels in the order blue, green, red": lambda pixels: pixels.flip(1),
    }
    for cause, remedy in remedies.items():
        try:
            if _accuracy(model, remedy(images), labels, batch_size) > max(2.0 * accuracy, accuracy + 0.2):
                return f": {cause}; put that into the function that is audited"
        except Exception:
            continue
    predicted = _decisions(model, images, batch_size)
    # The label that each predicted class most often has: another order gives each class another label.
    meant = {said: int(labels[predicted == said].mode().values) for said in set(predicted.tolist())}
    renamed = sum(meant[int(said)] == int(label) for said, label in zip(predicted, labels, strict=True))
    if 1 < len(meant) == len(set(meant.values())) and renamed / len(labels) > max(2.0 * accuracy, 0.5):
        return ": the model seems to number the classes in another order than the labels"
    return ""


def _double_precision(model: Model, images: Tensor, scores: Tensor, is_random: bool) -> Check:
    name = "float64-agreement"
    doubled = _copy(model) if not is_random else None
    if not isinstance(doubled, nn.Module):
        return not_run(name, "it takes a copy of a deterministic module")
    try:
        exact = doubled.double()(images.double())
        share = float((exact.argmax(dim=1) != scores.argmax(dim=1)).float().mean())
    except Exception:
        return not_run(name, "the module does not run in float64")
    return at_most(name, share, 0.05, "share of decisions that change when the module runs in float64")
