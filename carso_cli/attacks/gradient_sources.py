"""Where an attack may take a model's gradients from.

The output of a model can have no gradient, a zero one or a wrong one although its decisions depend on the
image: its gradients are *masked* (Athalye, Carlini and Wagner, 2018). The modules inside often still have a
good one. `find_sources` runs a model on a few images, looks at every module, and returns

- `output`: the model itself; probabilities are replaced by their logarithms;
- `layer`: the last module whose (B, C) output decides as the model does. This leaves out what follows it,
  such as a saturating softmax, a rounding, or a detour around autograd;
- `graft`: the model's forward pass, in which the first module's input has the gradient of the identity
  towards the images: BPDA around everything before that module, a `no_grad` included;
- `inner`: a module that maps images to scores, given the images themselves: what the model does to its
  input before is left out, in the forward pass too;
- `straight-through`: modules that keep the shape of their input, and that torch does not ship (or that the
  caller names), have the gradient of the identity: BPDA around each.

Where none of these has a right gradient, two more may lead somewhere: `smoothed`
(`carso_cli.attacks.smoothing`) and `distilled` (`carso_cli.attacks.distillation`).

Each is a function of images to scores that an attack can follow; what an attack finds is always scored on the
model itself. A source whose scores and gradients are those of an earlier one is left out.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from carso_cli.attacks.losses import margin
from carso_cli.attacks.model_parts import Model as Model
from carso_cli.attacks.model_parts import named_modules as named_modules
from carso_cli.attacks.model_parts import own_generators, reseeded
from carso_cli.errors import UsageError, nearest
from carso_cli.runtime.seed import all_seeded

OUTPUT, LAYER, GRAFT, INNER, STRAIGHT_THROUGH = "output", "layer", "graft", "inner", "straight-through"
SMOOTHED, DISTILLED = "smoothed", "distilled"
EXACT = (OUTPUT, LAYER)
"""Sources that differentiate the model's own forward pass, nothing replaced."""
_AGREES = 0.98
"""Least share of equal decisions for a layer; rounding may tip an image that lies between two classes."""
_RESEMBLES = 0.8
"""Least share for an inner module, which sees other inputs than in the model."""
_SAME = 1.0 - 1e-6
"""Cosine above which two gradients are one."""
_SEEDS = 3


@dataclass(frozen=True, eq=False)
class GradientSource:
    """A differentiable function of the images that decides as the model does, or nearly so.

    Args:
        name: `output`, or a kind and the module's name, such as `layer net.fc`.
        kind: One of the module's constants.
        agreement: Share of probe images on which its largest score is the model's decision, in [0, 1].
        function: (B, channels, H, W) images to (B, C) scores.
    """

    name: str
    kind: str
    agreement: float
    function: Model

    def __call__(self, images: Tensor) -> Tensor:
        """Map (B, channels, H, W) images to (B, C) scores; classes ruled out score below the others."""
        return finite_scores(self.function(images))


def finite_scores(answer: Tensor) -> Tensor:
    """Return (B, C) scores in which -infinity, that of a class ruled out, is below the others by 1."""
    ruled_out = answer == -torch.inf
    if not bool(ruled_out.any()):
        return answer
    lowest = answer.masked_fill(ruled_out, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(ruled_out, lowest - 1, answer)


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a module: its first input, and its output."""

    name: str
    module: nn.Module
    number: int
    """How often the module had been called before in the same forward pass."""
    received: Tensor | None
    returned: Tensor | None


def find_sources(
    model: Model, images: Tensor, *, eps: float, bpda: Sequence[str] = (), seed: int = 0
) -> list[GradientSource]:
    """Return the sources of a model, the most faithful first: `output`, then exact ones, then the others.

    Args:
        model: (B, channels, H, W) images in [0, 1] to (B, C) scores, random or not.
        images: A few images; the model is asked about these and about noisy copies.
        eps: Size of the noise, in pixel units.
        bpda: Names of modules to be replaced by the identity in the backward pass, together.
        seed: Seed of the noise and of the model's own randomness.

    Raises:
        UsageError: If `bpda` names an unknown module, or one that changes the shape of its input.
    """
    modules = named_modules(model)
    noise = (
        torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(seed)).to(images) * 2 - 1
    )
    probes = torch.cat([images, (images + eps * noise).clamp(0, 1)])
    with torch.no_grad(), all_seeded(seed):
        scores, calls = _trace(model, modules, probes)
    found = [GradientSource(OUTPUT, OUTPUT, 1.0, functools.partial(_scores, model))]
    found += _layers(model, modules, calls, scores)
    found += _grafts(model, modules, calls, probes)
    found += _inner_modules(calls, probes, scores)
    found += _straight_through(model, modules, calls, bpda)
    generators = own_generators(model)
    if generators:
        found = [
            replace(source, function=functools.partial(reseeded, source.function, generators))
            for source in found
        ]
    return _distinct(found, images, scores[: len(images)].argmax(dim=1), seed)


def _trace(model: Model, modules: dict[str, nn.Module], images: Tensor) -> tuple[Tensor, list[_Call]]:
    """Run a model and return its scores and every call of its modules, in the order in which they ended."""
    calls: list[_Call] = []
    counts: dict[str, int] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def record(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
            first = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            returned = output.detach().clone() if isinstance(output, Tensor) else None
            calls.append(_Call(name, module, counts.get(name, 0), first, returned))
            counts[name] = counts.get(name, 0) + 1

        return record

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(recorder(name)).remove)
        scores = model(images)
    return scores, calls


def _scores(model: Model, images: Tensor) -> Tensor:
    """Return what a model answers, probabilities as logarithms: their differences do not saturate."""
    answer = model(images)
    return answer.clamp_min(torch.finfo(answer.dtype).tiny).log() if are_probabilities(answer) else answer


def are_probabilities(answer: Tensor) -> bool:
    """Say whether (B, C) answers are probabilities: not negative, and each row sums to 1."""
    values = answer.detach()
    return bool((values >= 0).all()) and torch.allclose(
        values.sum(dim=1), torch.ones_like(values[:, 0]), atol=1e-3
    )


def _agreement(scores: Tensor, reference: Tensor) -> float:
    return float((scores.argmax(dim=1) == reference.argmax(dim=1)).float().mean())


def _layers(
    model: Model, modules: dict[str, nn.Module], calls: Sequence[_Call], scores: Tensor
) -> Iterator[GradientSource]:
    """Yield modules whose output decides as the model does, the last first."""
    for call in reversed(calls):
        if call.returned is not None and call.returned.shape == scores.shape:
            agreement = _agreement(call.returned, scores)
            if agreement >= _AGREES:
                function = functools.partial(_at_layer, model, modules[call.name], call.number)
                yield GradientSource(f"{LAYER} {call.name}", LAYER, agreement, function)


def _at_layer(model: Model, module: nn.Module, number: int, images: Tensor) -> Tensor:
    """Run a model and return the output of the `number`-th call of a module."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        answer = model(images)
    finally:
        handle.remove()
    # A model that routes its calls may leave the module out this time.
    return outputs[number] if number < len(outputs) else answer


def _grafts(
    model: Model, modules: dict[str, nn.Module], calls: Sequence[_Call], images: Tensor
) -> Iterator[GradientSource]:
    """Yield the graft at the first module that receives something of the images' shape."""
    started = [call for call in calls if call.received is not None and call.received.shape == images.shape]
    if started:
        name = started[0].name
        # A purifier that optimises the image calls its network many times, and decides by the last.
        last = max(call.number for call in started if call.name == name)
        for number in dict.fromkeys((0, last)):
            function = functools.partial(_grafted, model, modules[name], number)
            yield GradientSource(f"{GRAFT} {name}{', last call' * (number > 0)}", GRAFT, 1.0, function)


def _grafted(model: Model, module: nn.Module, number: int, images: Tensor) -> Tensor:
    """Run a model with the identity's gradient from the images to the input of a module's call."""
    calls = itertools.count()

    def graft(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if next(calls) != number:
            return None
        # Inside a `no_grad` of the model's own, which ends with its block.
        torch.set_grad_enabled(True)
        return (inputs[0].detach() + (images - images.detach()), *inputs[1:])

    was_enabled = torch.is_grad_enabled()
    handle = module.register_forward_pre_hook(graft)
    try:
        return _scores(model, images)
    finally:
        handle.remove()
        torch.set_grad_enabled(was_enabled)


def _inner_modules(calls: Sequence[_Call], images: Tensor, scores: Tensor) -> Iterator[GradientSource]:
    """Yield modules from something like images to scores, where the model changes the images first."""
    for call in calls:
        fits = call.received is not None and call.received.shape == images.shape
        if fits and call.returned is not None and call.returned.shape == scores.shape:
            try:
                with torch.no_grad():
                    agreement = _agreement(call.module(images), scores)
            except Exception:
                # It takes another type, device or range than the model does.
                continue
            if agreement >= _RESEMBLES:
                yield GradientSource(f"{INNER} {call.name}", INNER, agreement, call.module)


def _straight_through(
    model: Model, modules: dict[str, nn.Module], calls: Sequence[_Call], bpda: Sequence[str]
) -> Iterator[GradientSource]:
    keep_shape = {
        call.name
        for call in calls
        if call.received is not None
        and call.returned is not None
        and call.received.shape == call.returned.shape
    }
    for name in bpda:
        if name not in modules:
            raise UsageError(
                f"--bpda {name}: the model has no such module; {nearest(name, list(modules))}".rstrip("; "),
                hint=f"modules: {', '.join(list(modules)[:20])}",
            )
        if name not in keep_shape:
            raise UsageError(
                f"--bpda {name}: this module changes the shape of its input, so it has no identity"
            )
    foreign = [
        name
        for name in modules
        if name in keep_shape
        and not type(modules[name]).__module__.startswith("torch.nn.")
        and not any(modules[name].children())
    ]
    for names in dict.fromkeys((tuple(bpda), tuple(foreign))):
        if names:
            function = functools.partial(_with_identities, model, [modules[name] for name in names])
            yield GradientSource(f"{STRAIGHT_THROUGH} {', '.join(names)}", STRAIGHT_THROUGH, 1.0, function)


def _with_identities(model: Model, modules: Sequence[nn.Module], images: Tensor) -> Tensor:
    """Run a model with the identity's gradient through some modules."""

    def identity(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        straight: Tensor = inputs[0] - inputs[0].detach()
        return output.detach() + straight

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(identity).remove)
        return _scores(model, images)


def _distinct(
    sources: Sequence[GradientSource], images: Tensor, decisions: Tensor, seed: int
) -> list[GradientSource]:
    """Leave out sources without a gradient, and those whose gradients are those of an earlier one."""
    kept: list[GradientSource] = []
    directions: list[Tensor] = []
    for source in sources:
        # Over several seeds, since a model may spoil its gradient at some calls only.
        seeds = range(seed, seed + _SEEDS)
        try:
            gradients = [margin_gradient(source, images, decisions, number) for number in seeds]
        except Exception:
            # What is replaced may break a model that takes gradients of its own; the model itself must run.
            if source.kind == OUTPUT:
                raise
            continue
        found = [gradient.flatten(1).double() for gradient in gradients if gradient is not None]
        # The output stays whatever its gradient: that there is none is a finding.
        if not found:
            kept += [source] * (source.kind == OUTPUT)
            continue
        direction = F.normalize(torch.nan_to_num(torch.cat(found), 0.0, 0.0, 0.0), dim=1)
        others = (other for other in directions if len(other) == len(direction))
        known = any(bool(((direction * other).sum(dim=1) > _SAME).all()) for other in others)
        if source.kind == OUTPUT or (not known and bool((direction != 0).any())):
            kept.append(source)
            directions.append(direction)
    return kept


def margin_gradient(function: Model, images: Tensor, labels: Tensor, seed: int) -> Tensor | None:
    """Return the gradient of the margin at the images, (B, channels, H, W); None where there is no path.

    Args:
        function: Images to (B, C) scores.
        images: (B, channels, H, W).
        labels: (B,) int64.
        seed: Seed of whatever is random in the function.
    """
    return gradient_of(lambda at: margin(function(at), labels), images, seed)


def gradient_of(value: Model, images: Tensor, seed: int) -> Tensor | None:
    """Return the gradient of (B,) values at the images, (B, channels, H, W); None where there is no path.

    Args:
        value: Images to (B,) values.
        images: (B, channels, H, W).
        seed: Seed of whatever is random in it.
    """
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad(), all_seeded(seed):
        values = value(leaf)
        if not values.requires_grad:
            return None
        gradients = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
    return gradients[0]
