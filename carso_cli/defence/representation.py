"""The internal representation: outputs of a classifier's named layers (Section 4.1, Table 7).

`extract_representation` runs the classifier up to the last layer asked for and returns the outputs
in the order asked; `layer_names` lists what can be asked for, `module_shapes` what each gives.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from carso_cli.errors import UsageError, nearest


class _Complete(Exception):  # noqa: N818  (control flow: every layer asked for has been recorded)
    pass


def layer_names(classifier: nn.Module) -> tuple[str, ...]:
    """Return the names of all submodules, in registration order."""
    return tuple(name for name, _ in classifier.named_modules() if name)


def check_layers(classifier: nn.Module, layers: Sequence[str]) -> None:
    """Check that every named layer exists and that none is named twice.

    Raises:
        UsageError: Naming the first unknown or repeated layer, with near matches.
    """
    if not layers:
        raise UsageError("no layer is named: the internal representation needs at least one")
    known = set(layer_names(classifier))
    for layer in layers:
        if layer not in known:
            raise UsageError(
                f"the classifier has no layer '{layer}'; {nearest(layer, known)}".rstrip("; "),
                hint="list the layers with: carso extract RECIPE --list",
            )
    if len(set(layers)) != len(layers):
        raise UsageError("a layer is named twice in the internal representation")


def extract_representation(
    classifier: nn.Module, images: Tensor, layers: Sequence[str]
) -> OrderedDict[str, Tensor]:
    """Return the outputs of the named layers for a batch.

    The forward pass stops as soon as the last of them has been computed. Gradients flow to `images`
    unless the caller disables them; hooks are removed on any exit.

    Args:
        classifier: Any module taking (B, channels, H, W) images in [0, 1].
        images: (B, channels, H, W).
        layers: Module names, as given by `named_modules`.

    Returns:
        Layer name to output, in the order of `layers`.

    Raises:
        UsageError: If a layer is unknown, or did not run in the forward pass, or gave no tensor.
    """
    check_layers(classifier, layers)
    modules = dict(classifier.named_modules())
    recorded: dict[str, Tensor] = {}

    def recorder(layer: str) -> Callable[[nn.Module, object, object], None]:
        """Return a forward hook that keeps a layer's output and ends the pass at the last one."""

        def record(_module: nn.Module, _inputs: object, output: object) -> None:
            if not isinstance(output, Tensor):
                raise UsageError(f"layer '{layer}' returns {type(output).__name__}, not a tensor")
            recorded[layer] = output
            # torch.export follows no exception out of a module; it drops what the result does not need.
            if len(recorded) == len(layers) and not torch.compiler.is_compiling():
                raise _Complete

        return record

    handles = [modules[layer].register_forward_hook(recorder(layer)) for layer in layers]
    try:
        classifier(images)
    except _Complete:
        pass
    finally:
        for handle in handles:
            handle.remove()
    silent = [layer for layer in layers if layer not in recorded]
    if silent:
        raise UsageError(f"layer '{silent[0]}' did not run in the classifier's forward pass")
    return OrderedDict((layer, recorded[layer]) for layer in layers)


def module_shapes(classifier: nn.Module, image: Tensor) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return what went into and came out of the submodules that take and give one tensor.

    Args:
        classifier: Any module taking (B, channels, H, W) images in [0, 1].
        image: (1, channels, H, W).

    Returns:
        Module name to the shapes of input and output without the batch axis, in the order of running.
    """
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def record(_module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                shapes[name] = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])

        return record

    handles = [module.register_forward_hook(recorder(name)) for name, module in classifier.named_modules()]
    try:
        with torch.no_grad():
            classifier(image)
    finally:
        for handle in handles:
            handle.remove()
    return shapes
