"""NaN and infinities: which layer is the first to return them, and errors before they are used.

- `find_nonfinite_layer` runs a model again and names the layer;
- `require_finite_logits` stops an evaluation, `require_finite_gradients` a training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from carso_cli.errors import NumericsError
from carso_cli.runtime.hooks import forward_hooks


def find_nonfinite_layer(model: object, forward: Callable[[], object]) -> str:
    """Return, for a message, which layer is the first whose output holds NaN or an infinity.

    Args:
        model: The model whose submodules are watched.
        forward: Runs it; gradients are not kept.

    Returns:
        `, first in layer 'NAME'`; empty if it is in none, or the model is no module.
    """
    if not isinstance(model, nn.Module):
        return ""
    found: list[str] = []

    def watch(name: str, _inputs: object, output: object) -> None:
        # Children return before the module that holds them, so the innermost is named.
        if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
            found.append(name)

    named = ((name, module) for name, module in model.named_modules() if name)
    with torch.no_grad(), forward_hooks(named, watch):
        forward()
    return f", first in layer '{found[0]}'" if found else ""


def require_finite_logits(logits: Tensor, what: str, model: object, forward: Callable[[], object]) -> Tensor:
    """Return logits unchanged if all are finite.

    Args:
        logits: Of any shape.
        what: What they are of, for the message.
        model: The model that they come from.
        forward: Runs it again on the same inputs.

    Raises:
        NumericsError: If one is NaN or infinite, since the argmax would then mean nothing.
    """
    if not bool(logits.isfinite().all()):
        raise NumericsError(
            f"the logits of {what} are not finite{find_nonfinite_layer(model, forward)}",
            hint="its weights or its images are beyond what float32 holds; nothing was counted",
        )
    return logits


def require_finite_gradients(module: nn.Module, place: tuple[int, int], hint: str) -> None:
    """Stop where a gradient is NaN or infinite.

    Args:
        module: The module being trained, after the backward pass.
        place: Epoch and batch, from 0, for the message.
        hint: The next step, for the message.

    Raises:
        NumericsError: Naming the first such parameter.
    """
    gradients = {name: one.grad for name, one in module.named_parameters() if one.grad is not None}
    # One number for all, since each `bool` waits for the device.
    if bool(torch.nn.utils.get_total_norm(gradients.values()).isfinite()):
        return
    # The norm of finite gradients may overflow: training then goes on.
    for name, gradient in gradients.items():
        if not bool(gradient.isfinite().all()):
            raise NumericsError(
                f"the gradient of '{name}' is not finite in epoch {place[0] + 1}, batch {place[1] + 1}; "
                "training stops",
                hint=hint,
            )
