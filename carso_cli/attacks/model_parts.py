"""What any model consists of: its modules, and the generators that it draws random numbers from."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]
"""(B, channels, H, W) images to (B, C) scores."""


def named_modules(model: Model) -> dict[str, nn.Module]:
    """Return the modules that a model consists of, by name; for a function, those that it refers to.

    A function's modules are looked for in its closure, its defaults, the globals that it names, and the
    object that it is a method of.
    """
    if isinstance(model, nn.Module):
        return {name: module for name, module in model.named_modules() if name}
    found: dict[str, nn.Module] = {}
    for name, value in _referred(model):
        if isinstance(value, nn.Module):
            found |= {f"{name}.{inner}".rstrip("."): module for inner, module in value.named_modules()}
    return found


def _referred(function: object) -> Iterator[tuple[str, Any]]:
    if isinstance(function, functools.partial):
        values = (*function.args, *function.keywords.values())
        yield from ((f"argument{number}", value) for number, value in enumerate(values))
        yield from _referred(function.func)
    elif isinstance(function, types.MethodType):
        yield from vars(function.__self__).items() if hasattr(function.__self__, "__dict__") else ()
        yield from _referred(function.__func__)
    elif isinstance(function, types.FunctionType):
        inner = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
        for name, cell in inner:
            value = cell.cell_contents
            yield name, value
            if isinstance(value, types.FunctionType):
                yield from _referred(value)
        for name in function.__code__.co_names:
            if name in function.__globals__:
                yield name, function.__globals__[name]
    elif hasattr(function, "__dict__"):
        yield from vars(function).items()


def own_generators(model: Model) -> list[Any]:
    """Return the generators of random numbers that a model and its modules keep for themselves."""
    modules = [*named_modules(model).values(), *([model] if isinstance(model, nn.Module) else [])]
    values = [value for module in modules for value in vars(module).values()]
    if not isinstance(model, nn.Module):
        values += [value for _, value in _referred(model)]
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    return list({id(value): value for value in values if isinstance(value, kinds)}.values())


def follow_global_seed(model: Model) -> Model:
    """Return a model whose own generators are seeded from torch's global one before each call."""
    generators = own_generators(model)
    return functools.partial(reseeded, model, generators) if generators else model


def reseeded(function: Model, generators: Sequence[Any], images: Tensor) -> Tensor:
    """Call a function after seeding generators from torch's global one."""
    number = int(torch.randint(2**31, ()))
    for own in generators:
        if isinstance(own, torch.Generator):
            own.manual_seed(number)
        elif isinstance(own, np.random.Generator):
            own.bit_generator.state = type(own.bit_generator)(number).state
        else:
            own.seed(number)
    return function(images)
