"""Memory of a device: what is free, what a forward pass keeps for its gradient, and running out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SHORT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "DefaultCPUAllocator")
"""What messages say of it: torch and the CUDA driver, cuBLAS and cuDNN, the CPU's allocator."""
_USABLE = 0.8
"""Share of the free memory to plan for: gradients, workspaces and fragments take the rest."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out: most libraries raise a plain RuntimeError for it."""
    # By name, since torch's own class could be had only by importing torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT_OF_MEMORY)


def usable_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU to plan for; None elsewhere, where it is shared and cannot be planned."""
    import torch

    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds from earlier work and has not in use is free as well.
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(_USABLE * (free + max(cached, 0)))


def graph_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that a forward pass keeps for its gradient, parameters left out.

    Args:
        forward: The pass, run once with gradients enabled, on as few images as show the cost of each.
    """
    import torch

    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # By storage: several operations may keep one tensor, or views of it.
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Held, as its graph goes with it.
        result = forward()
    del result
    return sum(storage.nbytes() for storage in storages.values())
