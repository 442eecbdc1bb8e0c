"""Seeds per purpose, so that no part of a run disturbs the random numbers of another.

Every random choice is a function of the recipe's seed and of what it is for, never of
what happened to be drawn before it; that is what makes runs resumable bit for bit.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, e.g. `derive_seed(0, "latents", image_index)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    # Not `hash`, which for text differs from process to process.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a fresh generator on the CPU for one purpose."""
    # A GPU's generator would draw other numbers from the same seed.
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seed torch's global generators inside the context and restore them after it.

    Needed for libraries that draw from the global state (advertorch, AutoAttack).
    """
    # Named one by one: fork_rng warns where it has to take several GPUs by itself.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        number = derive_seed(seed, *purpose)
        if devices or torch.backends.mps.is_available():
            torch.manual_seed(number)
        else:
            # `torch.manual_seed` would note its stack for each accelerator that might come: 1 ms a call.
            torch.default_generator.manual_seed(number)
        yield


@contextmanager
def all_seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seed torch, numpy and the standard library inside the context and restore them after it.

    A model that draws random numbers of its own, in whatever way, is then a function of the seed.
    """
    number = derive_seed(seed, *purpose)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with seeded(seed, *purpose):
            np.random.seed(number % 2**32)
            random.seed(number)
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
