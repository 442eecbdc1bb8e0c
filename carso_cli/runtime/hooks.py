"""Forward hooks on several modules, removed on any exit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle

Hook = Callable[[str, tuple[object, ...], object], None]
"""Called with a module's name, its inputs and its output."""


@contextmanager
def forward_hooks(modules: Iterable[tuple[str, nn.Module]], hook: Hook) -> Iterator[None]:
    """Call `hook` after each forward pass of the named modules, inside the context."""

    # A function, as a lambda made in a loop would see the last name only.
    def register(name: str, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(lambda _, inputs, output: hook(name, inputs, output))

    handles = [register(name, module) for name, module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
