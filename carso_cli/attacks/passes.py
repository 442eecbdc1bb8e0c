"""Work on many units in passes of bounded size, smaller ones where memory runs out.

passes = Passes(4096 // defence.n_samples, defence)
logits = torch.cat(passes.over(len(latents), lambda part: classify(latents[part])))
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from carso_cli.runtime.memory import graph_bytes, is_out_of_memory, usable_bytes
from carso_cli.runtime.reporter import SILENT, Reporter

Result = TypeVar("Result")

# Larger passes take more memory and no less time: on a WRN-16-4, within 4% from 64 to 512 on one core.
_SAMPLES_PER_CPU_PASS = 256


@dataclass
class _Learnt:
    """What is known of the memory that a model takes; a model lies on one device."""

    reporter: Reporter = SILENT
    """Told, once, that memory ran out."""
    allowed: dict[int, int] = field(default_factory=dict)
    """Most units of a pass, by the number of reconstructions of a unit."""


_learnt: dict[int, _Learnt] = {}


def _learnt_of(model: object) -> _Learnt:
    # By identity, for as long as it lives: a user's own model need not be hashable.
    key = id(model)
    if key not in _learnt:
        _learnt[key] = _Learnt()
        weakref.finalize(model, _learnt.pop, key, None)
    return _learnt[key]


def samples_per_pass(
    most: int,
    device: torch.device,
    n_samples: int,
    *,
    model: object = None,
    forward: Callable[[], Tensor] | None = None,
    reporter: Reporter = SILENT,
) -> int:
    """Return the most reconstructions to take in one pass: what memory holds on a GPU, few on a CPU.

    Args:
        most: What the recipe allows.
        device: Where they are computed.
        n_samples: N, the reconstructions of an image, which are never cut apart.
        model: What they are computed by; its name in the memory of what was learnt.
        forward: Computes the N reconstructions of one image and their logits, with a graph.
        reporter: Told, once, when memory does not hold `most`, now or later.
    """
    if device.type == "cpu":
        return min(most, max(_SAMPLES_PER_CPU_PASS, n_samples))
    if model is not None:
        _learnt_of(model).reporter = reporter
    usable = usable_bytes(device)
    if usable is None or forward is None:
        return most
    held = n_samples * usable // max(graph_bytes(forward), 1)
    # A power of two: a few bytes more or less must not change the passes, and with them the rounding.
    held = max(1 << (max(held, 1).bit_length() - 1), n_samples)
    if held < most:
        reporter.info(f"passes of {held:,} reconstructions: {usable / 2**30:.0f} GiB hold no {most:,}")
    return min(most, held)


class Passes:
    """Cuts work into passes; the size that memory allowed is remembered for all further work on a model.

    Args:
        largest: Most units of a pass.
        model: The model; by default nothing is shared with other passes.
        samples: Reconstructions of one unit.
    """

    def __init__(self, largest: int, model: object = None, samples: int = 1) -> None:
        self._largest, self._samples = largest, samples
        self._learnt = _Learnt() if model is None else _learnt_of(model)

    @property
    def largest(self) -> int:
        """Most units of a pass."""
        return min(self._largest, self._learnt.allowed.get(self._samples, self._largest))

    def over(self, units: int, work: Callable[[slice], Result]) -> list[Result]:
        """Do `work` on consecutive slices of `range(units)`; return its results in order.

        A pass for which memory runs out is halved and done again, and so are all later ones.

        Raises:
            MemoryError, torch.OutOfMemoryError, RuntimeError: If memory runs out for a single unit.
        """
        results: list[Result] = []
        done = 0
        while done < units:
            part = slice(done, min(done + self.largest, units))
            found = self.attempt(part.stop - part.start, lambda part=part: [work(part)])  # type: ignore[misc]
            if found is not None:
                results += found
                done = part.stop
        return results

    def attempt(self, units: int, work: Callable[[], Result]) -> Result | None:
        """Do one pass; return None, and allow half as many units from now on, where memory runs out.

        Raises:
            MemoryError, torch.OutOfMemoryError, RuntimeError: If memory runs out for a single unit.
        """
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if units == 1 or not is_out_of_memory(error):
                raise
        # Outside the handler, whose error still holds on to the tensors of the failed pass.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._learnt.allowed[self._samples] = units // 2
        reporter, self._learnt.reporter = self._learnt.reporter, SILENT
        reporter.warning(
            f"memory ran out for {units * self._samples:,} reconstructions at once: passes are halved until "
            "they fit; evaluation.samples_per_pass says how many to start with"
        )
        return None
