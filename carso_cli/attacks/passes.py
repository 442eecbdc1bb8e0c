"""Work on many units in passes of bounded size, smaller ones where memory runs out.

passes = Passes(4096)
logits = torch.cat(passes.over(len(latents), lambda part: classify(latents[part])))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

# Larger passes take more memory and no less time: on a WRN-16-4, within 4% from 64 to 512 on one core.
_SAMPLES_PER_CPU_PASS = 256


def samples_per_pass(most: int, device: torch.device, n_samples: int) -> int:
    """Return the most reconstructions to take in one pass: fewer than `most` on a CPU, never below N."""
    return min(most, max(_SAMPLES_PER_CPU_PASS, n_samples)) if device.type == "cpu" else most


class Passes:
    """Cuts work into passes, and remembers the size that memory allowed.

    Args:
        largest: Most units of a pass.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest

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
            try:
                results.append(work(part))
            except (MemoryError, RuntimeError) as error:
                size = part.stop - part.start
                if size == 1 or not _is_out_of_memory(error):
                    raise
                # Kept for later calls, where the larger size would fail again.
                self.largest = size // 2
            else:
                done = part.stop
                continue
            # Outside the handler, whose error still holds on to the tensors of the failed pass.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return results


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
