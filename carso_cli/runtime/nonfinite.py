"""Where a value stopped being finite: the layer, or the parameter whose gradient did.

- `find_nonfinite_layer` runs a model again and names the layer;
- `require_finite_logits` stops what would count them;
- `require_finite_gradients` stops training before a step that would ruin the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from carso_cli.errors import NumericsError


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

    def watcher(name: str) -> Callable[[nn.Module, object, object], None]:
        def watch(_module: nn.Module, _inputs: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return watch

    handles = [module.register_forward_hook(watcher(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return f", first in layer '{found[0]}'" if found else ""


def require_finite_logits(logits: Tensor, what: str, model: object, forward: Callable[[], object]) -> Tensor:
    """Return logits that are counted on.

    Args:
        logits: Of any shape.
        what: What they are of, for the message.
        model: The model that they come from.
        forward: Runs it again on the same inputs.

    Raises:
        NumericsError: If one is NaN or infinite: its argmax would be a decision that nothing decided.
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
    # One number for all, since asking each would wait for the device as often as there are parameters.
    if bool(torch.nn.utils.get_total_norm(gradients.values()).isfinite()):
        return
    for name, gradient in gradients.items():
        if not bool(gradient.isfinite().all()):
            raise NumericsError(
                f"the gradient of '{name}' is not finite in epoch {place[0] + 1}, batch {place[1] + 1}; "
                "training stops",
                hint=hint,
            )
