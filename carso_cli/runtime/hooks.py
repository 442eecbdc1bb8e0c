"""Forward hooks on several modules, for the calling thread alone, removed on any exit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle

Hook = Callable[[str, tuple[object, ...], object], None]
"""Called with a module's name, its inputs and its output."""

# torch numbers hooks by a plain counter: two threads might get one number, and one hook would be lost.
_REGISTRATION = threading.Lock()


@contextmanager
def forward_hooks(modules: Iterable[tuple[str, nn.Module]], hook: Hook) -> Iterator[None]:
    """Call `hook` after each forward pass of the named modules, inside the context and in this thread.

    Passes of the same modules in other threads are left alone.
    """
    owner = threading.get_ident()

    # A function, as a lambda made in a loop would see the last name only.
    def register(name: str, module: nn.Module) -> RemovableHandle:
        def in_this_thread(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            if threading.get_ident() == owner:
                hook(name, inputs, output)

        return module.register_forward_hook(in_this_thread)

    with _REGISTRATION:
        handles = [register(name, module) for name, module in modules]
    try:
        yield
    finally:
        with _REGISTRATION:
            for handle in handles:
                handle.remove()
