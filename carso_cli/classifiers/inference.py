"""The copy of a classifier that attacks call: the same function in fewer steps.

`inference_copy` folds BatchNorms into convolutions (`folded`) and compiles where a recipe says `compile`.
Layers of the internal representation are read from the original, not from the copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from carso_cli.classifiers.wide_resnet import WideResNet
from carso_cli.runtime.reporter import SILENT, Reporter

_Model = TypeVar("_Model", bound=Callable[[Tensor], Tensor])


def inference_copy(classifier: _Model, *, compile: bool, reporter: Reporter = SILENT) -> _Model:
    """Return what attacks call in place of a frozen classifier; its logits agree up to rounding.

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
    """A module that torch.compile compiles at its first call, or that runs uncompiled where that fails.

    Args:
        module: Frozen, in evaluation mode.
        reporter: Is warned of a failure, once.
    """

    def __init__(self, module: nn.Module, reporter: Reporter = SILENT) -> None:
        super().__init__()
        self.module = module
        self.reporter = reporter
        # Of the method: a compiled module would be registered as a second submodule.
        self._run: Callable[[Tensor], Tensor] = torch.compile(module.forward)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, channels, H, W) images to (B, C) logits."""
        try:
            logits = self._run(images)
        except RuntimeError as error:
            # Not at the top: it takes a second to import, which `torch.compile` has spent by now.
            from torch._dynamo.exc import TorchDynamoException

            # The module's own errors are the caller's: attacks answer a lack of memory by smaller passes.
            if not isinstance(error, TorchDynamoException):
                raise
            # For good: every further attempt would fail as slowly.
            self._run = self.module.forward
            reason = str(error).strip().partition("\n")[0]
            self.reporter.warning(f"torch.compile failed, and attacks run without it: {reason}")
            logits = self._run(images)
        return logits


def folded(classifier: _Model) -> _Model:
    """Return a copy of a frozen classifier with its BatchNorms folded into the convolutions before them.

    In evaluation mode a BatchNorm scales and shifts each channel, which a convolution's own weights can do if
    nothing else reads its output. ReLUs work in place. Logits and gradients agree with the original's up to
    rounding; layer outputs, and with them the internal representation, do not.

    Args:
        classifier: In evaluation mode.

    Returns:
        A frozen copy of a `WideResNet`; anything else as it is.
    """
    if not isinstance(classifier, WideResNet):
        return classifier
    copied = copy.deepcopy(classifier).requires_grad_(False)
    blocks = list(copied.blocks())
    # A block that keeps its width adds its own input to its output, so that input must not be scaled.
    if blocks[0].shortcut is not None:
        blocks[0].batchnorm_0 = _fold(blocks[0].batchnorm_0, copied.init_conv)
    for block, following in pairwise(blocks):
        if block.shortcut is not None and following.shortcut is not None:
            # It normalises the sum of both branches, so both are scaled.
            following.batchnorm_0 = _fold(following.batchnorm_0, block.conv_1, block.shortcut)
    if blocks[-1].shortcut is not None:
        copied.batchnorm = _fold(copied.batchnorm, blocks[-1].conv_1, blocks[-1].shortcut)
    # In every block `conv_0` alone leads into it.
    for block in blocks:
        block.batchnorm_1 = _fold(block.batchnorm_1, block.conv_0)
    for module in copied.modules():
        if isinstance(module, nn.ReLU):
            # A ReLU's gradient needs its output only; that of SiLU needs the input, which must stay.
            # Beside an identity shortcut the BatchNorm is still there, and its result is a new tensor.
            module.inplace = True
    return copied


def _fold(normalisation: nn.Module, *convolutions: nn.Conv2d) -> nn.Module:
    """Fold a BatchNorm of a sum of convolutions into them, unless done already; return what replaces it."""
    if isinstance(normalisation, nn.Identity):
        return normalisation
    assert isinstance(normalisation, nn.BatchNorm2d)
    mean, variance = normalisation.running_mean, normalisation.running_var
    assert mean is not None
    assert variance is not None
    # y = scale * (x - mean) + bias.
    scale = normalisation.weight * torch.rsqrt(variance + normalisation.eps)
    for convolution in convolutions:
        convolution.weight.mul_(scale.reshape(-1, 1, 1, 1))
    # In the first alone: outputs are added, and the shift must count once.
    convolutions[0].bias = nn.Parameter(normalisation.bias - mean * scale, requires_grad=False)
    return nn.Identity()
