"""The copy of a classifier that attacks call: the same function in fewer steps.

BatchNorms are folded away (`carso_cli.classifiers.wide_resnet.folded`) and, where `compile` is set,
torch.compile joins what is left between convolutions. Layers are read from the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from carso_cli.classifiers.wide_resnet import folded
from carso_cli.runtime.reporter import SILENT, Reporter

_Model = TypeVar("_Model", bound=Callable[[Tensor], Tensor])


def inference_copy(classifier: _Model, *, compile: bool, reporter: Reporter = SILENT) -> _Model:
    """Return what attacks call in the place of a frozen classifier; its answers agree up to rounding.

    Args:
        classifier: (B, channels, H, W) images to (B, C) logits; only a module is compiled.
        compile: Whether to compile it, the `compile` of a recipe.
        reporter: Is warned if that fails.
    """
    quick = folded(classifier)
    if compile and isinstance(quick, nn.Module):
        return cast(_Model, Compiled(quick, reporter))
    return quick


class Compiled(nn.Module):
    """A module that torch.compile compiles at its first call, or runs as it is where that fails.

    Args:
        module: Frozen, in evaluation mode.
        reporter: Is warned of a failure, once.
    """

    def __init__(self, module: nn.Module, reporter: Reporter = SILENT) -> None:
        super().__init__()
        self.module = module
        self.reporter = reporter
        # Of the method: a compiled module would be registered as a second one.
        self._run: Callable[[Tensor], Tensor] = torch.compile(module.forward)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, channels, H, W) images to (B, C) logits."""
        try:
            logits = self._run(images)
        except RuntimeError as error:
            # Imported here: it takes a second, which `torch.compile` has spent by now.
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, TorchDynamoException):
                raise
            self._run = self.module.forward
            reason = str(error).strip().partition("\n")[0]
            self.reporter.warning(f"torch.compile failed, and attacks go on without it: {reason}")
            logits = self._run(images)
        return logits
