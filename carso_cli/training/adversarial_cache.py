"""A cache of perturbed images over several epochs: `training.attack_mix.reuse`, a deviation from the paper.

The classifier under attack is frozen, so that an example made in one epoch fools it as well in the next.
Epochs form groups of K. Those of a group share the batches and the perturbations of its first, each in an
order of its own; all other random numbers are fresh. What is cached follows from the seed, so a run that is
resumed within a group makes the same examples again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from carso_cli.data.image_set import epoch_batches
from carso_cli.runtime.seed import generator

Place = tuple[int, int]
"""Epoch, and number of a batch in it."""


class AdversarialCache:
    """Perturbed images of one group of epochs.

    Args:
        reuse: K, epochs of a group; with 1 nothing is cached.
    """

    def __init__(self, reuse: int) -> None:
        self.reuse = reuse
        self._first = -1
        self._cached: dict[int, tuple[Tensor, Tensor]] = {}

    def batches(self, count: int, batch_size: int, seed: int, epoch: int) -> list[tuple[Tensor, Place]]:
        """Return an epoch's batches: positions in `range(count)`, and the place of their perturbations."""
        first = epoch - epoch % self.reuse
        parts = epoch_batches(count, batch_size, seed, first)
        batches = [(positions, (first, number)) for number, positions in enumerate(parts)]
        if epoch == first:
            return batches
        # A perturbed batch is cached whole, so its images stay together; only the batches' order is new.
        order = torch.randperm(len(batches), generator=generator(seed, "pool order", epoch))
        return [batches[number] for number in order.tolist()]

    def perturbed(self, place: Place, clean: Tensor, perturb: Callable[[], Tensor]) -> Tensor:
        """Return a batch's inputs, made at its first use in a group and cached for the others.

        Args:
            place: Where the perturbations belong, as given by `batches`.
            clean: (B, channels, H, W), unperturbed.
            perturb: Makes the inputs, same shape and order; images that it does not change are not cached.
        """
        # Nothing would ever be read back, and the cache would come to hold the whole training set.
        if self.reuse == 1:
            return perturb()
        first, number = place
        # The group before it is dropped: memory holds the examples of one group at most.
        if first != self._first:
            self._first, self._cached = first, {}
        if number not in self._cached:
            # A run resumed within a group makes them again here, from the seed of the group's first epoch.
            inputs = perturb()
            # Only what an attack moved is kept: with an adversarial fraction of 0.01 that is little.
            changed = (inputs != clean).flatten(1).any(dim=1).nonzero()[:, 0]
            self._cached[number] = (changed, inputs[changed])
        changed, examples = self._cached[number]
        # Out of place: the caller's clean images are the targets of the reconstruction.
        return clean.index_copy(0, changed, examples)
