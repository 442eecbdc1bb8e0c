"""The precision of convolutions and products: `fp32`, `tf32` or `bf16`.

Classifier and purifier run in it; what they answer is float32 again, and so are aggregation and losses.
What a transfer attack makes of a classifier outside the defence runs in float32 products.

- `set_tf32` chooses between float32 and TF32, for the whole process;
- `autocast` is the context in which a model runs, `in_precision` wraps a model to run in it always;
- `multiplies_bf16` says whether bfloat16 is fast on a device.

TF32 keeps 10 bits of a product's factors and runs on NVIDIA GPUs only. bfloat16 keeps 7; weights stay in
float32 and are converted as they are used (torch's autocast).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from carso_cli.errors import UsageError

Model = Callable[[Tensor], Tensor]


def set_tf32(precision: str, device: torch.device) -> None:
    """Let float32 convolutions and products on GPUs use TF32, or forbid it.

    Raises:
        UsageError: If TF32 is asked for on another device, where it means nothing.
    """
    if device.type == "cuda":
        # torch allows it in convolutions unless told otherwise.
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    elif precision == "tf32":
        raise UsageError(
            f"precision tf32 is a mode of NVIDIA GPUs, and the device is {device.type}",
            hint="--set precision=fp32, or bf16, which runs on CPUs too",
        )


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a model runs: bfloat16 where it is asked for, nothing otherwise."""
    if precision != "bf16":
        return nullcontext()
    # bfloat16 has the range of float32, so losses need no scaling as under float16.
    return torch.autocast(device.type, dtype=torch.bfloat16)


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 in hardware; others emulate it, slower than float32."""
    if device.type == "cuda":
        # A build without CUDA cannot be asked, and has no such device.
        return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    # By what the CPU says of itself: a measured time would give another answer on a busy machine.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    # torch's names may change; `bool()` is False.
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def to_float32(values: Tensor) -> Tensor:
    """Return values in float32, or in the wider type that they have."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def in_precision(model: Model, precision: str) -> Model:
    """Return a model that runs in a precision and answers in float32.

    Args:
        model: (B, channels, H, W) images to (B, C) logits.
        precision: `fp32`, `tf32` or `bf16`.
    """
    # TF32 is set for the whole process: there is nothing to wrap.
    if precision != "bf16":
        return model

    def run(images: Tensor) -> Tensor:
        with autocast(precision, images.device):
            return to_float32(model(images))

    return run
