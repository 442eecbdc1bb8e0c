"""The internal representation: outputs of a classifier's named layers (Sections 4.1 and 4.2, Table 7).

It is all that the purifier sees of an image. `extract_representation` computes it; `layer_names` lists the
layers there are, `module_shapes` the shapes of their inputs and outputs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from weakref import WeakSet

import torch
from torch import Tensor, nn

from carso_cli.errors import UsageError, nearest
from carso_cli.runtime.hooks import forward_hooks

IMAGE = "image"
"""In place of a layer's name: the classifier's input itself, beyond the paper."""

RULE = 2
"""Version of what is recorded, stored with a purifier; 1 recorded what was written into an output later."""

# Classifiers that were seen to write into a recorded output after its layer had returned it.
_OVERWRITING: WeakSet[nn.Module] = WeakSet()


class _Complete(Exception):  # noqa: N818  (control flow: every layer asked for has been recorded)
    pass


def layer_names(classifier: nn.Module) -> tuple[str, ...]:
    """Return the names of all submodules, in registration order."""
    return tuple(name for name, _ in classifier.named_modules() if name)


def check_layers(classifier: nn.Module, layers: Sequence[str]) -> None:
    """Check that every named layer exists and that none is named twice; `IMAGE` always does.

    Raises:
        UsageError: Naming the first unknown or repeated layer, with near matches.
    """
    if not layers:
        raise UsageError("no layer is named: the internal representation needs at least one")
    known = {IMAGE, *layer_names(classifier)}
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

    An output is what the layer returned, even if something later in the pass writes into it, such as an
    activation with `inplace=True`. Of a layer that runs several times in one pass, the first output counts.
    The forward pass stops as soon as the last of them has been computed. Gradients flow to `images`
    unless the caller disables them. Several threads may share a classifier.

    Args:
        classifier: Any module taking (B, channels, H, W) images in [0, 1].
        images: (B, channels, H, W).
        layers: Module names, as given by `named_modules`, or `IMAGE`.

    Returns:
        Layer name to output, in the order of `layers`.

    Raises:
        UsageError: If a layer is unknown, or did not run in the forward pass, or gave no tensor.
    """
    check_layers(classifier, layers)
    # Inference tensors count no writes, and a traced pass shows its own only when it has ended.
    copies = classifier in _OVERWRITING or torch.is_inference_mode_enabled() or torch.compiler.is_compiling()
    recorded, written = _record(classifier, images, layers, copies=copies)
    if written:
        # Copies cost a few per cent, so they are made only for classifiers that need them.
        _OVERWRITING.add(classifier)
        recorded, _ = _record(classifier, images, layers, copies=True)
    return OrderedDict((layer, recorded[layer]) for layer in layers)


def overwrites_outputs(classifier: nn.Module) -> bool:
    """Return whether a classifier was seen to write into a layer's output that had been recorded."""
    return classifier in _OVERWRITING


def _record(
    classifier: nn.Module, images: Tensor, layers: Sequence[str], *, copies: bool
) -> tuple[dict[str, Tensor], bool]:
    """Run the classifier; return the outputs, and whether any was written into afterwards."""
    modules = dict(classifier.named_modules())
    recorded: dict[str, Tensor] = {IMAGE: images} if IMAGE in layers else {}
    versions: dict[str, int] = {}

    def record(layer: str, _inputs: object, output: object) -> None:
        if not isinstance(output, Tensor):
            raise UsageError(f"layer '{layer}' returns {type(output).__name__}, not a tensor")
        # The first, since the pass may stop before a later one, and torch.export never stops it.
        if layer in recorded:
            return
        recorded[layer] = output.clone() if copies else output
        if not copies:
            versions[layer] = output._version
        # torch.export cannot trace an exception out of a module; it drops what the result does not need.
        if len(recorded) == len(layers) and not torch.compiler.is_compiling():
            raise _Complete

    named = [(layer, modules[layer]) for layer in layers if layer != IMAGE]
    # Of the image alone the classifier need not be asked.
    if named:
        with suppress(_Complete), forward_hooks(named, record):
            classifier(images)
    silent = [layer for layer in layers if layer not in recorded]
    # The layer exists, but this input takes another branch, or a parent calls its weights directly.
    if silent:
        raise UsageError(f"layer '{silent[0]}' did not run in the classifier's forward pass")
    return recorded, any(recorded[layer]._version != version for layer, version in versions.items())


def module_shapes(classifier: nn.Module, image: Tensor) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the input and output shapes of the submodules that map a tensor to a tensor.

    Args:
        classifier: Any module taking (B, channels, H, W) images in [0, 1].
        image: (1, channels, H, W).

    Returns:
        Module name to the shapes of input and output without the batch axis, in the order of running.
    """
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def record(name: str, inputs: tuple[object, ...], output: object) -> None:
        # Modules that return tuples, such as attention, cannot condition the purifier.
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            shapes[name] = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])

    with torch.no_grad(), forward_hooks(classifier.named_modules(), record):
        classifier(image)
    return shapes
